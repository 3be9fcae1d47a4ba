"""Dense layers in inference: products computed by oneDNN, and calls that PyTorch's F.linear must compute."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from net.model import linear as module
from net.model.alexnet import alexnet
from net.model.linear import linear
from tests.tolerances import assert_product_within

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")

Counted = Callable[[], int]


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Small weights go through oneDNN too; how many products it has computed since the last call."""
    monkeypatch.setattr(module, "LEAST", 0)
    calls: list[Tensor] = []
    to_mkldnn = Tensor.to_mkldnn
    monkeypatch.setattr(Tensor, "to_mkldnn", lambda self: calls.append(self) or to_mkldnn(self))

    def count() -> int:
        found = len(calls)
        calls.clear()
        return found

    return count


def layer(outputs: int = 5, inputs: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, inputs), torch.randn(outputs)


@pytest.mark.parametrize("images", [1, 3, 64])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 7), (100, 2305)])
def test_against_float64(used: Counted, images: int, sizes: tuple[int, int]) -> None:
    weight, bias = layer(*sizes)
    input = torch.randn(images, sizes[1])
    with torch.no_grad():
        product = linear(input, weight, bias)
        assert used() == 1
        assert product.is_contiguous()
        assert_product_within(product, input, weight, bias)
        assert torch.equal(product, linear(input, weight, bias)), "repeats its bits"


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, 1:8], lambda x: x[1:, ::2][:, :7], lambda x: x.flatten()[1:43].view(6, 7), lambda x: x.T[:, :7]],
    ids=["misaligned", "strided", "offset", "transposed"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_views(used: Counted, view: Callable[[Tensor], Tensor], compiled: bool) -> None:
    """As an input, and as a weight: towers read slices of the rows. A bias may have a stride too."""
    kernels.private.found("torch._dynamo.reset")()
    call = torch.compile(linear, backend="aot_eager") if compiled else linear
    with torch.no_grad():
        piece, other = view(torch.randn(16, 16)), torch.randn(4, 7)
        for input, weight in ((piece, other), (other, piece)):
            bias = torch.randn(2 * len(weight))[::2]
            for _ in range(3):
                assert_product_within(call(input, weight, bias), input, weight, bias)
    assert used() == 6


def test_no_images(used: Counted) -> None:
    with torch.no_grad():
        assert linear(torch.empty(0, 7), *layer()).shape == (0, 5)
    assert used() == 1


def test_infinite_and_missing_numbers(used: Counted) -> None:
    """Reach their own row alone."""
    weight, bias = layer()
    input = torch.randn(4, 7)
    input[1, 2], input[2, 3] = math.nan, math.inf
    with torch.no_grad():
        product = linear(input, weight, bias)
        expected = input.double() @ weight.double().T + bias.double()
    assert used() == 1
    assert product[1].isnan().all()
    assert torch.equal(product[2], expected[2].float())
    assert_product_within(product[::3], input[::3], weight, bias)


def test_compiled(used: Counted) -> None:
    """In one graph for every number of images."""
    weight, bias = layer()
    kernels.private.found("torch._dynamo.reset")()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.inference_mode():
        for images in (3, 4, 5):
            input = torch.randn(images, 7)
            assert torch.equal(compiled(input, weight, bias), linear(input, weight, bias))
            assert used() == 2
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._operator, (input.clone(), weight, bias), test_utils=checks)


@pytest.mark.compiles
def test_compiled_by_inductor(used: Counted) -> None:
    weight, bias = layer()
    kernels.private.found("torch._dynamo.reset")()
    compiled = torch.compile(lambda x: torch.relu(linear(x, weight, bias)), fullgraph=True)
    with torch.no_grad():
        input = torch.randn(3, 7)
        assert torch.equal(compiled(input), torch.relu(linear(input, weight, bias)))
    assert used() == 2


