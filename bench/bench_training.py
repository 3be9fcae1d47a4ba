"""How fast networks learn: an update of the paper's network, and a whole run on the digits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

import kernels
from net import runs, train
from net.alexnet import alexnet
from net.config import TrainConfig
from net.device import peak_memory_mib
from net.recipe import PaperSGD, Schedule, parameter_groups

Row = Callable[..., None]
BATCH = 128


@pytest.mark.parametrize("implementation", ["reference", "aten"])
def test_paper_update(benchmark: BenchmarkFixture, row: Row, implementation: str) -> None:
    """Forward, backward and update of the paper's network at its batch size, eager, on the CPU."""
    torch.manual_seed(0)
    model = alexnet("paper").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    recipe = TrainConfig()
    optimizer = PaperSGD(parameter_groups(model, recipe), recipe.lr, recipe.momentum, recipe.weight_decay)
    Schedule(recipe).apply(optimizer)
    images = (torch.randn(BATCH, 3, 224, 224) * 60).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (BATCH,))

    def update() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    with kernels.implementation(implementation):
        benchmark.pedantic(update, rounds=5, warmup_rounds=2)
    row(
        case="update of the paper's network",
        implementation=implementation,
        mode="train_step",
        shape=f"{BATCH}x3x224x224",
        dtype="float32",
        memory_format="channels_last",
        images=BATCH,
        process_peak_mib=round(peak_memory_mib(torch.device("cpu"))),
    )


def test_digits_run(benchmark: BenchmarkFixture, row: Row, tmp_path: Path) -> None:
    """``python -m net.train`` without flags, from its first line to its last."""
    status = benchmark.pedantic(train.main, (["--output-dir", str(tmp_path / "run")],), rounds=1)
    assert status == 0
    last = runs.read_metrics(tmp_path / "run")[-1]
    row(
        case="digits, a whole run",
        mode="train",
        shape="64x3x32x32",
        dtype="float32",
        updates=last["step"],
        top1_accuracy_percent=round(100 - last["top1_error_percent"], 2),
    )
