"""The captured training step, with stand-ins for CUDA graphs: the same bits as a plain loop, and failed captures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime.errors import OutOfResources

import kernels
from kernels.gpu import update
from net.model.alexnet import AlexNet, alexnet
from net.training.config import RecipeConfig
from net.training.recipe import PaperSGD, parameter_groups
from net.training.step import UNRECORDED, TrainingStep

UPDATES = 20


def update_together(parameters: Sequence[update.Parameter], rate: Tensor, momentum: float, weight_decay: float) -> None:
    """The optimizer's kernel in PyTorch's operations, which round to bfloat16 as a GPU does."""
    lr = float(rate)
    for weight, gradient, velocity, copy in parameters:
        velocity.mul_(momentum).add_(weight.data, alpha=-weight_decay * lr).add_(gradient.float(), alpha=-lr)
        # Like a kernel, it does not count as an edit.
        weight.data.add_(velocity)
        if copy is not None:
            copy.data.copy_(weight)


def stand_in(monkeypatch: pytest.MonkeyPatch, step: TrainingStep) -> list[int]:
    """Make the step's captures and replays work without a GPU; returns a list with an item for each replay.

    A capture leaves parameters, velocities and the generator as they were, and a replay computes the update from the
    static inputs into the results of the capture.
    """
    replays: list[int] = []

    def state() -> list[Tensor]:
        velocities = [each for state in step.optimizer.state.values() for each in state.values()]
        copies = [copy for _, copy in step.copied.values()]
        return [each.data for each in (*step.parameters, *copies, *velocities) if isinstance(each, Tensor)]

    class Graph:
        def replay(self) -> None:
            replays.append(step.updates)
            assert step.images is not None
            assert step._labels is not None
            assert step._results is not None
            for old, new in zip(step._results, step._compute(step.images, step._labels), strict=True):
                old.copy_(new)

    @contextmanager
    def capture(graph: Graph, capture_error_mode: str) -> Iterator[None]:
        before = [each.clone() for each in state()]
        with torch.random.fork_rng([]):
            yield
        for each, value in zip(state(), before, strict=True):
            each.copy_(value)

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)
    monkeypatch.setattr(torch.cuda, "default_generators", {None: generator})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream of before")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    return replays


def digits(precision: str) -> tuple[AlexNet, PaperSGD]:
    torch.manual_seed(0)
    model = alexnet("digits", image_size=16, without=("conv3", "conv4"))
    fused = "triton" if precision == "bf16" else False
    return model.train(), PaperSGD(parameter_groups(model, RecipeConfig()), 2**-7, fused=fused)  # type: ignore[arg-type]


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(UPDATES):
        images = torch.randn(4, 3, 16, 16, generator=generator) * 60
        yield images, torch.randint(0, 10, (4,), generator=generator)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_updates_have_the_bits_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """With dropout, and a learning rate that falls; in bf16 with copies of the weights."""
    monkeypatch.setattr(update, "update_together_", update_together)

    def trained(one: Callable[[AlexNet, PaperSGD], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]) -> list[Tensor]:
        model, optimizer = digits(precision)
        assert model.config.dropout
        step = one(model, optimizer)
        results: list[Tensor] = []
        for number, (images, labels) in enumerate(batches()):
            for group in optimizer.param_groups:
                group["lr"] = 2**-7 if number < UPDATES // 2 else 2**-9
            results += step(images, labels)
        return [*results, *(parameter.detach() for parameter in model.parameters())]

    def plain(model: AlexNet, optimizer: PaperSGD) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach(), (logits.argmax(1) == labels).sum()

        return step

    replays: list[int] = []

    def captured(model: AlexNet, optimizer: PaperSGD) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        nonlocal replays
        step = TrainingStep(model, model, optimizer, precision, record=True, copies=precision == "bf16")
        step.loss_kernel = False
        replays = stand_in(monkeypatch, step)

        def given(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            if step.images is None or step.updates % 2:
                return step(images, labels)
            # As the input kernel does.
            return step(step.images.copy_(images), labels)

        return given

    with kernels.implementation("reference"):
        expected, found = trained(plain), trained(captured)
    assert all(map(torch.equal, found, expected))
    assert len(replays) == UPDATES - UNRECORDED


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("clone", torch.OutOfMemoryError("CUDA out of memory")),
        ("CUDAGraph", torch.OutOfMemoryError("CUDA out of memory")),
        ("graph", torch.OutOfMemoryError("CUDA out of memory")),
        ("graph", OutOfResources(300_000, 232_448, "shared memory")),
        ("end", RuntimeError("operation not permitted when stream is capturing")),
    ],
)
def test_a_step_that_cannot_be_captured_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str, error: Exception
) -> None:
    def failing(*arguments: object, **named: object) -> None:
        raise error

    @contextmanager
    def ends_badly(graph: object, capture_error_mode: str) -> Iterator[None]:
        """What fails in a capture makes its end fail with an error that says nothing."""
        try:
            raise error
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
        yield

    losses: list[float] = []
    streams: list[str] = []
    for record in (True, False):
        model, optimizer = digits("fp32")
        step = TrainingStep(model, model, optimizer, "fp32", record=record)
        stand_in(monkeypatch, step)
        monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
        if where == "end":
            monkeypatch.setattr(torch.cuda, "graph", ends_badly)
        elif where != "clone":
            monkeypatch.setattr(torch.cuda, where, failing)
        for number, (images, labels) in zip(range(UNRECORDED + 2), batches(), strict=False):
            if where == "clone" and record and number == UNRECORDED:
                monkeypatch.setattr(images, "clone", failing)
            losses.append(float(step(images, labels)[0]))
        assert step.graph is step.images is None
    assert losses[: UNRECORDED + 2] == losses[UNRECORDED + 2 :]
    said = capsys.readouterr().out.splitlines()
    assert said == [f"note: the update cannot be captured as a CUDA graph and runs eagerly: {error}"]
    assert streams == ["the stream of before"]
