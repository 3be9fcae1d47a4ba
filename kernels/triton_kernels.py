"""The two Triton kernels behind every operator: the chain forward, and backward; see :mod:`kernels.triton_stage`.

Each lane computes ``V`` neighbouring channels of one output pixel forward, of one input pixel backward. Parts of the
chain that are missing are left out when a kernel is compiled.
"""

import triton
import triton.language as tl

from .registers import activations, load_channels, negative_power, scales, store_channels


@triton.jit
def element_taken(
    element,
    best,
    taken,
    input,
    biases,
    image_base,
    first_row,
    first_column,
    rows,
    columns,
    pixel_stride,
    channel,
    channel_stride,
    position,
    group,
    mask,
    alpha,
    beta,
    k,
    V: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    POOL: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    DILATION_ROWS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
):
    """Take an element of every window into account: the largest values so far, and the numbers of their elements."""
    row = first_row + element // KERNEL_COLUMNS * DILATION_ROWS
    column = first_column + element % KERNEL_COLUMNS * DILATION_COLUMNS
    inside = mask & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    base = image_base + (row.to(tl.int64) * columns + column) * pixel_stride
    a = activations(input, biases, base, channel, channel_stride, position, group, inside, V, BEHIND, AHEAD, BIAS, RELU)
    if NORMALIZE:
        s = scales(a, alpha, k, V, BEHIND + AHEAD + 1)
    new_best = ()
    new_taken = ()
    for number in tl.static_range(V):
        value = a[BEHIND + number]
        if NORMALIZE:
            value = value * negative_power(s[number], beta, THREE_QUARTERS)
        if POOL:
            # The last of several that are not a number, the first of several that are equal: PyTorch's choice.
            larger = inside & ((value > best[number]) | (value != value))
            new_best = new_best + (tl.where(larger, value, best[number]),)
            new_taken = new_taken + (tl.where(larger, element, taken[number]),)
        else:
            new_best = new_best + (value,)
    return new_best, new_taken


