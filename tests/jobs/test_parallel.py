"""Two processes on gloo against one: equality, collectives, faults. Few launches, with many checks in each."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from net.common.errors import UsageError
from net.model.alexnet import AlexNet, alexnet
from net.model.config import network
from net.parallel import process_group
from net.parallel.launch import Launch
from net.parallel.strategies import parallelize
from net.training import checkpoint, runs
from tests.commands import ROOT, Done, environment, one_line, run_here

STRATEGIES = ("data", "tower", "hybrid")
#: A short run of the digits on two towers, dropout included.
RUN = ("--parallel", "tower", "--max-steps", 8, "--checkpoint-every", 3, "--log-every", 2, "-b", 32, "--seed", 5)


def torchrun(script: str, *arguments: object, restarts: int = 0) -> Done:
    """Run ``script`` to completion in two processes with one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(ROOT / "tests" / "jobs" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), timeout=280)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of :mod:`tests.jobs.parallel_worker`, with the short run in ``run``."""
    folder = tmp_path_factory.mktemp("parallel")
    done = torchrun("parallel_worker.py", folder, *RUN, "--output-dir", folder / "run")
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "found.json").read_text()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_to_one_process_in_float64(found: dict[str, Any], strategy: str) -> None:
    """Losses and weights over four updates, and logits in evaluation."""
    worst = found[strategy]["float64"]
    assert max(worst.values()) < 1e-10, worst


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_first_update_in_float32(found: dict[str, Any], strategy: str) -> None:
    """Against float64. A gradient's largest element is a sum of a few thousand products after eight layers, each of
    which adds some half ulps: 256 of them, 1.5e-5 relative to the largest element, cover every order of summation."""
    first = found[strategy]["first"]
    assert first["first_loss"] < 32 * 2**-24 * 2.5
    assert first["gradients"] < 256 * 2**-24, first


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_drift_in_float32_is_that_of_one_process(found: dict[str, Any], strategy: str) -> None:
    """Losses against float64. The reference is the plain run with a batch's images in several orders, where choices of
    ReLU and pooling flip too."""
    assert found["drift"][strategy] <= found["drift"]["none"]
    assert found["drift"]["none"] < 0.5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_repeats_are_bit_equal(found: dict[str, Any], strategy: str) -> None:
    assert found[strategy]["repeats"] is True


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_messages_are_those_of_the_formula(found: dict[str, Any], strategy: str) -> None:
    assert found[strategy]["messages"]
    assert found[strategy]["messages"] == found[strategy]["expected"]


def test_each_rank_holds_its_part(found: dict[str, Any]) -> None:
    assert found["data"]["held"] == found["data"]["parameters"]
    # Nine classes: both ranks hold five rows, one of them padding.
    padding = 1 * (128 * 2 + 1)
    assert 2 * found["tower"]["held"] == found["tower"]["parameters"] + padding
    assert found["tower"]["held"] < found["hybrid"]["held"] < found["data"]["held"]


def test_ranks_that_see_other_images_are_named(found: dict[str, Any]) -> None:
    assert found["unequal"] == {
        "count": "rank 1 differs from rank 0: training images 8 instead of 7",
        "missing": "rank 1: no such folder",
    }


def test_dropout_masks_differ_between_ranks(folder: Path) -> None:
    """In fc6 and fc7: masks are independent, and drop about half."""
    ours, theirs = (json.loads((folder / f"masks_{rank}.json").read_text()) for rank in range(2))
    assert len(ours) == len(theirs) == 2
    for mine, other in zip(ours, theirs, strict=True):
        count = min(len(mine), len(other))
        a, b = (torch.tensor(each[:count], dtype=torch.float64) for each in (mine, other))
        assert count > 1000
        assert abs(float(a.mean()) - 0.5) < 5 * 0.5 / count**0.5
        assert abs(float((a == b).double().mean()) - 0.5) < 5 * 0.5 / count**0.5


def test_one_rank_talks_and_writes(folder: Path) -> None:
    output = (folder / "stdout.txt").read_text()
    assert output.count("trained 8 updates") == 1
    assert "--parallel tower: 2 processes (gloo); each holds 184,421 parameters and sees 32 of 32 images" in output
    rows = runs.read_metrics(folder / "run")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 8]
    assert rows[-1]["kind"] == "eval"


def test_checkpoints_have_the_one_device_layout_and_go_on_in_one_process(folder: Path, tmp_path: Path) -> None:
    found = checkpoint.newest(folder / "run" / "checkpoints")
    assert found is not None
    model = AlexNet(network("digits"))
    model.load_state_dict(found[1]["model"])
    momentum = [state["momentum_buffer"].shape for state in found[1]["optimizer"]["state"].values()]
    parameters = list(model.parameters())
    assert sorted(momentum) == sorted(parameter.shape for parameter in parameters)
    six = folder / "run" / "checkpoints" / "step_00000006.pt"
    more = ("--resume", six, "--max-steps", 8, "--parallel", "none", "--output-dir", tmp_path / "one")
    done = run_here("net.train", *more)
    assert done.returncode == 0, done.stderr
    assert "now uses --parallel none on 1: images, order and augmentation stay the same" in done.stdout
    assert "resuming is not bit-exact" in done.stdout
    one = checkpoint.newest(tmp_path / "one" / "checkpoints")
    assert one is not None
    # Dropout masks differ in two of eight updates; the images are the same.
    for name, tensor in one[1]["model"].items():
        before = checkpoint.load(six)["model"][name]
        assert not torch.equal(tensor, before)
        assert (tensor - found[1]["model"][name]).norm() < (tensor - before).norm() * 1.5


@pytest.mark.slow
def test_a_rank_that_dies_is_named_and_the_restarted_run_ends_the_same(folder: Path, tmp_path: Path) -> None:
    """SIGKILL to rank 1 in update 5; torchrun restarts both, and they resume from update 3."""
    arguments = (*RUN, "--output-dir", tmp_path / "run", "--resume", "auto", "--epochs", 20)
    done = torchrun("faulty_worker.py", "die", *arguments, restarts=1)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: rank 1 on {socket.gethostname()} died;")
    assert "step_00000003.pt" in done.stdout
    weights = [(each / "model.safetensors").read_bytes() for each in (tmp_path / "run", folder / "run")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "flag", "line"),
    [
        ("hang", "--timeout", "rank 1 on {} did not answer for 10 s (--timeout);"),
        ("stop", "--timeout", "rank 1 on {} did not answer for 10 s (--timeout);"),
        ("save", "--progress-timeout", "rank 0 on {} reported no progress for 10 s (--progress-timeout);"),
    ],
)
def test_a_rank_that_hangs_is_named_and_torchrun_ends_it(tmp_path: Path, fault: str, flag: str, line: str) -> None:
    flags = (flag, 10, "--output-dir", tmp_path / "run")
    done = torchrun("faulty_worker.py", fault, *RUN, *flags)
    hung = float((tmp_path / "run" / "hung").read_text())
    # torchrun waits 30 s before it kills a stopped process.
    assert time.monotonic() - hung < 10 + 60
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: {line.format(socket.gethostname())}")


@pytest.mark.parametrize(
    ("ranks", "flags", "says"),
    [
        (3, ("--parallel", "tower"), ("torchrun started 3 processes", "--parallel tower needs 2 processes")),
        (3, ("--parallel", "data"), ("--batch-size 64", "3 processes", ": 1, 2, 4")),
        (2, (), ("--parallel none", "torchrun started 2")),
    ],
)
def test_numbers_of_processes_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, ranks: int, flags: tuple[str, ...], says: tuple[str, ...]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    one_line(run_here("net.train", *flags), 2, *says)


def test_strategies_need_torchrun() -> None:
    one_line(run_here("net.train", "--parallel", "data"), 2, "torchrun --standalone --nproc-per-node=2 -m net.train")


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        names = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in names.items():
            monkeypatch.setenv(name, str(value))
        done = run_here("net.train", "--parallel", "data", "--output-dir", tmp_path / "run")
    one_line(done, 1, f"port {port} (MASTER_PORT) is in use")


@pytest.mark.parametrize(
    ("address", "says"),
    [("nowhere.invalid", "[Errno -"), ("localhost", "no answer within 1 s (--start-timeout)")],
)
def test_an_address_at_which_nobody_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, says: str
) -> None:
    """An unknown host name fails at once."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    names = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    seconds = 1 if address == "localhost" else 300
    done = run_here("net.train", "--parallel", "data", "--start-timeout", seconds, "--output-dir", tmp_path / "run")
    one_line(done, 1, "rank 1 cannot reach the others: ", f"(MASTER_ADDR {address}, MASTER_PORT {port})", says)


