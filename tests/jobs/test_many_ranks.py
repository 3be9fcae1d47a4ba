"""Parallel strategies at large world sizes: one rank at a time, with PyTorch's fake process group."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.predict.messages import Count, expected
from kernels import private
from net.model.alexnet import alexnet
from net.model.config import network
from net.parallel.strategies import parallelize
from tests.commands import environment, run

RANKS = 64
BATCH = 2 * RANKS


@contextmanager
def one_of(rank: int) -> Iterator[dist.ProcessGroup]:
    store = private.found("torch.testing._internal.distributed.fake_pg:FakeStore")()
    dist.init_process_group("fake", store=store, rank=rank, world_size=RANKS)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _averaged(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DistributedDataParallel's default hook, for a group whose collectives return nothing to wait for."""
    dist.all_reduce(bucket.buffer(), group=group)
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _update(strategy: str, rank: int) -> list[tuple[str, int, int]]:
    """The kind, size and group size of each collective of one rank's update, in order."""
    plan = network("digits")
    with one_of(rank) as group:
        part = parallelize(alexnet("digits"), strategy, group)
        assert isinstance(part.forward, DistributedDataParallel)
        part.forward.register_comm_hook(group, _averaged)
        assert (part.training.rank, part.training.replicas) == (rank, RANKS)
        images = torch.randn(BATCH // RANKS, 3, 32, 32)
        labels = torch.randint(plan.classes, (BATCH // RANKS,))
        # DDP's gradient buckets are rebuilt in the order of the first update.
        F.cross_entropy(part.forward(images), labels).backward()
        with Count(RANKS) as count:
            logits = part.forward(images)
            assert logits.shape == (BATCH // RANKS, plan.classes)
            F.cross_entropy(logits, labels).backward()
        held = sum(parameter.numel() for parameter in part.model.parameters())
        wholes = {name: part.whole(name, parameter).shape for name, parameter in part.model.named_parameters()}
    assert wholes == {name: parameter.shape for name, parameter in alexnet("digits").named_parameters()}
    dense = [layer for layer in plan.layers() if layer.kind == "dense"]
    split = sum(-(-layer.output_shape[0] // RANKS) * (layer.input_shape[0] + 1) for layer in dense)
    rest = plan.parameters - sum(layer.parameters for layer in dense)
    assert held == (plan.parameters if strategy == "data" else split + rest)
    return [(message.kind, message.size, message.ranks) for message in count.messages]


@pytest.mark.parametrize("strategy", ["data", "hybrid"])
def test_messages_of_64_ranks(strategy: str) -> None:
    """They match the formula, in the same order on every rank, else they would deadlock.

    digits has 10 classes and up to 256 features, so that most ranks hold no class, and all of them few neurons.
    """
    sent = [_update(strategy, rank) for rank in (0, 37, 63)]
    assert sent[0] == sent[1] == sent[2]
    formula = expected(network("digits"), strategy, RANKS, BATCH)
    assert sorted(sent[0]) == sorted((message.kind, message.size, message.ranks) for message in formula)


def _host(folder: Path, hosts: int, port: int, *flags: object) -> "subprocess.Popen[str]":
    """Start the command of one host; here all hosts are this one."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={hosts}", "--nproc-per-node=1"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=alexnet", "-m", "net.train"]
    command += ["--parallel", "hybrid", "--resume", "auto", "--output-dir", folder / "run", *flags]  # type: ignore[list-item]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(OMP_NUM_THREADS="1"),
    )


@pytest.mark.slow
def test_two_hosts_and_then_one(tmp_path: Path) -> None:
    """The README's command: the hosts meet at one address, one packs the images, and one host fewer resumes."""
    done = run("net.data.shapes", tmp_path / "shapes", "--train", 12, "--val", 4, "--size", 32)
    assert done.returncode == 0, done.stderr
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ("--data-path", tmp_path / "shapes", "--network", "digits", "--image-size", 28, "-b", 48)
    for hosts, steps in ((2, 2), (1, 4)):
        processes = [_host(tmp_path, hosts, port, *flags, "--max-steps", steps) for _ in range(hosts)]
        printed = [process.communicate(timeout=250)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * hosts, printed
        assert "".join(printed).count(f"trained {steps} updates") == 1
    assert "this run used --parallel hybrid on 2 and now uses --parallel hybrid on 1" in "".join(printed)
