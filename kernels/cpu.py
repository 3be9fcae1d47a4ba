"""The chain for eager calls on a CPU: image by image, in pieces that fit a core's cache.

A worker thread takes one image, or several small ones, from input to output, so that a call is one parallel region.
PyTorch's own loops synchronize at a barrier after every operator. If another thread has no core to run on, the others
spin there, which on a shared machine costs more than the arithmetic.

A piece has the input's memory format, with a gap of zeros after each group of channels. A channel's neighbours are then
a fixed number of elements away, and almost every operator is one pass over a flat buffer, which a thread reuses for all
its pieces. Results depend neither on the number of threads nor on an image's position in the batch.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import private, reference, threads
from .arguments import Normalization, Pooling

# Every new tensor names its device: a default device, or a ``with torch.device`` block, may name another.

#: Elements per piece. Smaller pieces cost more time in Python; larger ones need more scratch memory than the input.
_PIECE = 2**18
#: PyTorch computes the remainder after whole vectors with scalar functions, whose ``pow`` rounds differently.
_VECTOR = 64


def suits(tensor: Tensor) -> bool:
    """Whether calls on ``tensor`` run here: a plain CPU tensor, and no operator is traced or recorded.

    Tracers and recorders see only their own thread.
    """
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not private.recorded()
    )


class _Layout(NamedTuple):
    """A piece's layout in a flat buffer: ``images`` x ``groups`` x ``channels`` (of a group) x ``pixels``."""

    images: int
    groups: int
    channels: int
    pixels: int
    gap: int
    channels_last: bool

    @property
    def step(self) -> int:
        """Elements from a channel to the next."""
        return 1 if self.channels_last else self.images * self.pixels

    @property
    def elements(self) -> int:
        """Elements of a buffer: it begins with a gap, and each group ends with one."""
        rows = self.gap + self.groups * (self.channels + self.gap) * (
            self.images * self.pixels if self.channels_last else 1
        )
        return -(-rows * self.step // _VECTOR) * _VECTOR

    def view(self, flat: Tensor) -> Tensor:
        """``flat`` without its gaps: ``[images, groups, channels, pixels]``."""
        channels = self.channels + self.gap
        if self.channels_last:
            pixel = self.groups * channels
            strides = (self.pixels * pixel, channels, 1, pixel)
        else:
            strides = (self.pixels, channels * self.step, self.step, 1)
        return flat.as_strided(self[:4], strides, self.gap * self.step)


class _WindowSum:
    """Sums over each channel's window, from ``before`` channels before it to ``after`` after it, buffer to buffer.

    Views are created once, because creating one takes as long as adding some thousand numbers.
    """

    def __init__(self, values: Tensor, spare: Tensor, into: Tensor, step: int, before: int, after: int) -> None:
        size = before + after + 1
        length = len(values) - (size - 1) * step

        def at(channel: int, source: Tensor) -> Tensor:
            return source.narrow(0, channel * step, length)

        self.total = into.narrow(0, before * step, length)
        if size < 4:
            self.begin = [(at(0, values), at(min(1, size - 1), values), self.total)] if size > 1 else []
            self.more = []
        else:
            # Two channels at a time.
            pairs = spare.narrow(0, 0, len(values) - step)
            self.begin = [(values[:-step], values[step:], pairs), (at(0, spare), at(2, spare), self.total)]
            self.more = [at(channel, spare) for channel in range(4, size - 1, 2)]
        if size % 2 and size > 1:
            self.more.append(at(size - 1, values))
        self.alone = values if size == 1 else None

    def __call__(self) -> None:
        if self.alone is not None:
            self.total.copy_(self.alone)
        for one, other, into in self.begin:
            torch.add(one, other, out=into)
        for each in self.more:
            self.total.add_(each)


class _Normalization:
    """Bias, ReLU and normalization of pieces with one layout, and their gradient.

    Args:
        layout: the pieces'.
        buffers: a thread's memory by name, shared with other layouts; allocated here if it is missing.
        dtype: the compute type.
        bias: ``[groups, channels, 1]`` in it.
        relu, normalization: what comes after the bias.
    """

    def __init__(
        self,
        layout: _Layout,
        buffers: dict[str, Tensor],
        dtype: torch.dtype,
        bias: Tensor | None,
        relu: bool,
        normalization: Normalization,
    ) -> None:
        self.layout, self.bias, self.relu, self.normalization = layout, bias, relu, normalization
        self._buffers, self._dtype = buffers, dtype
        before, after, step = normalization.before, normalization.after, layout.step
        # Each buffer is used both flat and as a view without its gaps.
        self.a, self.a_channels = self._buffer("a")
        self.s, self.s_channels = self._buffer("s")
        self.t, self.t_channels = self._buffer("t")
        self.u, _ = self._buffer("u")
        self.sum_squares = _WindowSum(self.t, self.u, self.s, step, before, after)
        self.share_of_k = self.a.new_tensor(normalization.k / normalization.size)

    def _buffer(self, name: str) -> tuple[Tensor, Tensor]:
        elements = self.layout.elements
        if name not in self._buffers:
            self._buffers[name] = torch.zeros(elements, dtype=self._dtype, device="cpu")
        flat = self._buffers[name].narrow(0, 0, elements)
        return flat, self.layout.view(flat)

    def zero_gaps(self) -> None:
        """Zeroes the gaps of what is squared or summed: another layout, with other gaps, may have used the buffers."""
        for name in ("a", "share"):
            if name in self._buffers:
                self._buffers[name].zero_()

    def scale(self, input: Tensor) -> None:
        """Write the activation to ``a`` and the base of the power to ``s``; ``t`` and ``u`` are scratch memory."""
        if self.bias is None:
            self.a_channels.copy_(input)
        else:
            torch.add(input, self.bias, out=self.a_channels)
        if self.relu:
            self.a.relu_()
        # Summed over a window, k / size is k.
        scaled = self.normalization.alpha / self.normalization.size
        torch.addcmul(self.share_of_k, self.a, self.a, value=scaled, out=self.t)
        self.sum_squares()

    def forward(self, input: Tensor, output: Tensor) -> None:
        """Write the normalized activation to ``output``; both are ``[images, groups, channels, pixels]``."""
        self.scale(input)
        if self.normalization.beta == 0.75:
            # s**-0.75 = q / rsqrt(q) with q = rsqrt(s). In this order an infinite s gives 0.
            torch.mul(self.a, self.s.rsqrt_(), out=self.t)
            self.s.rsqrt_()
            if output.dtype == self._dtype:
                torch.div(self.t_channels, self.s_channels, out=output)
                return
            self.t.div_(self.s)
        else:
            torch.mul(self.a, self.s.pow_(-self.normalization.beta), out=self.t)
        output.copy_(self.t_channels)

    def backward(self, input: Tensor, output_gradient: Tensor, gradient: Tensor) -> Tensor:
        """Write the gradient of the input to ``gradient``; all are ``[images, groups, channels, pixels]``.

        Returns:
            The same in the compute type, until the next piece.
        """
        size, alpha, beta, _, _ = self.normalization
        self.scale(input)
        if beta == 0.75:
            torch.rsqrt(self.s, out=self.t)
            torch.mul(output_gradient, self.t_channels, out=self.direct_channels)
            self.direct.div_(torch.rsqrt(self.t, out=self.u))
        else:
            torch.pow(self.s, -beta, out=self.t)
            torch.mul(output_gradient, self.t_channels, out=self.direct_channels)
        torch.mul(self.direct, self.a, out=self.t)
        # Not in the gaps, which stay zero.
        torch.div(self.t_channels, self.s_channels, out=self.share_channels)
        self.sum_shares()
        self.direct.addcmul_(self.a, self.t, value=-2 * alpha * beta / size)
        if self.relu:
            torch.ops.aten.threshold_backward.grad_input(self.direct, self.a, 0, grad_input=self.direct)
        gradient.copy_(self.direct_channels)
        return self.direct_channels

    @functools.cached_property
    def direct(self) -> Tensor:
        return self._buffer("direct")[0]

    @functools.cached_property
    def direct_channels(self) -> Tensor:
        return self._buffer("direct")[1]

    @functools.cached_property
    def share_channels(self) -> Tensor:
        return self._buffer("share")[1]

    @functools.cached_property
    def sum_shares(self) -> _WindowSum:
        # Over the channels whose windows contain a channel: the window mirrored.
        before, after = self.normalization.before, self.normalization.after
        return _WindowSum(self._buffer("share")[0], self.u, self.t, self.layout.step, after, before)


def _counts_in_float32(pooling: Pooling, size: Sequence[int]) -> bool:
    """Whether float32 represents every index and difference exactly, for maps of ``size`` and their windows."""
    rows, columns = (
        size[axis] + 2 * pooling.padding[axis] + pooling.dilation[axis] * pooling.kernel_size[axis] for axis in (0, 1)
    )
    return rows * columns < 2**22


class _Pool:
    """Max pooling of images ``[images, channels, rows, columns]``, channels last and in the compute type, with
    buffers that are reused for the next images.

    PyTorch's indices count elements of the whole map, ours of the window. Converting one to the other takes the
    element's row: a quotient in float32, kept half a unit away from the nearest whole number.
    """

    def __init__(self, pooling: Pooling, shape: Sequence[int], dtype: torch.dtype) -> None:
        images, channels, *self.size = shape
        self.pooling, self.dtype = pooling, dtype
        windows = [pooling.output_size(size, axis) for axis, size in enumerate(self.size)]
        self.shape = (images, channels, *windows)
        # Otherwise use the plain formula, which counts in int64.
        self.counts_in_float32 = _counts_in_float32(pooling, self.size)
        if self.counts_in_float32:
            rows, columns = (
                torch.arange(windows[axis], dtype=torch.float32, device="cpu") * pooling.stride[axis]
                - pooling.padding[axis]
                for axis in (0, 1)
            )
            # Where a window begins, which may be in the padding: its first element's row, column and index in the map,
            # and what that index would be if the map were as wide as the window.
            self.first_row, self.first_column = rows[None, None, :, None], columns[None, None, None, :]
            self.first = self.first_row * self.size[1] + self.first_column
            self.first_in_window = self.first_row * pooling.kernel_size[1] + self.first_column
            self.half = {
                columns: torch.tensor(0.5 / columns, device="cpu") for columns in (self.size[1], pooling.kernel_size[1])
            }

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)

    @functools.cached_property
    def indices(self) -> Tensor:
        return self._empty(self.shape, torch.int64)

    @functools.cached_property
    def output(self) -> Tensor:
        return self._empty(self.shape, self.dtype)

    @functools.cached_property
    def numbers(self) -> tuple[Tensor, Tensor]:
        return self._empty(self.shape, torch.float32), self._empty(self.shape, torch.float32)

    @functools.cached_property
    def values(self) -> Tensor:
        return self._empty((*self.shape[:2], *self.size), self.dtype)

    def forward(self, values: Tensor, output: Tensor, offsets: Tensor | None) -> None:
        """Write the maxima, and if requested their argmax indices in the windows."""
        if offsets is None:
            output.copy_(F.max_pool2d(values, *self.pooling))
            return
        if not self.counts_in_float32:
            maxima, indices = reference.pool(reference.channels_last(values, 1), self.pooling, True)
            output.copy_(reference.channels_first(maxima))
            offsets.copy_(reference.channels_first(indices))
            return
        torch.ops.aten.max_pool2d_with_indices.out(values, *self.pooling, out=self.output, indices=self.indices)
        output.copy_(self.output)
        element, row = self.numbers
        element.copy_(self.indices)
        self._row(element, self.size[1], row)
        width, dilation = self.pooling.kernel_size[1], self.pooling.dilation
        if dilation == (1, 1):
            element.sub_(row, alpha=self.size[1] - width).sub_(self.first_in_window)
        else:
            # Both quotients are whole numbers.
            element.sub_(row, alpha=self.size[1]).sub_(self.first_column).div_(dilation[1])
            element.add_(row.sub_(self.first_row).div_(dilation[0]), alpha=width)
        offsets.copy_(element)

    def _row(self, element: Tensor, columns: int, into: Tensor) -> None:
        """Write ``element // columns``."""
        torch.add(self.half[columns], element, alpha=1 / columns, out=into).floor_()

    def backward(self, output_gradient: Tensor, output: Tensor | None, offsets: Tensor) -> Tensor:
        """The gradient of ``values``, valid until the next images; with ``output``, that of the ReLU before it."""
        incoming = self.output.copy_(output_gradient)
        if output is not None:
            # Without a normalization, the maximum is zero only where the ReLU's input was not positive.
            incoming.masked_fill_(output <= 0, 0)
        if not self.counts_in_float32:
            by_pixel, indices = (reference.channels_last(each, 1) for each in (incoming, offsets))
            size = (self.size[0], self.size[1])
            return reference.channels_first(reference.pool_backward(by_pixel, indices, size, self.pooling))
        element, row = self.numbers
        element.copy_(offsets)
        width, dilation = self.pooling.kernel_size[1], self.pooling.dilation
        self._row(element, width, row)
        if dilation[1] > 1:
            element.mul_(dilation[1])
        # row * dilation[0] * columns + column * dilation[1], the element's column being element - row * width.
        element.add_(row, alpha=dilation[0] * self.size[1] - dilation[1] * width)
        self.indices.copy_(element.add_(self.first))
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
            incoming, self.values, *self.pooling, self.indices, grad_input=self.values
        )
        return self.values


