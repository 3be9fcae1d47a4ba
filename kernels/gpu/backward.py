"""The Triton kernel for the chain's backward; see :mod:`kernels.gpu.launch`.

Programs, units and lanes are as in :mod:`kernels.gpu.forward`. A unit computes one column of tiles of ``C.tile_rows``
by ``C.tile_columns`` input pixels, walking down the rows of its segment of the image.

If neighbouring channels are needed, the channel window is mirrored: the gradient of a channel depends on the channels
whose windows contain it.
"""

import triton
import triton.language as tl

from .functions import (
    activations,
    equal,
    floats,
    inside_columns,
    inside_image,
    inside_rows,
    load_channels,
    negative_power,
    store_channels,
    unit_of_lane,
    window_sums,
    with_neighbours,
)


@triton.jit
def load_windows(
    output_gradient,
    output,
    offsets,
    last_row,
    last_column,
    sizes,
    out_row_stride,
    out_channel_stride,
    position,
    mask,
    C: tl.constexpr,
):
    """Loads the data of the windows over a tile, up to the last: gradients, outputs, argmax indices.

    Where there is no such window, these are zeros, which add nothing.
    """
    WINDOWS: tl.constexpr = C.over_rows * C.over_columns
    gradients = ()
    outputs = ()
    indices = ()
    for over in tl.static_range(WINDOWS):
        up = C.over_rows - 1 - over // C.over_columns
        left = C.over_columns - 1 - over % C.over_columns
        there = mask & inside_image(last_row - up, last_column - left, sizes.out_rows, sizes.out_columns)
        place = -up * out_row_stride - left * C.out_pixel_stride
        gradients = gradients + load_channels(
            output_gradient + place, out_channel_stride, position, sizes.group, there, C.vector, C.load_after,
            C.load_before, C.words,
        )  # fmt: skip
        if C.pool:
            indices = indices + load_channels(
                offsets + place, out_channel_stride, position, sizes.group, there, C.vector, C.load_after,
                C.load_before, C.offset_words,
            )  # fmt: skip
        if C.masked:
            outputs = outputs + load_channels(
                output + place,
                out_channel_stride,
                position,
                sizes.group,
                there,
                C.vector,
                C.load_after,
                C.load_before,
                C.words,
            )
    return gradients, outputs, indices


