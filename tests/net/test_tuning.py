"""The choice of forms: autotuning with given times on a fake GPU, its cache, and its flags."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from net.model.alexnet import AlexNet, Convolution, alexnet
from net.model.config import network
from net.model.forms import Forms, forms, use
from net.parallel.process_group import World
from net.training import trainer, tuning
from net.training.config import TrainConfig
from net.training.setup import forms_wanted
from net.training.tuning import Measured
from tests.commands import run_here

GPU = torch.device("cuda", 0)


def test_chooses_slot_by_slot_and_asks_once() -> None:
    paper = alexnet("paper", image_size=67, hidden=())
    available = list(forms(paper, torch.device("cuda")))
    asked: list[Forms] = []

    def seconds(form: Forms) -> float:
        asked.append(form)
        return {"pixels": 3.0, "blocks": 1.0}[form.first] + {"apart": 0.0, "together": -0.1}[form.shared]

    assert tuning.slot_by_slot(available, Forms(), seconds) == Forms("blocks", "together")
    assert len(asked) == len(set(asked))


def test_a_gain_that_is_noise_changes_nothing() -> None:
    available = [Forms(), Forms("blocks")]
    for times, expected in (((1.0, 0.99), Forms()), ((1.0, 0.97), Forms("blocks")), ((1.0, 1.0), Forms())):
        told = dict(zip(available, times, strict=True))
        assert tuning.slot_by_slot(available, Forms(), told.__getitem__) == expected


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What measuring calls on a GPU besides the measurement itself, which ends without a trace in the run's memory."""
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: called.append("reset"))
    monkeypatch.setattr(tuning, "product_tflops", lambda *_: called.append("product") or 800.0)
    yield
    assert called[-2:] == ["empty_cache", "reset"]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no engine\nand more"), "no engine"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (OutOfResources(300_000, 232_448, "shared memory"), "out of resource: shared memory, Required: 300000"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_form_that_fails_is_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    def milliseconds(*arguments: object) -> float:
        form = arguments[-1]
        assert isinstance(form, Forms)
        if form.shared == "together":
            raise error
        return 1.0 if form.towers == "at once" else 2.0

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    found = tuning.measure(network("paper"), 8, "bf16", GPU)
    assert found is not None
    assert found.chosen == Forms("blocks", "apart", "at once")
    assert None in found.milliseconds.values()
    assert f"not usable here: {line}" in capsys.readouterr().out


@pytest.mark.usefixtures("no_gpu")
def test_without_a_usable_form_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "milliseconds", lambda *_: 1 / 0)
    assert tuning.measure(network("paper"), 8, "bf16", GPU) is None


@pytest.mark.usefixtures("no_gpu")
def test_measuring_stops_in_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Between two forms, with the fastest so far."""
    now = 0.0

    def milliseconds(*arguments: object) -> float:
        nonlocal now
        now += 25.0
        return 100 - now

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now)
    found = tuning.measure(network("paper"), 8, "bf16", GPU)
    assert found is not None
    assert len(found.milliseconds) == 3
    assert found.milliseconds[str(found.chosen)] == 25.0
    assert found.seconds == 75.0
    assert found.product_tflops == 800.0
    assert "  stopped after 60 s, before 1 more" in capsys.readouterr().out


def test_the_rate_of_large_products(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If it cannot be measured, the line about the forms is without it."""
    monkeypatch.setattr(tuning, "MATRIX", 64)

    def timed(call: Callable[[], object], count: int) -> float:
        product = call()
        assert isinstance(product, Tensor)
        assert (product.shape, product.dtype) == ((64, 64), torch.bfloat16)
        return 2e-6

    monkeypatch.setattr(tuning, "_timed", timed)
    before = torch.get_rng_state()
    assert tuning.product_tflops("bf16", torch.device("cpu")) == 262.1
    assert torch.equal(torch.get_rng_state(), before)

    def fails(call: Callable[[], object], count: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "_timed", fails)
    assert tuning.product_tflops("fp32", torch.device("cpu")) is None
    assert "rate of matrix products is not known: CUDA out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("precision", "fault", "found"),
    [
        ("fp32", "gradient", "gradient of conv2.weight off by"),
        ("bf16", "k", "logits off by"),
    ],
)
def test_a_form_is_checked(monkeypatch: pytest.MonkeyPatch, precision: str, fault: str, found: str) -> None:
    """Its logits and every gradient, at the run's precision; a correct form passes."""
    torch.manual_seed(0)
    model = alexnet("digits", image_size=20, hidden=())
    images, labels = torch.randn(4, 3, 20, 20) * 60, torch.arange(4)
    shared = Forms(shared="together")
    tuning.check(model, shared, images, labels, precision)
    assert model.training
    assert model.conv1.together

    def wrong(model: AlexNet, chosen: Forms) -> None:
        use(model, chosen)
        if chosen == shared and fault == "gradient":
            model.conv2.weight.register_hook(lambda gradient: gradient * 1.1)
        elif chosen == shared:
            model.stage1.lrn["k"] = 1.0

    monkeypatch.setattr(tuning, "use", wrong)
    with pytest.raises(ArithmeticError, match=f"wrong results: {found}"):
        tuning.check(model, shared, images, labels, precision)


