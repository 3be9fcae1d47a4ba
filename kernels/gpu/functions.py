"""Device functions of the chain's kernels: lanes and their work, channels in registers, window sums, powers.

A lane holds ``C.vector`` neighbouring channels of a pixel, as a tuple of that many values. With a vector of 8 and
channels_last memory, they come from one load of 8 channels (16 bytes in half types), which is unpacked in registers;
the other channels of a window come from the neighbouring lanes. With a vector of 1, each channel is loaded separately,
which works for any memory format and number of channels.

Arithmetic is float32. The GPU's approximate reciprocal square root, square root, logarithm and exponential are each
within two units in the last place.

``C`` is a :class:`kernels.gpu.config.Config`. Under Triton 3.6 its fields are plain numbers inside a kernel, so an
argument of ``tl.static_range`` must be bound to a ``tl.constexpr`` first.
"""

import triton
import triton.language as tl


@triton.jit
def unit_of_lane(strips, segments, columns, sizes, C: tl.constexpr):
    """The work of each lane.

    Returns:
        its image, strip (a column of windows or tiles), segment of rows, first channel, that channel's index in its
        group, and a mask of the lanes that have work.
    """
    program = tl.program_id(0)
    # Neighbouring programs read neighbouring channels of the same pixels.
    segment = program // C.channel_blocks % segments
    lane = tl.arange(0, C.lanes)
    block = program // C.channel_blocks // segments
    # A 64-bit division takes ten times the instructions of a 32-bit one.
    if strips.dtype == tl.int64:
        strip = block.to(tl.int64) * C.units + lane // C.unit_lanes
    else:
        strip = block.to(tl.uint32) * C.units + (lane // C.unit_lanes).to(tl.uint32)
        strips = strips.to(tl.uint32)
        columns = tl.cast(columns, tl.uint32)
    channel = (program % C.channel_blocks * C.unit_lanes + lane % C.unit_lanes) * C.vector
    mask = (lane < C.unit_lanes * C.units) & (strip < strips) & (channel < sizes.channels)
    # Idle lanes repeat another lane's work and do not store it.
    if C.vector == 1:
        channel = tl.minimum(channel, sizes.channels - 1)
        position = channel % sizes.group
    else:
        # With a normalization, the lanes of a unit are those of a channel group; without, the index is not used.
        position = lane % C.unit_lanes * C.vector
    strip = tl.minimum(strip, strips - 1)
    return (strip // columns).to(tl.int64), (strip % columns).to(tl.int32), segment, channel, position, mask


@triton.jit
def inside_rows(row, column, rows):
    """Whether the scalar ``row`` lies inside the image, as a per-lane mask: the interpreter has no scalar masks."""
    # As an unsigned number, a negative row is larger than any size.
    return (column * 0 + row).to(tl.uint32) < tl.cast(rows, tl.uint32)


@triton.jit
def inside_columns(column, columns):
    """Whether columns lie inside the image."""
    return column.to(tl.uint32) < tl.cast(columns, tl.uint32)


@triton.jit
def inside_image(row, column, rows, columns):
    """Whether pixels lie inside the image."""
    return inside_rows(row, column, rows) & inside_columns(column, columns)


@triton.jit
def unpack(vectors):
    """``[A, 8]`` as eight ``[A]``, in order."""
    even, odd = tl.split(tl.reshape(vectors, (vectors.shape[0], 4, 2)))
    even0, even1 = tl.split(tl.reshape(even, (vectors.shape[0], 2, 2)))
    odd0, odd1 = tl.split(tl.reshape(odd, (vectors.shape[0], 2, 2)))
    v0, v4 = tl.split(even0)
    v2, v6 = tl.split(even1)
    v1, v5 = tl.split(odd0)
    v3, v7 = tl.split(odd1)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def pack(values):
    """The inverse of :func:`unpack`."""
    shape: tl.constexpr = (values[0].shape[0], 4)
    even = tl.reshape(tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[6])), shape)
    odd = tl.reshape(tl.join(tl.join(values[1], values[5]), tl.join(values[3], values[7])), shape)
    return tl.reshape(tl.join(even, odd), (values[0].shape[0], 8))