@triton.jit
def load_tile(pointer, first_row, first_column, sizes, row_stride, channel_stride, position, mask, C: tl.constexpr):
    """Loads a tile's input pixels; zeros outside the image."""
    PIXELS: tl.constexpr = C.tile_rows * C.tile_columns
    HALO: tl.constexpr = C.load_before + C.load_after
    loaded = ()
    for tile in tl.static_range(PIXELS):
        inside = mask & inside_rows(first_row + tile // C.tile_columns, first_column, sizes.rows)
        if tile % C.tile_columns + C.padding_columns > 0:
            inside = inside & inside_columns(first_column + tile % C.tile_columns, sizes.columns)
        place = tile // C.tile_columns * row_stride + tile % C.tile_columns * C.pixel_stride
        loaded = loaded + load_channels(
            pointer + place, channel_stride, position, sizes.group, inside, C.vector, HALO, HALO, C.words
        )
    return loaded


@triton.jit
def with_window(
    db,
    gradients,
    outputs,
    indices,
    index,
    FIRST: tl.constexpr,
    FIRST_INDEX: tl.constexpr,
    INDEX_WORDS: tl.constexpr,
    C: tl.constexpr,
):
    """Adds to ``db`` of a pixel the gradients of one window over it, if the pixel, at ``index``, is the maximum.

    The window's gradients begin at ``gradients[FIRST]``, its argmax indices at ``indices[FIRST_INDEX]``.
    """
    COUNT: tl.constexpr = C.load_after + C.vector + C.load_before
    parts = floats(gradients, FIRST, COUNT, C.words)
    if C.masked:
        masks = floats(outputs, FIRST, COUNT, C.words)
    if C.pool:
        taken = equal(indices, index, FIRST_INDEX, COUNT, INDEX_WORDS)
    added = ()
    for number in tl.static_range(COUNT):
        part = parts[number]
        if C.masked:
            part = tl.where(masks[number] <= 0, 0.0, part)
        part = db[number] + part
        if C.pool:
            part = tl.where(taken[number], part, db[number])
        added = added + (part,)
    return added


@triton.jit
def pooled_gradient(gradients, outputs, indices, DOWN: tl.constexpr, RIGHT: tl.constexpr, C: tl.constexpr):
    """The gradient before pooling, ``DOWN`` rows and ``RIGHT`` columns from the first pixel of the last window."""
    COUNT: tl.constexpr = C.load_after + C.vector + C.load_before
    WINDOWS: tl.constexpr = C.over_rows * C.over_columns
    EACH: tl.constexpr = C.words if C.words > 0 else COUNT
    INDEX_EACH: tl.constexpr = C.offset_words if C.offset_words > 0 else COUNT
    # Minus zero, which a compiler may drop from a sum.
    db = ()
    for _ in tl.static_range(COUNT):
        db = db + (tl.full(gradients[0].shape, -0.0, tl.float32),)
    # In the order of the windows, like PyTorch.
    for over in tl.static_range(WINDOWS):
        down = (C.over_rows - 1 - over // C.over_columns) * C.stride_rows + DOWN
        right = (C.over_columns - 1 - over % C.over_columns) * C.stride_columns + RIGHT
        if (
            down % C.dilation_rows == 0
            and right % C.dilation_columns == 0
            and down < C.kernel_rows * C.dilation_rows
            and right < C.kernel_columns * C.dilation_columns
        ):
            index = down // C.dilation_rows * C.kernel_columns + right // C.dilation_columns
            db = with_window(db, gradients, outputs, indices, index, over * EACH, over * INDEX_EACH, C.offset_words, C)
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
    sizes,
    out_row_stride,
    out_channel_stride,
    position,
    mask,
    C: tl.constexpr,
):
    """The same, with windows loaded one by one; ``row`` and ``column`` count from the start of the padding."""
    V: tl.constexpr = C.vector
    COUNT: tl.constexpr = C.load_after + C.vector + C.load_before
    db = ()
    for _ in tl.static_range(COUNT):
        db = db + (tl.full(position.shape, -0.0, tl.float32),)
    for over in tl.range(0, C.over_rows * C.over_columns):
        window_row = out_row - (C.over_rows - 1 - over // C.over_columns)
        window_column = out_column - (C.over_columns - 1 - over % C.over_columns)
        down = row - window_row * C.stride_rows
        right = column - window_column * C.stride_columns
        place = (window_column - out_column).to(tl.int64) * C.out_pixel_stride - (out_row - window_row) * out_row_stride
        holds = mask & inside_image(window_row, window_column, sizes.out_rows, sizes.out_columns)
        holds = holds & (right * 0 + down % C.dilation_rows == 0)
        holds = holds & (right * 0 + down < C.kernel_rows * C.dilation_rows)
        holds = holds & (right % C.dilation_columns == 0) & (right < C.kernel_columns * C.dilation_columns)
        gradients = load_channels(
            output_gradient + place,
            out_channel_stride,
            position,
            sizes.group,
            holds,
            V,
            C.load_after,
            C.load_before,
            C.words,
        )
        indices = ()
        if C.pool:
            indices = load_channels(
                offsets + place, out_channel_stride, position, sizes.group, holds, V, C.load_after, C.load_before, 0
            )
        outputs = ()
        if C.masked:
            outputs = load_channels(
                output + place,
                out_channel_stride,
                position,
                sizes.group,
                holds,
                V,
                C.load_after,
                C.load_before,
                C.words,
            )
        index = down // C.dilation_rows * C.kernel_columns + right // C.dilation_columns
        db = with_window(db, gradients, outputs, indices, index, 0, 0, 0, C)
    return db


@triton.jit
def input_gradient(db, loaded, biases, position, group, alpha, factor, beta, k, FIRST: tl.constexpr, C: tl.constexpr):
    """The gradient before normalization and ReLU of the pixel at ``loaded[FIRST]``, from the gradient after them."""
    V: tl.constexpr = C.vector
    BEFORE: tl.constexpr = C.load_before
    AFTER: tl.constexpr = C.load_after
    COUNT: tl.constexpr = AFTER + V + BEFORE
    HALO: tl.constexpr = BEFORE + AFTER
    ALL: tl.constexpr = HALO + V + HALO
    SIZE: tl.constexpr = C.before + C.after + 1
    result = ()
    if C.normalize:
        a = floats(loaded, FIRST, ALL, C.words)
        a = activations(a, biases, ALL, C)
        squares = ()
        for number in tl.static_range(ALL):
            squares = squares + (a[number] * a[number],)
        squares = with_neighbours(squares, position // V, C.before, C.after, C.spare, C)
        scales = window_sums(squares, alpha, k, COUNT, SIZE)
        direct = ()
        shares = ()
        for number in tl.static_range(COUNT):
            value = db[number]
            if C.three_quarters:
                root = tl.rsqrt(scales[number])
                value = value * (root * tl.sqrt(root))
                shares = shares + (value * (a[BEFORE + number] * (root * root)),)
            else:
                value = value * negative_power(scales[number], beta, False)
                shares = shares + (value * (a[BEFORE + number] / scales[number]),)
            direct = direct + (value,)
        if V == 1 and not C.positive:
            # Without a positive ``k``, the contribution of a channel outside the group is 0 / 0.
            within = ()
            for number in tl.static_range(COUNT):
                place = position + (number - AFTER)
                within = within + (tl.where((place >= 0) & (place < group), shares[number], 0.0),)
            shares = within
        shares = with_neighbours(shares, position // V, C.after, C.before, C.spare, C)
        sums_of_shares = window_sums(shares, factor, 0.0, V, SIZE)
        for number in tl.static_range(V):
            activation = a[HALO + number]
            value = direct[AFTER + number] - activation * sums_of_shares[number]
            if C.relu:
                # The ReLU's output is zero where its input was not positive. Compare bits, so that the compiler does
                # not keep the input in registers for this comparison.
                value = tl.where(activation.to(tl.int32, bitcast=True) == 0, 0.0, value)
            result = result + (value,)
    else:
        for number in tl.static_range(V):
            result = result + (db[number],)
    return result


@triton.jit
def load_bias(bias, position, group, mask, C: tl.constexpr):
    """The float32 biases of the channels that a pixel's gradient needs; none without normalization."""
    HALO: tl.constexpr = C.load_before + C.load_after
    ALL: tl.constexpr = HALO + C.vector + HALO
    biases = ()
    if C.bias and C.normalize:
        biases = floats(load_channels(bias, 1, position, group, mask, C.vector, HALO, HALO, 0), 0, ALL, 0)
    return biases


@triton.jit
def store_pixel(
    gradient, totals, result, row, column, sizes, gradient_row_stride, mask, TILE: tl.constexpr, C: tl.constexpr
):
    """Store the gradient of pixel number ``TILE`` of a tile; its row must not be below the image.

    Returns the gradient sums so far, including this pixel.
    """
    V: tl.constexpr = C.vector
    DOWN: tl.constexpr = TILE // C.tile_columns
    RIGHT: tl.constexpr = TILE % C.tile_columns
    inside = mask
    if RIGHT + C.padding_columns > 0:
        inside = inside & inside_columns(column + RIGHT, sizes.columns)
    if C.padding_rows > 0:
        inside = inside & inside_rows(row + DOWN, column, sizes.rows)
    place = DOWN * gradient_row_stride + RIGHT * C.gradient_pixel_stride
    store_channels(gradient + place, result, inside, V)
    if C.sum:
        new_totals = ()
        for number in tl.static_range(V):
            part = result[number]
            # Outside the image and in idle lanes this is zero, or 0 / 0 without a positive ``k``.
            if not C.positive:
                part = tl.where(inside, part, 0.0)
            new_totals = new_totals + (totals[number] + part,)
        totals = new_totals
    return totals


@triton.jit(do_not_specialize=["strips", "segments", "segment_rows", "tile_columns", "tile_rows", "sizes"])
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
    tile_rows,
    sizes,
    strides,
    gradient_strides,
    out_strides,
    alpha,
    factor,
    beta,
    k,
    C: tl.constexpr,
):
    image, tile_column, segment, channel, position, mask = unit_of_lane(strips, segments, tile_columns, sizes, C)
    # Rows and columns from the start of the padding.
    first_column = tile_column * C.tile_columns
    first_tile = segment * segment_rows
    steps = tl.minimum(segment_rows, tile_rows - first_tile)
    # Promote strides to int64.
    row_stride = tl.zeros((), tl.int64) + strides.row
    channel_stride = tl.zeros((), tl.int64) + strides.channel
    out_channel_stride = tl.zeros((), tl.int64) + out_strides.channel
    gradient_row_stride = tl.zeros((), tl.int64) + gradient_strides.row
    out_row_stride = tl.zeros((), tl.int64) + out_strides.row
    V: tl.constexpr = C.vector
    LANES: tl.constexpr = C.lanes
    PIXELS: tl.constexpr = C.tile_rows * C.tile_columns
    COUNT: tl.constexpr = C.load_after + C.vector + C.load_before
    EACH: tl.constexpr = C.words if C.words > 0 else COUNT + C.load_before + C.load_after
    bias += channel
    totals = ()
    for _ in tl.static_range(V):
        totals = totals + (tl.zeros([LANES], tl.float32),)
    first_row = first_tile * C.tile_rows
    out_row = first_row // C.stride_rows
    out_column = first_column // C.stride_columns
    channel = channel.to(tl.int64)
    row = first_row - C.padding_rows
    column = first_column - C.padding_columns
    if C.normalize:
        input += image * strides.image + row * row_stride + column.to(tl.int64) * C.pixel_stride
        input += channel * channel_stride
    gradient += image * gradient_strides.image + row * gradient_row_stride
    gradient += column.to(tl.int64) * C.gradient_pixel_stride + channel * gradient_strides.channel
    place = image * out_strides.image + out_row * out_row_stride + out_column.to(tl.int64) * C.out_pixel_stride
    place += channel * out_channel_stride
    output_gradient += place
    if C.pool:
        offsets += place
    if C.masked:
        output += place
    # Loaded one step ahead, because load latency exceeds what the other warps can hide.
    for _ in tl.range(0, steps, num_stages=2):
        loaded = ()
        if C.normalize:
            loaded = load_tile(input, row, column, sizes, row_stride, channel_stride, position, mask, C)
        gradients = ()
        outputs = ()
        indices = ()
        if C.tiled:
            gradients, outputs, indices = load_windows(
                output_gradient, output, offsets, out_row, out_column, sizes, out_row_stride, out_channel_stride,
                position, mask, C,
            )  # fmt: skip
        for tile in tl.static_range(PIXELS):
            # Whether the pixel's row is in the image, written differently for each pixel. With separate conditions,
            # the assembler does not interleave the pixels' arithmetic, which saves registers, and Triton puts the
            # loads for the next step before it.
            right = tile % C.tile_columns
            if (row + tile // C.tile_columns + right).to(tl.uint32) < tl.cast(sizes.rows, tl.uint32) + right:
                if C.tiled:
                    db = pooled_gradient(gradients, outputs, indices, tile // C.tile_columns, tile % C.tile_columns, C)
                else:
                    db = pooled_gradient_by_loop(
                        output_gradient, output, offsets, row + C.padding_rows, first_column, out_row, out_column,
                        sizes, out_row_stride, out_channel_stride, position, mask, C,
                    )  # fmt: skip
                # Reload for each pixel: keeping it in registers would leave room for fewer warps.
                biases = load_bias(bias, position, sizes.group, mask, C)
                result = input_gradient(
                    db, loaded, biases, position, sizes.group, alpha, factor, beta, k, tile * EACH, C
                )
                totals = store_pixel(gradient, totals, result, row, column, sizes, gradient_row_stride, mask, tile, C)
        row += C.tile_rows
        # Always true while there are steps left, which the compiler does not know: see ``forward.py``.
        more = row < sizes.rows
        next_row = out_row + 1 if C.tiled else (row + C.padding_rows) // C.stride_rows
        if C.normalize:
            input += tl.where(more, C.tile_rows * row_stride, 0)
        gradient += tl.where(more, C.tile_rows * gradient_row_stride, 0)
        further = tl.where(more, (next_row - out_row) * out_row_stride, 0)
        output_gradient += further
        if C.pool:
            offsets += further
        if C.masked:
            output += further
        out_row = next_row
    if C.sum:
        # Sum over the units of a program, in order.
        lane = tl.arange(0, C.lanes)
        for number in tl.static_range(V):
            total = totals[number]
            if C.unit_lanes == 1:
                total = tl.where(lane == 0, tl.sum(total, 0), 0.0)
            else:
                for unit in tl.range(1, C.units):
                    other = tl.minimum(lane % C.unit_lanes + unit * C.unit_lanes, C.lanes - 1)
                    total += tl.gather(totals[number], other, 0)
            # One row per channel and one column per program, so that the next sum is contiguous.
            place = (channel + number) * (tl.num_programs(0) // C.channel_blocks)
            tl.store(sums + place + tl.program_id(0) // C.channel_blocks, total, mask=mask & (lane < C.unit_lanes))