def test_a_form_is_checked_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: AlexNet, form: Forms, images: Tensor, labels: Tensor, precision: str) -> None:
        assert images.shape == (2, 3, 20, 20)
        raise ArithmeticError(str(form))

    monkeypatch.setattr(tuning, "check", failing)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    with pytest.raises(ArithmeticError, match="shared together"):
        tuning.milliseconds(network("digits", image_size=20), 2, "fp32", torch.device("cpu"), Forms(shared="together"))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache folder of a machine with a GPU; every network has the same key."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "key", lambda *_: "this-machine")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return tmp_path / "cache" / "alexnet-fused"


FOUND = Measured(Forms("blocks"), {str(Forms("blocks")): 2.0, str(Forms()): None}, 3.0, 800.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Measuring finds :data:`FOUND`; a list with an item for each time."""
    calls: list[object] = []
    monkeypatch.setattr(tuning, "measure", lambda *arguments: calls.append(arguments) or FOUND)
    return calls


def tuned(how: str, allowed: float = 30.0) -> Forms:
    return tuning.tuned(network("paper"), 128, "bf16", GPU, how, allowed)


@pytest.mark.usefixtures("cache")
def test_a_choice_is_measured_once(measured: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert tuned("off") == tuned("auto", 0.0) == Forms("blocks", "together")
    assert not measured
    assert tuned("auto") == Forms("blocks")
    assert "measured in 0:00:03" in (said := capsys.readouterr().out)
    # 4.136 GFLOP per image.
    assert "64,000 images/s, 265 TFLOP/s (33 % of the rate of large matrix products)" in said
    assert tuned("auto", 0.0) == tuned("off") == Forms("blocks")
    assert "(cached)" in capsys.readouterr().out
    assert len(measured) == 1
    assert tuned("again") == Forms("blocks")
    assert len(measured) == 2


@pytest.mark.usefixtures("cache")
def test_if_no_form_is_usable_the_default_ones_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "measure", lambda *_: None)
    assert tuned("auto") == Forms("blocks", "together")
    assert not tuning.cache_file("this-machine").exists()


WHOLE = asdict(FOUND)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        "[]",
        b"\xff",
        {key: value for key, value in WHOLE.items() if key != "milliseconds"},
        {key: value for key, value in WHOLE.items() if key != "chosen"},
        {**WHOLE, "chosen": {"first": "bricks"}},
        {**WHOLE, "chosen": ["blocks"]},
        {**WHOLE, "chosen": asdict(Forms())},
        {**WHOLE, "milliseconds": [2.0]},
        {**WHOLE, "milliseconds": {str(Forms("blocks")): "2.0"}},
        {**WHOLE, "milliseconds": {str(Forms("blocks")): 0.0}},
        {**WHOLE, "milliseconds": {str(Forms("blocks")): math.nan}},
        {**WHOLE, "milliseconds": {str(Forms()): 2.0}},
        {**WHOLE, "product_tflops": 0.0},
        {**WHOLE, "product_tflops": "800"},
        {**WHOLE, "seconds": 10**400},
        {**WHOLE, "seconds": "long"},
    ],
    ids=lambda content: str(content)[:40] if isinstance(content, str | bytes) else str(list(content.items())[:3])[-60:],
)
def test_a_broken_cache_file_is_named_and_replaced(
    cache: Path, measured: list[object], capsys: pytest.CaptureFixture[str], content: object
) -> None:
    path = tuning.cache_file("this-machine")
    cache.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    if isinstance(content, dict):
        path.write_text(json.dumps(content))
    assert tuned("auto") == Forms("blocks")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"note: ignoring {path}: ")
    assert len(said) == 3
    assert len(measured) == 1
    assert tuning.remembered("this-machine") == FOUND


@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for the file"])
def test_without_a_cache_the_choice_works_and_a_line_says_so(
    cache: Path, measured: list[object], capsys: pytest.CaptureFixture[str], obstacle: str
) -> None:
    if obstacle == "a file for a folder":
        cache.parent.write_text("")
    else:
        tuning.cache_file("this-machine").mkdir(parents=True)
    assert tuned("auto") == Forms("blocks")
    assert (
        f"note: the chosen forms cannot be cached in {tuning.cache_file('this-machine')} (" in capsys.readouterr().out
    )
    assert len(measured) == 1


@pytest.mark.usefixtures("cache")
def test_two_runs_may_write_the_cache_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one writes its entry after this one has begun to write its own."""
    write, other = tuning.atomic_write, replace(FOUND, seconds=4.0)

    @contextlib.contextmanager
    def interrupted(path: Path) -> Iterator[BinaryIO]:
        with write(path) as file:
            monkeypatch.setattr(tuning, "atomic_write", write)
            tuning.remember("other", other)
            yield file

    monkeypatch.setattr(tuning, "atomic_write", interrupted)
    tuning.remember("own", FOUND)
    assert (tuning.remembered("own"), tuning.remembered("other")) == (FOUND, other)


def test_short_runs_measure_nothing() -> None:
    plan = network("paper")
    assert tuning.measuring_time(plan, 200 * 128, None) == 0
    assert tuning.measuring_time(plan, 90 * 1_200_000, None) == tuning.LIMIT
    assert tuning.measuring_time(plan, 90 * 1_200_000, 60.0) == 0
    # A tenth of the run, however little that is.
    assert tuning.measuring_time(plan, 90 * 1_200_000, 200.0) == 20


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A GPU as far as choosing goes; its properties can be changed."""
    properties: dict[str, object] = {"name": "a GPU", "major": 9, "minor": 0, "multi_processor_count": 132}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("net.common.device.choose", lambda name: GPU)
    return properties


@pytest.mark.usefixtures("gpu")
def test_a_choice_is_of_one_network_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's key does not change with the number of classes."""

    def key(variant: str = "paper", batch: int = 128, precision: str = "bf16", **fields: object) -> str:
        return tuning.key(network(variant, **fields), batch, precision, GPU)

    keys = [key(), key("half"), key(batch=64), key(precision="fp32"), key(lrn=False), key(image_size=160)]
    assert key(classes=10) == key()
    for version in (b"NVIDIA UNIX x86_64 Kernel Module 550.54", b"NVIDIA UNIX x86_64 Kernel Module 570.86"):
        monkeypatch.setattr(tuning, "read", lambda *_, version=version: version)
        keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


@pytest.mark.usefixtures("gpu")
def test_both_commands_have_one_key(monkeypatch: pytest.MonkeyPatch, measured: list[object], tmp_path: Path) -> None:
    """What net.tune measured, net.train finds, on other classes; both have cuDNN compute deterministically."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    flags = {"network": "half", "architecture": {"lrn": False}, "image_size": 99, "batch_size": 32}
    done = run_here("net.tune", "--network", "half", "--architecture", "lrn=false", "--image-size", 99, "-b", 32)
    assert done.returncode == 0, done.stderr
    assert torch.backends.cudnn.deterministic
    assert len(measured) == 1
    with torch.device("meta"):
        model = alexnet("half", lrn=False, image_size=99, classes=10)
    config = TrainConfig(**flags, precision="bf16")  # type: ignore[arg-type]
    assert forms_wanted(config, model, 10**9, GPU) == Forms("blocks")
    assert len(measured) == 1
    assert len(list(tmp_path.rglob("*.json"))) == 1


@pytest.mark.usefixtures("gpu")
def test_data_parallel_ranks_run_forms_measured_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a rank's share of the batch and of the time, and towers in turn; the line says what the time is of."""
    at_once = Forms("blocks", "together", "at once")
    in_turn = replace(at_once, towers="in turn")
    found = Measured(at_once, {str(at_once): 1.0, str(in_turn): 2.0}, 3.0)
    asked: list[tuple[int, float]] = []

    def measure(plan: object, batch: int, precision: str, device: object, limit: float) -> Measured:
        asked.append((batch, limit))
        return found

    monkeypatch.setattr(tuning, "key", lambda plan, batch, *_: str(batch))
    monkeypatch.setattr(tuning, "remembered", lambda name: None)
    monkeypatch.setattr(tuning, "remember", lambda name, found: None)
    monkeypatch.setattr(tuning, "measure", measure)
    with torch.device("meta"):
        model = alexnet("paper")
    # An epoch that one process would measure for 48 s, each of four for 12 s.
    images = int(480 * tuning.GPU_FLOP_PER_S / model.config.training_flop)
    flags = {"batch_size": 128, "epochs": 1, "precision": "bf16"}
    for parallel, ranks, chosen in (("none", 1, at_once), ("data", 4, in_turn)):
        config = TrainConfig(parallel=parallel, **flags)  # type: ignore[arg-type]
        assert forms_wanted(config, model, images, GPU, ranks) == chosen
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("forms on ")]
        assert f": {chosen}, {found.milliseconds[str(chosen)]:.3f} ms" in line
        assert line.endswith("; in one process alone, captured, with 32 images") is (ranks == 4)
    assert asked == [(128, pytest.approx(48, rel=1e-3)), (32, pytest.approx(12, rel=1e-3))]
    config = TrainConfig(parallel="tower", **flags)  # type: ignore[arg-type]
    assert forms_wanted(config, model, images, GPU, 2) == Forms("blocks")
    assert len(asked) == 2


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("form", [Forms("blocks"), Forms("blocks", "together")], ids=str)
def test_trying_forms_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, form: Forms, channels_last: bool) -> None:
    """Weights, gradients and generators are those of before; dropout is on, images are what the network will read."""
    shapes: list[torch.Size] = []
    forward = AlexNet.forward
    monkeypatch.setattr(AlexNet, "forward", lambda self, images: shapes.append(images.shape) or forward(self, images))
    model = AlexNet(network("paper", image_size=67, hidden=[{"name": "fc6", "features": 8}]))
    model.get_submodule("conv1").requires_grad_(False)
    use(model, form)
    weights = [parameter.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    assert tuning.try_forms(model, 2, "fp32", channels_last) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert shapes == [(2, 48, 17, 17) if channels_last else (2, 3, 67, 67)]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_trying_forms_that_fail(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Gives the first line, even if memory cannot be freed afterwards, and also where Triton is missing."""
    model = alexnet("digits", image_size=20)

    def failing(*_: Any) -> None:
        raise OutOfResources(300_000, 232_448, "shared memory")

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    if where == "forward":
        monkeypatch.setattr(AlexNet, "forward", failing)
    else:
        monkeypatch.setattr(torch.autograd, "grad", failing)
    monkeypatch.setattr(tuning, "_forget_memory", broken)
    monkeypatch.setattr(tuning, "is_gpu", lambda device: True)
    monkeypatch.setattr(tuning, "runs_triton", lambda device: False)
    monkeypatch.setitem(sys.modules, "kernels.gpu", None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    error = tuning.try_forms(model, 2, "fp32")
    assert error is not None
    assert error.startswith("out of resource: shared memory")
    assert "\n" not in error


def test_every_rank_uses_what_the_first_chose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the first may measure."""
    asked: list[str] = []

    def wanted(config: TrainConfig, *_: object) -> Forms:
        asked.append(config.tune)
        return Forms()

    class Second(World):
        rank, size = 1, 2

        def broadcast(self, value: Any) -> Any:
            return asdict(Forms(shared="together"))

    monkeypatch.setattr(trainer, "forms_wanted", wanted)
    for world, chosen in ((World(), Forms()), (Second(), Forms(shared="together"))):
        run = trainer.Trainer(TrainConfig(network="digits", batch_size=64), tmp_path, None, torch.device("cpu"), world)
        assert run.forms == chosen
        conv1 = run.model.get_submodule("conv1")
        assert isinstance(conv1, Convolution)
        assert conv1.together == (chosen.shared == "together")
    assert asked == ["auto", "off"]


@pytest.mark.usefixtures("gpu", "cache", "measured")
@pytest.mark.parametrize(
    ("flags", "device", "reason"),
    [
        ({}, torch.device("cpu"), "a CUDA GPU and --parallel none or data"),
        ({"parallel": "tower"}, GPU, "a CUDA GPU and --parallel none or data"),
        ({"parallel": "hybrid"}, GPU, "a CUDA GPU and --parallel none or data"),
        ({"compile": True}, GPU, "in a single process without --compile"),
        ({"cuda_graph": False}, GPU, "--no-cuda-graph"),
        ({"channels_last": False}, GPU, "--no-channels-last"),
        ({"forms": {"shared": "together"}}, GPU, "those of --forms or of the resumed run"),
        ({}, GPU, None),
        ({"parallel": "data"}, GPU, None),
    ],
)
def test_tune_again_is_never_ignored_without_a_word(
    capsys: pytest.CaptureFixture[str], flags: dict[str, Any], device: torch.device, reason: str | None
) -> None:
    with torch.device("meta"):
        model = alexnet("paper")
    for how in ("again", "auto"):
        forms_wanted(TrainConfig(**flags, tune=how), model, 100, device)  # type: ignore[arg-type]
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: --tune again")]
        if how == "again" and reason is not None:
            assert len(notes) == 1
            assert reason in notes[0]
        else:
            assert not notes


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("gpu", "name", "another"),
        ("gpu", "major", 10),
        ("gpu", "minor", 3),
        ("gpu", "multi_processor_count", 114),
        ("torch", "__version__", "1.0"),
        ("triton", "__version__", "1.0"),
        ("torch.version", "cuda", "1.0"),
        ("torch.backends.cudnn", "version", lambda: 1),
        ("code", "kernels/gpu/update.py", b"# changed"),
        ("code", "net/training/step.py", b"# changed"),
        ("code", "net/common/device.py", b"# changed"),
    ],
)
def test_a_choice_is_of_one_machine(
    place: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch, gpu: dict[str, object]
) -> None:
    """The cache's key changes with everything that a measurement depends on."""

    def key() -> str:
        return tuning.key(network("paper"), 128, "bf16", GPU)

    before = key()
    assert key() == before
    if place == "gpu":
        gpu[name] = value
    elif place == "code":
        read = Path.read_bytes
        monkeypatch.setattr(
            Path, "read_bytes", lambda path: read(path) + (value if path.as_posix().endswith(name) else b"")
        )
    else:
        monkeypatch.setattr(f"{place}.{name}", value)
    assert key() != before
