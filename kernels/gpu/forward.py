"""The Triton kernel of the chain forward; see :mod:`kernels.gpu.launch`.

A program is one warp. Its lanes are ``UNITS`` units of ``G`` lanes; the lanes of a unit share pixels and hold ``V``
channels each. A unit computes an output column, and walks down the rows of its segment of the image. Parts of the chain
that are missing are left out when the kernel is compiled.
"""

import triton
import triton.language as tl

from .functions import (
    SIZES,
    activations,
    floats,
    inside_image,
    load_channels,
    negative_power,
    store_channels,
    sums_of_squares,
    unit_of_lane,
    window_sums,
    with_neighbours,
)


@triton.jit
def normalized(
    values,
    biases,
    position,
    alpha,
    beta,
    k,
    scale,
    V: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    FOLD: tl.constexpr,
    SQUARED: tl.constexpr,
    SPARE: tl.constexpr,
):
    """Bias, ReLU and normalization of a pixel's channels; ``BEHIND`` and ``AHEAD`` are of the window.

    With ``FOLD`` too large by one factor, as ``k`` is that over ``alpha``; with ``SQUARED`` the squares of that, times
    ``scale``.
    """
    BEFORE: tl.constexpr = BEHIND if V == 1 else 0
    AFTER: tl.constexpr = AHEAD if V == 1 else 0
    values = activations(values, biases, BEFORE + V + AFTER, BIAS, RELU)
    result = ()
    if NORMALIZE:
        if FOLD:
            all_values = with_neighbours(values, position // V, G, V, BEHIND, AHEAD, SPARE)
            scales = sums_of_squares(all_values, k, V, BEHIND + AHEAD + 1)
        else:
            squares = ()
            for number in tl.static_range(BEFORE + V + AFTER):
                squares = squares + (values[number] * values[number],)
            squares = with_neighbours(squares, position // V, G, V, BEHIND, AHEAD, SPARE)
            scales = window_sums(squares, alpha, k, V, BEHIND + AHEAD + 1)
        for number in tl.static_range(V):
            value = values[BEFORE + number]
            if SQUARED:
                # Squares of what is wanted have its order, and take one special function each: the largest of many
                # needs the other. A ratio that is at most 1, and ``scale``, keep them among float32's normal numbers.
                root = tl.rsqrt(scales[number])
                ratio = value * root
                value = ratio * (ratio * (root * scale))
            else:
                value = value * negative_power(scales[number], beta, THREE_QUARTERS)
            result = result + (value,)
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
    CANONICAL: tl.constexpr,
    SAVE: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """A window's largest value and its element, once another ``ELEMENT`` of its row is looked at."""
    if KEYS:
        key = value.to(tl.int32, bitcast=True)
        if not CANONICAL:
            # Not a number may have a sign, and is the largest nevertheless.
            key = key & 0x7FFFFFFF
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
    scale,
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
    SQUARED: tl.constexpr,
    SPARE: tl.constexpr,
    KEYS: tl.constexpr,
    CANONICAL: tl.constexpr,
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
            floats(loaded, FROM + offset * EACH, EACH, WORDS), biases, position, alpha, beta, k, scale, V, G, BIAS,
            RELU, BEHIND, AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SQUARED, SPARE,
        )  # fmt: skip
        new_best = ()
        new_taken = ()
        for index in tl.static_range(V):
            one_best, one_taken = larger_of(
                best[index], taken[index], values[index], inside, offset, FIRST, KEYS, CANONICAL, SAVE, INSIDE
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
    scale,
    V: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    FOLD: tl.constexpr,
    SQUARED: tl.constexpr,
    SPARE: tl.constexpr,
    POOL: tl.constexpr,
    KEYS: tl.constexpr,
    CANONICAL: tl.constexpr,
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
            loaded, row + number * DILATION_ROWS, column, rows, columns, biases, position, alpha, beta, k, scale,
            (number - CARRIED) * KERNEL_COLUMNS * EACH, EACH, number * KERNEL_COLUMNS, V, G, BIAS, RELU, BEHIND, AHEAD,
            NORMALIZE, THREE_QUARTERS, FOLD, SQUARED, SPARE, KEYS, CANONICAL, SAVE, INSIDE, WORDS, KERNEL_COLUMNS,
            DILATION_COLUMNS,
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
    scale,
    V: tl.constexpr,
    G: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    FOLD: tl.constexpr,
    SQUARED: tl.constexpr,
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
            floats(values, 0, BEFORE + V + AFTER, WORDS), biases, position, alpha, beta, k, scale, V, G, BIAS, RELU,
            BEHIND, AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SQUARED, SPARE,
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
def store_window(
    output,
    offsets,
    best,
    taken,
    factor,
    mask,
    V: tl.constexpr,
    FOLD: tl.constexpr,
    SQUARED: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Store a window's largest values, and their elements if they are wanted."""
    if FOLD:
        # Here factor, square and scale are taken back.
        folded = best
        best = ()
        for number in tl.static_range(V):
            value = tl.sqrt(folded[number]) if SQUARED else folded[number]
            best = best + (value * factor,)
    store_channels(output, best, mask, V)
    if SAVE:
        store_channels(offsets, taken, mask, V)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    input,
    bias,
    output,
    offsets,
    strips,
    segments,
    segment_rows,
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
    scale,
    CHANNEL_BLOCKS: tl.constexpr,
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
    SQUARED: tl.constexpr,
    SPARE: tl.constexpr,
    POOL: tl.constexpr,
    SAVE: tl.constexpr,
    KEYS: tl.constexpr,
    CANONICAL: tl.constexpr,
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
    image, out_column, segment, channel, position, mask = unit_of_lane(
        strips, segments, out_columns, channels, group, CHANNEL_BLOCKS, L, G, UNITS, V
    )
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
                row_loaded, row + number, column, rows, columns, biases, position, alpha, beta, k, scale, 0, EACH,
                number * KERNEL_COLUMNS, V, G, BIAS, RELU, BEHIND, AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SQUARED,
                SPARE, KEYS, CANONICAL, SAVE, INSIDE, WORDS, KERNEL_COLUMNS, DILATION_COLUMNS,
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
                    scale, V, G, BIAS, RELU, BEHIND, AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SQUARED, SPARE, POOL, KEYS,
                    CANONICAL, SAVE, INSIDE, WORDS, CARRIED, KERNEL_ROWS, KERNEL_COLUMNS, STRIDE_ROWS, DILATION_ROWS,
                    DILATION_COLUMNS,
                )  # fmt: skip
                store_window(output, offsets, best, taken, factor, mask, V, FOLD, SQUARED, SAVE)
        else:
            best, taken = window_maxima_by_loop(
                input, row, column, rows, columns, row_stride, pixel_stride, channel_stride, biases, position, group,
                mask, alpha, beta, k, scale, V, G, BIAS, RELU, BEHIND, AHEAD, NORMALIZE, THREE_QUARTERS, FOLD, SQUARED,
                SPARE, WORDS, KERNEL_ROWS, KERNEL_COLUMNS, DILATION_ROWS, DILATION_COLUMNS,
            )  # fmt: skip
            store_window(output, offsets, best, taken, factor, mask, V, FOLD, SQUARED, SAVE)
        row += STRIDE_ROWS
        # This always holds while there are steps, which the compiler does not know. If it knew where every step is, it
        # would keep an address in registers for each access, which would leave room for fewer warps.
        more = row < rows
        input += tl.where(more, STRIDE_ROWS * row_stride, 0)
        output += tl.where(more, out_row_stride, 0)
        if SAVE:
            offsets += tl.where(more, out_row_stride, 0)
