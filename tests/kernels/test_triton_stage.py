"""The Triton kernels' values: in Triton's interpreter, on a GPU, or of compiled code in an emulator (conftest.py).

Where they are compiled they take a quarter of an hour on two cores, most of it to compile.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import autograd, dispatch, reference
from kernels.arguments import Normalization, Pooling
from kernels.gpu import config, ops
from kernels.gpu.launch import Launch, forward_launch
from tests.kernels.test_local_response_norm import formula, gradient_terms
from tests.kernels.test_stage import PAPER_POOL, POOLS, WINDOW, composed, special
from tests.tolerances import TOLERANCES, assert_within

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = DEVICE.type == "cpu" and not INTERPRETED
FORMATS = (torch.contiguous_format, torch.channels_last)
HALF = (torch.float16, torch.bfloat16)
#: The interpreter takes minutes for all of it; a GPU seconds.
SLOW = [pytest.mark.slow] if INTERPRETED else []
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:
        from triton.runtime import interpreter

        # The interpreter's time goes by the number of programs, and backward by the units whose sums are added.
        monkeypatch.setattr(config, "LANES", 128)
        # Checking integers for overflow is half the time; a few tests keep it (overflow_checked).
        builder = interpreter.interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    if EMULATED:
        from tests.ptx import emulator

        monkeypatch.setattr(Launch, "run", emulator.run)
        # On tensors of a CPU, that is.
        monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with kernels.implementation("triton"):
        yield


@pytest.fixture
def overflow_checked(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter raise when an integer overflows."""
    if INTERPRETED:
        from triton.runtime.interpreter import interpreter_builder as builder

        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))


def chain(*parts: Any) -> Callable[..., Tensor]:
    return lambda input, bias: autograd.run(input, bias, *parts)


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, format: torch.memory_format = FORMATS[0]
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    input, bias = input.to(DEVICE, dtype).contiguous(memory_format=format), bias.to(DEVICE, dtype)
    return input.requires_grad_(), bias.requires_grad_()


def results(function: Callable[..., Tensor], input: Tensor, bias: Tensor | None) -> list[Tensor]:
    output = function(input, bias)
    generator = torch.Generator().manual_seed(1)
    output_gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    wanted = [input] if bias is None else [input, bias]
    return [output.detach(), *torch.autograd.grad(output, wanted, output_gradient)]


def exact(parts: tuple[Any, ...], input: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The same of float64 tensors on the CPU and PyTorch's own operators."""
    doubles = [None if tensor is None else tensor.detach().cpu().double().requires_grad_() for tensor in (input, bias)]

    def rounded(input: Tensor, bias: Tensor | None) -> Tensor:
        return composed(*parts)(input, bias)

    assert doubles[0] is not None
    output = rounded(doubles[0], doubles[1])
    generator = torch.Generator().manual_seed(1)
    output_gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(input.dtype).to(output)
    wanted = [tensor for tensor in doubles if tensor is not None]
    return [output.detach(), *torch.autograd.grad(output, wanted, output_gradient)]


def close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    # Every element of these gradients is a sum of few terms of the order of one.
    scale = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.cpu().double(), other.double(), rtol=scale, atol=scale)


#: Quick in the interpreter, where only the call matters.
NARROW = WINDOW._replace(size=1)
#: More elements than are written out in the kernel's code.
LONGER = (Pooling((4, 3), (1, 2), (2, 1), (1, 1), False),)
#: Channels and groups: vectors of eight with a border inside, and sizes that no vector fits.
CHANNELS = ((32, 2), (8, 1), (24, 3), (6, 2), (5, 1))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("channels", "groups"), CHANNELS)
def test_the_formula_in_every_dtype(channels: int, groups: int, format: torch.memory_format) -> None:
    """Normalization against section 3.3 in float64: forward within 1 ulp of the half types, gradients within 3."""
    for dtype, size, beta in (
        (torch.float32, 5, 0.75),
        (torch.float16, 5, 0.75),
        (torch.bfloat16, 4, 0.75),
        (torch.float32, 3, 0.6),
    ):
        input, _ = inputs((2, channels, 3, 5), dtype, format)
        output = kernels.local_response_norm(input, size, 0.5, beta, 2.0, groups=groups)
        output_gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
        output.backward(output_gradient)
        double = input.detach().double().cpu().requires_grad_()
        theirs = formula(double, size, 0.5, beta, 2.0, groups)
        theirs.backward(output_gradient.double().cpu())
        terms = gradient_terms(double.detach(), output_gradient.double().cpu(), size, 0.5, beta, 2.0, groups)
        tolerance = TOLERANCES[dtype]
        # The interpreter cuts float32 off to bfloat16, where a GPU rounds: up to one more half ulp.
        extra = 2.0 if INTERPRETED and dtype == torch.bfloat16 else 1.0
        assert_within(output.detach().cpu(), theirs.detach(), theirs.detach(), extra * tolerance.forward)
        assert input.grad is not None
        assert double.grad is not None
        assert_within(input.grad.cpu(), double.grad, terms, tolerance.gradient)
        assert output.is_contiguous(memory_format=format)
        assert input.grad.stride() == input.stride()


