"""Forms do not change results; updates with bfloat16 copies of the weights."""

import itertools
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

import kernels
from kernels.gpu import loss, runtime
from net.common.device import choose as choose_device
from net.common.device import resolve_precision, set_precision
from net.common.errors import UsageError
from net.data.augmentation import TrainingInput, Variations
from net.model.alexnet import Convolution, Exchange, alexnet
from net.model.blocks import block_count, block_weight, blocks
from net.model.config import network
from net.model.forms import Forms, forms, untuned, use
from net.parallel.process_group import World
from net.training import checkpoint
from net.training.config import TrainConfig
from net.training.recipe import PaperSGD, Schedule, parameter_groups
from net.training.state import take
from net.training.step import TrainingStep
from net.training.trainer import Trainer
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


@pytest.mark.parametrize(
    ("variant", "compiled"),
    [*((variant, False) for variant in NETWORKS), pytest.param("paper", True, marks=pytest.mark.slow)],
)
def test_every_form_computes_the_same(variant: str, compiled: bool) -> None:
    """Logits and the gradient of every parameter, in float64; torch.compile takes each form as one graph."""
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
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for form in found:
        use(model, form)
        logits = run(images)
        torch.testing.assert_close(logits, exact, rtol=1e-10, atol=1e-10 * float(exact.detach().abs().max()))
        for one, other in zip(
            torch.autograd.grad(logits, list(model.parameters()), gradient), exact_gradients, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))
        layout = model.input_layout
        if form.first == "blocks":
            assert torch.equal(run(blocks(images, *layout)), logits)
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


@pytest.mark.parametrize("layer", ["conv1", "conv2"])
@pytest.mark.parametrize("copies", [False, True])
def test_frozen_layers_stay(layer: str, copies: bool) -> None:
    """conv2's towers read slices of the copies."""
    torch.manual_seed(0)
    model = alexnet("digits", hidden=(), without=("conv3", "conv4"))
    model.get_submodule(layer).requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = PaperSGD(parameter_groups(model, TrainConfig()), fused="triton" if copies else None)
    step = TrainingStep(model, model, optimizer, "bf16" if copies else "fp32", copies=copies)
    with kernels.implementation("reference"):
        loss, correct = step(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    assert loss.isfinite()
    assert 0 <= int(correct) <= 4
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if not name.startswith(layer)}
    assert all(parameter.grad is None for parameter in model.parameters())


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
    with monkeypatch.context() as patch:
        patch.setattr("net.common.device.importlib.util.find_spec", lambda name: None)
        assert not record_wanted(TrainConfig(), GPU)
    # A captured update is compiled only with --compile; others are compiled where it pays off.
    assert not compile_wanted(TrainConfig(), plan, 10**6, GPU)
    assert compile_wanted(TrainConfig(compile=True), plan, 10**6, GPU)
    assert compile_wanted(TrainConfig(cuda_graph=False), plan, 10**6, GPU)
    assert compile_wanted(TrainConfig(parallel="data"), plan, 10**6, GPU)
    for config, device in ((TrainConfig(cuda_graph=True), CPU), (TrainConfig(cuda_graph=True, parallel="tower"), GPU)):
        with pytest.raises(UsageError, match="--cuda-graph needs a CUDA GPU, Triton and --parallel none"):
            record_wanted(config, device)


def test_precision_is_the_device_s_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("auto", CPU, trained="bf16") == "fp32"
    assert resolve_precision("auto", GPU) == "bf16"
    assert resolve_precision("auto", GPU, trained="tf32") == "tf32"
    assert resolve_precision("bf16", CPU) == "bf16"
    for precision in ("tf32", "bf16"):
        set_precision(precision, GPU)
    assert resolve_precision("bf16", GPU) == "bf16"
    capability = (7, 5)
    assert resolve_precision("auto", GPU, trained="bf16") == "fp32"
    # Explicit, or that of a run resumed on an older GPU.
    for precision, device in (("bf16", GPU), ("tf32", GPU), ("tf32", CPU)):
        with pytest.raises(UsageError, match=f"--precision {precision} needs an NVIDIA GPU of compute capability 8.0"):
            set_precision(precision, device)
    set_precision("bf16", CPU)


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


def trained(monkeypatch: pytest.MonkeyPatch, folder: Path, first: str, from_call: int) -> Trainer:
    """Two updates of a run in which convolutions of blocks fail from a call on.

    As on a GPU, the input comes in the layout that the network reads.
    """
    calls = 0
    forward, make = Convolution.forward, TrainingInput.__init__

    def failing(self: Convolution, towers: list[Tensor], exchange: Exchange) -> list[Tensor]:
        nonlocal calls
        if self.blocks:
            assert towers[0].shape[1] == 48
            calls += 1
            if calls >= from_call:
                raise OutOfResources(300_000, 232_448, "shared memory")
        return forward(self, towers, exchange)

    def on_a_gpu(self: TrainingInput, *arguments: Any) -> None:
        make(self, *arguments)
        self.kernel = True

    def in_one_pass(self: TrainingInput, images: Tensor, variations: Variations, out: Tensor | None) -> Tensor:
        self.kernel = False
        pixels = self(images, variations)
        self.kernel = True
        return pixels if self.layout.block == 1 else blocks(pixels, *self.layout)

    monkeypatch.setattr(Convolution, "forward", failing)
    monkeypatch.setattr(TrainingInput, "__init__", on_a_gpu)
    monkeypatch.setattr(TrainingInput, "_in_one_pass", in_one_pass)
    architecture = {"hidden": [], "without": ["conv3", "conv4", "conv5"]}
    config = TrainConfig(
        data_path="synthetic:4", batch_size=2, image_size=67, architecture=architecture, forms={"first": first}
    )
    trainer = Trainer(config, folder, None, CPU, World())
    trainer.bar = tqdm(disable=True)
    folder.mkdir()
    for batch in itertools.islice(trainer.train_loader, 2):
        trainer._update(batch)
    return trainer


def test_a_form_that_fails_in_the_first_update_is_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the plain ones, with the bits of a run that had them from the start."""
    failed, plain = (trained(monkeypatch, tmp_path / first, first, 1) for first in ("blocks", "pixels"))
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "fail here" in line]
    assert note.startswith("note: the forms first blocks, shared apart, towers in turn fail here (out of resource")
    assert note.endswith("; using first pixels, shared apart, towers in turn")
    assert failed.interval.losses == plain.interval.losses
    assert all(map(torch.equal, failed.model.parameters(), plain.model.parameters()))
    # What resuming uses.
    assert 'forms = { first = "pixels"' in (tmp_path / "blocks" / "config.toml").read_text()
    assert take(failed)["forms"] == asdict(Forms())


def test_a_later_failure_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OutOfResources):
        trained(monkeypatch, tmp_path / "run", "blocks", 2)


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
