"""How an implementation is chosen."""

import importlib.util
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import dispatch, inductor, reference, stage


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


def test_a_second_thread_is_refused() -> None:
    """It would change the first one's choice. Inside, it sees that choice, as autograd's threads do."""
    found: list[object] = []

    def other() -> None:
        found.append(dispatch.selected())
        try:
            with kernels.implementation("reference"):
                found.append(dispatch.selected())
        except RuntimeError as error:
            found.append(str(error))

    def run() -> list[object]:
        found.clear()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return found

    with kernels.implementation("aten"), kernels.implementation("aten"):
        seen, refused = run()
        assert seen == dispatch.selected() == "aten"
    assert "implementation('reference'): another thread has chosen 'aten' for the process" in str(refused)
    assert run() == ["auto", "reference"]


def test_backward_keeps_the_choice_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "forward", reference.forward)
    input = torch.randn(1, 4, 5, 5, requires_grad=True)
    with kernels.implementation("inductor"):
        output = kernels.relu_max_pool2d(input, 3)
    called: list[str] = []
    for name, module in stage._IMPLEMENTATIONS.items():
        monkeypatch.setattr(
            module, "backward", lambda *arguments, name=name: called.append(name) or (torch.zeros(1, 4, 5, 5), None)
        )
    with kernels.implementation("reference"):
        output.sum().backward()
    assert called == ["inductor"]


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


def test_a_switch_inside_a_compiled_function() -> None:
    def run(input: torch.Tensor) -> torch.Tensor:
        with kernels.implementation("aten"):
            return kernels.max_pool2d(input, 2)

    input = torch.rand(1, 1, 4, 4)
    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(input), run(input))
    assert dispatch.selected() == "auto"


@pytest.mark.parametrize(
    ("module", "function"), [("kernels.reference", torch.ops.aten.sqrt), ("net.model.alexnet", torch.ops.aten.tanh)]
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
