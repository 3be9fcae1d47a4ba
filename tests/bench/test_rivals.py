"""Other programs that are measured beside this one: what they compute, and what becomes of those that are missing."""

import math
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from bench import bench_rivals, compile_ahead
from bench.cells import Scale
from bench.subjects import installed, rivals, xla
from bench.subjects.cases import (
    CASES,
    Prepared,
    WrongResultError,
    check,
    implementations,
    inputs,
    kept,
    may_refuse,
    prepare,
)
from net.model.alexnet import alexnet

CPU = torch.device("cpu")
SMALL = CASES[1]._replace(channels=16, size=13)


def needs(*names: str) -> pytest.MarkDecorator:
    missing = [name for name in names if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: the extra rivals")


@needs("jax")
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 5), (torch.float32, 4), (torch.bfloat16, 5)], ids=str)
def test_xla_s_stage_is_found_right(dtype: torch.dtype, size: int) -> None:
    """Output and gradients against float64, for odd and even windows."""
    normalization = SMALL.normalization
    assert normalization is not None
    check(prepare(SMALL._replace(normalization=normalization._replace(size=size)), "xla"), 2, dtype, CPU)


@needs("jax")
def test_xla_s_wrong_window_is_found() -> None:
    assert SMALL.normalization is not None
    assert SMALL.pooling is not None
    crossing = xla.Stage(SMALL.normalization._replace(groups=1), SMALL.pooling)
    with pytest.raises(WrongResultError, match="output differs"):
        check(Prepared(SMALL, "xla", crossing), 2, torch.float32, CPU)


@needs("jax")
def test_xla_s_timed_calls_compute_what_was_checked() -> None:
    prepared = prepare(SMALL, "xla")
    input, bias = inputs(SMALL, 2, torch.float32, "channels_last", CPU)
    threads = torch.get_num_threads()
    found: dict[str, Any] = {mode: prepared.calls(mode, [(input, bias)])[0]() for mode in ("inference", "forward")}
    expected = prepare(SMALL, "aten")(input, bias).detach().permute(0, 2, 3, 1)
    for output in (found["inference"], found["forward"][0]):
        torch.testing.assert_close(torch.from_dlpack(output), expected, rtol=1e-5, atol=1e-4)
    torch.manual_seed(5)
    gradients = prepared.calls("backward", [(input, bias)])[0]()
    torch.manual_seed(5)
    _, again = prepared.calls("forward_backward", [(input, bias)])[0]()
    for one, other in zip(gradients, again, strict=True):
        torch.testing.assert_close(torch.from_dlpack(one), torch.from_dlpack(other), rtol=0, atol=0)
    assert torch.get_num_threads() == threads
    # At least the input, or what backward would compute it from.
    assert kept(prepared, 2, torch.float32, CPU) * 2**20 >= input.numel() * 4


@needs("jax")
def test_a_nan_stays() -> None:
    input, bias = inputs(SMALL, 1, torch.float32, "channels_last", CPU)
    assert bias is not None
    input, bias = input.detach(), bias.detach()
    input[0, :, 4, 4] = float("nan")
    ours, theirs = (prepare(SMALL, name)(input, bias) for name in ("xla", "aten"))
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert ours.isnan().any()


def test_only_whole_stages_have_xla() -> None:
    for device in (CPU, torch.device("cuda")):
        assert [case.name for case in CASES if "xla" in implementations(case, device)] == ["stage1", "stage2"]


@needs("onnx", "onnxruntime")
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs("openvino"))])
def test_runtimes_agree(runtime: str) -> None:
    """With the network in float64, also once freed memory is overwritten; another network's logits do not pass."""
    torch.manual_seed(0)
    model = alexnet("digits").eval().to(memory_format=torch.channels_last)
    images = (torch.randn(8, 3, 32, 32) * 60).contiguous(memory_format=torch.channels_last)
    infer = bench_rivals.OTHERS[runtime](rivals.exported(model), images)
    expected = rivals.in_float64(model, images)
    for count in (0, 100):
        overwritten = [torch.full_like(images, math.nan) for _ in range(count)]
        rivals.agree(infer(), expected)
        del overwritten
    with torch.no_grad():
        model.get_submodule("conv2").weight *= 1.01
    with pytest.raises(WrongResultError, match="logits differ"):
        rivals.agree(infer(), rivals.in_float64(model, images))


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jax", "onnx", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    xla.jax.cache_clear()
    try:
        prepared, reason = compile_ahead.checked.__wrapped__(SMALL, "xla", "float32", Scale("cpu", 2, "paper"))
    finally:
        xla.jax.cache_clear()
    assert prepared is None
    assert reason.startswith("not installed: pip install")
    assert "[rivals]" in reason
    assert may_refuse("xla", reason)
    for runtime in bench_rivals.OTHERS.values():
        with pytest.raises(installed.NotInstalledError, match="not installed: pip install"):
            runtime(b"", torch.zeros(1, 3, 32, 32))
    with pytest.raises(installed.NotInstalledError, match="not installed: pip install"):
        rivals.exported(alexnet("digits"))


def test_what_fails_inside_a_package_is_no_missing_package(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_rival.py").write_text("import certainly_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="certainly_no_such_module"):
        installed.package("broken_rival")


def test_one_that_fails_leaves_the_others_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong and a missing one have their reasons; the others take turns, two calls each."""
    order: list[str] = []
    expected = torch.ones(2, 3, dtype=torch.float64)

    def ready(name: str, images: torch.Tensor) -> rivals.Inference:
        if name == "missing":
            raise installed.NotInstalledError("not installed: pip install it")

        def infer() -> torch.Tensor:
            order.append(name)
            return torch.full((2, 3), 2.0 if name == "wrong" else 1.0)

        return infer

    monkeypatch.setattr(bench_rivals, "ready", ready)
    monkeypatch.setattr(bench_rivals, "network", lambda: None)
    monkeypatch.setattr(rivals, "in_float64", lambda model, images: expected)
    monkeypatch.setattr(bench_rivals, "ROUNDS", 3)
    found = bench_rivals.measured.__wrapped__(2, ("a", "wrong", "missing", "b"), print)
    assert isinstance(found["wrong"], WrongResultError)
    assert isinstance(found["missing"], installed.NotInstalledError)
    assert order == ["a", "wrong", "b"] + ["a", "a", "b", "b"] * 3
    assert [len(found[name]) for name in ("a", "b")] == [3, 3]
