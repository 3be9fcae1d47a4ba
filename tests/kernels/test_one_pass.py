"""The kernels that are no operators, training input and update, against the formulas written out in float64."""

import threading
from copy import deepcopy
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

triton = pytest.importorskip("triton")

import kernels  # noqa: E402
from kernels.gpu import loss as loss_module  # noqa: E402
from kernels.gpu import runtime, update  # noqa: E402
from kernels.gpu.bias_relu import pixel_stride  # noqa: E402
from kernels.gpu.input import training_input  # noqa: E402
from kernels.gpu.launch import Launch  # noqa: E402
from kernels.gpu.update import Parameter, suits, update_  # noqa: E402
from net.common.device import repeat_bits  # noqa: E402
from net.model.alexnet import alexnet  # noqa: E402
from net.model.blocks import block_count, blocks  # noqa: E402
from net.model.forms import forms, use  # noqa: E402
from net.training.config import TrainConfig  # noqa: E402
from net.training.recipe import PaperSGD, Schedule, parameter_groups  # noqa: E402
from net.training.step import TrainingStep  # noqa: E402
from tests.net.test_recipe import RATES, paper_rule  # noqa: E402
from tests.tolerances import TOLERANCES  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CPU = DEVICE.type == "cpu"
EMULATED = ON_CPU and not triton.knobs.runtime.interpret
pytestmark = pytest.mark.gpu
#: The interpreter cuts a float32 off where a GPU rounds it to bfloat16.
BFLOAT16 = 2**-7 if ON_CPU and not EMULATED else 2**-8


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``KERNELS_TEST=ptx`` kernels run as compiled code in an emulator."""
    if EMULATED:
        from tests.ptx import emulator

        monkeypatch.setattr(Launch, "run", emulator.run)
        monkeypatch.setattr(triton.JITFunction, "run", emulator.run_kernel)
        monkeypatch.setattr(kernels.dispatch, "INTERPRETED", True)


def formula(
    images: np.ndarray, mean: np.ndarray, places: np.ndarray, noise: np.ndarray, divisor: float, size: int
) -> np.ndarray:
    """Sections 2 and 4.1, image by image, in float64: ``[N, 3, size, size]``."""
    result = []
    for image, (top, left, reflect), colour in zip(images, places.astype(int), noise, strict=True):
        crop = (image.astype(np.float64) - mean)[top : top + size, left : left + size]
        result.append(((crop[:, ::-1] if reflect else crop) + colour) / divisor)
    return np.stack(result).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("height", "width", "size"), [(13, 16, 12), (9, 9, 9)])
def test_one_pass_input(height: int, width: int, size: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(size)
    images = generator.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    mean = generator.uniform(0, 255, (height, width, 3)).astype(np.float32)
    noise = generator.normal(0, 20, (2, 3)).astype(np.float32)
    places = np.array([[0, 0, 0], [height - size, width - size, 1]], np.float32)
    sent = torch.from_numpy(np.concatenate([places, noise], 1)).to(DEVICE)
    given = (torch.from_numpy(images).to(DEVICE), torch.from_numpy(mean).to(DEVICE), sent[:, :3])
    half = BFLOAT16 if dtype == torch.bfloat16 else 2**-21
    for drawn, divisor in ((None, 1.0), (noise, 1.1)):
        exact = formula(images, mean, places, np.zeros((2, 3)) if drawn is None else drawn, divisor, size)
        colours = None if drawn is None else sent[:, 3:]
        pixels = training_input(*given, colours, divisor, size, dtype=dtype)
        assert pixels.dtype == dtype
        assert pixels.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_allclose(pixels.double().cpu(), exact, rtol=half, atol=256 * 2**-23)
        for kernel, padding in ((7, 0), (9, 2)):
            count = block_count((size + 2 * padding - kernel) // 4 + 1, kernel, 4)
            out = torch.full((2, 48, count, count), torch.nan, dtype=dtype, device=DEVICE)
            out = out.contiguous(memory_format=torch.channels_last)
            result = training_input(
                *given, colours, divisor, size, block=4, blocks=count, padding=padding, dtype=dtype, out=out
            )
            assert result is out
            assert torch.equal(out, blocks(pixels, 4, count, padding))


FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("rates", RATES.values(), ids=list(RATES))
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_update(gradient_dtype: torch.dtype, rates: list[float]) -> None:
    """The paper's rule at rates that change, and a copy that is the weight rounded."""
    generator = np.random.default_rng(0)
    starts = [generator.normal(size=shape).astype(np.float32) for shape in ((3, 5), (2, 3, 2, 2), (1, 7), (37, 41))]
    parameters, copies, gradients = [], {}, []
    for number, start in enumerate(starts):
        format = FORMATS[number % 2] if start.ndim == 4 else torch.contiguous_format
        weight = torch.from_numpy(start.copy()).to(DEVICE).contiguous(memory_format=format)
        parameters.append(torch.nn.Parameter(weight))
        copies[parameters[-1]] = torch.full_like(weight, torch.nan, dtype=torch.bfloat16)
        drawn = torch.from_numpy(generator.normal(size=(len(rates), *start.shape))).to(DEVICE, gradient_dtype)
        gradients.append(drawn)
    # PyTorch's fused form in float32; on a GPU it computes in float64.
    rivals = [torch.nn.Parameter(parameter.detach().cpu().clone()) for parameter in parameters]
    settings = {"lr": rates[0], "momentum": 0.9, "weight_decay": 0.05}
    optimizer, rival = PaperSGD(parameters, **settings, fused="triton"), PaperSGD(rivals, **settings, fused=True)
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rival.param_groups[0]["lr"] = rate
        optimizer.send_rates()
        drawn = [gradient[step] for gradient in gradients]
        optimizer.update({one: (gradient,) for one, gradient in zip(parameters, drawn, strict=True)}, copies)
        rival.update({one: (gradient.cpu().float(),) for one, gradient in zip(rivals, drawn, strict=True)})
    ours, theirs = [], []
    for parameter, other, start, drawn in zip(parameters, rivals, starts, gradients, strict=True):
        exact = paper_rule(start.astype(np.float64), list(drawn.double().cpu().numpy()), rates, 0.9, 0.05)
        # A few roundings of float32 an update, of weight, velocity and rate.
        np.testing.assert_allclose(parameter.detach().double().cpu(), exact, rtol=1e-5, atol=1e-6)
        ours.append((parameter.detach().double().cpu().numpy() - exact).ravel())
        theirs.append((other.detach().double().cpu().numpy() - exact).ravel())
        rounded = copies[parameter]
        assert rounded.stride() == parameter.stride()
        np.testing.assert_allclose(rounded.float().cpu(), parameter.detach().cpu(), rtol=BFLOAT16, atol=0)
    error, of_fused = (float(np.linalg.norm(np.concatenate(errors))) for errors in (ours, theirs))
    assert 0 < error <= 1.25 * of_fused