@triton.jit
def forward_kernel(
    input,
    bias,
    output,
    offsets,
    pixels,
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
    beta,
    k,
    V: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    POOL: tl.constexpr,
    SAVE: tl.constexpr,
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    STRIDE_ROWS: tl.constexpr,
    STRIDE_COLUMNS: tl.constexpr,
    PADDING_ROWS: tl.constexpr,
    PADDING_COLUMNS: tl.constexpr,
    DILATION_ROWS: tl.constexpr,
    DILATION_COLUMNS: tl.constexpr,
    UNROLLED: tl.constexpr,
    PIXELS: tl.constexpr,
    LANES: tl.constexpr,
):
    pixel = (tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS))[:, None]
    channel = ((tl.program_id(1) * LANES + tl.arange(0, LANES)) * V)[None, :]
    mask = (pixel < pixels) & (channel < channels)
    position = channel % group
    image = pixel // (out_rows * out_columns)
    place = pixel % (out_rows * out_columns)
    first_row = (place // out_columns).to(tl.int32) * STRIDE_ROWS - PADDING_ROWS
    first_column = (place % out_columns).to(tl.int32) * STRIDE_COLUMNS - PADDING_COLUMNS
    image_base = image * image_stride
    # The same for every pixel: read once.
    biases = ()
    if BIAS:
        biases = load_channels(bias, channel * 0, channel, 1, position, group, mask, V, BEHIND, AHEAD)
    zero = tl.zeros([PIXELS, LANES], tl.float32)
    best = ()
    taken = ()
    if POOL:
        # The first element that is no padding is the largest of a window of nothing but minus infinity.
        skipped_rows = tl.maximum((DILATION_ROWS - 1 - first_row) // DILATION_ROWS, 0)
        skipped_columns = tl.maximum((DILATION_COLUMNS - 1 - first_column) // DILATION_COLUMNS, 0)
        first = tl.broadcast_to(skipped_rows * KERNEL_COLUMNS + skipped_columns, [PIXELS, LANES])
        for _ in tl.static_range(V):
            best = best + (zero - float("inf"),)
            taken = taken + (first,)
    if KERNEL_ROWS * KERNEL_COLUMNS <= UNROLLED:
        for element in tl.static_range(KERNEL_ROWS * KERNEL_COLUMNS):
            best, taken = element_taken(
                element, best, taken, input, biases, image_base, first_row, first_column, rows, columns, pixel_stride,
                channel, channel_stride, position, group, mask, alpha, beta, k, V, BIAS, RELU, BEHIND, AHEAD,
                NORMALIZE, THREE_QUARTERS, POOL, KERNEL_COLUMNS, DILATION_ROWS, DILATION_COLUMNS,
            )  # fmt: skip
    else:
        for element in tl.range(KERNEL_ROWS * KERNEL_COLUMNS):
            best, taken = element_taken(
                element, best, taken, input, biases, image_base, first_row, first_column, rows, columns, pixel_stride,
                channel, channel_stride, position, group, mask, alpha, beta, k, V, BIAS, RELU, BEHIND, AHEAD,
                NORMALIZE, THREE_QUARTERS, POOL, KERNEL_COLUMNS, DILATION_ROWS, DILATION_COLUMNS,
            )  # fmt: skip
    out_base = image * out_image_stride + place * out_pixel_stride
    store_channels(output, out_base, channel, out_channel_stride, best, mask, V)
    if SAVE:
        store_channels(offsets, out_base, channel, out_channel_stride, taken, mask, V)


@triton.jit
def backward_kernel(
    output_gradient,
    input,
    bias,
    output,
    offsets,
    gradient,
    sums,
    pixels,
    rows,
    columns,
    out_rows,
    out_columns,
    channels,
    group,
    image_stride,
    pixel_stride,
    channel_stride,
    gradient_image_stride,
    out_image_stride,
    out_pixel_stride,
    out_channel_stride,
    alpha,
    factor,
    beta,
    k,
    V: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    NORMALIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    POOL: tl.constexpr,
    MASKED: tl.constexpr,
    SUM: tl.constexpr,
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
    PIXELS: tl.constexpr,
    LANES: tl.constexpr,
):
    pixel = (tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS))[:, None]
    channel = ((tl.program_id(1) * LANES + tl.arange(0, LANES)) * V)[None, :]
    mask = (pixel < pixels) & (channel < channels)
    position = channel % group
    image = pixel // (rows * columns)
    place = pixel % (rows * columns)
    # The channels whose windows hold a channel: the window the other way round.
    COUNT: tl.constexpr = AHEAD + V + BEHIND
    db = ()
    for _ in tl.static_range(COUNT):
        db = db + (tl.zeros([PIXELS, LANES], tl.float32),)
    row = (place // columns).to(tl.int32) + PADDING_ROWS
    column = (place % columns).to(tl.int32) + PADDING_COLUMNS
    # From the last window to the first an element's gradients would be added in the other order than PyTorch's.
    for over in tl.static_range(OVER_ROWS * OVER_COLUMNS):
        out_row = row // STRIDE_ROWS - (OVER_ROWS - 1 - over // OVER_COLUMNS)
        out_column = column // STRIDE_COLUMNS - (OVER_COLUMNS - 1 - over % OVER_COLUMNS)
        inside_row = row - out_row * STRIDE_ROWS
        inside_column = column - out_column * STRIDE_COLUMNS
        holds = mask & (out_row >= 0) & (out_row < out_rows) & (out_column >= 0) & (out_column < out_columns)
        holds = holds & (inside_row < KERNEL_ROWS * DILATION_ROWS) & (inside_column < KERNEL_COLUMNS * DILATION_COLUMNS)
        holds = holds & (inside_row % DILATION_ROWS == 0) & (inside_column % DILATION_COLUMNS == 0)
        out_base = image * out_image_stride + (out_row.to(tl.int64) * out_columns + out_column) * out_pixel_stride
        parts = load_channels(
            output_gradient, out_base, channel, out_channel_stride, position, group, holds, V, AHEAD, BEHIND
        )
        if POOL:
            taken = load_channels(
                offsets, out_base, channel, out_channel_stride, position, group, holds, V, AHEAD, BEHIND
            )
            element = inside_row // DILATION_ROWS * KERNEL_COLUMNS + inside_column // DILATION_COLUMNS
        if MASKED:
            outputs = load_channels(
                output, out_base, channel, out_channel_stride, position, group, holds, V, AHEAD, BEHIND
            )
        added = ()
        for number in tl.static_range(COUNT):
            part = parts[number].to(tl.float32)
            if POOL:
                part = tl.where(holds & (taken[number].to(tl.int32) == element), part, 0.0)
            if MASKED:
                part = tl.where(outputs[number].to(tl.float32) <= 0, 0.0, part)
            added = added + (db[number] + part,)
        db = added
    base = image * image_stride + place * pixel_stride
    result = ()
    if NORMALIZE:
        HALO: tl.constexpr = BEHIND + AHEAD
        biases = ()
        if BIAS:
            biases = load_channels(bias, channel * 0, channel, 1, position, group, mask, V, HALO, HALO)
        a = activations(input, biases, base, channel, channel_stride, position, group, mask, V, HALO, HALO, BIAS, RELU)
        s = scales(a, alpha, k, COUNT, HALO + 1)
        powers = ()
        shares = ()
        for number in tl.static_range(COUNT):
            power = negative_power(s[number], beta, THREE_QUARTERS)
            powers = powers + (power,)
            shares = shares + (db[number] * a[BEHIND + number] * power / s[number],)
        for number in tl.static_range(V):
            total = shares[number]
            for other in tl.static_range(1, HALO + 1):
                total += shares[number + other]
            own = a[HALO + number]
            value = db[AHEAD + number] * powers[AHEAD + number] - factor * own * total
            if RELU:
                value = tl.where(own <= 0, 0.0, value)
            result = result + (value,)
    else:
        for number in tl.static_range(V):
            result = result + (db[AHEAD + number],)
    store_channels(
        gradient, image * gradient_image_stride + place * pixel_stride, channel, channel_stride, result, mask, V
    )
    if SUM:
        for number in tl.static_range(V):
            column_sum = tl.sum(tl.where(mask, result[number], 0.0), 0)
            lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
            there = sums + tl.program_id(0).to(tl.int64) * channels + lane * V + number
            tl.store(there, column_sum, mask=lane * V + number < channels)
