"""Local response normalization against the formula in float64, forward and gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from tests.tolerances import TOLERANCES, assert_within

DTYPES = tuple(TOLERANCES)
#: (size, alpha, beta, k, groups): the paper's, Caffe's, even and long windows, one group a channel, other powers.
PARAMETERS = (
    (5, 0.5, 0.75, 2.0, 1),
    (5, 0.5, 0.75, 2.0, 2),
    (5, 1.0, 0.75, 1.0, 1),
    (4, 0.7, 0.75, 2.0, 1),
    (2, 0.7, 0.5, 1.0, 3),
    (1, 0.3, 1.0, 0.5, 1),
    (3, 0.3, 0.6, 1.0, 12),
    (31, 0.5, 0.75, 2.0, 2),
)


def windows(channels: int, size: int, groups: int) -> list[range]:
    """The channels in the window of each channel."""
    width = channels // groups
    found = []
    for channel in range(channels):
        first = channel // width * width
        found.append(range(max(first, channel - size // 2), min(first + width, channel + (size - 1) // 2 + 1)))
    return found


def formula(a: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    """Section 3.3, channel by channel, in a's dtype."""
    outputs = []
    for channel, window in enumerate(windows(a.shape[1], size, groups)):
        total = sum(a[:, other] ** 2 for other in window)
        outputs.append(a[:, channel] / (k + alpha / size * total) ** beta)
    return torch.stack(outputs, 1)


def gradient_terms(a: Tensor, db: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    """The sum of the absolute values of the terms of the gradient."""
    found = windows(a.shape[1], size, groups)
    s = torch.stack([k + alpha / size * sum(a[:, other] ** 2 for other in window) for window in found], 1)
    total = (db * s**-beta).abs()
    for channel, window in enumerate(found):
        share = (db[:, channel] * a[:, channel] * s[:, channel] ** (-beta - 1)).abs()
        for other in window:
            total[:, other] += 2 * alpha * beta / size * a[:, other].abs() * share
    return total


def tensors(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    """An input whose window sums are about as large as k, and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for scale in (2.0, 1.0)]
    if channels_last:
        pair = [tensor.to(memory_format=torch.channels_last) for tensor in pair]
    return pair[0].to(dtype), pair[1].to(dtype)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_agrees_with_the_formula(
    parameters: tuple[int, float, float, float, int], dtype: torch.dtype, channels_last: bool
) -> None:
    size, alpha, beta, k, groups = parameters
    input, output_gradient = tensors((2, 12, 5, 3), dtype, channels_last)
    input.requires_grad_()
    output = kernels.local_response_norm(input, size, alpha, beta, k, groups=groups)
    output.backward(output_gradient)
    exact_input = input.detach().double().requires_grad_()
    exact = formula(exact_input, size, alpha, beta, k, groups)
    exact.backward(output_gradient.double())
    terms = gradient_terms(exact_input.detach(), output_gradient.double(), size, alpha, beta, k, groups)
    tolerance = TOLERANCES[dtype]
    assert output.dtype == dtype
    assert output.stride() == input.stride()
    assert_within(output.detach(), exact.detach(), exact.detach(), tolerance.forward)
    assert input.grad is not None
    assert exact_input.grad is not None
    assert input.grad.stride() == input.stride()
    assert_within(input.grad, exact_input.grad, terms, tolerance.gradient)


def test_the_window_matters_at_these_inputs() -> None:
    """With unit inputs and the paper's alpha a wrong window would pass; here it changes results by percents."""
    input, _ = tensors((2, 12, 5, 3), torch.float64, False)
    right = formula(input, 5, 0.5, 0.75, 2.0, 1)
    for wrong in (formula(input, 3, 0.3, 0.75, 2.0, 1), formula(input, 5, 0.5, 0.75, 2.0, 2)):
        assert ((wrong - right).abs() / right.abs()).max() > 0.03


@pytest.mark.parametrize(("size", "groups"), [*itertools.product((1, 2, 4, 5), (1, 3))])
def test_is_torch_s_with_groups(size: int, groups: int) -> None:
    input, _ = tensors((2, 12, 4, 4), torch.float64, False)
    parts = [F.local_response_norm(part, size, 0.5, 0.75, 2.0) for part in input.chunk(groups, 1)]
    torch.testing.assert_close(
        kernels.local_response_norm(input, size, 0.5, 0.75, 2.0, groups=groups), torch.cat(parts, 1)
    )
    with kernels.implementation("aten"):
        torch.testing.assert_close(
            kernels.local_response_norm(input, size, 0.5, 0.75, 2.0, groups=groups), torch.cat(parts, 1)
        )


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-10, 1.0, 1e8])
def test_float32_at_any_scale(scale: float) -> None:
    input = (torch.rand(2, 12, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.5) * scale
    exact = formula(input.double(), 5, 5e-4, 0.75, 2.0, 1)
    output = kernels.local_response_norm(input, 5, 5e-4, 0.75, 2.0)
    assert_within(output, exact, exact, TOLERANCES[torch.float32].forward)


def test_float16_squares_do_not_overflow() -> None:
    input = torch.full((1, 8, 2, 2), 60_000.0, dtype=torch.float16)
    exact = formula(input.double(), 5, 5e-4, 0.75, 2.0, 1)
    output = kernels.local_response_norm(input, 5, 5e-4, 0.75, 2.0)
    assert_within(output, exact, exact, TOLERANCES[torch.float16].forward)


def test_nan_reaches_its_window_and_no_further() -> None:
    input = torch.ones(1, 12, 1, 2)
    input[0, 3, 0, 0] = float("nan")
    output = kernels.local_response_norm(input, 5, groups=2)
    assert output[0, :, 0, 0].isnan().tolist() == [channel in (1, 2, 3, 4, 5) for channel in range(12)]
    assert not output[0, :, 0, 1].isnan().any()


@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 3, 2, 4), (3, 6, 1, 1)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    input = torch.randn(shape, dtype=torch.float64) * 2
    torch.testing.assert_close(
        kernels.local_response_norm(input, 5, 0.5, 0.75, 2.0), F.local_response_norm(input, 5, 0.5, 0.75, 2.0)
    )