@pytest.mark.parametrize(
    ("format", "channels", "groups"),
    [(FORMATS[1], 8, 1), (FORMATS[0], 5, 1), pytest.param(FORMATS[1], 6, 2, marks=SLOW)],
    ids=["vectors", "contiguous", "single channels"],
)
@pytest.mark.parametrize("pooling", [*POOLS[:7], *LONGER, POOLS[8]], ids=str)
def test_every_window(pooling: Pooling, format: torch.memory_format, channels: int, groups: int) -> None:
    """Pooling alone, behind a ReLU, and the whole stage, vectors and single channels."""
    for parts in ((False, None), (True, None), (True, WINDOW)):
        # The interpreter is slow: what vectors and single channels share is tested with one of them.
        if channels == 8 and parts[1] is None and pooling not in POOLS[:3:2]:
            continue
        if channels == 5 and parts[1] is not None and pooling not in (*POOLS[:3:2], POOLS[6], *LONGER):
            continue
        if channels == 6 and (parts[1] is None or pooling not in (PAPER_POOL, *LONGER)):
            continue
        normalization = None if parts[1] is None else parts[1]._replace(groups=groups)
        input, bias = inputs((2, channels, 3 if pooling in LONGER else 6, 7), torch.float32, format)
        whole = (parts[0], normalization, pooling)
        ours = results(chain(*whole), input, bias)
        close(ours, exact(whole, input, bias), torch.float32)
        assert ours[0].is_contiguous(memory_format=format)
        assert ours[1].stride() == input.stride()


@pytest.mark.parametrize(
    ("channels", "groups", "pooling"),
    [(16, 1, PAPER_POOL), (24, 1, PAPER_POOL), (16, 2, Pooling((3, 3), (2, 2), (1, 1), (1, 1), True))],
    ids=["whole", "a lane without work", "rows outside"],
)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types_take_the_maximum_before_rounding(
    dtype: torch.dtype, channels: int, groups: int, pooling: Pooling
) -> None:
    """Three lanes for a group leave the last lane without work; of the last windows two rows lie outside."""
    input, bias = inputs((1, channels, 4 if pooling.ceil_mode else 5, 9), dtype, torch.channels_last)
    with torch.no_grad():
        bias += 3
    parts = (True, WINDOW._replace(groups=groups), pooling)
    ours = results(chain(*parts), input, bias)
    assert [tensor.dtype for tensor in ours] == [dtype] * 3
    close(ours, exact(parts, input, bias), dtype)


@pytest.mark.parametrize(
    ("dtype", "pooling"),
    [
        (torch.float32, PAPER_POOL),
        (torch.bfloat16, PAPER_POOL),
        # The last windows' second row and column lie outside, though their neighbours in the window would not.
        (torch.float32, Pooling((2, 2), (2, 2), (1, 1), (2, 2), False)),
    ],
    ids=str,
)
def test_without_relu_the_largest_may_be_negative(dtype: torch.dtype, pooling: Pooling) -> None:
    """Neither squares nor bits of negative numbers are in their order."""
    input, bias = inputs((2, 8, 5, 7), dtype, torch.channels_last)
    with torch.no_grad():
        bias -= 4
    parts = (False, WINDOW._replace(groups=1), pooling)
    ours = results(chain(*parts), input, bias)
    assert (ours[0] < 0).any()
    assert (ours[0] > 0).any()
    close(ours, exact(parts, input, bias), dtype)


