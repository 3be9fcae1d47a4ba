"""Device functions that the Triton kernels share: lanes and their work, channels in registers, window sums, powers.

A lane holds ``V`` neighbouring channels of a pixel as a tuple of ``V`` values. With ``V`` of 8 and channels_last memory
they come from one load of 8 channels, 16 bytes in half types, taken apart in registers, and what a window needs of the
channels before and after comes from the neighbouring lanes. With ``V`` of 1 each channel comes from a load of its own,
for any memory format and number of channels.

Arithmetic is in float32. The approximate reciprocal square root, square root, logarithm and exponential of the GPU are
each within two units in the last place.
"""

import triton
import triton.language as tl

#: Sizes that kernels are compiled for once, whatever they are. Strides tell which accesses are aligned; those between a
#: row's pixels, in channels_last memory the number of channels, are compiled for.
SIZES = [
    "strips",
    "segments",
    "segment_rows",
    "rows",
    "columns",
    "out_rows",
    "out_columns",
    "channels",
    "group",
]


@triton.jit
def unit_of_lane(
    strips,
    segments,
    columns,
    channels,
    group,
    CHANNEL_BLOCKS: tl.constexpr,
    L: tl.constexpr,
    G: tl.constexpr,
    UNITS: tl.constexpr,
    V: tl.constexpr,
):
    """Each lane's image and strip of columns in it, segment of rows, first channel, its place in its group, and mask.

    The mask is set where there is work to do.
    """
    program = tl.program_id(0)
    # Neighbouring programs read neighbouring channels of the same pixels.
    segment = program // CHANNEL_BLOCKS % segments
    lane = tl.arange(0, L)
    block = program // CHANNEL_BLOCKS // segments
    # A division of 64 bits takes ten times the instructions of one of 32.
    if strips.dtype == tl.int64:
        strip = block.to(tl.int64) * UNITS + lane // G
    else:
        strip = block.to(tl.uint32) * UNITS + (lane // G).to(tl.uint32)
        strips = strips.to(tl.uint32)
        columns = columns.to(tl.uint32)
    channel = (program % CHANNEL_BLOCKS * G + lane % G) * V
    mask = (lane < G * UNITS) & (strip < strips) & (channel < channels)
    # Lanes without work do another's and do not store it.
    if V == 1:
        channel = tl.minimum(channel, channels - 1)
        position = channel % group
    else:
        # With a normalization a unit's lanes are those of a group; without nobody asks.
        position = lane % G * V
    strip = tl.minimum(strip, strips - 1)
    return (strip // columns).to(tl.int64), (strip % columns).to(tl.int32), segment, channel, position, mask


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
def apart(vectors):
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
def together(values):
    """The inverse of :func:`apart`."""
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
    MASKED: tl.constexpr,
    WORDS: tl.constexpr,
):
    """``V`` channels from each ``pointer``, ``step`` apart; with ``V`` of 1 also those before and after.

    Zero outside the group, in which the first channel has the place ``position``, and where the mask is not set. They
    are as they lie in memory, for :func:`floats` or :func:`equal` to take apart where they are used: ``WORDS`` are
    32 bits, which are aligned, of several channels each.
    """
    if WORDS > 0:
        words = pointer.to(tl.pointer_type(tl.int32), bitcast=True)[:, None] + tl.arange(0, WORDS)[None, :]
        loaded = tl.load(words, mask=mask[:, None], other=0) if MASKED else tl.load(words)
        if WORDS == 2:
            return tl.split(loaded)
        else:
            even, odd = tl.split(tl.reshape(loaded, (loaded.shape[0], 2, 2)))
            w0, w2 = tl.split(even)
            w1, w3 = tl.split(odd)
            return w0, w1, w2, w3
    elif V == 8:
        places = pointer[:, None] + tl.arange(0, 8)[None, :]
        if MASKED:
            return apart(tl.load(places, mask=mask[:, None], other=0))
        else:
            return apart(tl.load(places))
    else:
        values = (tl.load(pointer, mask=mask, other=0),)
        for number in tl.static_range(1, BEFORE + 1):
            values = (tl.load(pointer - number * step, mask=mask & (position >= number), other=0),) + values
        for number in tl.static_range(1, AFTER + 1):
            values = values + (tl.load(pointer + number * step, mask=mask & (position + number < group), other=0),)
        return values


@triton.jit
def floats(loaded, FIRST: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr):
    """``COUNT`` channels in float32, of those that were loaded from number ``FIRST`` of ``loaded`` on."""
    result = ()
    if WORDS > 0:
        # bfloat16: the upper half of a float32, an instruction for each number.
        for number in tl.static_range(WORDS):
            pair = loaded[FIRST + number]
            result = result + ((pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True))
    else:
        for number in tl.static_range(COUNT):
            result = result + (loaded[FIRST + number].to(tl.float32),)
    return result


@triton.jit
def equal(loaded, number, FIRST: tl.constexpr, COUNT: tl.constexpr, WORDS: tl.constexpr):
    """Which of ``COUNT`` integers that were loaded, from number ``FIRST`` of ``loaded`` on, are ``number``.

    Where several lie in a word they are bytes, and they and ``number``, which is known when a kernel is compiled, are
    less than 128.
    """
    result = ()
    if WORDS > 0:
        for word in tl.static_range(WORDS):
            # The highest bit of a byte is left where there was nothing else: a test of one bit is one instruction.
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
        tl.store(places, together(values).to(pointer.dtype.element_ty), mask=mask[:, None])
    else:
        tl.store(pointer, values[0].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def with_neighbours(
    values, vector, vectors, V: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, SPARE: tl.constexpr
):
    """``values`` of a lane's channels with those of its neighbours' last and first channels; zero outside the group.

    With ``V`` of 1 they are there already.

    Args:
        values: a tuple of ``V`` tensors, one for each channel.
        vector: each lane's place among the ``vectors`` lanes of its group.
        SPARE: the last lane has no work and holds zeros, which stand for what is outside.
    """
    if V == 8:
        lane = tl.arange(0, vector.shape[0])
        last: tl.constexpr = vector.shape[0] - 1
        lower = tl.where(vector > 0, lane - 1, last if SPARE else lane)
        upper = tl.minimum(tl.where(vector < vectors - 1, lane + 1, last if SPARE else lane), last)
        result = values
        # Masks of bits: with two more of the seven predicates held from step to step, the assembler puts one
        # instruction behind the other instead of mixing those of eight channels.
        lowest = -tl.minimum(vector, 1)
        highest = -tl.minimum(vectors - 1 - vector, 1)
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
def activations(values, biases, COUNT: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr):
    """``relu(value + bias)`` of ``COUNT`` channels in float32."""
    result = ()
    for number in tl.static_range(COUNT):
        value = values[number]
        if BIAS:
            value += biases[number]
        if RELU:
            # Not a number stays.
            value = tl.where(value <= 0, 0.0, value)
        result = result + (value,)
    return result


@triton.jit
def window_sums(values, factor, addend, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """``addend + factor * sum`` of each of ``COUNT`` windows of ``SIZE`` neighbours."""
    result = ()
    if SIZE == 5 and COUNT % 2 == 0:
        # Two neighbouring windows have four of their five values in common.
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
    """``addend`` and the squares of each of ``COUNT`` windows of ``SIZE`` neighbours."""
    result = ()
    if SIZE == 5 and COUNT % 2 == 0:
        # As above, and a pair of squares with half of the addend is in two such sums.
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
    """``base ** -beta`` of a positive base; the paper's 0.75 takes two of the GPU's special functions."""
    if THREE_QUARTERS:
        root = tl.rsqrt(base)
        return root * tl.sqrt(root)
    else:
        return tl.exp2(-beta * tl.log2(base))
