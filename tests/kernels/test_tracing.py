"""What a trace of a forward would record wrongly is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.fuse.tracing import reason, trace


class Module(nn.Module):
    """``run`` as a forward, on a module with a buffer, a plain tensor and a module below."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.below = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.register_buffer("mean", torch.randn(3))
        self.plain = torch.randn(6)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def in_no_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return self.below(x)


def in_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.below(x)


def in_another_implementation(self: Any, x: Tensor) -> Tensor:
    with kernels.implementation("aten"):
        return kernels.max_pool2d(x, 2)


def counts(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.below(x)


def keeps(self: Any, x: Tensor) -> Tensor:
    self.below.kept = x
    return self.below(x)


def adds_in_place(self: Any, x: Tensor) -> Tensor:
    x = self.below(x)
    same = x
    x += 1
    x *= x
    return x - 2 * same


def branches(self: Any, x: Tensor) -> Tensor:
    return self.below(x) if self.training else x


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (lambda self, x: x if x.sum() > 0 else -x, "control flow"),
        (branches, "control flow"),
        (lambda self, x: torch.cat([part * 2 for part in x.chunk(2, 1)], 1), "iterat"),
        (lambda self, x: x + torch.arange(6), "a tensor that does not come from its arguments"),
        (lambda self, x: x * (self.plain * 2), "a tensor that does not come from its arguments"),
        (in_no_grad, "switches gradients"),
        (in_autocast, "autocast"),
        (in_another_implementation, "implementation"),
        (lambda self, x: checkpoint(self.below, x, use_reentrant=False), "checkpointing"),
        (counts, "sets self.calls"),
    ],
)
def test_refused(run: Callable[[Any, Tensor], Tensor], says: str) -> None:
    module = Module(run)
    with pytest.raises(Exception, match=says):
        trace(module)
    assert module.training is True
    assert module.calls == 0


def test_an_argument_that_may_be_none_is_refused() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x if mask is None else x * mask

    with pytest.raises(Exception, match="'mask' may be None"):
        trace(Optional())
    module = Module(lambda self, x: x)
    module.forward = lambda x: x * 2  # type: ignore[method-assign]
    with pytest.raises(Exception, match="replaced on the instance"):
        trace(module)


@pytest.mark.parametrize(
    "run",
    [
        lambda self, x: (x - self.mean.view(-1, 1, 1)) * self.plain,
        lambda self, x: F.dropout(self.below(x), 0.5, self.training),
        lambda self, x: kernels.max_pool2d(x, 2),
        adds_in_place,
    ],
)
def test_recorded(run: Callable[[Any, Tensor], Tensor]) -> None:
    """Buffers and ``training`` are read when the traced forward runs."""
    module = Module(run)
    traced = fx.GraphModule(module, trace(module))
    input = torch.randn(2, 3, 6, 6)
    for training in (True, False):
        module.train(training)
        traced.train(training)
        module.mean.add_(1)
        torch.manual_seed(0)
        expected = module(input)
        torch.manual_seed(0)
        assert torch.equal(traced(input), expected)


@pytest.mark.parametrize("run", [in_no_grad, branches, counts, keeps, in_autocast, lambda self, x: self.below(x)])
def test_a_module_below_is_called(run: Callable[[Any, Tensor], Tensor]) -> None:
    outer = nn.Sequential(Module(run), nn.ReLU())
    targets = [node.target for node in trace(outer).nodes if node.op == "call_module"]
    assert targets == ["0", "1"]
    assert outer[0].calls == 0
    assert not hasattr(outer[0].below, "kept")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_called() -> None:
    script = copy.deepcopy(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))))
    outer = nn.Sequential(script, nn.ReLU())
    assert [(node.op, node.target) for node in trace(outer).nodes][1:-1] == [("call_module", "0"), ("call_module", "1")]


def test_the_reason_names_the_line() -> None:
    with pytest.raises(Exception, match="control flow") as raised:
        trace(Module(branches))
    line = branches.__code__.co_firstlineno + 1
    assert reason(raised.value).endswith(f"control flow (test_tracing.py:{line})")
