"""Forms do not change results; autotuning; updates with bfloat16 copies of the weights."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels.gpu import loss, runtime
from net.common.device import choose as choose_device
from net.common.device import resolve_precision
from net.common.errors import UsageError
from net.model.alexnet import alexnet
from net.model.blocks import block_count, block_weight, blocks
from net.model.config import network
from net.model.forms import Forms, forms, untuned, use
from net.training import checkpoint, tuning
from net.training.config import TrainConfig
from net.training.recipe import PaperSGD, Schedule, parameter_groups
from net.training.step import TrainingStep
from tests.commands import one_line, run_here

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"), [(20, 11, 4, 0), (23, 11, 4, 2), (21, 5, 2, 1), (9, 3, 3, 0)]
)
def test_blocks_are_the_same_convolution(size: int, kernel: int, stride: int, padding: int) -> None:
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    weight = torch.randn(5, 3, kernel, kernel, dtype=torch.float64)
    exact = torch.nn.functional.conv2d(images, weight, stride=stride, padding=padding)
    count = block_count(exact.shape[-1], kernel, stride)
    result = torch.nn.functional.conv2d(blocks(images, stride, count, padding), block_weight(weight, stride))
    torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)


#: Networks with a strided conv1, towers, normalization across towers, and removed layers.
NETWORKS = {
    "paper": {"image_size": 67},
    "caffe": {"image_size": 67},
    "original_code": {"image_size": 67},
    "sixth_conv": {"image_size": 99},
    "one_weird_trick": {"image_size": 63},
    "digits": {},
    "cifar10": {},
}


@pytest.mark.parametrize("variant", NETWORKS)
def test_every_form_computes_the_same(variant: str) -> None:
    """Logits and the gradient of every parameter, in float64."""
    torch.manual_seed(0)
    model = alexnet(variant, classes=7, hidden=(), **NETWORKS[variant]).double().eval()
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = model.config.image_size
    images = torch.randn(2, 3, size, size, dtype=torch.float64) * 60
    exact = model(images)
    gradient = torch.randn_like(exact)
    exact_gradients = torch.autograd.grad(exact, list(model.parameters()), gradient)
    found = list(forms(model, CPU))
    assert Forms() in found
    for form in found:
        use(model, form)
        logits = model(images)
        torch.testing.assert_close(logits, exact, rtol=1e-10, atol=1e-10 * float(exact.detach().abs().max()))
        for one, other in zip(
            torch.autograd.grad(logits, list(model.parameters()), gradient), exact_gradients, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))
        layout = model.input_layout
        if form.first == "blocks":
            assert torch.equal(model(blocks(images, *layout)), logits)
    use(model, Forms())
    assert torch.equal(model(images), exact)


def test_the_forms_of_a_network() -> None:
    paper, cifar10 = alexnet("paper", image_size=67, hidden=()), alexnet("cifar10")
    assert len(set(forms(paper, CPU))) == 4
    assert list(forms(cifar10, CPU)) == [Forms()]
    assert len(set(forms(paper, torch.device("cuda")))) == 8
    assert untuned(paper, CPU) == Forms()
    assert untuned(paper, torch.device("cuda")) == Forms("blocks", "together")
    assert untuned(cifar10, torch.device("cuda")) == Forms()


def test_other_input_is_refused_by_its_shape() -> None:
    model = alexnet("paper", image_size=67, hidden=())
    use(model, Forms("blocks"))
    with pytest.raises(ValueError, match=r"images must have shape \[N, 3, 67, 67\]"):
        model(torch.zeros(1, 48, 5, 5))


def digits_step(fused: bool | str | None, precision: str, copies: bool) -> tuple[TrainingStep, Callable[[], float]]:
    torch.manual_seed(0)
    # The optimizer's kernel runs in the interpreter, so there are few weights.
    model = alexnet("digits", hidden=(), without=("conv3", "conv4")).train()
    config = TrainConfig()
    optimizer = PaperSGD(parameter_groups(model, config), fused=fused)  # type: ignore[arg-type]
    Schedule(config).apply(optimizer)
    step = TrainingStep(model, model, optimizer, precision, copies=copies)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 32, 32, generator=generator) * 60
    labels = torch.tensor([3, 1, 4, 1])
    return step, lambda: float(step(images, labels)[0])


def test_an_update_with_copies_is_the_update_without() -> None:
    """In bfloat16: the network sees the same rounded weights, the optimizer the same gradients."""
    with kernels.implementation("reference"):
        plain, plain_update = digits_step("triton", "bf16", False)
        copied, copied_update = digits_step("triton", "bf16", True)
        for _ in range(2):
            # The interpreter truncates to bfloat16; an edit makes the step round the copies again.
            for parameter, _copy in copied.copied.values():
                parameter.detach().add_(0)
            assert plain_update() == copied_update()
        for one, other in zip(plain.parameters, copied.parameters, strict=True):
            assert torch.equal(one, other)


def test_kernels_are_compiled_before_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them runs: parameters, copies and velocities keep their values, and the generator its state."""
    compiled: list[str] = []
    monkeypatch.setattr(runtime, "_compile", lambda kernel, *_: compiled.append(kernel.fn.__name__))
    step, update = digits_step("triton", "bf16", True)
    step.model.register_forward_hook(lambda model, _, logits: logits * torch.rand(10))

    def state() -> list[Tensor]:
        return [each.clone() for pair in step.copied.values() for each in pair] + [torch.get_rng_state()]

    step.optimizer.send_rates()
    before = state()
    with kernels.implementation("triton"):
        step._compile(torch.randn(4, 3, 32, 32, generator=torch.Generator()), torch.zeros(4, dtype=torch.int64))
    assert all(map(torch.equal, state(), before))
    assert not any(found["velocity"].any() for found in step.optimizer.state.values())
    # Three stages of two towers; weights, biases of convolutions, and fc8's bias, which has a copy.
    kinds = {"forward_kernel": 6, "backward_kernel": 6, "loss_kernel": 1, "joint_update_kernel": 3}
    assert {name: compiled.count(name) for name in compiled} == kinds

    calls: list[object] = []
    monkeypatch.setattr(step, "_compile", lambda *arguments: calls.append(arguments))
    assert not step.compiles, "on a CPU"
    step.compiles = True
    with kernels.implementation("reference"):
        assert update() > 0
        assert update() > 0
    assert len(calls) == 1


