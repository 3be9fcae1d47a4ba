"""Max pooling and the fused stages around it against PyTorch's own operators."""

import pytest
import torch
import torch.nn.functional as F

import kernels

POOLS = (
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 2, "stride": 1, "dilation": 2},
)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_is_torch_s(pool: dict[str, object], dtype: torch.dtype) -> None:
    input = torch.randn(2, 3, 8, 7, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    output = kernels.max_pool2d(input, **pool)  # type: ignore[arg-type]
    expected = F.max_pool2d(input, **pool)  # type: ignore[arg-type]
    assert torch.equal(output, expected)
    assert output.stride() == expected.stride()
    output_gradient = torch.randn_like(output)
    ours, theirs = (torch.autograd.grad(result, input, output_gradient)[0] for result in (output, expected))
    if dtype in (torch.float16, torch.bfloat16):
        # PyTorch rounds after each addition, we once.
        exact = torch.autograd.grad(F.max_pool2d(input, **pool).double(), input, output_gradient.double())[0]  # type: ignore[arg-type]
        torch.testing.assert_close(ours, exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(ours, theirs)


def test_ties_and_nan() -> None:
    input = torch.zeros(1, 1, 4, 4, requires_grad=True)
    kernels.max_pool2d(input, 2).sum().backward()
    assert input.grad is not None
    assert input.grad[0, 0].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    with_nan = torch.zeros(1, 1, 2, 2)
    with_nan[0, 0, 0, 1] = float("nan")
    assert kernels.max_pool2d(with_nan, 2).isnan().all()
    assert kernels.max_pool2d(torch.full((1, 1, 2, 2), float("-inf")), 2, padding=1).isneginf().all()


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (3, 6, 6)])
def test_relu_and_bias_come_first(shape: tuple[int, ...]) -> None:
    input, bias = torch.randn(shape, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    expected = F.max_pool2d(F.relu(input + bias.reshape(-1, 1, 1)), 3, 2)
    assert torch.equal(kernels.relu_max_pool2d(input, 3, 2, bias=bias), expected)
    assert torch.equal(kernels.relu_max_pool2d(input, 3, 2), F.max_pool2d(F.relu(input), 3, 2))


@pytest.mark.parametrize("implementation", ["auto", "reference", "aten"])
def test_the_whole_stage(implementation: str) -> None:
    input = (torch.randn(2, 6, 9, 9, dtype=torch.float64) * 2).requires_grad_()
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    window = {"size": 5, "alpha": 0.5, "beta": 0.75, "k": 2.0}
    with kernels.implementation(implementation):
        output = kernels.relu_lrn_max_pool2d(input, **window, groups=2, bias=bias)  # type: ignore[arg-type]
    before = F.relu(input + bias.reshape(-1, 1, 1))
    normalized = [F.local_response_norm(part, **window) for part in before.chunk(2, 1)]  # type: ignore[arg-type]
    expected = F.max_pool2d(torch.cat(normalized, 1), 3, 2)
    torch.testing.assert_close(output, expected)
    output_gradient = torch.randn_like(output)
    for ours, theirs in zip(
        torch.autograd.grad(output, (input, bias), output_gradient),
        torch.autograd.grad(expected, (input, bias), output_gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: kernels.max_pool2d(torch.ones(2, 3), 3), ValueError, "3 or 4 dimensions"),
        (lambda: kernels.max_pool2d(torch.ones(1, 2, 5, 5), 0), ValueError, "kernel_size must be an integer"),
        (lambda: kernels.max_pool2d(torch.ones(1, 2, 5, 5), 3, 0), ValueError, "stride must be"),
        (lambda: kernels.max_pool2d(torch.ones(1, 2, 5, 5), 3, padding=-1), ValueError, "padding must be"),
        (lambda: kernels.max_pool2d(torch.ones(1, 2, 5, 5), 3, dilation=0), ValueError, "dilation must be"),
        (lambda: kernels.max_pool2d(torch.ones(1, 2, 5, 5, dtype=torch.int32), 3), TypeError, "torch.int32"),
        (lambda: kernels.relu_max_pool2d(torch.ones(1, 2, 5, 5), 3, bias=torch.ones(3)), ValueError, "bias must have"),
        (lambda: kernels.relu_lrn_max_pool2d(torch.ones(2, 5, 5), 5), ValueError, "4 dimensions"),
    ],
)
def test_refusals_name_the_argument(call, error: type[Exception], says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        call()
