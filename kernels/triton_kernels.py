"""The two Triton kernels behind every operator: the chain forward, and backward; see :mod:`kernels.triton_stage`.

A program is one warp. Its lanes are ``UNITS`` units of ``G`` lanes; the lanes of a unit share pixels and hold ``V``
channels each. Forward a unit computes an output column, backward columns of tiles of ``TILE_ROWS`` by
``TILE_COLUMNS`` input pixels, and walks down the rows of its segment of the image. Parts of the chain that are missing
are left out when a kernel is compiled.
"""

import triton
import triton.language as tl

from .registers import (
    activations,
    equal,
    floats,
    load_channels,
    negative_power,
    store_channels,
    sums_of_squares,
    window_sums,
    with_neighbours,
)

#: Sizes that kernels are compiled for once, whatever they are. Strides tell which accesses are aligned; those between a
#: row's pixels, in channels_last memory the number of channels, are compiled for.
SIZES = [
    "strips",
    "segments",
    "segment_rows",
    "channel_blocks",
    "rows",
    "columns",
    "out_rows",
    "out_columns",
    "channels",
    "group",
    "tile_rows",
    "tile_columns",
]


@triton.jit
def unit_of_lane(
    strips, segments, channel_blocks, channels, L: tl.constexpr, G: tl.constexpr, UNITS: tl.constexpr, V: tl.constexpr
):
    """Each lane's strip of the image, segment of rows, first channel, and whether it has work."""
    program = tl.program_id(0)
    # Neighbouring programs read neighbouring channels of the same pixels.
    segment = program // channel_blocks % segments
    lane = tl.arange(0, L)
    strip = (program // channel_blocks // segments).to(tl.int64) * UNITS + lane // G
    channel = (program % channel_blocks * G + lane % G) * V
    mask = (lane < G * UNITS) & (strip < strips) & (channel < channels)
    # Lanes without work do another's and do not store it.
    if V == 1:
        channel = tl.minimum(channel, channels - 1)
    return tl.minimum(strip, strips - 1), segment, channel, mask


@triton.jit
def inside_rows(row, column, rows):
    """Whether a row lies inside the image; it is one for all lanes, which the interpreter's masks must not be."""
    # What is negative is larger than any size as an unsigned number.
    return (column * 0 + row).to(tl.uint32) < rows.to(tl.uint32)


@triton.jit
def inside_columns(column, columns):
    """Whether columns lie inside the image."""
    return column.to(tl.uint32) < columns.to(tl.uint32)


@triton.jit
def inside_image(row, column, rows, columns):
    """Whether pixels lie inside the image."""
    return inside_rows(row, column, rows) & inside_columns(column, columns)


@triton.jit
def normalized(
    values,
    biases,
    position,
    alpha,
    beta,
    k,
    V: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    FOLD: tl.constexpr,
    SPARE: tl.constexpr,
):
    """Bias, ReLU and normalization of a pixel's channels; ``BEHIND`` and ``AHEAD`` are of the window."""
    BEFORE: tl.constexpr = BEHIND if V == 1 else 0
    AFTER: tl.constexpr = AHEAD if V == 1 else 0
    values = activations(values, biases, BEFORE + V + AFTER, BIAS, RELU)
    result = ()
    if NORMALIZE:
        if FOLD:
            # ``k`` is that over ``alpha``: everything comes out too large by one factor.
            all_values = with_neighbours(values, position // V, G, V, BEHIND, AHEAD, SPARE)
            scales = sums_of_squares(all_values, k, V, BEHIND + AHEAD + 1)
        else:
            squares = ()
            for number in tl.static_range(BEFORE + V + AFTER):
                squares = squares + (values[number] * values[number],)
            squares = with_neighbours(squares, position // V, G, V, BEHIND, AHEAD, SPARE)
            scales = window_sums(squares, alpha, k, V, BEHIND + AHEAD + 1)
        for number in tl.static_range(V):
            result = result + (values[BEFORE + number] * negative_power(scales[number], beta, THREE_QUARTERS),)
    else:
        result = values
    return result


@triton.jit
def beats(value, best):
    """Whether ``value`` takes the place of the largest of those before it."""
    # The last of several that are not a number, the first of several that are equal: PyTorch's choice.
    return (value > best) | (value != value)


@triton.jit
def larger_of(
    best,
    taken,
    value,
    inside,
    ELEMENT: tl.constexpr,
    FIRST: tl.constexpr,
    KEYS: tl.constexpr,
    SAVE: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """A window's largest value and its element, once another ``ELEMENT`` of its row is looked at."""
    if KEYS:
        key = value.to(tl.int32, bitcast=True)
        if SAVE:
            # A subtraction and a maximum are one instruction.
            key = (key | 15) - ELEMENT
        if not INSIDE:
            key = tl.where(inside, key, -(2**30))
        return key if ELEMENT == 0 else tl.maximum(best, key), taken
    elif INSIDE and ELEMENT == 0:
        return value, taken
    else:
        larger = beats(value, best)
        if not INSIDE:
            larger = larger & inside
        return tl.where(larger, value, best), tl.where(larger, FIRST + ELEMENT, taken)


@triton.jit
def load_row(
    there,
    row,
    first_column,
    rows,
    columns,
    pixel_stride: tl.constexpr,
    channel_stride,
    position,
    group,
    mask,
    V: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    INSIDE: tl.constexpr,
    WORDS: tl.constexpr,
    PIXELS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
):
    """What is loaded for ``PIXELS`` pixels of a row, one after the other."""
    loaded = ()
    for number in tl.static_range(PIXELS):
        column = first_column + number * DILATION_COLUMNS
        loaded = loaded + load_channels(
            there + number * DILATION_COLUMNS * pixel_stride, channel_stride, position, group,
            mask if INSIDE else mask & inside_image(row, column, rows, columns), V, BEFORE, AFTER, True, WORDS,
        )  # fmt: skip
    return loaded


@triton.jit
def row_maxima(
    loaded,
    row,
    first_column,
    rows,
    columns,
    biases,
    position,
    alpha,
    beta,
    k,
    FROM: tl.constexpr,
    EACH: tl.constexpr,
    FIRST: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    FOLD: tl.constexpr,
    SPARE: tl.constexpr,
    KEYS: tl.constexpr,
    SAVE: tl.constexpr,
    INSIDE: tl.constexpr,
    WORDS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
):
    """The largest values in a row of a window, and the numbers of their elements from ``FIRST``.

    The row's pixels are ``EACH`` of the values ``loaded``, from number ``FROM`` on.
    """
    best = ()
    taken = ()
    for _ in tl.static_range(V):
        if KEYS:
            best = best + (tl.full(position.shape, -(2**30), tl.int32),)
        else:
            best = best + (tl.full(position.shape, -float("inf"), tl.float32),)
        taken = taken + (tl.full(position.shape, FIRST, tl.int32),)
    for offset in tl.static_range(KERNEL_COLUMNS):
        column = first_column + offset * DILATION_COLUMNS
        inside = inside_image(row, column, rows, columns)
        values = normalized(
            floats(loaded, FROM + offset * EACH, EACH, WORDS), biases, position, alpha, beta, k, V, G, BIAS, RELU,
            BEHIND, AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SPARE,
        )  # fmt: skip
        new_best = ()
        new_taken = ()
        for index in tl.static_range(V):
            one_best, one_taken = larger_of(
                best[index], taken[index], values[index], inside, offset, FIRST, KEYS, SAVE, INSIDE
            )
            new_best = new_best + (one_best,)
            new_taken = new_taken + (one_taken,)
        best = new_best
        taken = new_taken
    return best, taken


@triton.jit
def first_element(
    row, column, KERNEL_COLUMNS: tl.constexpr, DILATION_ROWS: tl.constexpr, DILATION_COLUMNS: tl.constexpr
):
    """The first element that is no padding: the largest of a window of nothing but minus infinity."""
    first = tl.maximum((DILATION_ROWS - 1 - row) // DILATION_ROWS, 0) * KERNEL_COLUMNS
    return first + tl.maximum((DILATION_COLUMNS - 1 - column) // DILATION_COLUMNS, 0)


@triton.jit
def window_maxima(
    loaded,
    carried_best,
    carried_taken,
    row,
    column,
    rows,
    columns,
    biases,
    position,
    alpha,
    beta,
    k,
    V: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    FOLD: tl.constexpr,
    SPARE: tl.constexpr,
    POOL: tl.constexpr,
    KEYS: tl.constexpr,
    SAVE: tl.constexpr,
    INSIDE: tl.constexpr,
    WORDS: tl.constexpr,
    CARRIED: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    STRIDE_ROWS: tl.constexpr,
    DILATION_ROWS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
):
    """A window's largest values and their elements, from the maxima of the rows above and the rows that are loaded.

    Also those of the rows that the window has in common with the next one.
    """
    EACH: tl.constexpr = WORDS if WORDS > 0 else V if V > 1 else BEHIND + V + AHEAD
    rows_best = carried_best
    rows_taken = carried_taken
    for number in tl.static_range(CARRIED, KERNEL_ROWS):
        new_best, new_taken = row_maxima(
            loaded, row + number * DILATION_ROWS, column, rows, columns, biases, position, alpha, beta, k,
            (number - CARRIED) * KERNEL_COLUMNS * EACH, EACH, number * KERNEL_COLUMNS, V, G, BIAS, RELU, BEHIND, AHEAD,
            NORMALIZE, THREE_QUARTERS, FOLD, SPARE, KEYS, SAVE, INSIDE, WORDS, KERNEL_COLUMNS, DILATION_COLUMNS,
        )  # fmt: skip
        rows_best = rows_best + new_best
        rows_taken = rows_taken + new_taken
    next_best = ()
    next_taken = ()
    for number in tl.static_range(CARRIED * V):
        one_best = rows_best[STRIDE_ROWS * V + number]
        one_taken = rows_taken[STRIDE_ROWS * V + number]
        next_best = next_best + (one_best,)
        next_taken = next_taken + (one_taken - STRIDE_ROWS * KERNEL_COLUMNS,)
    first = first_element(row, column, KERNEL_COLUMNS, DILATION_ROWS, DILATION_COLUMNS)
    best = ()
    taken = ()
    for index in tl.static_range(V):
        largest = rows_best[index]
        element = rows_taken[index]
        if KEYS:
            for number in tl.static_range(1, KERNEL_ROWS):
                below = rows_best[number * V + index]
                if SAVE:
                    below -= number * KERNEL_COLUMNS
                largest = tl.maximum(largest, below)
            if SAVE:
                element = 15 - (largest & 15)
                largest = largest & -16
            largest = largest.to(tl.float32, bitcast=True)
        else:
            if POOL and not INSIDE:
                element = tl.where((largest > -float("inf")) | (largest != largest), element, first)
            for number in tl.static_range(1, KERNEL_ROWS):
                value = rows_best[number * V + index]
                larger = beats(value, largest)
                largest = tl.where(larger, value, largest)
                element = tl.where(larger, rows_taken[number * V + index], element)
        best = best + (largest,)
        taken = taken + (element,)
    return best, taken, next_best, next_taken


@triton.jit
def window_maxima_by_loop(
    input,
    row,
    column,
    rows,
    columns,
    row_stride,
    pixel_stride: tl.constexpr,
    channel_stride,
    biases,
    position,
    group,
    mask,
    alpha,
    beta,
    k,
    V: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    FOLD: tl.constexpr,
    SPARE: tl.constexpr,
    WORDS: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    DILATION_ROWS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
):
    """A window's largest values and their elements, loaded one by one."""
    BEFORE: tl.constexpr = BEHIND if V == 1 else 0
    AFTER: tl.constexpr = AHEAD if V == 1 else 0
    first = first_element(row, column, KERNEL_COLUMNS, DILATION_ROWS, DILATION_COLUMNS)
    best = ()
    taken = ()
    for _ in tl.static_range(V):
        best = best + (tl.full(position.shape, -float("inf"), tl.float32),)
        taken = taken + (first,)
    for element in tl.range(0, KERNEL_ROWS * KERNEL_COLUMNS):
        down = element // KERNEL_COLUMNS * DILATION_ROWS
        right = element % KERNEL_COLUMNS * DILATION_COLUMNS
        inside = mask & inside_image(row + down, column + right, rows, columns)
        values = load_channels(
            input + down * row_stride + right.to(tl.int64) * pixel_stride, channel_stride, position, group, inside, V,
            BEFORE, AFTER, True, WORDS,
        )  # fmt: skip
        values = normalized(
            floats(values, 0, BEFORE + V + AFTER, WORDS), biases, position, alpha, beta, k, V, G, BIAS, RELU, BEHIND,
            AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SPARE,
        )  # fmt: skip
        new_best = ()
        new_taken = ()
        for index in tl.static_range(V):
            larger = inside & beats(values[index], best[index])
            new_best = new_best + (tl.where(larger, values[index], best[index]),)
            new_taken = new_taken + (tl.where(larger, element, taken[index]),)
        best = new_best
        taken = new_taken
    return best, taken


@triton.jit
def store_window(output, offsets, best, taken, factor, mask, V: tl.constexpr, FOLD: tl.constexpr, SAVE: tl.constexpr):
    """Store a window's largest values, and their elements if they are wanted."""
    if FOLD:
        # Here the factor is taken back.
        folded = best
        best = ()
        for number in tl.static_range(V):
            best = best + (folded[number] * factor,)
    store_channels(output, best, mask, V)
    if SAVE:
        store_channels(offsets, taken, mask, V)


@triton.jit(do_not_specialize=SIZES[:-2])
def forward_kernel(
    input,
    bias,
    output,
    offsets,
    strips,
    segments,
    segment_rows,
    channel_blocks,
    rows,
    columns,
    out_rows,
    out_columns,
    channels,
    group,
    image_stride,
    row_stride,
    pixel_stride: tl.constexpr,
    channel_stride,
    out_image_stride,
    out_row_stride,
    out_pixel_stride: tl.constexpr,
    out_channel_stride,
    alpha,
    factor,
    beta,
    k,
    L: tl.constexpr,
    G: tl.constexpr,
    UNITS: tl.constexpr,
    V: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    FOLD: tl.constexpr,
    SPARE: tl.constexpr,
    POOL: tl.constexpr,
    SAVE: tl.constexpr,
    KEYS: tl.constexpr,
    INSIDE: tl.constexpr,
    WORDS: tl.constexpr,
    CARRIED: tl.constexpr,
    UNROLLED: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    STRIDE_ROWS: tl.constexpr,
    STRIDE_COLUMNS: tl.constexpr,
    PADDING_ROWS: tl.constexpr,
    PADDING_COLUMNS: tl.constexpr,
    DILATION_ROWS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
):
    strip, segment, channel, mask = unit_of_lane(strips, segments, channel_blocks, channels, L, G, UNITS, V)
    position = channel % group
    image = strip // out_columns
    out_column = (strip % out_columns).to(tl.int32)
    out_row = segment * segment_rows
    steps = tl.minimum(segment_rows, out_rows - out_row)
    row = out_row * STRIDE_ROWS - PADDING_ROWS
    column = out_column * STRIDE_COLUMNS - PADDING_COLUMNS
    # Whatever Triton takes them for, from here on they are 64 bits wide.
    row_stride = tl.zeros((), tl.int64) + row_stride
    channel_stride = tl.zeros((), tl.int64) + channel_stride
    out_row_stride = tl.zeros((), tl.int64) + out_row_stride
    input += image * image_stride + row * row_stride + column.to(tl.int64) * pixel_stride
    input += channel.to(tl.int64) * channel_stride
    place = image * out_image_stride + out_row * out_row_stride + out_column.to(tl.int64) * out_pixel_stride
    place += channel.to(tl.int64) * out_channel_stride
    output += place
    if SAVE:
        offsets += place
    BEFORE: tl.constexpr = BEHIND if V == 1 else 0
    AFTER: tl.constexpr = AHEAD if V == 1 else 0
    COUNT: tl.constexpr = BEFORE + V + AFTER
    biases = ()
    if BIAS:
        biases = floats(load_channels(bias + channel, 1, position, group, mask, V, BEFORE, AFTER, True, 0), 0, COUNT, 0)
    EACH: tl.constexpr = WORDS if WORDS > 0 else COUNT
    carried_best = ()
    carried_taken = ()
    if UNROLLED:
        for number in tl.static_range(CARRIED):
            row_loaded = load_row(
                input + number * row_stride, row + number, column, rows, columns, pixel_stride, channel_stride,
                position, group, mask, V, BEFORE, AFTER, INSIDE, WORDS, KERNEL_COLUMNS, DILATION_COLUMNS,
            )  # fmt: skip
            row_best, row_taken = row_maxima(
                row_loaded, row + number, column, rows, columns, biases, position, alpha, beta, k, 0, EACH,
                number * KERNEL_COLUMNS, V, G, BIAS, RELU, BEHIND, AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SPARE, KEYS,
                SAVE, INSIDE, WORDS, KERNEL_COLUMNS, DILATION_COLUMNS,
            )  # fmt: skip
            carried_best = carried_best + row_best
            carried_taken = carried_taken + row_taken
    # Rows are loaded a step before they are used: their way from memory is longer than the other warps' arithmetic.
    # In registers they would leave room for fewer warps.
    for _ in tl.range(0, steps, num_stages=2):
        if UNROLLED:
            loaded = ()
            for number in tl.static_range(CARRIED, KERNEL_ROWS):
                loaded = loaded + load_row(
                    input + number * DILATION_ROWS * row_stride, row + number * DILATION_ROWS, column, rows, columns,
                    pixel_stride, channel_stride, position, group, mask, V, BEFORE, AFTER, INSIDE, WORDS,
                    KERNEL_COLUMNS, DILATION_COLUMNS,
                )  # fmt: skip
            # A window begins in the image or before it. But what is behind a condition, Triton puts behind the loads
            # for the next step; otherwise it puts them last, and the next step begins by waiting for them. Without
            # elements to save it would take 24 registers more.
            here = row < rows if SAVE else True
            if here:
                best, taken, carried_best, carried_taken = window_maxima(
                    loaded, carried_best, carried_taken, row, column, rows, columns, biases, position, alpha, beta, k,
                    V, G, BIAS, RELU, BEHIND, AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SPARE, POOL, KEYS, SAVE, INSIDE,
                    WORDS, CARRIED, KERNEL_ROWS, KERNEL_COLUMNS, STRIDE_ROWS, DILATION_ROWS, DILATION_COLUMNS,
                )  # fmt: skip
                store_window(output, offsets, best, taken, factor, mask, V, FOLD, SAVE)
        else:
            best, taken = window_maxima_by_loop(
                input, row, column, rows, columns, row_stride, pixel_stride, channel_stride, biases, position, group,
                mask, alpha, beta, k, V, G, BIAS, RELU, BEHIND, AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SPARE, WORDS,
                KERNEL_ROWS, KERNEL_COLUMNS, DILATION_ROWS, DILATION_COLUMNS,
            )  # fmt: skip
            store_window(output, offsets, best, taken, factor, mask, V, FOLD, SAVE)
        row += STRIDE_ROWS
        # This always holds while there are steps, which the compiler does not know. If it knew where every step is, it
        # would keep an address in registers for each access, which would leave room for fewer warps.
        more = row < rows
        input += tl.where(more, STRIDE_ROWS * row_stride, 0)
        output += tl.where(more, out_row_stride, 0)
        if SAVE:
            offsets += tl.where(more, out_row_stride, 0)


@triton.jit
def load_windows(
    output_gradient,
    output,
    offsets,
    last_row,
    last_column,
    out_rows,
    out_columns,
    out_row_stride,
    out_pixel_stride: tl.constexpr,
    out_channel_stride,
    position,
    group,
    mask,
    V: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POOL: tl.constexpr,
    MASKED: tl.constexpr,
    WORDS: tl.constexpr,
    OFFSET_WORDS: tl.constexpr,
):
    """What is loaded of ``ROWS`` by ``COLUMNS`` windows up to the last: gradients, outputs, elements.

    Where there is no such window they are zeros, which add nothing.
    """
    gradients = ()
    outputs = ()
    elements = ()
    for over in tl.static_range(ROWS * COLUMNS):
        up = ROWS - 1 - over // COLUMNS
        left = COLUMNS - 1 - over % COLUMNS
        there = mask & inside_image(last_row - up, last_column - left, out_rows, out_columns)
        place = -up * out_row_stride - left * out_pixel_stride
        gradients = gradients + load_channels(
            output_gradient + place, out_channel_stride, position, group, there, V, AFTER, BEFORE, True, WORDS
        )
        if POOL:
            elements = elements + load_channels(
                offsets + place, out_channel_stride, position, group, there, V, AFTER, BEFORE, True, OFFSET_WORDS
            )
        if MASKED:
            outputs = outputs + load_channels(
                output + place, out_channel_stride, position, group, there, V, AFTER, BEFORE, True, WORDS
            )
    return gradients, outputs, elements


@triton.jit
def load_tile(
    first,
    first_row,
    first_column,
    rows,
    columns,
    row_stride,
    pixel_stride: tl.constexpr,
    channel_stride,
    position,
    group,
    mask,
    V: tl.constexpr,
    HALO: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    PADDING_COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """What is loaded of a tile's pixels from the ``first`` on; zero where they lie outside the image."""
    loaded = ()
    for tile in tl.static_range(TILE_ROWS * TILE_COLUMNS):
        inside = mask & inside_rows(first_row + tile // TILE_COLUMNS, first_column, rows)
        if tile % TILE_COLUMNS + PADDING_COLUMNS > 0:
            inside = inside & inside_columns(first_column + tile % TILE_COLUMNS, columns)
        place = tile // TILE_COLUMNS * row_stride + tile % TILE_COLUMNS * pixel_stride
        loaded = loaded + load_channels(
            first + place, channel_stride, position, group, inside, V, HALO, HALO, True, WORDS
        )
    return loaded


@triton.jit
def with_window(
    db,
    gradients,
    outputs,
    elements,
    element,
    FIRST: tl.constexpr,
    FIRST_ELEMENT: tl.constexpr,
    COUNT: tl.constexpr,
    POOL: tl.constexpr,
    MASKED: tl.constexpr,
    WORDS: tl.constexpr,
    OFFSET_WORDS: tl.constexpr,
):
    """``db`` of a pixel, with the gradients of a window that holds it as its ``element``, where that was taken."""
    parts = floats(gradients, FIRST, COUNT, WORDS)
    if MASKED:
        masks = floats(outputs, FIRST, COUNT, WORDS)
    if POOL:
        taken = equal(elements, element, FIRST_ELEMENT, COUNT, OFFSET_WORDS)
    added = ()
    for number in tl.static_range(COUNT):
        part = parts[number]
        if MASKED:
            part = tl.where(masks[number] <= 0, 0.0, part)
        part = db[number] + part
        if POOL:
            part = tl.where(taken[number], part, db[number])
        added = added + (part,)
    return added


@triton.jit
def pooled_gradient(
    gradients,
    outputs,
    elements,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    COUNT: tl.constexpr,
    POOL: tl.constexpr,
    MASKED: tl.constexpr,
    WORDS: tl.constexpr,
    OFFSET_WORDS: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    STRIDE_ROWS: tl.constexpr,
    STRIDE_COLUMNS: tl.constexpr,
    DILATION_ROWS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
):
    """The gradient behind the pooling of a pixel ``DOWN`` below and ``RIGHT`` of the last window's first."""
    EACH: tl.constexpr = WORDS if WORDS > 0 else COUNT
    OFFSET_EACH: tl.constexpr = OFFSET_WORDS if OFFSET_WORDS > 0 else COUNT
    # Minus zero is what a compiler may leave out of a sum.
    db = ()
    for _ in tl.static_range(COUNT):
        db = db + (tl.full(gradients[0].shape, -0.0, tl.float32),)
    # From the last window to the first an element's gradients would be added in the other order than PyTorch's.
    for over in tl.static_range(OVER_ROWS * OVER_COLUMNS):
        down = (OVER_ROWS - 1 - over // OVER_COLUMNS) * STRIDE_ROWS + DOWN
        right = (OVER_COLUMNS - 1 - over % OVER_COLUMNS) * STRIDE_COLUMNS + RIGHT
        if (
            down % DILATION_ROWS == 0
            and right % DILATION_COLUMNS == 0
            and down < KERNEL_ROWS * DILATION_ROWS
            and right < KERNEL_COLUMNS * DILATION_COLUMNS
        ):
            db = with_window(
                db, gradients, outputs, elements, down // DILATION_ROWS * KERNEL_COLUMNS + right // DILATION_COLUMNS,
                over * EACH, over * OFFSET_EACH, COUNT, POOL, MASKED, WORDS, OFFSET_WORDS,
            )  # fmt: skip
    return db


@triton.jit
def pooled_gradient_by_loop(
    output_gradient,
    output,
    offsets,
    row,
    column,
    out_row,
    out_column,
    out_rows,
    out_columns,
    out_row_stride,
    out_pixel_stride: tl.constexpr,
    out_channel_stride,
    position,
    group,
    mask,
    V: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    POOL: tl.constexpr,
    MASKED: tl.constexpr,
    WORDS: tl.constexpr,
    OFFSET_WORDS: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    STRIDE_ROWS: tl.constexpr,
    STRIDE_COLUMNS: tl.constexpr,
    DILATION_ROWS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
):
    """The same of a pixel in ``row`` and ``column`` from the padding's first, its windows loaded one by one."""
    COUNT: tl.constexpr = AFTER + V + BEFORE
    db = ()
    for _ in tl.static_range(COUNT):
        db = db + (tl.full(position.shape, -0.0, tl.float32),)
    for over in tl.range(0, OVER_ROWS * OVER_COLUMNS):
        window_row = out_row - (OVER_ROWS - 1 - over // OVER_COLUMNS)
        window_column = out_column - (OVER_COLUMNS - 1 - over % OVER_COLUMNS)
        down = row - window_row * STRIDE_ROWS
        right = column - window_column * STRIDE_COLUMNS
        place = (window_column - out_column).to(tl.int64) * out_pixel_stride - (out_row - window_row) * out_row_stride
        holds = mask & inside_image(window_row, window_column, out_rows, out_columns)
        holds = holds & (right * 0 + down % DILATION_ROWS == 0) & (right * 0 + down < KERNEL_ROWS * DILATION_ROWS)
        holds = holds & (right % DILATION_COLUMNS == 0) & (right < KERNEL_COLUMNS * DILATION_COLUMNS)
        gradients = load_channels(
            output_gradient + place, out_channel_stride, position, group, holds, V, AFTER, BEFORE, True, WORDS
        )
        elements = ()
        if POOL:
            elements = load_channels(
                offsets + place, out_channel_stride, position, group, holds, V, AFTER, BEFORE, True, 0
            )
        outputs = ()
        if MASKED:
            outputs = load_channels(
                output + place, out_channel_stride, position, group, holds, V, AFTER, BEFORE, True, WORDS
            )
        element = down // DILATION_ROWS * KERNEL_COLUMNS + right // DILATION_COLUMNS
        db = with_window(db, gradients, outputs, elements, element, 0, 0, COUNT, POOL, MASKED, WORDS, 0)
    return db


@triton.jit
def input_gradient(
    db,
    loaded,
    biases,
    position,
    alpha,
    factor,
    beta,
    k,
    FIRST: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    SPARE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The gradient before normalization and ReLU of a pixel that is loaded from number ``FIRST`` on."""
    BEFORE: tl.constexpr = BEHIND if V == 1 else 0
    AFTER: tl.constexpr = AHEAD if V == 1 else 0
    COUNT: tl.constexpr = AFTER + V + BEFORE
    HALO: tl.constexpr = BEFORE + AFTER
    result = ()
    if NORMALIZE:
        a = floats(loaded, FIRST, HALO + V + HALO, WORDS)
        a = activations(a, biases, HALO + V + HALO, BIAS, RELU)
        squares = ()
        for number in tl.static_range(HALO + V + HALO):
            squares = squares + (a[number] * a[number],)
        squares = with_neighbours(squares, position // V, G, V, BEHIND, AHEAD, SPARE)
        scales = window_sums(squares, alpha, k, COUNT, BEHIND + AHEAD + 1)
        direct = ()
        shares = ()
        for number in tl.static_range(COUNT):
            value = db[number]
            if THREE_QUARTERS:
                root = tl.rsqrt(scales[number])
                value = value * (root * tl.sqrt(root))
                shares = shares + (value * (a[BEFORE + number] * (root * root)),)
            else:
                value = value * negative_power(scales[number], beta, False)
                shares = shares + (value * (a[BEFORE + number] / scales[number]),)
            direct = direct + (value,)
        shares = with_neighbours(shares, position // V, G, V, AHEAD, BEHIND, SPARE)
        sums_of_shares = window_sums(shares, factor, 0.0, V, BEHIND + AHEAD + 1)
        for number in tl.static_range(V):
            activation = a[HALO + number]
            value = direct[AFTER + number] - activation * sums_of_shares[number]
            if RELU:
                value = tl.where(activation <= 0, 0.0, value)
            result = result + (value,)
    else:
        for number in tl.static_range(V):
            result = result + (db[number],)
    return result


@triton.jit
def pixel_of_tile(
    gradient,
    totals,
    loaded,
    gradients,
    outputs,
    elements,
    output_gradient,
    output,
    offsets,
    row,
    column,
    first_column,
    out_row,
    out_column,
    rows,
    columns,
    out_rows,
    out_columns,
    gradient_row_stride,
    gradient_pixel_stride: tl.constexpr,
    out_row_stride,
    out_pixel_stride: tl.constexpr,
    out_channel_stride,
    bias,
    position,
    group,
    mask,
    alpha,
    factor,
    beta,
    k,
    TILE: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILED: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    SPARE: tl.constexpr,
    POOL: tl.constexpr,
    MASKED: tl.constexpr,
    SUM: tl.constexpr,
    POSITIVE: tl.constexpr,
    WORDS: tl.constexpr,
    OFFSET_WORDS: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    STRIDE_ROWS: tl.constexpr,
    STRIDE_COLUMNS: tl.constexpr,
    PADDING_ROWS: tl.constexpr,
    PADDING_COLUMNS: tl.constexpr,
    DILATION_ROWS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
):
    """Compute and store the gradient of pixel number ``TILE`` of a tile, whose row is none below the image.

    Returns the sums of the gradients so far with it.
    """
    BEFORE: tl.constexpr = BEHIND if V == 1 else 0
    AFTER: tl.constexpr = AHEAD if V == 1 else 0
    COUNT: tl.constexpr = AFTER + V + BEFORE
    HALO: tl.constexpr = BEFORE + AFTER
    EACH: tl.constexpr = WORDS if WORDS > 0 else HALO + V + HALO
    DOWN: tl.constexpr = TILE // TILE_COLUMNS
    RIGHT: tl.constexpr = TILE % TILE_COLUMNS
    if TILED:
        db = pooled_gradient(
            gradients, outputs, elements, DOWN, RIGHT, COUNT, POOL, MASKED, WORDS, OFFSET_WORDS, KERNEL_ROWS,
            KERNEL_COLUMNS, STRIDE_ROWS, STRIDE_COLUMNS, DILATION_ROWS, DILATION_COLUMNS, OVER_ROWS, OVER_COLUMNS,
        )  # fmt: skip
    else:
        db = pooled_gradient_by_loop(
            output_gradient, output, offsets, row + PADDING_ROWS, first_column, out_row, out_column, out_rows,
            out_columns, out_row_stride, out_pixel_stride, out_channel_stride, position, group, mask, V, BEFORE, AFTER,
            POOL, MASKED, WORDS, OFFSET_WORDS, KERNEL_ROWS, KERNEL_COLUMNS, STRIDE_ROWS, STRIDE_COLUMNS, DILATION_ROWS,
            DILATION_COLUMNS, OVER_ROWS, OVER_COLUMNS,
        )  # fmt: skip
    # Loaded for each pixel again: in registers from pixel to pixel it would leave room for fewer warps.
    biases = ()
    if BIAS and NORMALIZE:
        biases = floats(load_channels(bias, 1, position, group, mask, V, HALO, HALO, True, 0), 0, HALO + V + HALO, 0)
    result = input_gradient(
        db, loaded, biases, position, alpha, factor, beta, k, TILE * EACH, G, V, BIAS, RELU, BEHIND, AHEAD, NORMALIZE,
        THREE_QUARTERS, SPARE, WORDS,
    )  # fmt: skip
    inside = mask
    if RIGHT + PADDING_COLUMNS > 0:
        inside = inside & inside_columns(column + RIGHT, columns)
    if PADDING_ROWS > 0:
        inside = inside & inside_rows(row + DOWN, column, rows)
    place = DOWN * gradient_row_stride + RIGHT * gradient_pixel_stride
    store_channels(gradient + place, result, inside, V)
    if SUM:
        new_totals = ()
        for number in tl.static_range(V):
            part = result[number]
            # Outside the image, and in lanes without work, there is no gradient: this is zero, but 0 / 0 without a
            # positive ``k``.
            if not POSITIVE:
                part = tl.where(inside, part, 0.0)
            new_totals = new_totals + (totals[number] + part,)
        totals = new_totals
    return totals


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    output_gradient,
    input,
    bias,
    output,
    offsets,
    gradient,
    sums,
    strips,
    segments,
    segment_rows,
    tile_columns,
    channel_blocks,
    tile_rows,
    rows,
    columns,
    out_rows,
    out_columns,
    channels,
    group,
    image_stride,
    row_stride,
    pixel_stride: tl.constexpr,
    channel_stride,
    gradient_image_stride,
    gradient_row_stride,
    gradient_pixel_stride: tl.constexpr,
    gradient_channel_stride,
    out_image_stride,
    out_row_stride,
    out_pixel_stride: tl.constexpr,
    out_channel_stride,
    alpha,
    factor,
    beta,
    k,
    L: tl.constexpr,
    G: tl.constexpr,
    UNITS: tl.constexpr,
    V: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILED: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    SPARE: tl.constexpr,
    POOL: tl.constexpr,
    MASKED: tl.constexpr,
    SUM: tl.constexpr,
    POSITIVE: tl.constexpr,
    WORDS: tl.constexpr,
    OFFSET_WORDS: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    STRIDE_ROWS: tl.constexpr,
    STRIDE_COLUMNS: tl.constexpr,
    PADDING_ROWS: tl.constexpr,
    PADDING_COLUMNS: tl.constexpr,
    DILATION_ROWS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
):
    strip, segment, channel, mask = unit_of_lane(strips, segments, channel_blocks, channels, L, G, UNITS, V)
    position = channel % group
    image = strip // tile_columns
    # Rows and columns from the padding's first.
    first_column = (strip % tile_columns).to(tl.int32) * TILE_COLUMNS
    first_tile = segment * segment_rows
    steps = tl.minimum(segment_rows, tile_rows - first_tile)
    # Whatever Triton takes them for, from here on they are 64 bits wide.
    row_stride = tl.zeros((), tl.int64) + row_stride
    channel_stride = tl.zeros((), tl.int64) + channel_stride
    out_channel_stride = tl.zeros((), tl.int64) + out_channel_stride
    gradient_row_stride = tl.zeros((), tl.int64) + gradient_row_stride
    out_row_stride = tl.zeros((), tl.int64) + out_row_stride
    # Gradients of the channels whose windows hold a channel are needed: the window the other way round.
    BEFORE: tl.constexpr = BEHIND if V == 1 else 0
    AFTER: tl.constexpr = AHEAD if V == 1 else 0
    HALO: tl.constexpr = BEFORE + AFTER
    bias += channel
    totals = ()
    for _ in tl.static_range(V):
        totals = totals + (tl.zeros([L], tl.float32),)
    first_row = first_tile * TILE_ROWS
    out_row = first_row // STRIDE_ROWS
    out_column = first_column // STRIDE_COLUMNS
    channel = channel.to(tl.int64)
    row = first_row - PADDING_ROWS
    column = first_column - PADDING_COLUMNS
    if NORMALIZE:
        input += image * image_stride + row * row_stride + column.to(tl.int64) * pixel_stride
        input += channel * channel_stride
    gradient += image * gradient_image_stride + row * gradient_row_stride
    gradient += column.to(tl.int64) * gradient_pixel_stride + channel * gradient_channel_stride
    place = image * out_image_stride + out_row * out_row_stride + out_column.to(tl.int64) * out_pixel_stride
    place += channel * out_channel_stride
    output_gradient += place
    if POOL:
        offsets += place
    if MASKED:
        output += place
    # Loads are made a step before they are used: their way from memory is longer than the other warps' arithmetic.
    for _ in tl.range(0, steps, num_stages=2):
        loaded = ()
        if NORMALIZE:
            loaded = load_tile(
                input, row, column, rows, columns, row_stride, pixel_stride, channel_stride, position, group, mask, V,
                HALO, TILE_ROWS, TILE_COLUMNS, PADDING_COLUMNS, WORDS,
            )  # fmt: skip
        gradients = ()
        outputs = ()
        elements = ()
        if TILED:
            gradients, outputs, elements = load_windows(
                output_gradient, output, offsets, out_row, out_column, out_rows, out_columns, out_row_stride,
                out_pixel_stride, out_channel_stride, position, group, mask, V, BEFORE, AFTER, OVER_ROWS, OVER_COLUMNS,
                POOL, MASKED, WORDS, OFFSET_WORDS,
            )  # fmt: skip
        for tile in tl.static_range(TILE_ROWS * TILE_COLUMNS):
            # Whether the pixel's row is above the image's end, in words that differ from pixel to pixel: behind
            # conditions of their own the assembler does not mix the pixels' arithmetic, which takes fewer registers,
            # and Triton puts the loads for the next step before it.
            if row.to(tl.int64) * TILE_COLUMNS + tile < rows.to(tl.int64) * TILE_COLUMNS:
                totals = pixel_of_tile(
                    gradient, totals, loaded, gradients, outputs, elements, output_gradient, output, offsets, row,
                    column, first_column, out_row, out_column, rows, columns, out_rows, out_columns,
                    gradient_row_stride, gradient_pixel_stride, out_row_stride, out_pixel_stride, out_channel_stride,
                    bias, position, group, mask, alpha, factor, beta, k, tile, G, V, TILE_COLUMNS, TILED, BIAS,
                    RELU, BEHIND, AHEAD, NORMALIZE, THREE_QUARTERS, SPARE, POOL, MASKED, SUM, POSITIVE, WORDS,
                    OFFSET_WORDS, KERNEL_ROWS, KERNEL_COLUMNS, STRIDE_ROWS, STRIDE_COLUMNS, PADDING_ROWS,
                    PADDING_COLUMNS, DILATION_ROWS, DILATION_COLUMNS, OVER_ROWS, OVER_COLUMNS,
                )  # fmt: skip
        row += TILE_ROWS
        # This always holds while there are steps, which the compiler does not know: see forward_kernel.
        more = row < rows
        next_row = out_row + 1 if TILED else (row + PADDING_ROWS) // STRIDE_ROWS
        if NORMALIZE:
            input += tl.where(more, TILE_ROWS * row_stride, 0)
        gradient += tl.where(more, TILE_ROWS * gradient_row_stride, 0)
        further = tl.where(more, (next_row - out_row) * out_row_stride, 0)
        output_gradient += further
        if POOL:
            offsets += further
        if MASKED:
            output += further
        out_row = next_row
    if SUM:
        # The units of a program, in order; each program has a column of its own for its channels.
        lane = tl.arange(0, L)
        for number in tl.static_range(V):
            total = totals[number]
            if G == 1:
                total = tl.where(lane == 0, tl.sum(total, 0), 0.0)
            else:
                for unit in tl.range(1, UNITS):
                    total += tl.gather(totals[number], tl.minimum(lane % G + unit * G, L - 1), 0)
            # A row for each channel: what is summed next lies next to each other.
            place = (channel + number) * (tl.num_programs(0) // channel_blocks)
            tl.store(sums + place + tl.program_id(0) // channel_blocks, total, mask=mask & (lane < G))