def test_copies_follow_an_edit() -> None:
    with kernels.implementation("reference"):
        step, update = digits_step("triton", "bf16", True)
        before = update()
        for parameter in step.parameters:
            parameter.detach().zero_()
        # Logits of zero: all classes are equally likely.
        assert update() == pytest.approx(math.log(10)) != before


def test_an_update_goes_on_without_its_loss_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its operators give the same loss; a failure is one line."""

    def failing(*arguments: object) -> None:
        raise RuntimeError

    (step, update), (other, update_other) = (digits_step(False, "fp32", False) for _ in range(2))
    step.loss_kernel = other.loss_kernel = True
    losses = update(), update()
    monkeypatch.setattr(loss, "cross_entropy", failing)
    assert (update_other(), update_other()) == pytest.approx(losses, rel=1e-5)
    for one, another in zip(step.parameters, other.parameters, strict=True):
        torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-6)
    assert capsys.readouterr().out == "note: the loss is computed by PyTorch's operators: RuntimeError\n"


def test_frozen_layers_stay() -> None:
    torch.manual_seed(0)
    model = alexnet("digits", hidden=())
    model.conv1.requires_grad_(False)
    before = model.conv1.weight.clone()
    optimizer = PaperSGD(parameter_groups(model, TrainConfig()))
    step = TrainingStep(model, model, optimizer, "fp32")
    loss, correct = step(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    assert loss.isfinite()
    assert 0 <= int(correct) <= 4
    assert torch.equal(model.conv1.weight, before)
    assert all(parameter.grad is None for parameter in model.parameters())


# Autotuning, with given times


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


def test_a_form_that_fails_is_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def milliseconds(*arguments: object) -> float:
        form = arguments[-1]
        assert isinstance(form, Forms)
        if form.shared == "together":
            raise RuntimeError("no engine\nand more")
        return 1.0 if form.towers == "at once" else 2.0

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    entry = tuning.measure(network("paper"), 8, "bf16", torch.device("cuda"))
    assert entry["chosen"] == {"first": "blocks", "shared": "apart", "towers": "at once"}
    assert None in entry["milliseconds"].values()
    assert "not supported here: no engine" in capsys.readouterr().out


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(tuning, "key", lambda *_: "this machine")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@pytest.mark.usefixtures("cache")
def test_a_choice_is_measured_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    measured: list[object] = []
    entry = {
        "chosen": {"first": "blocks", "shared": "apart", "towers": "in turn"},
        "milliseconds": {str(Forms("blocks")): 2.0},
        "seconds": 3.0,
    }
    monkeypatch.setattr(tuning, "measure", lambda *arguments: measured.append(arguments) or entry)

    def tuned(how: str, worth: bool = True) -> Forms:
        return tuning.tuned(network("paper"), 128, "bf16", torch.device("cuda"), how, worth)

    assert tuned("off") == tuned("auto", worth=False) == Forms("blocks", "together")
    assert not measured
    assert tuned("auto") == Forms("blocks")
    assert "measured in 0:00:03" in (said := capsys.readouterr().out)
    assert "64,000 images/s" in said
    assert tuned("auto", worth=False) == Forms("blocks")
    assert len(measured) == 1
    assert tuned("again") == Forms("blocks")
    assert len(measured) == 2
    # A truncated or foreign file holds no choice.
    for content in ("{", "[]", json.dumps({"this machine": {"chosen": {"first": "bricks"}}})):
        tuning.cache_file().write_text(content)
        assert tuning.remembered("this machine") is None
        assert tuned("auto") == Forms("blocks")
        assert tuning.remembered("this machine") == entry


def test_short_runs_measure_nothing() -> None:
    plan = network("paper")
    assert not tuning.worth_measuring(plan, 200 * 128, None)
    assert tuning.worth_measuring(plan, 90 * 1_200_000, None)
    assert not tuning.worth_measuring(plan, 90 * 1_200_000, 60.0)


# Flags


GPU = torch.device("cuda", 0)


def test_one_process_on_a_gpu_records(monkeypatch: pytest.MonkeyPatch) -> None:
    from net.training.setup import compile_wanted, record_wanted

    monkeypatch.setattr("net.training.setup.compiler.obstacle", lambda: None)
    plan = network("paper")
    assert record_wanted(TrainConfig(), GPU)
    assert not record_wanted(TrainConfig(), CPU)
    assert not record_wanted(TrainConfig(parallel="data"), GPU)
    assert not record_wanted(TrainConfig(cuda_graph=False), GPU)
    # A captured update is compiled only with --compile; others are compiled where it pays off.
    assert not compile_wanted(TrainConfig(), plan, 10**6, GPU)
    assert compile_wanted(TrainConfig(compile=True), plan, 10**6, GPU)
    assert compile_wanted(TrainConfig(cuda_graph=False), plan, 10**6, GPU)
    assert compile_wanted(TrainConfig(parallel="data"), plan, 10**6, GPU)
    for config, device in ((TrainConfig(cuda_graph=True), CPU), (TrainConfig(cuda_graph=True, parallel="tower"), GPU)):
        with pytest.raises(UsageError, match="--cuda-graph needs a CUDA GPU and --parallel none"):
            record_wanted(config, device)


def test_precision_is_the_device_s_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("auto", CPU, trained="bf16") == "fp32"
    assert resolve_precision("auto", GPU) == "bf16"
    assert resolve_precision("auto", GPU, trained="tf32") == "tf32"
    assert resolve_precision("bf16", CPU) == "bf16"
    capability = (7, 5)
    assert resolve_precision("auto", GPU, trained="bf16") == "fp32"


def test_a_gpu_is_current_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device requires an index."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device(None) == choose_device("cuda") == GPU
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert [device.index for device in current] == [0, 0, 1]


@pytest.fixture(scope="module")
def run_with_forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates, the towers' shared convolutions together."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = run_here("net.train", *FLAGS, "--max-steps", 2, "--output-dir", folder, "--forms", "shared=together")
    assert done.returncode == 0, done.stderr
    return folder


FLAGS = (
    "--preset", "imagenet", "--network", "digits", "--data-path", "synthetic:16", "-b", 8, "--image-size", 20
)  # fmt: skip


def final(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_run_records_its_forms(run_with_forms: Path, tmp_path: Path) -> None:
    """In config.toml and in every checkpoint; an unknown form is an error."""
    config = (run_with_forms / "config.toml").read_text()
    assert 'forms = { shared = "together" }' in config
    assert 'precision = "fp32"' in config
    state = checkpoint.load(run_with_forms / "checkpoints" / "step_00000002.pt")
    assert state["forms"] == {"first": "pixels", "shared": "together", "towers": "in turn"}
    one_line(
        run_here("net.train", *FLAGS, "--output-dir", tmp_path / "other", "--forms", "shared=apart", "first=bricks"),
        2,
        "--forms",
        "first must be one of pixels, blocks; got 'bricks'",
    )
    one_line(run_here("net.tune", "--device", "cpu"), 2, "--device must be cuda")


def test_a_resumed_run_keeps_its_forms_and_bits(
    run_with_forms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Forms] = []
    monkeypatch.setattr("net.training.trainer.use", lambda model, form: used.append(form) or use(model, form))
    whole, folder = tmp_path / "whole", shutil.copytree(run_with_forms, tmp_path / "run")
    done = run_here("net.train", *FLAGS, "--max-steps", 4, "--output-dir", whole, "--forms", "shared=together")
    resumed = run_here("net.train", "--resume", folder, "--max-steps", 4)
    assert done.returncode == resumed.returncode == 0, done.stderr + resumed.stderr
    assert used == [Forms(shared="together")] * 2
    assert final(folder) == final(whole)
    assert "forms" not in resumed.stdout


def test_a_run_resumed_with_other_forms_says_so(run_with_forms: Path, tmp_path: Path) -> None:
    """Chosen with a flag, or because another machine's form is not available here."""
    for number, flag in enumerate(("shared=apart", "towers=at once")):
        folder = shutil.copytree(run_with_forms, tmp_path / str(number))
        done = run_here("net.train", "--resume", folder, "--max-steps", 3, "--forms", flag)
        assert done.returncode == 0, done.stderr
        notes = [line for line in done.stdout.splitlines() if line.startswith("note: ") and "forms" in line]
        assert notes.pop() == (
            "note: this run used the forms first pixels, shared together, towers in turn and now uses first pixels, "
            "shared apart, towers in turn: they compute the same with other roundings, so resuming is not bit-exact"
        )
        if flag == "towers=at once":
            assert notes.pop().startswith(
                "note: --forms first pixels, shared apart, towers at once: not available on CPU with "
            )
        assert not notes


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("gpu", "name", "another"),
        ("gpu", "major", 10),
        ("gpu", "minor", 3),
        ("gpu", "multi_processor_count", 114),
        ("run", "variant", "half"),
        ("run", "batch", 64),
        ("run", "precision", "fp32"),
        ("torch", "__version__", "1.0"),
        ("triton", "__version__", "1.0"),
        ("torch.version", "cuda", "1.0"),
        ("torch.backends.cudnn", "version", lambda: 1),
        ("code", "kernels/gpu/update.py", b"# changed"),
        ("code", "net/training/step.py", b"# changed"),
    ],
)
def test_a_choice_is_of_one_machine(place: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's key changes with everything that a measurement depends on."""
    pytest.importorskip("triton")
    properties = {"name": "a GPU", "major": 9, "minor": 0, "multi_processor_count": 132}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))

    def key(variant: str = "paper", batch: int = 128, precision: str = "bf16") -> str:
        return tuning.key(network(variant), batch, precision, GPU)

    before = key()
    assert key() == before
    if place == "gpu":
        properties[name] = value
    elif place == "code":
        read = Path.read_bytes
        monkeypatch.setattr(
            Path, "read_bytes", lambda path: read(path) + (value if path.as_posix().endswith(name) else b"")
        )
    elif place != "run":
        monkeypatch.setattr(f"{place}.{name}", value)
    assert key(**{name: value} if place == "run" else {}) != before