@pytest.mark.parametrize("resumed_as", ["triton", True, False], ids=str)
@pytest.mark.parametrize("saved_as", ["triton", True, False], ids=str)
def test_one_pass_update_goes_on_from_any_form(
    saved_as: bool | Literal["triton"], resumed_as: bool | Literal["triton"]
) -> None:
    """A state saved with a momentum buffer or a velocity, while the rate falls; with the same form to the bit."""
    rates = [0.1, 0.1, 0.01, 0.001, 0.001]
    start, *gradients = torch.randn(1 + len(rates), 37, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def run(parameter: torch.nn.Parameter, form: bool | Literal["triton"], steps: range, state: Any) -> Any:
        optimizer = PaperSGD([parameter], lr=0.1, weight_decay=0.05)
        if state is not None:
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["fused"] = form
        for step in steps:
            optimizer.param_groups[0]["lr"] = rates[step]
            parameter.grad = gradients[step].clone()
            optimizer.step()
        return deepcopy(optimizer.state_dict())

    straight, parted = (torch.nn.Parameter(start.clone()) for _ in range(2))
    run(straight, saved_as, range(5), None)
    saved = run(parted, saved_as, range(3), None)
    assert ("momentum_buffer" if saved_as is True else "velocity") in saved["state"][0]
    run(parted, resumed_as, range(3, 5), saved)
    if saved_as == resumed_as:
        assert torch.equal(parted, straight)
    exact = paper_rule(
        start.double().cpu().numpy(), [each.double().cpu().numpy() for each in gradients], rates, 0.9, 0.05
    )
    np.testing.assert_allclose(parted.detach().double().cpu(), exact, rtol=1e-5, atol=1e-6)


def test_one_pass_update_of_an_unaligned_view() -> None:
    memory = torch.randn(1 + 3 * 5, device=DEVICE)
    weight, gradient, velocity = memory[1:].view(3, 5), torch.randn(3, 5, device=DEVICE), torch.zeros(3, 5).to(DEVICE)
    expected = weight - 0.5 * gradient
    first = memory[0].clone()
    update_(Parameter(weight, gradient, velocity, None), torch.tensor(0.5, device=DEVICE), 0.9, 0.0)
    torch.testing.assert_close(weight, expected)
    assert torch.equal(memory[0], first)


def test_one_pass_update_refuses_other_strides() -> None:
    weight = torch.zeros(3, 5, device=DEVICE)
    transposed = torch.zeros(5, 3, device=DEVICE).t()
    rate = torch.tensor(0.1, device=DEVICE)
    for name, tensors in (("gradient", (transposed, weight, None)), ("copy", (weight, weight, transposed))):
        with pytest.raises(ValueError, match=f"{name} must have the weight's strides"):
            update_(Parameter(weight, *tensors), rate, 0.9, 0.0)


def drawn_parameters(count: int) -> list[Parameter]:
    """Parameters of many sizes, dtypes and alignments; the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        # None, one, more and fewer than a program's, and multiples.
        size = (3, 1, 0, 1024, 2 * 1024 + 5, 16)[number % 6]
        gradient_dtype = torch.bfloat16 if number % 2 else torch.float32
        weight, gradient, velocity = (torch.randn(size + 1, generator=generator).to(DEVICE) for _ in range(3))
        start = number % 5 == 0
        copy = torch.full_like(weight, torch.nan, dtype=torch.bfloat16)[start:] if number % 3 else None
        tensors = weight[start:], gradient.to(gradient_dtype)[start:], velocity[start:], copy
        found.append(Parameter(*tensors))
    return found


@pytest.mark.parametrize("count", [1, 2, 12])
def test_one_pass_updates_in_one_launch_have_the_bits_of_several(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "TOGETHER", 3)
    together, apart = drawn_parameters(count), drawn_parameters(count)
    settings = torch.tensor(0.3, device=DEVICE), 0.9, 0.05
    groups = list(update.alike(together))
    assert sorted(map(id, together)) == sorted(id(each) for group in groups for each in group)
    # Two dtypes of gradients, with and without a copy: 4, 4, 2 and 2 parameters.
    assert [len(group) for group in groups] == {1: [1], 2: [1, 1], 12: [2, 3, 1, 3, 1, 2]}[count]
    for group in groups:
        update.update_together_(group, *settings)
    for each in apart:
        update_(each, *settings)
    for one, other in zip(together, apart, strict=True):
        for name in Parameter._fields:
            changed, expected = getattr(one, name), getattr(other, name)
            assert (changed is expected is None) or torch.equal(changed, expected), name
    untouched = drawn_parameters(1)[0].weight
    assert not torch.equal(together[0].weight, untouched)


def test_one_pass_updates_go_on_one_by_one_if_they_cannot_share_a_launch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*arguments: object) -> None:
        raise RuntimeError("no such instruction\nand more")

    results = []
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(update, "update_together_", failing)
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(6, device=DEVICE)) for _ in range(3)]
        optimizer = PaperSGD(parameters, fused="triton")
        optimizer.send_rates()
        for _ in range(2):
            # The gradients of a parameter may come in slices.
            optimizer.update({each: torch.ones(6, device=DEVICE).chunk(2) for each in parameters})
        results.append(torch.stack(list(parameters)))
    assert torch.equal(*results)
    assert capsys.readouterr().out == (
        "note: the optimizer updates one parameter a launch, not all in one: no such instruction\n"
    )


@pytest.mark.parametrize(
    ("tensor", "fits"),
    [
        (torch.zeros(3, 4), True),
        (torch.zeros(3, 4).t(), True),
        (torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
        (torch.zeros(()), True),
        (torch.zeros(3, 8)[:, :4], False),
        (torch.zeros(1).expand(4), False),
        (torch.zeros(3, dtype=torch.float64), False),
    ],
)
def test_one_pass_update_suits_dense_float32(tensor: Tensor, fits: bool) -> None:
    assert suits(tensor) is fits


def maps(kind: str, dtype: torch.dtype) -> Tensor:
    """Input of :func:`kernels.bias_relu` whose sums with a bias of 0.5 are at zero in places, and NaN in one."""
    shape, channels = {"plain": ((2, 70, 5, 3), 70), "slice": ((3, 96, 4, 4), 48), "one": ((1, 8, 1, 1), 8)}[kind]
    input = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    input[:, ::5] = -0.5
    input[0, 1] = torch.nan
    input[0, 2], input[0, 3] = torch.inf, -torch.inf
    return input.contiguous(memory_format=torch.channels_last)[:, shape[1] - channels :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "slice", "one"])
def test_one_pass_bias_and_relu(kind: str, dtype: torch.dtype) -> None:
    """Output and both gradients; a gradient passes where the sum is over zero or NaN."""
    input = maps(kind, dtype).requires_grad_()
    assert pixel_stride(input) is not None
    bias = torch.full((input.shape[1],), 0.5, device=DEVICE, requires_grad=True)
    with kernels.implementation("triton"):
        output = kernels.bias_relu(input, bias)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    total = input.detach().double() + 0.5
    exact = torch.where(total < 0, 0.0, total)
    half = 2 * TOLERANCES[dtype].forward
    torch.testing.assert_close(output.detach().double(), exact, rtol=half, atol=0, equal_nan=True)
    given = torch.randn_like(output)
    gradient, bias_gradient = torch.autograd.grad(output, (input, bias), given)
    expected = torch.where(total <= 0, 0.0, given.double())
    assert gradient.dtype == dtype
    assert torch.equal(gradient.double(), expected)
    scale = expected.abs().sum((0, 2, 3))
    assert ((bias_gradient.double() - expected.sum((0, 2, 3))).abs() <= 32 * 2**-24 * scale).all()


@pytest.mark.parametrize("implementation", ["auto", "aten", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_pass_bias_and_relu_rounds_once(dtype: torch.dtype, implementation: str) -> None:
    """With a float32 bias that the half type cannot represent. (The interpreter of Triton truncates to bfloat16.)"""
    bias = torch.randn(8, device=DEVICE)
    for format in (torch.contiguous_format, torch.channels_last):
        input = torch.randn(2, 8, 5, 5, device=DEVICE).to(dtype).contiguous(memory_format=format)
        exact = torch.relu(input.float() + bias.reshape(8, 1, 1)).to(dtype)
        with kernels.implementation(implementation):
            assert torch.equal(kernels.bias_relu(input, bias), exact)


def test_one_pass_bias_and_relu_differentiates_twice() -> None:
    input = torch.randn(2, 8, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    bias = torch.zeros(8, device=DEVICE, requires_grad=True)
    with kernels.implementation("triton"):
        output = kernels.bias_relu(input, bias)
        (gradient,) = torch.autograd.grad((output**2).sum(), input, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), input)
    assert torch.equal(second, 2 * (input > 0).float())


@pytest.mark.parametrize("implementation", ["auto", "aten", "reference", "triton"])
def test_one_pass_bias_and_relu_of_any_layout(implementation: str) -> None:
    """What the kernel does not take runs PyTorch's operators; no bias is ReLU."""
    contiguous = torch.randn(2, 6, 3, 4, device=DEVICE)
    bias = torch.randn(6, device=DEVICE)
    for input in (contiguous, contiguous.transpose(2, 3), contiguous.double(), contiguous[:0], contiguous[:, :, 0, 0]):
        exact = torch.relu(input + bias.to(input.dtype).reshape(-1, *[1] * (input.dim() - 2)))
        with kernels.implementation(implementation):
            torch.testing.assert_close(kernels.bias_relu(input, bias), exact)
            assert torch.equal(kernels.bias_relu(input), torch.relu(input))
    with pytest.raises(ValueError, match="bias_relu: bias must have shape"):
        kernels.bias_relu(contiguous, bias[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 10, 37])
def test_one_pass_loss(classes: int, dtype: torch.dtype) -> None:
    """Loss, correct images and gradient in float64; equal logits, a row of which is a view into a wider tensor."""
    wide = 4 * torch.randn(5, classes + 3, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    logits = wide[:, :classes]
    assert loss_module.suits(logits)
    logits[1] = 0.5
    logits[2] += 1000
    labels = torch.tensor([0, 0, classes - 1, classes // 2, int(logits[4].argmax())], device=DEVICE)
    loss, correct, gradient = loss_module.cross_entropy(logits, labels)
    exact_logits = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(exact_logits, labels)
    (exact_gradient,) = torch.autograd.grad(exact, exact_logits)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-6, atol=1e-6)
    rounding = BFLOAT16 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=rounding, atol=1e-7)
    assert correct.dtype == torch.int64
    assert int(correct) == int((logits.argmax(1) == labels).sum()) >= 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_pass_loss_that_is_not_finite(bad: float) -> None:
    logits = torch.zeros(2, 4, device=DEVICE)
    logits[1, 2] = bad
    loss, _, _ = loss_module.cross_entropy(logits, torch.tensor([0, 1], device=DEVICE))
    assert not loss.isfinite()


def test_one_pass_loss_leaves_the_rest_to_pytorch() -> None:
    assert not loss_module.suits(torch.zeros(2, 4, dtype=torch.float64))
    assert not loss_module.suits(torch.zeros(1, loss_module.CLASSES + 1))
    assert not loss_module.suits(torch.zeros(4, 2).t())


LRN = {"size": 5, "alpha": 0.1, "beta": 0.75, "k": 2.0}
POOL = {"kernel_size": 3, "stride": 2}


@pytest.mark.parametrize(
    ("lrn", "pool", "dtype", "inputs", "joined"),
    [
        *((None, None, torch.bfloat16, inputs, joined) for inputs in (1, 2) for joined in (False, True)),
        *((LRN, POOL, torch.bfloat16, inputs, joined) for inputs in (1, 2) for joined in (False, True)),
        *((LRN, None, torch.float32, *layouts) for layouts in ((1, False), (2, True))),
        *((None, POOL, torch.float32, *layouts) for layouts in ((1, False), (2, True))),
    ],
)
def test_one_pass_chunks(
    lrn: dict[str, float] | None, pool: dict[str, int] | None, dtype: torch.dtype, inputs: int, joined: bool
) -> None:
    """Outputs and gradients of two chunks are those of each by itself, in float64."""
    random = torch.Generator().manual_seed(0)
    # Bias and ReLU alone: enough pixels for two programs of several tiles.
    size = 9 if lrn is None and pool is None else 3
    given = [torch.randn(2, 16 // inputs, size, size, generator=random).to(DEVICE, dtype) for _ in range(inputs)]
    given = [each.contiguous(memory_format=torch.channels_last).requires_grad_() for each in given]
    bias = torch.linspace(-1, 1, 16, device=DEVICE).requires_grad_()
    with kernels.implementation("triton"):
        assert kernels.dispatch.runs_chunks_kernel(given, None)
        outputs = kernels.relu_chunks(given, bias, 2, lrn, pool, joined=joined)
    assert len(outputs) == (1 if joined else 2)
    # Not in channels_last memory format, as from a dense layer.
    weights = [torch.randn(output.shape, generator=random).to(DEVICE, dtype) for output in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, (*given, bias), weights)]

    # On the CPU, because on a GPU the backward pass of average pooling is not deterministic and raises.
    exact_given = [each.detach().cpu().double().requires_grad_() for each in given]
    exact_bias = bias.detach().cpu().double().requires_grad_()
    chunks = exact_given if inputs == 2 else exact_given[0].chunk(2, 1)
    exact_outputs = []
    for part, part_bias in zip(chunks, exact_bias.chunk(2), strict=True):
        x = torch.relu(part + part_bias.reshape(-1, 1, 1))
        x = x if lrn is None else torch.nn.functional.local_response_norm(x, **lrn)  # type: ignore[arg-type]
        exact_outputs.append(x if pool is None else torch.nn.functional.max_pool2d(x, **pool))
    exact_outputs = [torch.cat(exact_outputs, 1)] if joined else exact_outputs
    doubles = [each.cpu().double() for each in weights]
    exact = [*exact_outputs, *torch.autograd.grad(exact_outputs, (*exact_given, exact_bias), doubles)]
    tolerance = 8 * TOLERANCES[dtype].forward
    for one, other in zip(found, exact, strict=True):
        scale = float(other.detach().abs().max())
        one = one.detach().cpu().double()
        torch.testing.assert_close(one, other.detach(), rtol=tolerance, atol=tolerance * scale, check_stride=False)
    for each in found[:-1]:
        assert each.dtype == dtype
        assert each.is_contiguous(memory_format=torch.channels_last)
    assert found[-1].dtype == torch.float32


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("joined", [False, True])
def test_one_pass_chunks_differentiate_twice(inputs: int, joined: bool) -> None:
    given = [torch.randn(1, 16 // inputs, 3, 3, device=DEVICE) for _ in range(inputs)]
    given = [each.contiguous(memory_format=torch.channels_last).requires_grad_() for each in given]
    bias = torch.zeros(16, device=DEVICE, requires_grad=True)
    for lrn, pool in ((None, None), (LRN, POOL)):
        seconds = []
        for implementation in ("triton", "reference"):
            with kernels.implementation(implementation):
                outputs = kernels.relu_chunks(given, bias, 2, lrn, pool, joined=joined)
                assert len(outputs) == (1 if joined else 2)
                total = sum((output**2).sum() for output in outputs)
                first = torch.autograd.grad(total, (*given, bias), create_graph=True)
                seconds.append(torch.autograd.grad(sum((each**2).sum() for each in first), given))
        for one, other in zip(*seconds, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_one_pass_chunks_refuse() -> None:
    input, bias = torch.randn(2, 6, 5, 5, device=DEVICE), torch.zeros(6, device=DEVICE)
    with pytest.raises(ValueError, match="chunks=4 does not divide the input's 6 channels"):
        kernels.relu_chunks([input], bias, 4)
    with pytest.raises(ValueError, match=r"one tensor or one per chunk; got chunks=3 and 2 inputs"):
        kernels.relu_chunks([input, input], bias, 3)
    with pytest.raises(TypeError, match=r"inputs must be a sequence of tensors; got Tensor"):
        kernels.relu_chunks(input, bias, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got chunks=0 and 0 inputs"):
        kernels.relu_chunks([], bias, 0)
    with pytest.raises(ValueError, match=r"one shape, dtype and device; got \(2, 6, 5, 5\) torch\.float32"):
        kernels.relu_chunks([input, input[:, :3]], bias, 2)
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\)"):
        kernels.relu_chunks([input], bias[:3], 2)
    with pytest.raises(ValueError, match=r"bias must have shape \(12,\)"):
        kernels.relu_chunks([input, input], bias, 2)
    with pytest.raises(TypeError, match=r"bias must be a torch\.Tensor; got None"):
        kernels.relu_chunks([input], None, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups=2 does not divide the 3 channels"):
        kernels.relu_chunks([input], bias, 2, {**LRN, "groups": 2})


def test_one_pass_compiled_only_nothing_is_written() -> None:
    input, bias = (torch.randn(shape, device=DEVICE) for shape in ((2, 6, 5, 5), (6,)))
    input = input.contiguous(memory_format=torch.channels_last).requires_grad_()
    with kernels.implementation("triton"):
        with runtime.compile_only():
            output = kernels.relu_max_pool2d(input, 2, bias=bias)
            (gradient,) = torch.autograd.grad(output.sum(), input)
        assert output.isnan().all(), "poisoned memory"
        assert gradient.isnan().all()
        assert kernels.relu_max_pool2d(input, 2, bias=bias).isfinite().all(), "launches run again"


def test_one_pass_compiles_in_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread launches meanwhile runs."""
    found: dict[str, object] = {}

    def compiled(kernel: Any, *rest: object) -> None:
        found["compiled"] = kernel, threading.current_thread() is not here
        assert free.wait(60)

    here, free = threading.current_thread(), threading.Event()
    monkeypatch.setattr(runtime, "_compile", compiled)
    logits, labels = torch.randn(2, 3, device=DEVICE), torch.tensor([0, 2], device=DEVICE)

    def beside() -> None:
        found["loss"] = float(loss_module.cross_entropy(logits, labels)[0])
        free.set()

    with runtime.compile_only():
        loss_module.cross_entropy(logits, labels)
        other = threading.Thread(target=beside)
        other.start()
        other.join(60)
    assert found["compiled"] == (loss_module.loss_kernel, True)
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_one_pass_recorded_updates_have_the_bits_of_others(precision: str) -> None:
    """In every form, dropout included: recorded, unrecorded, and recorded again; copies are the weights rounded."""
    repeat_bits()
    labels = torch.arange(8, device=DEVICE) % 10
    for form in forms(alexnet("paper", image_size=67, hidden=()), DEVICE):
        results = []
        for record in (True, False, True):
            torch.manual_seed(0)
            model = alexnet("paper", image_size=67, classes=10).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
            use(model, form)
            optimizer = PaperSGD(parameter_groups(model.train(), TrainConfig()))
            Schedule(TrainConfig()).apply(optimizer)
            step = TrainingStep(model, model, optimizer, precision, record=record, copies=precision == "bf16")
            images = torch.randn(8, 3, 67, 67, device=DEVICE).contiguous(memory_format=torch.channels_last) * 60
            losses = [step(images, labels)[0] for _ in range(8)]
            assert (step.graph is not None) is record
            for parameter, copy in step.copied.values():
                assert torch.equal(copy, parameter.to(torch.bfloat16))
            results.append([*losses, *(parameter.detach() for parameter in model.parameters())])
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0])), form


@pytest.mark.skipif(not ON_CPU, reason="a GPU can run it")
def test_one_pass_bias_and_relu_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the other operators do: an explicit choice is never replaced without a word."""
    monkeypatch.setattr(kernels.dispatch, "INTERPRETED", False)
    with kernels.implementation("triton"), pytest.raises(ValueError, match="'triton' needs a tensor on a GPU"):
        kernels.bias_relu(torch.ones(1, 4, 2, 2), torch.ones(4))