def test_missing_nccl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group.dist, "is_nccl_available", lambda: False)
    with pytest.raises(UsageError, match="--device cuda: several GPUs need NCCL"):
        process_group._backend(torch.device("cuda", 0), shared=False)
    assert process_group._backend(torch.device("cuda", 0), shared=True) == "gloo"
    assert process_group._backend(torch.device("cpu"), shared=False) == "gloo"


@pytest.mark.parametrize(
    ("name", "local_world_size", "count", "expected"),
    [
        (None, 2, 2, ("cuda:1", False)),
        ("cuda", 2, 1, ("cuda:0", True)),
        ("cuda:1", 2, 4, ("cuda:1", True)),
        (None, 2, 0, (None, False)),
        ("cpu", 2, 2, ("cpu", False)),
    ],
)
def test_each_rank_gets_a_device(
    name: str | None, local_world_size: int, count: int, expected: tuple[str | None, bool]
) -> None:
    assert process_group._device_name(name, Launch(1, local_world_size, 1, local_world_size), count) == expected


@pytest.mark.parametrize(
    ("strategy", "variant", "fields", "says"),
    [
        ("tower", "one_weird_trick", {}, "two towers; one_weird_trick has 1"),
        ("tower", "caffe", {}, "caffe normalizes across towers"),
        ("hybrid", "digits", {"exchange": False}, "fc6 of digits reads only its own"),
    ],
)
def test_networks_that_a_strategy_cannot_use(
    strategy: str, variant: str, fields: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 0

    with torch.device("meta"), pytest.raises(UsageError, match=says):
        parallelize(alexnet(variant, **fields), strategy, Two())  # type: ignore[arg-type]


def test_no_variable_of_torchrun_is_left() -> None:
    """The tests above restore the environment."""
    assert "RANK" not in os.environ
