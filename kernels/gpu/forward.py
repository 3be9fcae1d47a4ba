"""The Triton kernel for the chain's forward; see :mod:`kernels.gpu.launch`.

A program is one warp. Its lanes form ``C.units`` units of ``C.unit_lanes`` lanes; the lanes of a unit work on the same
pixels and hold ``C.vector`` channels each. A unit computes one output column, walking down the rows of its segment of
the image. Parts that are not in the chain are left out at compile time.
"""

import triton
import triton.language as tl

from .functions import (
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
def normalized(values, biases, position, alpha, beta, k, scale, C: tl.constexpr):
    """Bias, ReLU and normalization of a pixel's channels.

    With ``C.fold`` the result lacks the factor ``alpha ** -beta``, and ``k`` is the chain's ``k / alpha``. With
    ``C.squared`` it is squared, and multiplied by ``scale``.
    """
    V: tl.constexpr = C.vector
    BEFORE: tl.constexpr = C.load_before
    COUNT: tl.constexpr = C.load_before + C.vector + C.load_after
    SIZE: tl.constexpr = C.before + C.after + 1
    values = activations(values, biases, COUNT, C)
    result = ()
    if C.normalize:
        if C.fold:
            all_values = with_neighbours(values, position // V, C.before, C.after, C.spare, C)
            scales = sums_of_squares(all_values, k, V, SIZE)
        else:
            squares = ()
            for number in tl.static_range(COUNT):
                squares = squares + (values[number] * values[number],)
            squares = with_neighbours(squares, position // V, C.before, C.after, C.spare, C)
            scales = window_sums(squares, alpha, k, V, SIZE)
        for number in tl.static_range(V):
            value = values[BEFORE + number]
            if C.squared:
                # The square has the same order and takes one special function; only the maximum needs the second
                # one. A ratio of at most 1, and ``scale``, keep it in the range of normal float32 numbers.
                root = tl.rsqrt(scales[number])
                ratio = value * root
                value = ratio * (ratio * (root * scale))
            else:
                value = value * negative_power(scales[number], beta, C.three_quarters)
            result = result + (value,)
    else:
        result = values
    return result


@triton.jit
def beats(value, best):
    """Whether ``value`` replaces ``best``, the maximum of the elements before it."""
    # Like PyTorch: the first of equal values, the last NaN.
    return (value > best) | (value != value)


@triton.jit
def larger_of(best, index, value, inside, ELEMENT: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr):
    """A row's maximum and its argmax index after one more ``ELEMENT`` of it; the row's indices begin at ``FIRST``."""
    if C.keys:
        key = value.to(tl.int32, bitcast=True)
        if not C.canonical:
            # A NaN may have a sign, but must win regardless.
            key = key & 0x7FFFFFFF
        if C.save:
            # A subtraction and a maximum are one instruction.
            key = (key | 15) - ELEMENT
        if not C.inside:
            key = tl.where(inside, key, -(2**30))
        return key if ELEMENT == 0 else tl.maximum(best, key), index
    elif C.inside and ELEMENT == 0:
        return value, index
    else:
        larger = beats(value, best)
        if not C.inside:
            larger = larger & inside
        return tl.where(larger, value, best), tl.where(larger, FIRST + ELEMENT, index)


@triton.jit
def load_row(pointer, row, first_column, sizes, channel_stride, position, mask, C: tl.constexpr):
    """Loads the pixels in one row of a window, one after the other."""
    PIXELS: tl.constexpr = C.kernel_columns
    loaded = ()
    for number in tl.static_range(PIXELS):
        column = first_column + number * C.dilation_columns
        loaded = loaded + load_channels(
            pointer + number * C.dilation_columns * C.pixel_stride, channel_stride, position, sizes.group,
            mask if C.inside else mask & inside_image(row, column, sizes.rows, sizes.columns), C.vector, C.load_before,
            C.load_after, C.words,
        )  # fmt: skip
    return loaded


@triton.jit
def row_maxima(
    loaded,
    row,
    first_column,
    sizes,
    biases,
    position,
    alpha,
    beta,
    k,
    scale,
    FROM: tl.constexpr,
    FIRST: tl.constexpr,
    C: tl.constexpr,
):
    """The maxima of one row of a window, and their argmax indices, which begin at ``FIRST``.

    The row's first pixel is at ``loaded[FROM]``.
    """
    V: tl.constexpr = C.vector
    PIXELS: tl.constexpr = C.kernel_columns
    EACH: tl.constexpr = C.words if C.words > 0 else C.load_before + C.vector + C.load_after
    best = ()
    indices = ()
    for _ in tl.static_range(V):
        if C.keys:
            best = best + (tl.full(position.shape, -(2**30), tl.int32),)
        else:
            best = best + (tl.full(position.shape, -float("inf"), tl.float32),)
        indices = indices + (tl.full(position.shape, FIRST, tl.int32),)
    for offset in tl.static_range(PIXELS):
        column = first_column + offset * C.dilation_columns
        inside = inside_image(row, column, sizes.rows, sizes.columns)
        values = normalized(
            floats(loaded, FROM + offset * EACH, EACH, C.words), biases, position, alpha, beta, k, scale, C
        )
        new_best = ()
        new_indices = ()
        for number in tl.static_range(V):
            one_best, one_index = larger_of(best[number], indices[number], values[number], inside, offset, FIRST, C)
            new_best = new_best + (one_best,)
            new_indices = new_indices + (one_index,)
        best = new_best
        indices = new_indices
    return best, indices


@triton.jit
def first_index(row, column, C: tl.constexpr):
    """The first element that is not padding, which is the argmax index of a window of only minus infinity."""
    first = tl.maximum((C.dilation_rows - 1 - row) // C.dilation_rows, 0) * C.kernel_columns
    return first + tl.maximum((C.dilation_columns - 1 - column) // C.dilation_columns, 0)


@triton.jit
def window_maxima(
    loaded,
    carried_best,
    carried_indices,
    row,
    column,
    sizes,
    biases,
    position,
    alpha,
    beta,
    k,
    scale,
    C: tl.constexpr,
):
    """A window's maxima and argmax indices, from those of the rows carried over and from the rows just loaded.

    Also returns those of the rows that the next window shares.
    """
    V: tl.constexpr = C.vector
    CARRIED: tl.constexpr = C.carried
    KERNEL_ROWS: tl.constexpr = C.kernel_rows
    EACH: tl.constexpr = C.words if C.words > 0 else C.load_before + C.vector + C.load_after
    rows_best = carried_best
    rows_indices = carried_indices
    for number in tl.static_range(CARRIED, KERNEL_ROWS):
        new_best, new_indices = row_maxima(
            loaded, row + number * C.dilation_rows, column, sizes, biases, position, alpha, beta, k, scale,
            (number - CARRIED) * C.kernel_columns * EACH, number * C.kernel_columns, C,
        )  # fmt: skip
        rows_best = rows_best + new_best
        rows_indices = rows_indices + new_indices
    next_best = ()
    next_indices = ()
    for number in tl.static_range(CARRIED * V):
        one_best = rows_best[C.stride_rows * V + number]
        one_index = rows_indices[C.stride_rows * V + number]
        next_best = next_best + (one_best,)
        next_indices = next_indices + (one_index - C.stride_rows * C.kernel_columns,)
    first = first_index(row, column, C)
    best = ()
    indices = ()
    for channel in tl.static_range(V):
        largest = rows_best[channel]
        index = rows_indices[channel]
        if C.keys:
            for number in tl.static_range(1, KERNEL_ROWS):
                below = rows_best[number * V + channel]
                if C.save:
                    below -= number * C.kernel_columns
                largest = tl.maximum(largest, below)
            if C.save:
                index = 15 - (largest & 15)
                largest = largest & -16
            largest = largest.to(tl.float32, bitcast=True)
        else:
            if C.pool and not C.inside:
                index = tl.where((largest > -float("inf")) | (largest != largest), index, first)
            for number in tl.static_range(1, KERNEL_ROWS):
                value = rows_best[number * V + channel]
                larger = beats(value, largest)
                largest = tl.where(larger, value, largest)
                index = tl.where(larger, rows_indices[number * V + channel], index)
        best = best + (largest,)
        indices = indices + (index,)
    return best, indices, next_best, next_indices


@triton.jit
def window_maxima_by_loop(
    input,
    row,
    column,
    sizes,
    row_stride,
    channel_stride,
    biases,
    position,
    mask,
    alpha,
    beta,
    k,
    scale,
    C: tl.constexpr,
):
    """A window's maxima and argmax indices, with its elements loaded one by one."""
    V: tl.constexpr = C.vector
    COUNT: tl.constexpr = C.load_before + C.vector + C.load_after
    first = first_index(row, column, C)
    best = ()
    indices = ()
    for _ in tl.static_range(V):
        best = best + (tl.full(position.shape, -float("inf"), tl.float32),)
        indices = indices + (first,)
    for element in tl.range(0, C.kernel_rows * C.kernel_columns):
        down = element // C.kernel_columns * C.dilation_rows
        right = element % C.kernel_columns * C.dilation_columns
        inside = mask & inside_image(row + down, column + right, sizes.rows, sizes.columns)
        values = load_channels(
            input + down * row_stride + right.to(tl.int64) * C.pixel_stride, channel_stride, position, sizes.group,
            inside, V, C.load_before, C.load_after, C.words,
        )  # fmt: skip
        values = normalized(floats(values, 0, COUNT, C.words), biases, position, alpha, beta, k, scale, C)
        new_best = ()
        new_indices = ()
        for number in tl.static_range(V):
            larger = inside & beats(values[number], best[number])
            new_best = new_best + (tl.where(larger, values[number], best[number]),)
            new_indices = new_indices + (tl.where(larger, element, indices[number]),)
        best = new_best
        indices = new_indices
    return best, indices


@triton.jit
def store_window(output, offsets, best, indices, factor, mask, C: tl.constexpr):
    """Store a window's maxima and, if wanted, their argmax indices."""
    V: tl.constexpr = C.vector
    if C.fold:
        # Undo the square, the scale and the missing factor.
        folded = best
        best = ()
        for number in tl.static_range(V):
            value = tl.sqrt(folded[number]) if C.squared else folded[number]
            best = best + (value * factor,)
    store_channels(output, best, mask, V)
    if C.save:
        store_channels(offsets, indices, mask, V)


@triton.jit(do_not_specialize=["strips", "segments", "segment_rows", "sizes"])
def forward_kernel(
    input,
    bias,
    output,
    offsets,
    strips,
    segments,
    segment_rows,
    sizes,
    strides,
    out_strides,
    alpha,
    factor,
    beta,
    k,
    scale,
    C: tl.constexpr,
):
    image, out_column, segment, channel, position, mask = unit_of_lane(strips, segments, sizes.out_columns, sizes, C)
    out_row = segment * segment_rows
    steps = tl.minimum(segment_rows, sizes.out_rows - out_row)
    row = out_row * C.stride_rows - C.padding_rows
    column = out_column * C.stride_columns - C.padding_columns
    # Promote strides to int64.
    row_stride = tl.zeros((), tl.int64) + strides.row
    channel_stride = tl.zeros((), tl.int64) + strides.channel
    out_row_stride = tl.zeros((), tl.int64) + out_strides.row
    input += image * strides.image + row * row_stride + column.to(tl.int64) * C.pixel_stride
    input += channel.to(tl.int64) * channel_stride
    place = image * out_strides.image + out_row * out_row_stride + out_column.to(tl.int64) * C.out_pixel_stride
    place += channel.to(tl.int64) * out_strides.channel
    output += place
    if C.save:
        offsets += place
    V: tl.constexpr = C.vector
    CARRIED: tl.constexpr = C.carried
    KERNEL_ROWS: tl.constexpr = C.kernel_rows
    COUNT: tl.constexpr = C.load_before + C.vector + C.load_after
    biases = ()
    if C.bias:
        loaded_bias = load_channels(bias + channel, 1, position, sizes.group, mask, V, C.load_before, C.load_after, 0)
        biases = floats(loaded_bias, 0, COUNT, 0)
    carried_best = ()
    carried_indices = ()
    if C.unrolled:
        for number in tl.static_range(CARRIED):
            row_loaded = load_row(
                input + number * row_stride, row + number, column, sizes, channel_stride, position, mask, C
            )
            row_best, row_indices = row_maxima(
                row_loaded, row + number, column, sizes, biases, position, alpha, beta, k, scale, 0,
                number * C.kernel_columns, C,
            )  # fmt: skip
            carried_best = carried_best + row_best
            carried_indices = carried_indices + row_indices
    # Rows are loaded one step ahead, because load latency exceeds what the other warps can hide. They go to shared
    # memory, because in registers they would leave room for fewer warps.
    for _ in tl.range(0, steps, num_stages=2):
        if C.unrolled:
            loaded = ()
            for number in tl.static_range(CARRIED, KERNEL_ROWS):
                loaded = loaded + load_row(
                    input + number * C.dilation_rows * row_stride, row + number * C.dilation_rows, column, sizes,
                    channel_stride, position, mask, C,
                )  # fmt: skip
            # Always true: a window begins in the image or before it. But Triton schedules code that follows a condition
            # after the loads for the next step. Without a condition, it puts those loads last, and the next step begins
            # by waiting for them. Without argmax indices the condition would cost 24 registers.
            here = row < sizes.rows if C.save else True
            if here:
                best, indices, carried_best, carried_indices = window_maxima(
                    loaded, carried_best, carried_indices, row, column, sizes, biases, position, alpha, beta, k, scale,
                    C,
                )  # fmt: skip
                store_window(output, offsets, best, indices, factor, mask, C)
        else:
            best, indices = window_maxima_by_loop(
                input, row, column, sizes, row_stride, channel_stride, biases, position, mask, alpha, beta, k, scale, C
            )
            store_window(output, offsets, best, indices, factor, mask, C)
        row += C.stride_rows
        # Always true while there are steps left, but the compiler does not know this. If it did, it would keep an
        # address in registers for each access, leaving room for fewer warps.
        more = row < sizes.rows
        input += tl.where(more, C.stride_rows * row_stride, 0)
        output += tl.where(more, out_row_stride, 0)
        if C.save:
            offsets += tl.where(more, out_row_stride, 0)