class _Thread:
    """A thread's buffers, and the objects prepared for each layout of a piece."""

    def __init__(
        self, dtype: torch.dtype, bias: Tensor | None, relu: bool, normalization: Normalization | None
    ) -> None:
        self.dtype, self.parts = dtype, (bias, relu, normalization)
        self.buffers: dict[str, Tensor] = {}
        self.ready: dict[_Layout, _Normalization] = {}
        self.last: _Normalization | None = None
        self.pools: dict[int, _Pool] = {}

    def pool(self, pooling: Pooling, shape: Sequence[int]) -> _Pool:
        """For ``[images, channels, rows, columns]``; the last call may have fewer images."""
        if shape[0] not in self.pools:
            self.pools[shape[0]] = _Pool(pooling, shape, self.dtype)
        return self.pools[shape[0]]

    def activation(self, images: Tensor, pool: _Pool) -> Tensor:
        """Bias and ReLU of ``[images, channels, rows, columns]``, channels last and in the compute type.

        With neither, returns ``images`` themselves if they already have that layout and type.
        """
        bias, relu, _ = self.parts
        plain = images.dtype == self.dtype and images.is_contiguous(memory_format=torch.channels_last)
        if bias is None and not relu and plain:
            return images
        if bias is None:
            pool.values.copy_(images)
        else:
            torch.add(images, bias.view(-1, 1, 1), out=pool.values)
        return pool.values.relu_() if relu else pool.values

    def normalization(self, piece: Tensor) -> _Normalization:
        """For ``[images, groups, channels, pixels]``."""
        bias, relu, normalization = self.parts
        assert normalization is not None
        gap = max(normalization.before, normalization.after)
        channels_last = piece.stride(2) == 1 and piece.shape[2] > 1
        layout = _Layout(*piece.shape, gap, channels_last)  # type: ignore[call-arg]
        if layout not in self.ready:
            self.ready[layout] = _Normalization(layout, self.buffers, self.dtype, bias, relu, normalization)
        one = self.ready[layout]
        if self.last not in (one, None) and not channels_last:
            one.zero_gaps()
        self.last = one
        return one