@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (2, 6, 0, 5)])
def test_empty_input_gives_a_new_tensor(shape: tuple[int, ...]) -> None:
    input = torch.empty(shape, requires_grad=True)
    output = kernels.local_response_norm(input, 5)
    assert output.shape == input.shape
    assert output is not input
    output.sum().backward()


def test_views_are_read_where_they_are() -> None:
    base = torch.randn(4, 24, 6, 6, dtype=torch.float64) * 2
    for view in (base[1:, 3:15], base[::2], base.transpose(2, 3), base[:, ::2, 1:, 1:]):
        torch.testing.assert_close(
            kernels.local_response_norm(view, 5, 0.5, 0.75, 2.0),
            F.local_response_norm(view.contiguous(), 5, 0.5, 0.75, 2.0),
        )


def test_output_gradient_of_any_layout() -> None:
    input, output_gradient = tensors((2, 12, 5, 3), torch.float64, True)
    input.requires_grad_()
    output = kernels.local_response_norm(input, 5, 0.5, 0.75, 2.0)
    spread = torch.zeros(2, 12, 5, 6, dtype=torch.float64)
    spread[..., ::2] = output_gradient
    gradients = [
        torch.autograd.grad(output, input, layout, retain_graph=True)[0]
        for layout in (output_gradient, output_gradient.contiguous(), spread[..., ::2])
    ]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_gradients_of_gradients_and_of_batches() -> None:
    def operator(input: Tensor) -> Tensor:
        return kernels.local_response_norm(input, 3, 0.5, 0.75, 2.0, groups=2)

    input = (torch.randn(2, 4, 2, 2, dtype=torch.float64) * 2).requires_grad_()
    assert torch.autograd.gradcheck(operator, input)
    assert torch.autograd.gradgradcheck(operator, input)
    detached = input.detach()
    by_function = torch.func.grad(lambda tensor: operator(tensor).sum())(detached)
    (by_tape,) = torch.autograd.grad(operator(input).sum(), input)
    torch.testing.assert_close(by_function, by_tape)
    batch = torch.randn(3, 2, 4, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(operator)(batch), torch.stack([operator(item) for item in batch]))


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 17),
    size=st.integers(1, 12),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    scale=st.floats(0.01, 100.0),
)
def test_any_shape(channels: int, size: int, rows: int, columns: int, scale: float) -> None:
    input = torch.randn(2, channels, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    input *= scale
    torch.testing.assert_close(
        kernels.local_response_norm(input, size, 0.3, 0.75, 1.5), formula(input, size, 0.3, 0.75, 1.5, 1)
    )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relu_and_bias_come_first(dtype: torch.dtype, with_bias: bool) -> None:
    input, output_gradient = tensors((2, 12, 5, 3), dtype, True)
    input.requires_grad_()
    bias = torch.linspace(-1, 1, 12, dtype=dtype).requires_grad_() if with_bias else None
    output = kernels.relu_local_response_norm(input, 5, 0.5, 0.75, 2.0, groups=2, bias=bias)
    output.backward(output_gradient)
    exact_input = input.detach().double().requires_grad_()
    exact_bias = None if bias is None else bias.detach().double().requires_grad_()
    before = exact_input if exact_bias is None else exact_input + exact_bias.reshape(-1, 1, 1)
    exact = formula(F.relu(before), 5, 0.5, 0.75, 2.0, 2)
    exact.backward(output_gradient.double())
    assert_within(output.detach(), exact.detach(), exact.detach(), TOLERANCES[dtype].forward)
    terms = gradient_terms(F.relu(before.detach()), output_gradient.double(), 5, 0.5, 0.75, 2.0, 2)
    assert input.grad is not None
    assert exact_input.grad is not None
    assert_within(input.grad, exact_input.grad, terms, TOLERANCES[dtype].gradient)
    if bias is not None:
        assert bias.grad is not None
        assert exact_bias is not None
        assert exact_bias.grad is not None
        assert_within(bias.grad, exact_bias.grad, terms.sum((0, 2, 3)), 2 * TOLERANCES[dtype].gradient)


def test_relu_passes_nan_and_stops_gradients_at_zero() -> None:
    input = torch.tensor([float("nan"), 0.0, -1.0, 1.0]).reshape(1, 4, 1, 1).requires_grad_()
    output = kernels.relu_local_response_norm(input, 1, 0.5)
    assert output[0, 0].isnan().all()
    output.sum().backward()
    assert input.grad is not None
    assert input.grad[0, 1] == 0
    assert input.grad[0, 2] == 0
    assert input.grad[0, 3] != 0


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: kernels.local_response_norm(torch.ones(2, 3), 5), ValueError, "input must have 3 or more dimensions"),
        (lambda: kernels.local_response_norm(torch.ones(1, 2, 3, dtype=torch.int64), 5), TypeError, "torch.int64"),
        (lambda: kernels.local_response_norm([1.0], 5), TypeError, "must be a torch.Tensor"),  # type: ignore[arg-type]
        (lambda: kernels.local_response_norm(torch.ones(1, 2, 3), 0), ValueError, "size must be a positive integer"),
        (lambda: kernels.local_response_norm(torch.ones(1, 2, 3), 2.5), ValueError, "got 2.5"),  # type: ignore[arg-type]
        (lambda: kernels.local_response_norm(torch.ones(1, 3, 3), 5, groups=2), ValueError, "groups=2 does not divide"),
        (
            lambda: kernels.relu_local_response_norm(torch.ones(1, 3, 3), 5, bias=torch.ones(2)),
            ValueError,
            r"bias must have shape \(3,\)",
        ),
    ],
)
def test_refusals_name_the_argument(call, error: type[Exception], says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.compiles])]
)
def test_compiles_without_a_break(backend: str) -> None:
    def operator(input: Tensor, bias: Tensor) -> Tensor:
        return kernels.relu_local_response_norm(input, 5, 0.5, 0.75, 2.0, groups=2, bias=bias)

    compiled = torch.compile(operator, fullgraph=True, backend=backend)
    input, output_gradient = tensors((2, 12, 5, 3), torch.float32, True)
    bias = torch.linspace(-1, 1, 12)
    results = []
    for function in (operator, compiled):
        leaves = [input.clone().requires_grad_(), bias.clone().requires_grad_()]
        output = function(*leaves)
        output.backward(output_gradient)
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager)
    assert results[1][0].stride() == input.stride()
