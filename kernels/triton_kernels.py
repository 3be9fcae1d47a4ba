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
    floats,
    integers,
    load_channels,
    negative_power,
    store_channels,
    sums_of_squares,
    window_sums,
    with_neighbours,
)

#: Sizes that kernels are compiled for once, whatever they are; strides tell which accesses are aligned.
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
def inside_image(row, column, rows, columns):
    """Whether pixels lie inside the image; ``row`` is one for all lanes, which the interpreter's masks must not be."""
    # What is negative is larger than any size as an unsigned number.
    row = (column * 0 + row).to(tl.uint32)
    return (row < rows.to(tl.uint32)) & (column.to(tl.uint32) < columns.to(tl.uint32))


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
    pixel_stride,
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
    pixel_stride,
    channel_stride,
    out_image_stride,
    out_pixel_stride,
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
    zero = tl.zeros((), tl.int64)
    pixel_stride = zero + pixel_stride
    out_pixel_stride = zero + out_pixel_stride
    row_stride = pixel_stride * columns
    out_row_stride = out_pixel_stride * out_columns
    there = input + image * image_stride + row * row_stride + column * pixel_stride
    there += channel.to(tl.int64) * channel_stride
    place = image * out_image_stride + out_row * out_row_stride + out_column * out_pixel_stride
    place += channel.to(tl.int64) * out_channel_stride
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
                there + number * row_stride, row + number, column, rows, columns, pixel_stride, channel_stride,
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
        # The first element that is no padding is the largest of a window of nothing but minus infinity.
        first = tl.maximum((DILATION_ROWS - 1 - row) // DILATION_ROWS, 0) * KERNEL_COLUMNS
        first = first + tl.maximum((DILATION_COLUMNS - 1 - column) // DILATION_COLUMNS, 0)
        best = ()
        taken = ()
        if UNROLLED:
            rows_best = carried_best
            rows_taken = carried_taken
            loaded = ()
            for number in tl.static_range(CARRIED, KERNEL_ROWS):
                loaded = loaded + load_row(
                    there + number * DILATION_ROWS * row_stride, row + number * DILATION_ROWS, column, rows, columns,
                    pixel_stride, channel_stride, position, group, mask, V, BEFORE, AFTER, INSIDE, WORDS,
                    KERNEL_COLUMNS, DILATION_COLUMNS,
                )  # fmt: skip
            for number in tl.static_range(CARRIED, KERNEL_ROWS):
                new_best, new_taken = row_maxima(
                    loaded, row + number * DILATION_ROWS, column, rows, columns, biases, position, alpha, beta, k,
                    (number - CARRIED) * KERNEL_COLUMNS * EACH, EACH, number * KERNEL_COLUMNS, V, G, BIAS, RELU, BEHIND,
                    AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SPARE, KEYS, SAVE, INSIDE, WORDS, KERNEL_COLUMNS,
                    DILATION_COLUMNS,
                )  # fmt: skip
                rows_best = rows_best + new_best
                rows_taken = rows_taken + new_taken
            carried_best = ()
            carried_taken = ()
            for number in tl.static_range(CARRIED * V):
                one_best = rows_best[STRIDE_ROWS * V + number]
                one_taken = rows_taken[STRIDE_ROWS * V + number]
                carried_best = carried_best + (one_best,)
                carried_taken = carried_taken + (one_taken - STRIDE_ROWS * KERNEL_COLUMNS,)
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
        else:
            for _ in tl.static_range(V):
                best = best + (tl.full([L], -float("inf"), tl.float32),)
                taken = taken + (first,)
            for element in tl.range(0, KERNEL_ROWS * KERNEL_COLUMNS):
                down = element // KERNEL_COLUMNS * DILATION_ROWS
                right = element % KERNEL_COLUMNS * DILATION_COLUMNS
                inside = mask & inside_image(row + down, column + right, rows, columns)
                values = load_channels(
                    there + down * row_stride + right * pixel_stride, channel_stride, position, group, inside, V,
                    BEFORE, AFTER, True, WORDS,
                )  # fmt: skip
                values = normalized(
                    floats(values, 0, COUNT, WORDS), biases, position, alpha, beta, k, V, G, BIAS, RELU, BEHIND, AHEAD,
                    NORMALIZE, THREE_QUARTERS, FOLD, SPARE,
                )  # fmt: skip
                new_best = ()
                new_taken = ()
                for index in tl.static_range(V):
                    larger = inside & beats(values[index], best[index])
                    new_best = new_best + (tl.where(larger, values[index], best[index]),)
                    new_taken = new_taken + (tl.where(larger, element, taken[index]),)
                best = new_best
                taken = new_taken
        if FOLD:
            # Here the factor is taken back.
            folded = best
            best = ()
            for number in tl.static_range(V):
                best = best + (folded[number] * factor,)
        store_channels(output + place, best, mask, V)
        if SAVE:
            store_channels(offsets + place, taken, mask, V)
        row += STRIDE_ROWS
        there += STRIDE_ROWS * row_stride
        place += out_row_stride


@triton.jit
def load_windows(
    output_gradient,
    output,
    offsets,
    place,
    last_row,
    last_column,
    out_rows,
    out_columns,
    out_pixel_stride,
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
        one = place - (up * out_columns + left) * out_pixel_stride
        gradients = gradients + load_channels(
            output_gradient + one, out_channel_stride, position, group, there, V, AFTER, BEFORE, True, WORDS
        )
        if POOL:
            elements = elements + load_channels(
                offsets + one, out_channel_stride, position, group, there, V, AFTER, BEFORE, True, OFFSET_WORDS
            )
        if MASKED:
            outputs = outputs + load_channels(
                output + one, out_channel_stride, position, group, there, V, AFTER, BEFORE, True, WORDS
            )
    return gradients, outputs, elements


@triton.jit
def load_tile(
    there,
    first_row,
    first_column,
    rows,
    columns,
    pixel_stride,
    channel_stride,
    position,
    group,
    mask,
    V: tl.constexpr,
    HALO: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """What is loaded of a tile's pixels, the first of which is ``there``; zero where they lie outside the image."""
    loaded = ()
    for tile in tl.static_range(TILE_ROWS * TILE_COLUMNS):
        inside = mask & inside_image(
            first_row + tile // TILE_COLUMNS, first_column + tile % TILE_COLUMNS, rows, columns
        )
        place = (tile // TILE_COLUMNS * columns + tile % TILE_COLUMNS) * pixel_stride
        loaded = loaded + load_channels(
            there + place, channel_stride, position, group, inside, V, HALO, HALO, True, WORDS
        )
    return loaded


@triton.jit
def with_window(
    db, gradients, outputs, elements, element, COUNT: tl.constexpr, POOL: tl.constexpr, MASKED: tl.constexpr
):
    """``db`` of a pixel, with the gradients of a window that holds it as its ``element``, where that was taken."""
    added = ()
    for number in tl.static_range(COUNT):
        part = gradients[number]
        if POOL:
            part = tl.where(elements[number] == element, part, 0.0)
        if MASKED:
            part = tl.where(outputs[number] <= 0, 0.0, part)
        added = added + (db[number] + part,)
    return added


@triton.jit
def with_tile_window(
    db,
    gradients,
    outputs,
    elements,
    OVER: tl.constexpr,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    COUNT: tl.constexpr,
    POOL: tl.constexpr,
    MASKED: tl.constexpr,
    WORDS: tl.constexpr,
    OFFSET_WORDS: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    DILATION_ROWS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
):
    """The same with window number ``OVER`` of those loaded, which begins ``DOWN`` above and ``RIGHT`` left of it."""
    if (
        DOWN % DILATION_ROWS != 0
        or RIGHT % DILATION_COLUMNS != 0
        or DOWN >= KERNEL_ROWS * DILATION_ROWS
        or RIGHT >= KERNEL_COLUMNS * DILATION_COLUMNS
    ):
        return db
    else:
        EACH: tl.constexpr = WORDS if WORDS > 0 else COUNT
        OFFSET_EACH: tl.constexpr = OFFSET_WORDS if OFFSET_WORDS > 0 else COUNT
        parts = floats(gradients, OVER * EACH, COUNT, WORDS)
        masks = ()
        if MASKED:
            masks = floats(outputs, OVER * EACH, COUNT, WORDS)
        taken = ()
        if POOL:
            taken = integers(elements, OVER * OFFSET_EACH, COUNT, OFFSET_WORDS)
        return with_window(
            db, parts, masks, taken, DOWN // DILATION_ROWS * KERNEL_COLUMNS + RIGHT // DILATION_COLUMNS, COUNT, POOL,
            MASKED,
        )  # fmt: skip


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
    image_shift,
    pixel_stride,
    channel_stride,
    out_image_stride,
    out_pixel_stride,
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
    SHIFTED: tl.constexpr,
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
    pixel_stride = tl.zeros((), tl.int64) + pixel_stride
    out_pixel_stride = tl.zeros((), tl.int64) + out_pixel_stride
    # Gradients of the channels whose windows hold a channel are needed: the window the other way round.
    BEFORE: tl.constexpr = BEHIND if V == 1 else 0
    AFTER: tl.constexpr = AHEAD if V == 1 else 0
    COUNT: tl.constexpr = AFTER + V + BEFORE
    HALO: tl.constexpr = BEFORE + AFTER
    PIXELS: tl.constexpr = TILE_ROWS * TILE_COLUMNS
    EACH: tl.constexpr = WORDS if WORDS > 0 else HALO + V + HALO
    biases = ()
    if BIAS and NORMALIZE:
        biases = load_channels(bias + channel, 1, position, group, mask, V, HALO, HALO, True, 0)
        biases = floats(biases, 0, HALO + V + HALO, 0)
    totals = ()
    for _ in tl.static_range(V):
        totals = totals + (tl.zeros([L], tl.float32),)
    first_row = first_tile * TILE_ROWS
    out_row = first_row // STRIDE_ROWS
    out_column = first_column // STRIDE_COLUMNS
    place = (first_row - PADDING_ROWS) * columns.to(tl.int64) + first_column - PADDING_COLUMNS
    there = image * image_stride + place * pixel_stride + channel.to(tl.int64) * channel_stride
    if SHIFTED:
        input += image * image_shift
    above = image * out_image_stride + (out_row * out_columns.to(tl.int64) + out_column) * out_pixel_stride
    above += channel.to(tl.int64) * out_channel_stride
    # Loads are made a step before they are used: their way from memory is longer than the other warps' arithmetic.
    for _ in tl.range(0, steps, num_stages=2):
        loaded = ()
        if NORMALIZE:
            loaded = load_tile(
                input + there, first_row - PADDING_ROWS, first_column - PADDING_COLUMNS, rows, columns, pixel_stride,
                channel_stride, position, group, mask, V, HALO, TILE_ROWS, TILE_COLUMNS, WORDS,
            )  # fmt: skip
        gradients = ()
        outputs = ()
        elements = ()
        if TILED:
            gradients, outputs, elements = load_windows(
                output_gradient, output, offsets, above, out_row, out_column, out_rows, out_columns, out_pixel_stride,
                out_channel_stride, position, group, mask, V, BEFORE, AFTER, OVER_ROWS, OVER_COLUMNS, POOL, MASKED,
                WORDS, OFFSET_WORDS,
            )  # fmt: skip
        for tile in tl.static_range(PIXELS):
            row = first_row + tile // TILE_COLUMNS - PADDING_ROWS
            column = first_column + tile % TILE_COLUMNS - PADDING_COLUMNS
            inside = mask & inside_image(row, column, rows, columns)
            # Minus zero is what a compiler may leave out of a sum.
            db = ()
            for _ in tl.static_range(COUNT):
                db = db + (tl.full([L], -0.0, tl.float32),)
            # From the last window to the first an element's gradients would be added in the other order than PyTorch's.
            if TILED:
                for over in tl.static_range(OVER_ROWS * OVER_COLUMNS):
                    db = with_tile_window(
                        db, gradients, outputs, elements, over,
                        (OVER_ROWS - 1 - over // OVER_COLUMNS) * STRIDE_ROWS + tile // TILE_COLUMNS,
                        (OVER_COLUMNS - 1 - over % OVER_COLUMNS) * STRIDE_COLUMNS + tile % TILE_COLUMNS, COUNT, POOL,
                        MASKED, WORDS, OFFSET_WORDS, KERNEL_ROWS, KERNEL_COLUMNS, DILATION_ROWS, DILATION_COLUMNS,
                    )  # fmt: skip
            else:
                for over in tl.range(0, OVER_ROWS * OVER_COLUMNS):
                    window_row = out_row - (OVER_ROWS - 1 - over // OVER_COLUMNS)
                    window_column = out_column - (OVER_COLUMNS - 1 - over % OVER_COLUMNS)
                    down = first_row - window_row * STRIDE_ROWS
                    right = first_column - window_column * STRIDE_COLUMNS
                    one = above - (out_row - window_row) * out_columns * out_pixel_stride
                    one = one - (out_column - window_column) * out_pixel_stride
                    one_holds = mask & inside_image(window_row, window_column, out_rows, out_columns)
                    one_holds = one_holds & (right * 0 + down % DILATION_ROWS == 0)
                    one_holds = one_holds & (right * 0 + down < KERNEL_ROWS * DILATION_ROWS)
                    one_holds = one_holds & (right % DILATION_COLUMNS == 0)
                    one_holds = one_holds & (right < KERNEL_COLUMNS * DILATION_COLUMNS)
                    one_gradients = load_channels(
                        output_gradient + one, out_channel_stride, position, group, one_holds, V, AFTER, BEFORE, True,
                        WORDS,
                    )  # fmt: skip
                    one_gradients = floats(one_gradients, 0, COUNT, WORDS)
                    one_elements = ()
                    if POOL:
                        one_elements = load_channels(
                            offsets + one, out_channel_stride, position, group, one_holds, V, AFTER, BEFORE, True,
                            OFFSET_WORDS,
                        )  # fmt: skip
                        one_elements = integers(one_elements, 0, COUNT, OFFSET_WORDS)
                    one_outputs = ()
                    if MASKED:
                        one_outputs = load_channels(
                            output + one, out_channel_stride, position, group, one_holds, V, AFTER, BEFORE, True,
                            WORDS,
                        )  # fmt: skip
                        one_outputs = floats(one_outputs, 0, COUNT, WORDS)
                    db = with_window(
                        db, one_gradients, one_outputs, one_elements,
                        down // DILATION_ROWS * KERNEL_COLUMNS + right // DILATION_COLUMNS, COUNT, POOL, MASKED,
                    )  # fmt: skip
            result = ()
            if NORMALIZE:
                a = floats(loaded, tile * EACH, HALO + V + HALO, WORDS)
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
            further = (tile // TILE_COLUMNS * columns + tile % TILE_COLUMNS) * pixel_stride
            store_channels(gradient + there + further, result, inside, V)
            if SUM:
                # Outside the image, and in lanes without work, there is no gradient and the input is zero: so is this.
                new_totals = ()
                for number in tl.static_range(V):
                    new_totals = new_totals + (totals[number] + result[number],)
                totals = new_totals
        first_row += TILE_ROWS
        there += TILE_ROWS * columns * pixel_stride
        next_row = first_row // STRIDE_ROWS
        above += (next_row - out_row) * out_columns * out_pixel_stride
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
            place = (channel + number).to(tl.int64) * (tl.num_programs(0) // channel_blocks)
            tl.store(sums + place + tl.program_id(0) // channel_blocks, total, mask=mask & (lane < G))