def test_a_bias_of_another_dtype() -> None:
    input, bias = inputs((2, 8, 5, 5), torch.float16, torch.channels_last)
    same = results(chain(True, WINDOW, None), input, bias)
    for dtype in (torch.float32, torch.float64):
        wide = bias.detach().to(dtype).requires_grad_()
        ours = results(chain(True, WINDOW, None), input, wide)
        assert [tensor.dtype for tensor in ours] == [torch.float16, torch.float16, dtype]
        assert torch.equal(ours[0], same[0])
        assert torch.equal(ours[1], same[1])


def test_special_values_go_where_pytorch_s_do() -> None:
    kinds = special()
    input = torch.cat(list(kinds.values())).float().to(DEVICE)
    for relu, pooling in itertools.product((False, True), (POOLS[0], POOLS[2])):
        source = input.contiguous(memory_format=FORMATS[relu != (pooling == POOLS[2])])
        ours = results(chain(relu, None, pooling), source.requires_grad_(), None)
        theirs = results(composed(relu, None, pooling), source.detach().cpu().requires_grad_(), None)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.cpu().isnan(), other.isnan())
            assert torch.equal(one.cpu().nan_to_num(1e9), other.nan_to_num(1e9))


def test_nan_reaches_its_window_and_no_further() -> None:
    for channels, format in ((16, torch.channels_last), (12, torch.contiguous_format)):
        input = torch.ones(1, channels, 1, 2, device=DEVICE).contiguous(memory_format=format)
        input[0, 6, 0, 0] = float("nan")
        output = kernels.relu_local_response_norm(input, 5, groups=2)
        half = channels // 2
        reached = [channel for channel in range(4, 9) if channel // half == 6 // half]
        assert output[0, :, 0, 0].isnan().nonzero().flatten().tolist() == reached
        assert not output[0, :, 0, 1].isnan().any()


def test_float32_at_any_scale() -> None:
    """Forward within 32 half ulps, and the maximum of a window is found however small it is."""
    scales = torch.tensor([1e-30, 1e-25, 1e-10, 1.0, 1e8]).reshape(5, 1, 1, 1)
    input = (torch.rand(1, 8, 3, 7, generator=torch.Generator().manual_seed(0)) + 0.5) * scales
    input = input.to(DEVICE).contiguous(memory_format=torch.channels_last)
    output = kernels.local_response_norm(input, 5, 5e-4, 0.75, 2.0)
    theirs = formula(input.double().cpu(), 5, 5e-4, 0.75, 2.0, 1)
    assert_within(output.cpu(), theirs, theirs, TOLERANCES[torch.float32].forward)
    # With pooling behind it alpha is taken out of the power where it is neither zero nor too small, and squares are
    # compared: at both ends of that range, in values and with elements in their last bits.
    for (alpha, k), dtype in itertools.product(
        ((5e-4, 2.0), (1e-12, 2.0), (0.0, 2.0), (5.001e-8, 1.0), (4.999e8, 1.0)), (torch.float32, torch.bfloat16)
    ):
        source = input.to(dtype).requires_grad_()
        pooled = kernels.relu_lrn_max_pool2d(source, 5, alpha, 0.75, k)
        largest = torch.nn.functional.max_pool2d(formula(source.detach().double().cpu(), 5, alpha, 0.75, k, 1), 3, 2)
        assert_within(pooled.detach().cpu(), largest, largest, TOLERANCES[dtype].forward)


@pytest.mark.parametrize(
    ("alpha", "beta", "k"),
    [
        (1e-5, 3.0, 1.0),
        (1e-4, 10.0, 1.0),
        (1e-4, 70.0, 1.0),
        (1e30, 0.75, 1e30),
        (1.0, 0.0, 0.0),
        (-5.0, 2.0, 2.0),
        (1.0, 2.0, -30.0),
    ],
)
def test_powers_beyond_float32(alpha: float, beta: float, k: float) -> None:
    """No part of a power leaves the range that the power itself does not leave, and other bases have powers as well."""
    input = torch.arange(1.0, 17.0, device=DEVICE).reshape(1, 1, 4, 4).requires_grad_()
    output = kernels.relu_lrn_max_pool2d(input, 1, alpha, beta, k, kernel_size=2)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    double = input.detach().double().cpu().requires_grad_()
    theirs = torch.nn.functional.max_pool2d(double * (k + alpha * double * double) ** -beta, 2, 2)
    # What the base is off by counts ``beta`` times.
    assert_within(output.detach().cpu(), theirs, theirs, TOLERANCES[torch.float32].forward * max(1.0, beta / 4))
    if alpha < 1e20:  # Where PyTorch's own gradient in float32 loses a product, too.
        (their_gradient,) = torch.autograd.grad(theirs.sum(), double)
        torch.testing.assert_close(gradient.cpu().double(), their_gradient, rtol=1e-4, atol=0)


def test_not_a_number_may_have_a_sign() -> None:
    """And infinity over infinity, which has one on some processors, is none."""
    for dtype, value in itertools.product((torch.float32, *HALF), (-float("nan"), float("inf"))):
        input = torch.tensor([1.0, 2.0, value, 4.0], device=DEVICE).reshape(1, 1, 2, 2).to(dtype)
        for wanted in (False, True):
            output = kernels.relu_lrn_max_pool2d(input.clone().requires_grad_(wanted), 5, kernel_size=2)
            assert output.isnan().all(), (dtype, value, wanted)


def test_windows_reach_no_further_than_the_group() -> None:
    launch = forward_launch(
        torch.empty(1, 8, 2, 2, device="meta"), None, True, Normalization(1001, 1.0, 0.75, 1.0, 2), None, False,
        torch.empty(1, 8, 2, 2, device="meta"), torch.empty(0, dtype=torch.uint8, device="meta"),
    )  # fmt: skip
    assert (launch.config.before, launch.config.after) == (3, 3)
    for format in FORMATS:
        input, bias = inputs((1, 16, 3, 3), torch.float32, format)
        parts = (True, WINDOW._replace(size=31, groups=2), None)
        close(results(chain(*parts), input, bias), exact(parts, input, bias), torch.float32)


def test_float16_squares_do_not_overflow() -> None:
    input = torch.full((1, 8, 2, 2), 60_000.0, dtype=torch.float16, device=DEVICE)
    theirs = formula(input.double().cpu(), 5, 5e-4, 0.75, 2.0, 1)
    output = kernels.local_response_norm(input, 5, 5e-4, 0.75, 2.0)
    assert_within(output.cpu(), theirs, theirs, TOLERANCES[torch.float16].forward)


@pytest.mark.parametrize(
    ("kernel", "dilation"),
    [((4, 64), (1, 1)), ((3, 96), (2, 1)), pytest.param((27, 27), (1, 1), marks=SLOW)],
    ids=str,
)
def test_large_windows(kernel: tuple[int, int], dilation: tuple[int, int]) -> None:
    """Elements are numbered in one byte, all of it, and in two."""
    pooling = Pooling(kernel, (3, 20), (1, 2), dilation, False)
    rows = kernel[0] + 1
    source = torch.arange(2.0 * rows * 100, device=DEVICE).reshape(1, 2, rows, 100).requires_grad_()
    for ours, theirs in zip(
        results(chain(False, None, pooling), source, None),
        results(composed(False, None, pooling), source, None),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("overflow_checked")
def test_any_number_of_dimensions() -> None:
    for shape in ((2, 8, 5), (2, 6, 3, 2, 4), (3, 8, 1, 1)):
        input, bias = inputs(shape)
        parts = (True, WINDOW, None)
        close(results(chain(*parts), input, bias), exact(parts, input, bias), torch.float32)


def test_the_stride_of_a_single_element_means_nothing() -> None:
    base, bias = inputs((2, 8, 1, 5))
    view = base.detach().transpose(2, 3)
    assert view.stride(3) == 5
    for tensor in (view, view[:, :, :1], view[:1]):
        some = tensor.requires_grad_()
        parts = (True, WINDOW, None)
        close(results(chain(*parts), some, bias), exact(parts, some, bias), torch.float32)


def test_views_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of images, channels and pixels, and memory that is not aligned, without a copy, forward and backward."""
    read: list[int] = []
    run = Launch.run

    def noted(launch: Launch, device: torch.device) -> None:
        source = launch.arguments["input"]
        assert isinstance(source, Tensor)
        read.append(source.data_ptr())
        run(launch, device)

    monkeypatch.setattr(Launch, "run", noted)
    base = torch.randn(6, 24, 5, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2
    last = base.contiguous(memory_format=torch.channels_last)
    flat = torch.randn(3 + 2 * 8 * 5 * 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)[3:]
    views = {
        "images": base[1::2, :8],
        "channels": base[:, 3:11],
        "images, channels_last": last[::2, :16],
        "channels, channels_last": last[:, 8:16],
        "channels off a vector": last[:, 3:11],
        "not aligned": flat.reshape(2, 8, 5, 5),
        "not aligned, channels_last": flat.reshape(2, 5, 5, 8).permute(0, 3, 1, 2),
        "expanded": base[:1, :8].expand(3, -1, -1, -1),
        "transposed": base[:, :8].transpose(2, 3),
        "pixels": base[:, :8, 1:, 1:],
        "every other row, channels_last": last[:, :8, ::2, 2:],
        "every other channel": base[:, ::2],
    }
    bias = torch.linspace(-1, 1, 48, device=DEVICE)
    for name, view in views.items():
        # The interpreter takes a second for each gradient.
        backward = not INTERPRETED or name in ("channels, channels_last", "pixels", "every other row, channels_last")
        results = []
        # PyTorch's own operators on the CPU: their gradients on a GPU are not deterministic.
        for function, device in (
            (chain(True, WINDOW, PAPER_POOL), DEVICE),
            (composed(True, WINDOW, PAPER_POOL), "cpu"),
        ):
            some = view.detach().to(device).requires_grad_()
            output = function(some, bias[: 2 * view.shape[1] : 2].to(device))
            output_gradient = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(device)
            gradient = torch.autograd.grad(output, some, output_gradient) if backward else ()
            results.append([tensor.cpu() for tensor in (output, *gradient)])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert read == [view.data_ptr()] * (1 + backward), name
        read.clear()


@pytest.mark.parametrize("format", [FORMATS[0], pytest.param(FORMATS[1], marks=SLOW)], ids=str)
def test_segments_of_an_image_meet(format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images cut into segments of rows, the last of which is shorter, give what whole ones give."""
    monkeypatch.setattr(config, "SEGMENT_ROWS", 2)
    assert config.segments(5, 4) == (2, 3)
    assert config.segments(11, 4) == (6, 2)
    assert config.segments(11, 9) == (6, 2)
    assert config.segments(11, 1) == (1, 11)
    if INTERPRETED and format == torch.contiguous_format:
        # Several programs for the columns and for the channels, too.
        monkeypatch.setattr(config, "LANES", 4)
    for pooling, columns, rows in ((PAPER_POOL, 5, 2), (Pooling((3, 3), (1, 1), (1, 1), (1, 1), False), 2, 1)):
        input, bias = inputs((1, 16 if format == torch.channels_last else 2, 7, columns), torch.float32, format)
        monkeypatch.setattr(config, "SEGMENT_ROWS", 100)
        assert config.segments(9, 1) == (1, 9)
        whole = results(chain(True, WINDOW, pooling), input, bias)
        monkeypatch.setattr(config, "SEGMENT_ROWS", rows)
        assert config.segments(7, pooling.stride[0] * pooling.stride[1])[0] > 1
        cut = results(chain(True, WINDOW, pooling), input, bias)
        for one, other in zip(cut, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("overflow_checked")
def test_output_gradients_of_any_layout() -> None:
    for format, channels in zip(FORMATS, (4, 8), strict=True):
        input, bias = inputs((2, channels, 3, 6), torch.float32, format)
        output = autograd.run(input, bias, True, WINDOW._replace(groups=1), PAPER_POOL)
        output_gradient = torch.randn_like(output)
        spread = torch.zeros(*output.shape[:3], 2 * output.shape[3], device=DEVICE)[..., ::2].copy_(output_gradient)
        layouts = [output_gradient.contiguous(memory_format=layout) for layout in FORMATS] + [spread]
        first, *others = [torch.autograd.grad(output, (input, bias), item, retain_graph=True) for item in layouts]
        for other in others:
            assert torch.equal(first[0], other[0])
            torch.testing.assert_close(first[1], other[1])
        constant = torch.autograd.grad(output, input, torch.ones((), device=DEVICE).expand(output.shape))
        assert constant[0].stride() == input.stride()


def test_an_image_does_not_depend_on_its_batch() -> None:
    input, bias = inputs((5, 8, 5, 7), torch.float32, torch.channels_last)
    parts = (True, WINDOW._replace(size=3), PAPER_POOL)
    whole = results(chain(*parts), input, bias)
    again = results(chain(*parts), input, bias)
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one, other)
    alone = input.detach()[3:4].requires_grad_()
    output = autograd.run(alone, bias, *parts)
    assert torch.equal(output, whole[0][3:4])
    output_gradient = torch.randn(whole[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(output, alone, output_gradient.to(output)[3:4])
    assert torch.equal(gradient, whole[1][3:4])


def test_the_bias_s_gradient_without_k() -> None:
    """Where squares are all there is, nothing outside the image or the group counts: there it would be 0 / 0."""
    for channels, format in ((3, FORMATS[0]), (24, FORMATS[1])):
        parts = (False, Normalization(5, 0.5, 0.75, 0.0, 1), POOLS[2])
        input, bias = inputs((2, channels, 5, 4), torch.float32, format)
        close(results(chain(*parts), input, bias), exact(parts, input, bias), torch.float32)


def test_gradients_at_a_group_s_border_without_k() -> None:
    """What lies outside the group has no share in the gradient of a channel that is zero."""
    for format in FORMATS:
        input = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 4.0], device=DEVICE).reshape(1, 6, 1, 1)
        input = input.contiguous(memory_format=format).requires_grad_()
        output = kernels.local_response_norm(input, 3, 1.0, 0.75, 0.0, groups=2)
        (gradient,) = torch.autograd.grad(output.sum(), input)
        double = input.detach().double().cpu().requires_grad_()
        (theirs,) = torch.autograd.grad(formula(double, 3, 1.0, 0.75, 0.0, 2).sum(), double)
        torch.testing.assert_close(gradient.cpu().double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["images", "channels"])
def test_strides_of_more_than_32_bits(what: str) -> None:
    """The third of three images or channels 2^31 elements from the first, in memory that is hardly touched."""
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 9 * 2**30:
        pytest.skip("needs 9 GiB of GPU memory: the input, and a gradient of its strides")
    far = 2**30 + 8
    shape, strides = ((3, 8, 3, 3), (far, 1, 24, 8)) if what == "images" else ((1, 3, 3, 3), (9, far, 3, 1))
    base = _reserved(2 * far + 2**10)
    input = base.as_strided(shape, strides)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    input.copy_(values)
    parts = (True, WINDOW._replace(groups=1), PAPER_POOL)
    ours = results(chain(*parts), input.requires_grad_(), None)
    for one, other in zip(ours, results(chain(*parts), values.requires_grad_(), None), strict=True):
        assert torch.equal(one, other)


def _reserved(elements: int) -> Tensor:
    """Memory that is there when it is touched, without the not-a-numbers that tests write to empty tensors."""
    torch.use_deterministic_algorithms(False)
    return torch.empty(elements, dtype=torch.float16, device=DEVICE)


def test_gradients_of_gradients_take_the_reference() -> None:
    input, bias = inputs((2, 8, 5, 5))
    (gradient,) = torch.autograd.grad(
        autograd.run(input, bias, True, WINDOW, PAPER_POOL).sum(), input, create_graph=True
    )
    (ours,) = torch.autograd.grad(gradient.square().sum(), input)
    with kernels.implementation("reference"):
        (gradient,) = torch.autograd.grad(
            autograd.run(input, bias, True, WINDOW, PAPER_POOL).sum(), input, create_graph=True
        )
        (theirs,) = torch.autograd.grad(gradient.square().sum(), input)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_forward_mode_and_vmap() -> None:
    input, bias = (tensor.detach() for tensor in inputs((2, 8, 5, 5)))
    tangents = (torch.randn_like(input), torch.randn_like(bias))
    ours, theirs = chain(True, WINDOW, PAPER_POOL), composed(True, WINDOW, PAPER_POOL)
    for one, other in zip(
        torch.func.jvp(ours, (input, bias), tangents), torch.func.jvp(theirs, (input, bias), tangents), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    batch = torch.randn(3, 2, 8, 5, 5, device=DEVICE)
    expected = torch.stack([theirs(item, bias) for item in batch])
    torch.testing.assert_close(torch.vmap(ours, (0, None))(batch, bias), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", [pytest.param(FORMATS[0], marks=SLOW), FORMATS[1]], ids=str)
def test_operators_keep_pytorch_s_rules(format: torch.memory_format) -> None:
    """Schema, fake implementation, and tracing with shapes that vary, by torch.library's own checks."""
    input, bias = (tensor.detach() for tensor in inputs((2, 8, 5, 5), torch.float32, format))
    norm, pool = ops._numbers(NARROW, PAPER_POOL)
    output, offsets = ops.forward(input, bias, True, NARROW, PAPER_POOL, True)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for pooling, save in ((pool, True), ([], False)):
        torch.library.opcheck(ops._forward_op, (input, bias, True, *norm, pooling, save), test_utils=checks)
    last = format == torch.channels_last
    arguments = (
        torch.ones_like(output),
        input,
        bias,
        None,
        offsets,
        [5, 5],
        True,
        *norm,
        pool,
        torch.float32,
        last,
        True,
    )
    torch.library.opcheck(ops._backward_op, arguments, test_utils=checks)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_compiles_without_a_break(format: torch.memory_format) -> None:
    torch._dynamo.reset()
    input, bias = inputs((2, 8, 5, 5), torch.float32, format)
    eager = chain(True, NARROW, PAPER_POOL)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    for count in (2, 3):
        some = torch.randn(count, *input.shape[1:], device=DEVICE).contiguous(memory_format=format).requires_grad_()
        ours = results(compiled, some, bias)
        for one, other in zip(ours, results(eager, some, bias), strict=True):
            assert torch.equal(one, other)
        assert ours[0].is_contiguous(memory_format=format)
        assert ours[1].stride() == some.stride()


def test_float64_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_forward_op", None)
    input = torch.randn(2, 8, 5, 5, dtype=torch.float64, device=DEVICE)
    with kernels.implementation("reference"):
        expected = autograd.run(input, None, True, WINDOW, PAPER_POOL)
    assert torch.equal(autograd.run(input, None, True, WINDOW, PAPER_POOL), expected)


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a tensor on a GPU, or TRITON_INTERPRET=1; got one on cpu"):
        kernels.max_pool2d(torch.ones(1, 2, 4, 4), 2)


@pytest.mark.usefixtures("overflow_checked")
def test_reference_and_kernels_count_offsets_alike() -> None:
    """So that a derivative of another implementation than the forward pass's is right."""
    input, bias = (tensor.detach() for tensor in inputs((2, 4, 6, 7)))
    for pooling in (*POOLS, Pooling((2, 3), (2, 2), (0, 1), (1, 2), False)):
        normalization = WINDOW if pooling == PAPER_POOL else None
        ours = ops.forward(input, bias, True, normalization, pooling, True)[1]
        assert torch.equal(ours, reference.forward(input, bias, True, normalization, pooling, True)[1])
        assert ours.dtype == torch.uint8


def test_flops_are_counted() -> None:
    """By hand for the paper's chain: 13 for an element forward and 24 backward, 8 and 18 for a window."""
    input, bias = inputs((2, 8, 5, 7))
    with FlopCounterMode(display=False) as counter:
        autograd.run(input, bias, True, WINDOW, PAPER_POOL).sum().backward()
    elements, windows = 2 * 8 * 5 * 7, 2 * 8 * 2 * 3
    counts = counter.get_flop_counts()["Global"]
    found = {str(operator).rsplit(".", 1)[-1]: count for operator, count in counts.items()}
    # Bias, ReLU; a square and four additions; alpha and k; the power; the product.
    assert found["stage_forward"] == elements * (1 + 1 + 5 + 2 + 3 + 1) + windows * 8
    assert found["stage_backward"] == elements * (2 + 5 + 2 + 3 + 1 + 2 + 4 + 3 + 2) + windows * 18
