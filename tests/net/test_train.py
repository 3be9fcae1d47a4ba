"""The training command: output files, resuming, stopping."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from net.common.files import locked
from net.data.packing import Packing
from net.model import weights
from net.model.config import network
from net.parallel.process_group import Votes, World
from net.training import checkpoint, curve, runs, setup, trainer
from net.training.config import TrainConfig
from net.training.meter import Interval
from net.training.setup import compile_wanted
from net.training.signals import StopSignal
from tests.commands import ROOT, environment, one_line, run, run_here, start, wait_for
from tests.stores import packed_here

#: A short run of fixed length: 28 updates, 22 to an epoch, the learning rate drops in between.
SHORT = (
    "--max-steps", 28, "--epochs", 2, "--log-every", 5, "--checkpoint-every", 4, "--seed", 3, "--image-size", 20
)  # fmt: skip


def final(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def learned(folder: Path) -> list[dict[str, object]]:
    """The metrics without columns that depend on the clock and the machine."""
    clock = ("images_per_s", "memory_mib", "elapsed_s")
    return [{key: value for key, value in row.items() if key not in clock} for row in runs.read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The short run, uninterrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        # A checkpoint at the end of each epoch, however long writing takes.
        patch.setattr(trainer, "CHECKPOINT_SHARE", 0)
        done = run_here("net.train", *SHORT, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_leaves_everything_it_names(whole: Path) -> None:
    output = (whole / "stdout.txt").read_text()
    for name in ("model.safetensors", "metrics.csv", "curve.png"):
        assert f"{whole / name}" in output
        assert (whole / name).stat().st_size > 0
    assert f"{whole}/checkpoints/step_00000028.pt" in output
    assert f"python -m net.evaluate {whole}" in output
    assert [path.name for path in checkpoint.checkpoints(whole / "checkpoints")] == [
        "step_00000028.pt",
        "step_00000024.pt",
        "step_00000022.pt",
    ]
    with Image.open(whole / "curve.png") as picture:
        assert picture.size[0] > 600
    state = checkpoint.load(whole / "checkpoints" / "step_00000028.pt")
    assert state["step"] == 28
    tensors, metadata = weights.read(whole / "model.safetensors")
    assert all(torch.equal(tensors[name], state["model"][name]) for name in tensors)
    assert metadata["classes"] == list("0123456789")
    assert metadata["network"] == network("digits", image_size=20).to_dict()


def test_lines_of_progress_and_metrics(whole: Path) -> None:
    output = (whole / "stdout.txt").read_text().splitlines()
    progress = [line for line in output if line.startswith("step ")]
    assert len(progress) == 5
    for word in ("step 25/28", "epoch 1.14", "loss ", "top-1 ", "lr 0.001", "images/s", "MiB", "ETA 0:00:0"):
        assert word in progress[-1]
    rows = runs.read_metrics(whole)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [5, 10, 15, 20, 25]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [22, 28]
    assert rows[-1]["top1_error_percent"] < rows[0]["top1_error_percent"]
    assert rows[0]["memory_mib"] > 50
    assert len((whole / "metrics.csv").read_text().splitlines()) == len(rows) + 1
    assert "epoch 1: learning rate: 0.01 -> 0.001" in output


@pytest.mark.slow  # Tests of resuming also find nondeterminism.
def test_the_same_command_gives_the_same_bits(whole: Path, tmp_path: Path) -> None:
    assert run("net.train", *SHORT, "--output-dir", tmp_path / "again").returncode == 0
    assert final(tmp_path / "again") == final(whole)
    assert learned(tmp_path / "again") == learned(whole)


def test_killed_at_any_moment_it_ends_with_the_same_bits(whole: Path, tmp_path: Path) -> None:
    """SIGKILL at a random time, which differs in every run of this test."""
    folder = tmp_path / "killed"
    process = start("net.train", *SHORT, "--output-dir", folder)
    wait_for(process, "run folder")
    time.sleep(random.Random().uniform(0.05, 1.5))
    process.kill()
    process.communicate()
    done = run_here("net.train", *SHORT, "--output-dir", folder, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert final(folder) == final(whole)
    assert learned(folder) == learned(whole)
    assert (folder / "metrics.csv").read_text().count("\n") == len(learned(whole)) + 1


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((signal.SIGINT, 130), (signal.SIGHUP, 129))),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_with_the_same_bits(
    whole: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    folder = tmp_path / "stopped"
    # Without --checkpoint-every there is only the signal's checkpoint, in the middle of a logging interval.
    arguments = [*SHORT[:6], *SHORT[8:], "--output-dir", folder]
    process = start("net.train", *arguments)
    wait_for(process, "step 5/28")
    process.send_signal(number)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == status
    assert f"{number.name}: saved update" in output
    assert f"--resume {folder}" in output
    assert errors == ""
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None
    assert 5 <= found[1]["step"] < 28
    done = run_here("net.train", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {found[0]}\n" in done.stdout
    assert final(folder) == final(whole)
    assert learned(folder) == learned(whole)


def test_a_signal_during_the_last_checkpoint_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save

    def interrupted(path: Path, state: dict[str, object]) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", interrupted)
    done = run_here("net.train", "--max-steps", 1, "--image-size", 20, "--output-dir", tmp_path / "run")
    assert done.returncode == 143, done.stderr
    assert "SIGTERM: saved update 1" in done.stdout


def test_resume_takes_the_newest_intact_checkpoint(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    newest = folder / "checkpoints" / "step_00000028.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    done = run_here("net.train", "--resume", "auto", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "step_00000028.pt is damaged" in done.stdout
    assert "resuming from" in done.stdout
    assert "step_00000024.pt" in done.stdout
    assert final(folder) == final(whole)
    assert learned(folder) == learned(whole)


def test_a_finished_run_says_so_again_and_can_go_on(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    done = run_here("net.train", "--resume", folder)
    assert done.returncode == 0, done.stderr
    assert "trained 28 updates" in done.stdout
    assert final(folder) == final(whole)
    more = run_here("net.train", "--resume", folder, "--max-steps", 34, "--epochs", 3, "--lr-milestones", 3)
    assert more.returncode == 0, more.stderr
    assert "with" in more.stdout
    assert "epochs 2 -> 3" in more.stdout
    assert "max_steps 28 -> 34" in more.stdout
    assert "lr_milestones (1, 2) -> (3,)" in more.stdout
    assert "lr 0.01 " in more.stdout, "one epoch is over, so no reduction"
    assert "trained 34 updates" in more.stdout
    assert runs.read_config(folder)["max_steps"] == 34


@pytest.mark.slow
def test_resume_from_an_older_checkpoint_needs_its_own_folder(whole: Path, tmp_path: Path) -> None:
    older = whole / "checkpoints" / "step_00000024.pt"
    one_line(run("net.train", "--resume", older), 2, "is not its run's newest checkpoint")
    done = run("net.train", "--resume", older, "--output-dir", tmp_path / "branch")
    assert done.returncode == 0, done.stderr
    assert final(tmp_path / "branch") == final(whole)


def test_resume_refusals(whole: Path, tmp_path: Path) -> None:
    one_line(run_here("net.train", "--resume", tmp_path / "nowhere"), 1, "nowhere does not exist")
    one_line(run_here("net.train", "--resume", tmp_path), 1, "is not a run folder")
    one_line(run_here("net.train", "--resume", whole, "--preset", "cifar10"), 2, "has the preset digits")
    for flags in (("--network", "paper"), ("--architecture", "lrn=false"), ("--image-size", 28)):
        done = run_here("net.train", "--resume", whole, *flags)
        one_line(done, 2, f"{flags[0]} cannot change when resuming; the run in {whole} keeps its own")
    one_line(run_here("net.train", *SHORT, "--output-dir", whole), 2, "already holds a run")
    folder = shutil.copytree(whole, tmp_path / "damaged")
    for path in checkpoint.checkpoints(folder / "checkpoints"):
        path.write_bytes(b"junk")
    done = run_here("net.train", "--resume", folder)
    assert done.returncode == 1
    assert "no checkpoint in" in done.stderr


def test_two_runs_do_not_share_a_folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    with locked(folder):
        one_line(run_here("net.train", "--resume", folder, "--epochs", 9), 1, f"{folder} is in use by another process")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits-001").mkdir(parents=True)
    with locked(tmp_path / "runs" / "digits-001"):
        done = run_here("net.train", "--max-steps", 1, "--log-every", 10**15)
    assert "run folder runs/digits-002" in done.stdout, done.stderr


def test_resume_auto_without_a_run_starts_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_here("net.train", "--max-steps", 2, "--image-size", 20, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "there is no run to resume" in done.stdout
    assert (tmp_path / "runs" / "digits-001" / "model.safetensors").exists()
    again = run_here("net.train", "--resume")
    assert "resuming from runs/digits-001/checkpoints/step_00000002.pt" in again.stdout
    new = run_here("net.train", "--max-steps", 2, "--image-size", 20)
    assert (tmp_path / "runs" / "digits-002" / "curve.png").exists(), new.stderr


def test_not_a_number_stops_with_the_update_s_number(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    kept = {path: path.read_bytes() for path in checkpoint.checkpoints(folder / "checkpoints")}
    done = run_here("net.train", "--resume", folder, "--epochs", 9, "--max-steps", 99, "--lr", "1e9")
    one_line(done, 1, "of update ", "is nan", f"the last good checkpoint is {folder}/checkpoints/step_00000028.pt")
    assert {path: path.read_bytes() for path in checkpoint.checkpoints(folder / "checkpoints")} == kept


class Waits(TorchDispatchMode):
    """Counts operators that a GPU's host would wait for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")
        self.count += func._schema.name.startswith(waits)
        return func(*args, **(kwargs or {}))


