"""How an implementation is chosen."""

import importlib.util
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import dispatch, inductor, reference
from kernels.gpu.config import INTERPRETED


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
    monkeypatch.setattr(dispatch.compiler, "obstacle", lambda: None)
    input = torch.randn(1, 4, 5, 5, requires_grad=True)
    with kernels.implementation("inductor"):
        output = kernels.relu_max_pool2d(input, 3)
    called: list[str] = []
    for name, module in dispatch.MODULES.items():
        monkeypatch.setattr(
            module, "backward", lambda *arguments, name=name: called.append(name) or (torch.zeros(1, 4, 5, 5), None)
        )
    with kernels.implementation("reference"):
        output.sum().backward()
    assert called == ["inductor"]


def test_environment_variable() -> None:
    """It is read when the package is imported; one process does so with each value, as importing torch is slow."""
    code = """
import importlib, os
from kernels import dispatch
print(dispatch.selected())
os.environ[dispatch.ENVIRONMENT_VARIABLE] = ""
print(importlib.reload(dispatch).selected())
os.environ[dispatch.ENVIRONMENT_VARIABLE] = "nonsense"
importlib.reload(dispatch)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, dispatch.ENVIRONMENT_VARIABLE: "aten"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["aten", "auto"]
    assert done.returncode != 0
    assert f"ValueError: {dispatch.ENVIRONMENT_VARIABLE} must be " in done.stderr


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
    ("module", "function"), [("kernels.traced", torch.ops.aten.sqrt), ("net.model.alexnet", torch.ops.aten.tanh)]
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
    assert module != "kernels.traced" or (torch.float64, 1) in called


def test_triton_by_name_says_once_what_it_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 and powers of what may be negative run the formula; auto takes it without a word."""
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    dispatch._say_once.cache_clear()
    double, single = torch.ones(1, 4, 2, 2, dtype=torch.float64), torch.ones(1, 4, 2, 2)
    with kernels.implementation("triton"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(kernels.local_response_norm(double, 1, 1.0, 1.0, 1.0), double / 2)
            assert torch.equal(kernels.local_response_norm(single, 1, -1.0, 1.0, 3.0), single / 2)
            assert torch.equal(kernels.bias_relu(double, double[0, :, 0, 0]), 2 * double)
    assert [str(warning.message) for warning in said] == [
        "kernels: running 'reference' instead of 'triton': the kernels compute in float32, and input is float64",
        "kernels: running 'reference' instead of 'triton': the kernels need alpha and k of at least 0 and a beta that "
        "is not 0; got alpha=-1, beta=1, k=3",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.local_response_norm(double, 1)
        # A graph says nothing while it is traced, and is not broken by it.
        with kernels.implementation("triton"):
            dispatch._say_once.cache_clear()
            torch.compile(lambda x: kernels.local_response_norm(x, 1), backend="eager", fullgraph=True)(double)
    dispatch._say_once.cache_clear()


def test_a_warning_names_the_caller_s_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    double = torch.ones(1, 4, 2, 2, dtype=torch.float64)
    norm = torch.compiler.disable(kernels.local_response_norm)
    module = torch.nn.Sequential(kernels.LocalResponseNorm(1))
    fused = kernels.fuse(torch.nn.Sequential(torch.nn.LocalResponseNorm(1), torch.nn.Identity()))
    edited = kernels.fuse(torch.nn.Sequential(torch.nn.LocalResponseNorm(1), torch.nn.Identity()))
    edited[1] = torch.nn.ReLU()
    ways = [
        lambda: kernels.local_response_norm(double, 1),
        lambda: module(double),
        lambda: norm(double, 1),
        lambda: fused(double),
        lambda: edited(double),
    ]
    for number, call in enumerate(ways):
        dispatch._say_once.cache_clear()
        # In a compiled function, what Dynamo leaves out is called by PyTorch.
        run = torch.compile(call, backend="eager") if number == 2 else call
        with kernels.implementation("triton"), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
        (warning,) = said
        assert (warning.filename, warning.lineno) == (__file__, call.__code__.co_firstlineno)
    dispatch._say_once.cache_clear()


@pytest.mark.parametrize(("exporting", "formula"), [(False, "traced"), (True, "reference")])
def test_the_formula_that_a_graph_gets(exporting: bool, formula: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled it is the one shaped for Inductor, exported the plain one; eagerly it runs in a CPU's cache."""
    input = torch.ones(1, 4, 2, 2)
    assert dispatch.choose(input, None) == "cpu"
    assert dispatch.choose(input[:0], None) == "aten"
    assert dispatch.choose_backward("cpu", input) == "reference", "gradients of gradients"
    with torch.no_grad():
        assert dispatch.choose_backward("cpu", input) == "cpu"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", exporting)
    for name in ("auto", "reference", "inductor"):
        with kernels.implementation(name):
            assert dispatch.choose(input, None) == formula
    if INTERPRETED:
        with kernels.implementation("triton"):
            assert dispatch.choose(input, None) == ("reference" if exporting else "triton")
    assert dispatch.choose_backward("traced", input) == formula
    with torch.no_grad():
        assert dispatch.choose_backward("triton", input) == "triton"