def _pixels(tensor: Tensor, groups: int) -> Tensor:
    """``[N, C, ...]`` as ``[N, G, C / G, pixels]``: a view of what is contiguous or channels_last."""
    return tensor.reshape(len(tensor), groups, tensor.shape[1] // groups, -1)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits tensors ``[images, groups, channels, pixels]`` along the pixels into pieces."""
    count = -(-tensors[0].numel() // _PIECE)
    if count == 1:
        return iter((tensors,))
    step = -(-tensors[0].shape[-1] // count)
    return zip(*(tensor.split(step, -1) for tensor in tensors), strict=True)


def _each(make: Callable[[], _Thread], work: Callable[..., None], input: Tensor, *others: Tensor | None) -> None:
    """Call ``work`` for every image of the tensors, spread over the threads; each thread calls ``make`` first.

    Small images are taken several at a time. All views are created here in advance: a thread that holds the GIL for
    many short operators makes the others sleep.
    """
    count = max(1, _PIECE // math.prod(input.shape[1:]))
    parts = [input.split(count)]
    parts += [[None] * len(parts[0]) if each is None else each.split(count) for each in others]
    left = collections.deque(zip(*parts, strict=True))

    def worker() -> None:
        thread = make()
        while True:
            try:
                images = left.popleft()
            except IndexError:
                return
            work(thread, *images)

    threads.run(worker, len(left))


def forward(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.reference.forward`."""
    format, shape = reference.memory_format(input), list(input.shape)
    if pooling is not None:
        shape[2:] = [pooling.output_size(size, axis) for axis, size in enumerate(input.shape[2:])]
    output = torch.empty(shape, dtype=input.dtype, device="cpu", memory_format=format)
    offsets = None
    if pooling is not None and save:
        offsets = torch.empty(shape, dtype=pooling.offset_dtype, device="cpu", memory_format=torch.channels_last)
    compute = reference.compute_dtype(input.dtype)
    groups = 1 if normalization is None else normalization.groups

    def pool_alone(thread: _Thread, part: Tensor, into: Tensor, indices: Tensor | None) -> None:
        assert pooling is not None
        pool = thread.pool(pooling, part.shape)
        pool.forward(thread.activation(part, pool), into, indices)

    def normalize(thread: _Thread, part: Tensor, into: Tensor) -> None:
        for piece, written in _pieces(part, into):
            thread.normalization(piece).forward(piece, written)

    def normalize_and_pool(thread: _Thread, part: Tensor, into: Tensor, indices: Tensor | None) -> None:
        assert pooling is not None
        pool = thread.pool(pooling, (len(part), *input.shape[1:]))
        normalize(thread, part, _pixels(pool.values, groups))
        pool.forward(pool.values, into, indices)

    def make() -> _Thread:
        return _Thread(compute, _bias(bias, compute, groups), relu, normalization)

    if normalization is None:
        _each(make, pool_alone, input, output, offsets)
    elif pooling is None:
        _each(make, normalize, _pixels(input, groups), _pixels(output, groups))
    else:
        _each(make, normalize_and_pool, _pixels(input, groups), output, offsets)
    if offsets is None:
        offsets = input.new_empty(0, dtype=torch.uint8 if pooling is None else pooling.offset_dtype)
    return output, offsets


def _bias(bias: Tensor | None, dtype: torch.dtype, groups: int) -> Tensor | None:
    return None if bias is None else reference.cast(bias, dtype).view(groups, -1, 1)


def backward(
    output_gradient: Tensor,
    input: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    offsets: Tensor | None,
    size: tuple[int, int],
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
    dtype: torch.dtype,
    format: torch.memory_format,
    bias_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`kernels.reference.backward`."""
    shape = (*output_gradient.shape[:2], *size) if input is None else input.shape
    compute = reference.compute_dtype(dtype)
    groups = 1 if normalization is None else normalization.groups
    gradient = torch.empty(shape, dtype=dtype, device="cpu", memory_format=format)
    # Per image, then over the images in order.
    sums = None
    if bias_wanted:
        sums = torch.empty(shape[0], groups, shape[1] // groups, dtype=compute, device="cpu")

    def pool_alone(
        thread: _Thread,
        into: Tensor,
        incoming: Tensor,
        output: Tensor | None,
        indices: Tensor,
        total: Tensor | None,
    ) -> None:
        assert pooling is not None
        partial = thread.pool(pooling, (len(incoming), *shape[1:])).backward(incoming, output, indices)
        into.copy_(partial)
        if total is not None:
            torch.sum(partial, (2, 3), out=total[:, 0])

    def normalize(thread: _Thread, into: Tensor, incoming: Tensor, part: Tensor, total: Tensor | None) -> None:
        for number, (piece, its_gradient, written) in enumerate(_pieces(part, incoming, into)):
            finished = thread.normalization(piece).backward(piece, its_gradient, written)
            if total is not None and number == 0:
                torch.sum(finished, -1, out=total)
            elif total is not None:
                total.add_(finished.sum(-1))

    def normalize_and_pool(
        thread: _Thread, into: Tensor, incoming: Tensor, part: Tensor, indices: Tensor, total: Tensor | None
    ) -> None:
        assert pooling is not None
        pool = thread.pool(pooling, (len(part), *shape[1:]))
        normalize(thread, into, _pixels(pool.backward(incoming, None, indices), groups), part, total)

    def make() -> _Thread:
        return _Thread(compute, _bias(bias, compute, groups), relu, normalization)

    if normalization is None:
        _each(make, pool_alone, gradient, output_gradient, output, offsets, sums)
    else:
        assert input is not None
        into, part = _pixels(gradient, groups), _pixels(input, groups)
        if pooling is None:
            _each(make, normalize, into, _pixels(output_gradient, groups), part, sums)
        else:
            _each(make, normalize_and_pool, into, output_gradient, part, offsets, sums)
    return gradient, None if sums is None else sums.sum(0).flatten()