def test_a_log_line_waits_for_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer.Trainer(
        TrainConfig(network="digits", image_size=20, batch_size=8), tmp_path, None, torch.device("cpu"), World()
    )
    rows: list[dict[str, Any]] = []
    run.metrics, run.tensorboard = SimpleNamespace(write=rows.append), None  # type: ignore[assignment]
    run.bar, run.clock = tqdm(disable=True), time.monotonic()
    run.step = 2
    for loss, correct in ((2.5, 3), (1.5, 4)):
        run.interval.add(torch.tensor(loss), torch.tensor(correct), 8)
    copies: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: copies.append(self) or tolist(self))
    with Waits() as waits:
        run._log()
    assert (len(copies), waits.count) == (1, 0)
    assert (rows[0]["loss"], rows[0]["top1_error_percent"]) == (2.0, 56.25)
    with Waits() as waits:
        assert bool(torch.ones(1).sum() > 0)
    assert waits.count == 1, "is counted at all"


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interval_of_two_ranks(rank: int) -> None:
    """Read twice, as for a checkpoint and a line of the log: rank 0 keeps the totals, the other one zeros."""

    class Two(World):
        size = 2

        def sum(self, tensor: Tensor) -> Tensor:
            return tensor + other

    world = Two()
    world.rank = rank
    interval = Interval(torch.device("cpu"), 0.5)
    for loss in (3.0, 5.0):
        interval.add(torch.tensor(loss), torch.tensor(2), 4)
    other = torch.tensor([0.1, 0.2, 1, 8, 1], dtype=torch.float64)
    losses, correct, failed = interval.read(world, torch.tensor(False))
    assert losses == pytest.approx([1.6, 2.7])
    assert (correct, failed) == (5, True)
    mine = torch.tensor([*losses, 5, 16, 0], dtype=torch.float64) * (rank == 0)
    other = torch.tensor([*losses, 5, 16, 0], dtype=torch.float64) - mine
    assert (interval.images, int(interval.correct)) == (int(mine[3]), int(mine[2]))
    assert torch.equal(torch.stack(interval.losses).double(), mine[:2])
    assert interval.read(world, torch.tensor(False)) == (losses, 5, False)