class Replaced(TorchFunctionMode):
    """Gives F.linear another meaning."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return -result if func is F.linear else result


class Subclass(Tensor):
    pass


def compiled_too(weight: Tensor, bias: Tensor, **changed: Any) -> None:
    """``F.linear`` and ``linear`` agree, without gradients, eager and compiled."""
    kernels.private.found("torch._dynamo.reset")()
    given = {"input": torch.randn(3, 7), "weight": weight, "bias": bias} | changed
    with torch.no_grad():
        expected = F.linear(*given.values())
        for function in (linear, torch.compile(linear, backend="eager")):
            found = function(*given.values())
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected)


def differentiated(weight: Tensor, bias: Tensor) -> None:
    weight.requires_grad_()
    for function in (linear, torch.compile(linear, backend="eager")):
        function(torch.randn(3, 7), weight, bias).sum().backward()
        assert weight.grad is not None
        weight.grad = None


def with_a_tangent(weight: Tensor, bias: Tensor) -> None:
    input, tangent = torch.randn(2, 3, 7)
    with torch.no_grad():
        for function in (linear, torch.compile(linear, backend="eager")):
            _, found = torch.func.jvp(lambda x, of=function: of(x, weight, bias), (input,), (tangent,))
            torch.testing.assert_close(found, tangent @ weight.T)


def vectorized(weight: Tensor, bias: Tensor) -> None:
    input = torch.randn(2, 3, 7)
    with torch.no_grad():
        found = torch.vmap(lambda x: linear(x, weight, bias))(input)
    torch.testing.assert_close(found, F.linear(input, weight, bias))


def in_float64(weight: Tensor, bias: Tensor) -> None:
    compiled_too(weight.double(), bias.double(), input=torch.randn(3, 7).double())


def under_autocast(weight: Tensor, bias: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        compiled_too(weight, bias)


def on_no_device(weight: Tensor, bias: Tensor) -> None:
    targets: list[str] = []

    def noted(graph: fx.GraphModule, _: Any) -> fx.GraphModule:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    given = [tensor.to("meta") for tensor in (torch.randn(3, 7), weight, bias)]
    kernels.private.found("torch._dynamo.reset")()
    with torch.no_grad():
        for function in (linear, torch.compile(linear, backend=noted)):
            assert function(*given).is_meta
    assert targets
    assert not [target for target in targets if "alexnet_fused" in target]


def of_subclasses(weight: Tensor, bias: Tensor) -> None:
    for name, given in {"input": torch.randn(3, 7), "weight": weight, "bias": bias}.items():
        with torch.no_grad():
            tensors = {"input": torch.randn(3, 7), "weight": weight, "bias": bias, name: given.as_subclass(Subclass)}
            assert type(linear(*tensors.values())) is Subclass


def of_a_sparse_weight(weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        input = torch.randn(3, 7)
        torch.testing.assert_close(linear(input, weight.to_sparse_csr(), bias), F.linear(input, weight, bias))


def with_one_bias_for_all(weight: Tensor, bias: Tensor) -> None:
    compiled_too(weight, bias[:1])


def with_sizes_that_do_not_fit(weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(3, 8), weight, bias)


def under_a_function_mode(weight: Tensor, bias: Tensor) -> None:
    input = torch.randn(3, 7)
    with torch.no_grad():
        expected = -F.linear(input, weight, bias)
        with Replaced():
            assert torch.equal(linear(input, weight, bias), expected)


def turned_off(weight: Tensor, bias: Tensor) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        compiled_too(weight, bias)


def counted(weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(torch.randn(3, 7), weight, bias)
    assert counter.get_total_flops() == 2 * 3 * 7 * 5


def traced(weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        graph = torch.jit.trace(lambda x: linear(x, weight, bias), (torch.randn(3, 7),), check_trace=False).graph
    assert "aten::linear" in str(graph)


def exported(weight: Tensor, bias: Tensor) -> None:
    model = alexnet("digits", image_size=20).eval()
    for strict in (False, True):
        with torch.no_grad(), kernels.implementation("aten"):
            program = torch.export.export(model, (torch.randn(2, 3, 20, 20),), strict=strict)
        names = {str(node.target) for node in program.graph.nodes}
        assert "aten.linear.default" in names
        assert not [name for name in names if name.startswith("alexnet_fused")]


@pytest.mark.parametrize(
    "call",
    [
        differentiated, with_a_tangent, vectorized, in_float64, under_autocast, on_no_device, of_subclasses,
        of_a_sparse_weight, with_one_bias_for_all, with_sizes_that_do_not_fit, under_a_function_mode, turned_off,
        counted, traced, exported,
    ],
    ids=lambda call: call.__name__,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Sparse CSR", "ignore:TF32 acceleration")
def test_calls_that_onednn_does_not_compute(used: Counted, call: Callable[[Tensor, Tensor], None]) -> None:
    call(*layer())
    assert used() == 0


def test_small_weights_are_not_worth_it(used: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 36)
    with torch.no_grad():
        linear(torch.randn(3, 7), *layer(5))
        assert used() == 0
        linear(torch.randn(3, 7), *layer(6))
        assert used() == 1


def test_the_network(used: Counted) -> None:
    """Calls it for each dense layer in inference, and F.linear in training."""
    model = alexnet("digits", image_size=20)
    assert isinstance(model.get_submodule(model.config.output_name).weight, nn.Parameter)
    images = 60 * torch.randn(2, 3, 20, 20)
    trained = model.eval()(images)
    assert used() == 0
    with torch.inference_mode():
        torch.testing.assert_close(model(images), trained.detach())
    assert used() == len(model.config.hidden) + 1
