"""Device functions that the Triton kernels share: channels held in registers, window sums, powers.

A lane holds ``V`` neighbouring channels of a pixel as a tuple of ``V`` values, with those of the window before and
after them. With ``V`` of 8 and channels_last memory they come from loads of 8 channels, which are 16 bytes in half
types, taken apart in registers; with ``V`` of 1 each comes from a load of its own, for any memory format and number of
channels.

Arithmetic is in float32. The approximate reciprocal square root, square root, logarithm and exponential of the GPU are
each within two units in the last place.
"""

import triton
import triton.language as tl


@triton.jit
def apart(vectors):
    """``[A, B, 8]`` as eight ``[A, B]``, in order."""
    even, odd = tl.split(tl.reshape(vectors, (vectors.shape[0], vectors.shape[1], 4, 2)))
    even0, even1 = tl.split(tl.reshape(even, (vectors.shape[0], vectors.shape[1], 2, 2)))
    odd0, odd1 = tl.split(tl.reshape(odd, (vectors.shape[0], vectors.shape[1], 2, 2)))
    v0, v4 = tl.split(even0)
    v2, v6 = tl.split(even1)
    v1, v5 = tl.split(odd0)
    v3, v7 = tl.split(odd1)
    return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def together(values):
    """The inverse of :func:`apart`."""
    shape: tl.constexpr = (values[0].shape[0], values[0].shape[1], 4)
    even = tl.reshape(tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[6])), shape)
    odd = tl.reshape(tl.join(tl.join(values[1], values[5]), tl.join(values[3], values[7])), shape)
    return tl.reshape(tl.join(even, odd), (values[0].shape[0], values[0].shape[1], 8))


@triton.jit
def load_channels(
    pointer, base, channel, step, position, group, mask, V: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr
):
    """``BEFORE + V + AFTER`` channels around ``channel``; zero outside its group and where ``mask`` is not set.

    Args:
        pointer, base: where the pixel's first channel lies.
        channel: ``[A, B]``, the first of the ``V``.
        step: elements between neighbouring channels.
        position: ``channel``'s place in its group of ``group`` channels.
        mask: ``[A, B]``.
    """
    if V == 8:
        place = (base + channel)[:, :, None] + tl.arange(0, 8)[None, None, :]
        values = apart(tl.load(pointer + place, mask=mask[:, :, None], other=0))
        if BEFORE > 0:
            before = apart(tl.load(pointer + place - 8, mask=(mask & (position >= 8))[:, :, None], other=0))
            for number in tl.static_range(BEFORE):
                values = (before[7 - number],) + values
        if AFTER > 0:
            after = apart(tl.load(pointer + place + 8, mask=(mask & (position + 8 < group))[:, :, None], other=0))
            for number in tl.static_range(AFTER):
                values = values + (after[number],)
    else:
        values = (tl.load(pointer + base + channel * step, mask=mask, other=0),)
        for number in tl.static_range(1, BEFORE + 1):
            there = mask & (position >= number)
            values = (tl.load(pointer + base + (channel - number) * step, mask=there, other=0),) + values
        for number in tl.static_range(1, AFTER + 1):
            there = mask & (position + number < group)
            values = values + (tl.load(pointer + base + (channel + number) * step, mask=there, other=0),)
    return values


@triton.jit
def store_channels(pointer, base, channel, step, values, mask, V: tl.constexpr):
    """Store ``V`` channels, rounded to the tensor's type."""
    if V == 8:
        place = (base + channel)[:, :, None] + tl.arange(0, 8)[None, None, :]
        tl.store(pointer + place, together(values).to(pointer.dtype.element_ty), mask=mask[:, :, None])
    else:
        tl.store(pointer + base + channel * step, values[0].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def activations(
    input,
    biases,
    base,
    channel,
    step,
    position,
    group,
    mask,
    V: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
):
    """``relu(input + bias)`` of the channels, in float32; zero outside the group, as ``biases`` must be."""
    values = load_channels(input, base, channel, step, position, group, mask, V, BEFORE, AFTER)
    result = ()
    for number in tl.static_range(BEFORE + V + AFTER):
        value = values[number].to(tl.float32)
        if BIAS:
            value += biases[number].to(tl.float32)
        if RELU:
            # Not a number stays.
            value = tl.where(value <= 0, 0.0, value)
        result = result + (value,)
    return result


@triton.jit
def scales(values, alpha, k, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """``k + alpha * sum of squares`` over each of ``COUNT`` windows of ``SIZE``; ``alpha`` is divided by the size."""
    squares = ()
    for number in tl.static_range(COUNT + SIZE - 1):
        squares = squares + (values[number] * values[number],)
    result = ()
    for number in tl.static_range(COUNT):
        total = squares[number]
        for other in tl.static_range(1, SIZE):
            total += squares[number + other]
        result = result + (k + alpha * total,)
    return result


@triton.jit
def negative_power(base, beta, THREE_QUARTERS: tl.constexpr):
    """``base ** -beta`` of a positive base; the paper's 0.75 takes two of the GPU's special functions."""
    if THREE_QUARTERS:
        root = tl.rsqrt(base)
        return root * tl.sqrt(root)
    else:
        return tl.exp2(-beta * tl.log2(base))