@triton.jit
def load_channels(
    pointer,
    step,
    position,
    group,
    mask,
    V: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Load ``V`` channels from each ``pointer``, ``step`` elements apart; with ``V`` of 1, also the channels around it.

    Returns:
        a tuple that :func:`floats` or :func:`equal` unpack on use: ``WORDS`` aligned 32-bit words of several channels
        each or, if ``WORDS`` is 0, ``BEFORE + V + AFTER`` channels. The first channel has index ``position`` in
        ``group``. Values are zero outside the group and in lanes whose mask is not set.
    """
    if WORDS > 0:
        words = pointer.to(tl.pointer_type(tl.int32), bitcast=True)[:, None] + tl.arange(0, WORDS)[None, :]
        loaded = tl.load(words, mask=mask[:, None], other=0)
        if WORDS == 2:
            return tl.split(loaded)
        else:
            even, odd = tl.split(tl.reshape(loaded, (loaded.shape[0], 2, 2)))
            w0, w2 = tl.split(even)
            w1, w3 = tl.split(odd)
            return w0, w1, w2, w3
    elif V == 8:
        places = pointer[:, None] + tl.arange(0, 8)[None, :]
        return unpack(tl.load(places, mask=mask[:, None], other=0))
    else:
        values = (tl.load(pointer, mask=mask, other=0),)
        for number in tl.static_range(1, BEFORE + 1):
            values = (tl.load(pointer - number * step, mask=mask & (position >= number), other=0),) + values
        for number in tl.static_range(1, AFTER + 1):
            values = values + (tl.load(pointer + number * step, mask=mask & (position + number < group), other=0),)
        return values


@triton.jit
def floats(loaded, FIRST: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr):
    """``COUNT`` channels in float32 from the loaded values, starting at ``loaded[FIRST]``."""
    result = ()
    if WORDS > 0:
        # bfloat16 is the upper half of a float32, so this is one instruction per channel.
        for number in tl.static_range(WORDS):
            pair = loaded[FIRST + number]
            result = result + ((pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True))
    else:
        for number in tl.static_range(COUNT):
            result = result + (loaded[FIRST + number].to(tl.float32),)
    return result


@triton.jit
def equal(loaded, number, FIRST: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr):
    """Which of ``COUNT`` loaded integers, starting at ``loaded[FIRST]``, equal ``number``.

    If packed in words, they are bytes; then they and ``number``, a compile-time constant, must be below 128.
    """
    result = ()
    if WORDS > 0:
        for word in tl.static_range(WORDS):
            # A byte keeps its highest bit where the difference is zero: testing one bit is one instruction.
            bits = 0x80808080 - (loaded[FIRST + word].to(tl.uint32, bitcast=True) ^ (number * 0x01010101))
            for byte in tl.static_range(COUNT // WORDS):
                result = result + ((bits & (0x80 << (8 * byte))) != 0,)
    else:
        for index in tl.static_range(COUNT):
            result = result + (loaded[FIRST + index].to(tl.int32) == number,)
    return result


@triton.jit
def store_channels(pointer, values, mask, V: tl.constexpr):
    """Store ``V`` channels, rounded to the tensor's type."""
    if V == 8:
        places = pointer[:, None] + tl.arange(0, 8)[None, :]
        tl.store(places, pack(values).to(pointer.dtype.element_ty), mask=mask[:, None])
    else:
        tl.store(pointer, values[0].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def with_neighbours(values, vector, BEFORE: tl.constexpr, AFTER: tl.constexpr, SPARE: tl.constexpr, C: tl.constexpr):
    """A lane's ``values``, the last ``BEFORE`` of the lane before it and the first ``AFTER`` of the lane after it.

    Zeros outside the channel group. With a vector of 1 the neighbours have been loaded already.

    Args:
        values: a tuple, one for each channel.
        vector: each lane's index among the ``C.unit_lanes`` lanes of its group.
        SPARE: whether the last lane is idle with zeros as values; it then stands for the channels outside the group.
    """
    if C.vector == 8:
        lane = tl.arange(0, vector.shape[0])
        last: tl.constexpr = vector.shape[0] - 1
        lower = tl.where(vector > 0, lane - 1, last if SPARE else lane)
        upper = tl.minimum(tl.where(vector < C.unit_lanes - 1, lane + 1, last if SPARE else lane), last)
        result = values
        # Use bit masks, not conditions: with two more of the seven predicate registers live across iterations, the
        # assembler serializes the instructions of the eight channels instead of interleaving them.
        lowest = -tl.minimum(vector, 1)
        highest = -tl.minimum(C.unit_lanes - 1 - vector, 1)
        for number in tl.static_range(BEFORE):
            before = tl.gather(values[7 - number], lower, 0)
            if not SPARE:
                before = (before.to(tl.int32, bitcast=True) & lowest).to(tl.float32, bitcast=True)
            result = (before,) + result
        for number in tl.static_range(AFTER):
            after = tl.gather(values[number], upper, 0)
            if not SPARE:
                after = (after.to(tl.int32, bitcast=True) & highest).to(tl.float32, bitcast=True)
            result = result + (after,)
        return result
    else:
        return values


@triton.jit
def activations(values, biases, COUNT: tl.constexpr, C: tl.constexpr):
    """``relu(value + bias)`` of ``COUNT`` channels in float32; bias and ReLU only if the chain has them."""
    result = ()
    for number in tl.static_range(COUNT):
        value = values[number]
        if C.bias:
            value += biases[number]
        if C.relu:
            # NaN propagates.
            value = tl.where(value <= 0, 0.0, value)
        result = result + (value,)
    return result


@triton.jit
def window_sums(values, factor, addend, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """``addend + factor * sum`` of each of ``COUNT`` windows of ``SIZE`` neighbours."""
    result = ()
    if SIZE == 5 and COUNT % 2 == 0:
        # Two neighbouring windows share four of their five values.
        for number in tl.static_range(0, COUNT, 2):
            common = (values[number + 1] + values[number + 2]) + (values[number + 3] + values[number + 4])
            common = addend + factor * common
            result = result + (common + factor * values[number], common + factor * values[number + 5])
    else:
        for number in tl.static_range(COUNT):
            total = values[number]
            for other in tl.static_range(1, SIZE):
                total += values[number + other]
            result = result + (addend + factor * total,)
    return result


@triton.jit
def sums_of_squares(values, addend, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """``addend`` plus the sum of squares, for each of ``COUNT`` windows of ``SIZE`` neighbours."""
    result = ()
    if SIZE == 5 and COUNT % 2 == 0:
        # As in window_sums; in addition, two such sums share a pair of squares plus half of the addend.
        half = 0.5 * addend
        for number in tl.static_range(0, COUNT, 2):
            low = values[number + 1] * values[number + 1] + (values[number + 2] * values[number + 2] + half)
            high = values[number + 3] * values[number + 3] + (values[number + 4] * values[number + 4] + half)
            common = low + high
            first = values[number] * values[number] + common
            result = result + (first, values[number + 5] * values[number + 5] + common)
    else:
        for number in tl.static_range(COUNT):
            total = addend
            for other in tl.static_range(SIZE):
                total += values[number + other] * values[number + other]
            result = result + (total,)
    return result


@triton.jit
def negative_power(base, beta, THREE_QUARTERS: tl.constexpr):
    """``base ** -beta`` for a positive base; the paper's 0.75 takes two of the GPU's special functions."""
    if THREE_QUARTERS:
        root = tl.rsqrt(base)
        return root * tl.sqrt(root)
    else:
        return tl.exp2(-beta * tl.log2(base))