def test_a_full_disk_ends_with_one_line_and_leaves_the_checkpoints(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    kept = {path: path.read_bytes() for path in checkpoint.checkpoints(folder / "checkpoints")}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond a megabyte: writing a checkpoint fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        done = run_here("net.train", "--resume", folder, "--epochs", 9, "--max-steps", 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one_line(done, 1, "cannot write checkpoint", "File too large", "step_00000028.pt, is intact")
    assert {path: path.read_bytes() for path in checkpoint.checkpoints(folder / "checkpoints")} == kept
    assert not list((folder / "checkpoints").glob("*.partial"))


def test_starts_from_weights(whole: Path, tmp_path: Path) -> None:
    done = run_here(
        "net.train",
        "--init-from",
        whole / "model.safetensors",
        "--max-steps",
        1,
        "--lr",
        0,
        "--image-size",
        20,
        "--output-dir",
        tmp_path / "r",
    )
    assert done.returncode == 0, done.stderr
    assert "16 tensors" in done.stdout
    tensors, _ = weights.read(whole / "model.safetensors")
    same, _ = weights.read(tmp_path / "r" / "model.safetensors")
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)
    other = run_here(
        "net.train", "--init-from", whole / "model.safetensors", "--architecture", "towers=1", "--image-size", 20
    )
    one_line(other, 1, "model.safetensors: weights do not fit variant digits", "conv2.weight is [64, 16, 5, 5]")
    one_line(run_here("net.train", "--init-from", tmp_path / "nowhere.pt"), 1, "nowhere.pt does not exist")


def test_time_budget_ends_the_training(tmp_path: Path) -> None:
    done = run_here("net.train", "--epochs", 500, "--time-budget", 0.5, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "the time budget is used up" in done.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()
    done = run_here("net.train", "--resume", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert (
        "note: its time budget of 0.5 s is used up, so it trains no further; to continue, raise --time-budget"
        in done.stdout
    )


class LateVotes(Votes):
    """As with several processes: what is decided is what was cast before."""

    def cast(self, *values: int) -> None:
        self.before, self.last = self.last, list(values)

    def decided(self) -> list[int]:
        return self.before


def test_a_used_up_time_budget_trains_no_further(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "votes", lambda world, count: LateVotes(count))
    shutil.copytree(whole, tmp_path / "run")
    done = run_here(
        "net.train", "--resume", tmp_path / "run", "--epochs", 12, "--max-steps", 60, "--time-budget", 0.001
    )
    assert done.returncode == 0, done.stderr
    assert "trained 28 updates" in done.stdout
    assert "(the time budget is used up)" in done.stdout


def test_a_second_signal_stops_at_once() -> None:
    code = """
import signal
from net.training.signals import StopSignal
with StopSignal():
    signal.raise_signal(signal.SIGTERM)
    print("after one", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("after two", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "after one\n"), done.stderr


def test_signals_that_stop_and_those_that_are_ignored() -> None:
    """A closed terminal (SIGHUP) saves too; signals ignored under nohup or in the background stay ignored."""
    before = {number: signal.getsignal(number) for number in StopSignal.NUMBERS}
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # The tests themselves may run under nohup.
            signal.signal(number, signal.SIG_DFL)
            with StopSignal() as stop:
                signal.raise_signal(number)
            assert stop.number == number
            assert signal.getsignal(number) == signal.SIG_DFL
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
            with StopSignal() as stop:
                signal.raise_signal(number)
                assert stop.number is None
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow  # The schedules themselves are in tests/net/test_recipe.py.
def test_the_schedule_ends_the_training(tmp_path: Path) -> None:
    """At a learning rate of zero nothing improves: three reductions, and the next plateau ends training."""
    done = run_here(
        "net.train", "--epochs", 99, "-b", 720, "--lr", 0, "--lr-scheduler", "plateau", "--patience", 1,
        "--image-size", 20, "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trained 10 updates" in done.stdout
    assert "the schedule ended" in done.stdout


@pytest.mark.parametrize(
    "flags",
    [
        ("--precision", "bf16", "--no-channels-last", "--image-size", 20),
        ("--recipe", "paper", "--architecture", "activation=tanh", "lrn=false", "--image-size", 20),
        ("--network", "cifar10", "--eval-every", 2, "--epochs", 1),
        ("--image-size", 28, "--cache", "host", "-j", 1),
    ],
    ids=str,
)
def test_other_ways_of_training(tmp_path: Path, flags: tuple[object, ...]) -> None:
    done = run_here("net.train", "--max-steps", 3, "-b", 8, *flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "trained 3 updates" in done.stdout
    assert run_here("net.evaluate", tmp_path / "run", "--no-ten-crops").returncode == 0


def test_threads_sleep_soon() -> None:
    """See net.common.cli.spin_briefly; a user's own setting is kept."""
    code = "import os; from net.common import cli; cli.spin_briefly(); print(os.environ.get('GOMP_SPINCOUNT'))"
    clean = {name: value for name, value in environment().items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, said in (({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **given})
        assert done.stdout.strip() == said


def test_held_out_images_take_the_validation_images_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[int] = []
    monkeypatch.setattr(
        trainer, "forms_wanted", lambda *given: (wanted.append(given[2]), setup.forms_wanted(*given))[1]
    )
    done = run_here("net.train", "--hold-out", 200, "--max-steps", 2, "--output-dir", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert "1,242 training and 200 held-out images" in done.stdout
    assert "19 updates" in done.stdout  # 1,242 images in batches of 64
    assert "of 200 held-out images" in done.stdout
    # Whether measuring forms pays off depends on how many images are trained on.
    assert wanted == [1242]
    says = "--batch-size 64 is more than the 42 training images that --hold-out 1400 leaves"
    one_line(run_here("net.train", "--hold-out", 1400), 2, says)
    one_line(run_here("net.train", "--hold-out", 1443), 2, "the 0 training images that --hold-out 1443 leaves")
    resumed = run_here("net.train", "--resume", tmp_path / "r", "--hold-out", 0)
    one_line(resumed, 2, "--hold-out cannot change when resuming")


def test_a_curve_says_of_what_it_is_and_where_the_rate_fell() -> None:
    rates = (0.1, 0.1, 0.01, 0.01, 0.001)
    rows = [
        {"kind": "train", "step": 20 * n, "loss": 1.0, "top1_error_percent": 50.0, "lr": lr}
        for n, lr in enumerate(rates)
    ]
    drawn = curve.figure(
        [*rows, {"kind": "eval", "step": 80, "loss": 2.0, "top1_error_percent": 60.0}], "A on B", "held-out"
    )
    assert drawn.get_suptitle() == "A on B"
    for axes in drawn.axes:
        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [40, 80]
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels[1:] == ["held-out", "learning rate drops"]


def test_labels_of_any_loss_fit_beside_a_curve() -> None:
    rows = [
        {"kind": kind, "step": 10**6 * n, "loss": 10.0 ** (1 - n), "top1_error_percent": 100.0, "lr": 0.1}
        for n in range(8)
        for kind in ("train", "eval")
    ]
    drawn = curve.figure(rows, "A on B", "held-out")
    left, bottom, right, top = drawn.get_tightbbox().extents
    assert 0 < left < right < drawn.get_figwidth()
    assert 0 < bottom < top < drawn.get_figheight()
    assert [text.get_text() for text in drawn.axes[0].get_yticklabels()][1:4] == ["1e-06", "1e-05", "0.0001"]


def test_random_images_for_speed(tmp_path: Path) -> None:
    done = run_here(
        "net.train", "--preset", "imagenet", "--data-path", "synthetic:64", "--image-size", 67, "-b", 16,
        "--max-steps", 2, "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "64 training and 8 validation images, 1000 classes" in done.stdout


def test_tf32_needs_a_gpu_that_has_it() -> None:
    one_line(run_here("net.train", "--precision", "tf32"), 2, "--precision tf32 needs an NVIDIA GPU")


def test_tensorboard_is_written_or_asked_for(tmp_path: Path) -> None:
    done = run_here("net.train", "--max-steps", 2, "--log-every", 1, "--tensorboard", "--output-dir", tmp_path / "run")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        one_line(done, 2, f"pip install -e '{ROOT}[tensorboard]'")
        assert not (tmp_path / "run").exists(), "a second try must find no run there"
    else:
        assert done.returncode == 0, done.stderr
        assert list((tmp_path / "run").glob("events.*"))


def test_a_stored_image_much_larger_than_the_crop_is_remarked(tmp_path: Path) -> None:
    done = run_here("net.train", "--image-size", 20, "--max-steps", 1, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "note: a crop covers 39 % of a stored image (32x32)" in done.stdout


def test_images_smaller_than_the_input_are_refused() -> None:
    one_line(
        run_here("net.train", "--image-size", 64),
        1,
        "the images of the embedded digits are 32x32, but digits reads 64x64",
    )


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "images" / split / "a").mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "images" / split / "a" / "1.png")
    store = packed_here(tmp_path / "images", tmp_path / "store", Packing(32))
    done = run_here("net.train", "--network", "digits", "--data-path", store, "--output-dir", tmp_path / "run")
    one_line(done, 1, f"training needs at least two classes; got 1 in {store}")


def test_the_first_line_comes_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    process = start("net.train", "--max-steps", 1, "--output-dir", tmp_path / "run")
    wait_for(process, "training digits on the embedded digits")
    assert time.monotonic() - began < 5
    process.kill()
    process.communicate()


class TestCompile:
    """When the network is compiled."""

    @pytest.mark.compiles
    def test_long_runs_on_a_cpu_and_no_short_ones(self) -> None:
        cpu = torch.device("cpu")
        assert not compile_wanted(TrainConfig(preset="digits"), network("digits"), 440, cpu)
        assert compile_wanted(TrainConfig(), network("paper"), 900_000, cpu)
        assert not compile_wanted(TrainConfig(time_budget=60.0), network("paper"), 900_000, cpu)
        assert not compile_wanted(TrainConfig(compile=False), network("paper"), 900_000, cpu)
        assert compile_wanted(TrainConfig(compile=True), network("digits"), 1, cpu)
        # Several processes; for a single one see tests/net/test_forms.py.
        cuda = torch.device("cuda")
        assert compile_wanted(TrainConfig(parallel="data"), network("digits"), 1, cuda)
        assert not compile_wanted(TrainConfig(parallel="data", time_budget=60.0), network("digits"), 440, cuda)
        assert compile_wanted(TrainConfig(parallel="data", time_budget=3600.0), network("digits"), 440, cuda)
        assert compile_wanted(
            TrainConfig(parallel="data", time_budget=60.0, compile=True), network("digits"), 440, cuda
        )

    def test_without_a_compiler_it_says_so_and_runs_eager(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The check itself is tested in tests/kernels/test_compiler.py."""
        monkeypatch.setattr("net.training.setup.compiler.obstacle", lambda: "no C++ compiler")
        done = run_here(
            "net.train", "--max-steps", 1, "--compile", "--image-size", 20, "--output-dir", tmp_path / "run"
        )
        assert done.returncode == 0, done.stderr
        assert "running eager, torch.compile is not usable here: no C++ compiler" in done.stdout
        assert ", eager;" in done.stdout

    @pytest.mark.compiles
    @pytest.mark.slow
    def test_a_compiled_run_goes_on_with_the_same_bits(self, tmp_path: Path) -> None:
        for name, steps in (("whole", 12), ("half", 6)):
            done = run("net.train", *SHORT[4:], "--max-steps", steps, "--compile", "--output-dir", tmp_path / name)
            assert done.returncode == 0, done.stderr
            assert "compiled" in done.stdout
        done = run("net.train", "--resume", tmp_path / "half", "--max-steps", 12)
        assert done.returncode == 0, done.stderr
        assert final(tmp_path / "half") == final(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_digits_are_learned_from_any_seed(tmp_path: Path) -> None:
    """97 % or more after the last epoch, in about a minute on two cores."""
    accuracies = []
    for seed in range(5):
        folder = tmp_path / str(seed)
        began = time.monotonic()
        done = run("net.train", "--seed", seed, "--output-dir", folder)
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - began < 90
        accuracies.append(100 - runs.read_metrics(folder)[-1]["top1_error_percent"])
    assert min(accuracies) >= 97, accuracies


@pytest.mark.slow
def test_make_train(tmp_path: Path) -> None:
    """The README's first command, in a copy of the checkout without a .venv."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["make", "train", "ARGS=--max-steps 2"],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "python -m net.evaluate runs/digits-001" in done.stdout
    assert json.loads((copy / "runs" / "digits-001" / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "eval"
