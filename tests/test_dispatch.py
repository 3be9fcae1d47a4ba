"""How an implementation is chosen."""

import os
import subprocess
import sys

import pytest
import torch

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
