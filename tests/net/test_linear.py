"""Dense layers in inference: products computed by oneDNN, and calls that PyTorch's F.linear must compute."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels
from net.model.alexnet import alexnet
from net.model.linear import _operator, linear
from tests.tolerances import assert_product_within

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")

Counted = Callable[[], int]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """How many products oneDNN has computed since the last call."""
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
def test_views(used: Counted, view: Callable[[Tensor], Tensor]) -> None:
    """As an input, and as a weight: towers read slices of the rows."""
    bias = torch.randn(16)
    with torch.no_grad():
        piece = view(torch.randn(16, 16))
        other = torch.randn(4, 7)
        assert_product_within(linear(piece, other, bias[:4]), piece, other, bias[:4])
        rows = bias[: len(piece)]
        assert_product_within(linear(other, piece, rows), other, piece, rows)
        assert used() == 2


def test_no_images(used: Counted) -> None:
    with torch.no_grad():
        assert linear(torch.empty(0, 7), *layer()).shape == (0, 5)


def test_infinite_and_missing_numbers() -> None:
    """Reach their own row alone."""
    weight, bias = layer()
    input = torch.randn(4, 7)
    input[1, 2], input[2, 3] = math.nan, math.inf
    with torch.no_grad():
        product = linear(input, weight, bias)
        expected = input.double() @ weight.double().T + bias.double()
    assert product[1].isnan().all()
    assert torch.equal(product[2], expected[2].float())
    assert_product_within(product[::3], input[::3], weight, bias)


def test_compiled(used: Counted) -> None:
    """In one graph for every number of images."""
    weight, bias = layer()
    kernels.private.found("torch._dynamo.reset")()
    compiled = torch.compile(linear, fullgraph=True, backend="eager", dynamic=True)
    with torch.inference_mode():
        for images in (3, 4, 5):
            input = torch.randn(images, 7)
            assert torch.equal(compiled(input, weight, bias), linear(input, weight, bias))
            assert used() == 2
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_operator, (input.clone(), weight, bias), test_utils=checks)


def differentiated(weight: Tensor, bias: Tensor) -> None:
    weight.requires_grad_()
    linear(torch.randn(3, 7), weight, bias).sum().backward()
    assert weight.grad is not None


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
    with torch.no_grad():
        assert linear(torch.randn(3, 7).double(), weight.double(), bias.double()).dtype == torch.float64


def under_autocast(weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 7), weight, bias).dtype == torch.bfloat16


def counted(weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(torch.randn(3, 7), weight, bias)
    assert counter.get_total_flops() == 2 * 3 * 7 * 5


def exported(weight: Tensor, bias: Tensor) -> None:
    model = alexnet("digits", image_size=20).eval()
    with torch.no_grad(), kernels.implementation("aten"):
        program = torch.export.export(model, (torch.randn(2, 3, 20, 20),))
    names = {str(node.target) for node in program.graph.nodes}
    assert "aten.linear.default" in names
    assert not [name for name in names if name.startswith("alexnet_fused")]


@pytest.mark.parametrize(
    "call",
    [differentiated, with_a_tangent, vectorized, in_float64, under_autocast, counted, exported],
    ids=lambda call: call.__name__,
)
def test_calls_that_onednn_does_not_compute(used: Counted, call: Callable[[Tensor, Tensor], None]) -> None:
    call(*layer())
    assert used() == 0


def test_the_network(used: Counted) -> None:
    """Calls it for each dense layer in inference, and F.linear in training."""
    model = alexnet("digits", image_size=20)
    images = 60 * torch.randn(2, 3, 20, 20)
    trained = model.eval()(images)
    assert used() == 0
    with torch.inference_mode():
        torch.testing.assert_close(model(images), trained.detach())
    assert used() == len(model.config.hidden) + 1
