"""How an implementation is chosen."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import dispatch


def test_context_manager_restores_the_choice() -> None:
    before = dispatch.selected()
    with kernels.implementation("aten"):
        assert dispatch.selected() == "aten"
        with kernels.implementation("reference"):
            assert dispatch.selected() == "reference"
        assert dispatch.selected() == "aten"
    assert dispatch.selected() == before


def test_unknown_name_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="name must be one of auto, aten, reference, inductor, triton; got 'cudnn'"),
        kernels.implementation("cudnn"),
    ):
        pass


@pytest.mark.parametrize(("value", "says"), [("aten", "aten"), ("", "auto"), ("nonsense", "KERNELS_IMPLEMENTATION")])
def test_environment_variable(value: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from kernels import dispatch; print(dispatch.selected())"],
        env={**os.environ, dispatch.ENVIRONMENT_VARIABLE: value},
        capture_output=True,
        text=True,
    )
    assert says in (done.stderr if value == "nonsense" else done.stdout)
    assert (done.returncode != 0) == (value == "nonsense")


def test_a_switch_traces_again() -> None:
    """The choice is read while tracing: a compiled caller must not keep the old one."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda input: kernels.local_response_norm(input, 3), backend=backend, fullgraph=True)
    input = torch.ones(1, 4, 2, 2)
    compiled(input)
    with kernels.implementation("aten"):
        compiled(input)
    compiled(input)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    ("module", "function"), [("kernels.reference", torch.ops.aten.sqrt), ("net.alexnet", torch.ops.aten.tanh)]
)
def test_mkl_s_functions_are_first_called_by_one_thread(module: str, function: object) -> None:
    """Nothing shows the race itself but thousands of fresh processes (reports/LOG.md)."""
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket == function:
                called.append((args[0].dtype, args[0].numel()))
            return func(*args, **(kwargs or {}))

    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.loader is not None
    with Recorder():
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert (torch.float32, 1) in called
    assert module != "kernels.reference" or (torch.float64, 1) in called
