"""The operators combined with other parts of PyTorch: transforms, tracers, exporters, devices chosen by a block."""

import io
from collections.abc import Callable

import pytest
import torch
import torch.func
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import kernels

LRN = {"size": 5, "alpha": 5.0}
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "local_response_norm": lambda x: kernels.local_response_norm(x, **LRN),
    "relu_local_response_norm": lambda x: kernels.relu_local_response_norm(x, **LRN, bias=x[0, :, 0, 0].detach()),
    "max_pool2d": lambda x: kernels.max_pool2d(x, 3, 2),
    "relu_max_pool2d": lambda x: kernels.relu_max_pool2d(x, 3, 2),
    "relu_lrn_max_pool2d": lambda x: kernels.relu_lrn_max_pool2d(x, **LRN),
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "local_response_norm": lambda x: F.local_response_norm(x, **LRN),
    "relu_local_response_norm": lambda x: F.local_response_norm(F.relu(x + x[0, :, :1, :1].detach()), **LRN),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2),
    "relu_max_pool2d": lambda x: F.max_pool2d(F.relu(x), 3, 2),
    "relu_lrn_max_pool2d": lambda x: F.max_pool2d(F.local_response_norm(F.relu(x), **LRN), 3, 2),
}
operators = pytest.mark.parametrize("name", list(OPERATORS))


def gradient_of(operator: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The output, and a function from its gradient to that of ``x``."""
    output = operator(x)
    return output, lambda gradient: torch.autograd.grad(output, x, gradient, retain_graph=True)[0]


@operators
def test_forward_mode_inside_forward_mode(name: str) -> None:
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = torch.randn(2, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def twice(operator: Callable[[Tensor], Tensor]) -> Tensor:
        def once(x: Tensor) -> Tensor:
            return torch.func.jvp(operator, (x,), (directions[0],))[1]

        return torch.func.jvp(once, (x,), (directions[1],))[1]

    expected = twice(PLAIN[name])
    if "pool2d" not in name:
        assert expected.abs().max() > 0.1
    torch.testing.assert_close(twice(OPERATORS[name]), expected)


@operators
def test_a_batch_of_gradients(name: str) -> None:
    """By the vmap of autograd, which is not that of torch.func."""
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    output, backward = gradient_of(OPERATORS[name], x)
    gradients = torch.randn(3, *output.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(output, x, gradients, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(found, torch.stack([backward(gradient) for gradient in gradients]))


@operators
def test_a_backward_pass_is_recorded_after_an_ordinary_forward_pass(name: str) -> None:
    # Large enough that worker threads compute it.
    x = torch.randn(8, 96, 55, 55, requires_grad=True)
    output, backward = gradient_of(OPERATORS[name], x)
    recorded = make_fx(backward)(torch.ones_like(output))
    gradient = torch.randn_like(output)
    torch.testing.assert_close(recorded(gradient), backward(gradient))


@operators
def test_a_block_that_names_another_device(name: str) -> None:
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    output, backward = gradient_of(OPERATORS[name], x)
    expected = backward(torch.ones_like(output))
    with torch.device("meta"):
        inside, backward = gradient_of(OPERATORS[name], x)
        found = backward(torch.ones_like(output))
        assert torch.empty(1).is_meta
    assert torch.equal(inside, output)
    assert torch.equal(found, expected)


class Network(nn.Module):
    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.operator, self.dense = nn.Conv2d(3, 8, 3), operator, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.operator(self.conv(x)).mean((2, 3)))  # type: ignore[no-any-return]


@operators
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_network_is_trained(name: str, strict: bool) -> None:
    model, x = Network(OPERATORS[name]), torch.randn(2, 3, 9, 9)
    names = [name for name, _ in model.named_parameters()]
    exported = torch.export.export(model, (x,), strict=strict).module()
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    found = torch.autograd.grad(exported(x).sum(), [dict(exported.named_parameters())[name] for name in names])
    torch.testing.assert_close(found, expected)


MODULES = (kernels.LocalResponseNorm(**LRN), kernels.MaxPool2d(3, 2), kernels.ReLULRNMaxPool2d(**LRN))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torch_jit_trace(module: nn.Module) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), module), torch.randn(2, 3, 9, 9)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_torch_fx_traces_a_call(module: nn.Module) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), module), torch.randn(2, 3, 9, 9)
    traced = torch.fx.symbolic_trace(model)
    assert any("kernels" in str(getattr(node.target, "__module__", "")) for node in traced.graph.nodes)
    assert torch.equal(traced(x), model(x))


def test_a_number_that_would_lose_its_gradient() -> None:
    alpha, x = nn.Parameter(torch.tensor(5.0)), torch.randn(2, 8, 9, 9)
    with pytest.raises(TypeError, match="alpha must be a number; got a tensor that requires a gradient"):
        kernels.local_response_norm(x, 5, alpha)  # type: ignore[arg-type]
    expected = kernels.local_response_norm(x, 5, 5.0)
    assert torch.equal(kernels.local_response_norm(x, 5, alpha.detach()), expected)  # type: ignore[arg-type]
