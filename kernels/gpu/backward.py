"""The Triton kernel of the chain backward; see :mod:`kernels.gpu.launch`.

Programs, units and lanes are as in :mod:`kernels.gpu.forward`. A unit computes columns of tiles of ``TILE_ROWS`` by
``TILE_COLUMNS`` input pixels, and walks down the rows of its segment of the image.
"""

import triton
import triton.language as tl

from .functions import (
    SIZES,
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
    group,
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
    POSITIVE: tl.constexpr,
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
        if V == 1 and not POSITIVE:
            # Without a positive ``k`` the share of a channel outside the group is 0 / 0.
            within = ()
            for number in tl.static_range(COUNT):
                place = position + (number - AFTER)
                within = within + (tl.where((place >= 0) & (place < group), shares[number], 0.0),)
            shares = within
        shares = with_neighbours(shares, position // V, G, V, AHEAD, BEHIND, SPARE)
        sums_of_shares = window_sums(shares, factor, 0.0, V, BEHIND + AHEAD + 1)
        for number in tl.static_range(V):
            activation = a[HALO + number]
            value = direct[AFTER + number] - activation * sums_of_shares[number]
            if RELU:
                # Not positive before the ReLU is zero behind it. Told by its bits, what was before is not kept for it.
                value = tl.where(activation.to(tl.int32, bitcast=True) == 0, 0.0, value)
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
        db, loaded, biases, position, group, alpha, factor, beta, k, TILE * EACH, G, V, BIAS, RELU, BEHIND, AHEAD,
        NORMALIZE, THREE_QUARTERS, SPARE, POSITIVE, WORDS,
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


@triton.jit(do_not_specialize=[*SIZES, "tile_rows", "tile_columns"])
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
    CHANNEL_BLOCKS: tl.constexpr,
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
    image, tile_column, segment, channel, position, mask = unit_of_lane(
        strips, segments, tile_columns, channels, group, CHANNEL_BLOCKS, L, G, UNITS, V
    )
    # Rows and columns from the padding's first.
    first_column = tile_column * TILE_COLUMNS
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
            # Whether the pixel's row is in the image, in words that differ from pixel to pixel: behind conditions of
            # their own the assembler does not mix the pixels' arithmetic, which takes fewer registers, and Triton puts
            # the loads for the next step before it.
            right = tile % TILE_COLUMNS
            if (row + tile // TILE_COLUMNS + right).to(tl.uint32) < rows.to(tl.uint32) + right:
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
        # This always holds while there are steps, which the compiler does not know: see ``forward.py``.
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
            place = (channel + number) * (tl.num_programs(0) // CHANNEL_BLOCKS)
            tl.store(sums + place + tl.program_id(0) // CHANNEL_BLOCKS, total, mask=mask & (lane < G))
