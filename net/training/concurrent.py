"""Several trainings, one after the other or side by side."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..common.errors import DataError, UsageError
from ..data import processes
from .config import TrainConfig


def train(config: TrainConfig, folder: Path) -> dict[str, Any] | int:
    """Train in ``folder``, from its newest checkpoint if there is one; returns the results, or a signal's exit status.

    What the training prints goes to ``log.txt``.
    """
    from ..common.device import choose, describe
    from ..doors.checkpoint import RESUMED
    from ..parallel.process_group import World
    from . import checkpoint
    from .trainer import DivergedError, Trainer

    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    device = choose(config.device)
    row: dict[str, Any] = {"device": describe(device)}
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        trainer = Trainer(config, folder, checkpoint.newest(folder / "checkpoints", RESUMED), device, World())
        try:
            status = trainer.run()
        except DivergedError as error:
            row["diverged"] = str(error)
        else:
            if status:
                return status
            assert trainer.errors is not None
            row |= vars(trainer.errors)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {**row, "updates": trainer.step, "seconds": round(time.monotonic() - started, 2)}


def _apart(connection: Connection, config: TrainConfig, folder: Path, threads: int) -> None:
    """:func:`train` in a process of its own; what comes of it, or why nothing does, goes through ``connection``."""
    import torch

    processes.end_with_parent()
    # Out of the terminal's group, so that Ctrl-C comes once: from the process that started this one.
    os.setpgrp()
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] | int | Exception
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stderr(log):
        try:
            result = train(config, folder)
        except (DataError, UsageError, OSError) as error:
            result = error
    connection.send(result)


def side_by_side(
    trainings: Sequence[tuple[TrainConfig, Path]], workers: int
) -> Iterator[tuple[int, dict[str, Any] | int]]:
    """:func:`train` in processes of their own, each with its share of the cores.

    The first SIGTERM or SIGINT is passed on to them, a second one ends this process and them at once.

    Args:
        trainings: configuration and folder of each.
        workers: processes at a time.

    Yields:
        The number of a training and its results, or the exit status of a signal that stopped it, in the order in which
        they end. After a signal no training is started.

    Raises:
        DataError: a process died. Whatever stopped a training; the others are stopped then, and go on another time.
    """
    from .signals import StopSignal

    # The others are what a training imports on its way, seconds each time: PyTorch for an optimizer's first update, the
    # trainer for the curve at the end.
    start = processes.context("net.training.trainer", "torch._dynamo", "net.training.curve")
    threads = max(1, processes.available_cores() // workers)
    waiting = iter(enumerate(trainings))
    running: dict[Any, tuple[int, BaseProcess]] = {}
    told = said = False
    with StopSignal() as stop:
        try:
            while True:
                while len(running) < workers and not stop.number and (task := next(waiting, None)) is not None:
                    number, (config, folder) = task
                    receiving, sending = start.Pipe(duplex=False)
                    process: BaseProcess = start.Process(target=_apart, args=(sending, config, folder, threads))
                    process.start()
                    # Only the process holds this end now: when it dies, reading ends.
                    sending.close()
                    running[receiving] = number, process
                if not running:
                    if stop.number and not said and (task := next(waiting, None)) is not None:
                        # It came when none was running: the next one is where it stops.
                        yield task[0], 128 + stop.number
                    return
                # Now and then it is asked whether a signal came.
                for connection in wait(running, timeout=0.2):
                    number, process = running.pop(connection)
                    result = _received(connection, process, trainings[number][1], stop.number)
                    if isinstance(result, int) and stop.number:
                        # Theirs was SIGTERM whatever came here.
                        result, said = 128 + stop.number, True
                    yield number, result
                if stop.number and not told:
                    told = True
                    for _, process in running.values():
                        process.terminate()
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join()


def one_by_one(trainings: Sequence[tuple[TrainConfig, Path]]) -> Iterator[tuple[int, dict[str, Any] | int]]:
    """:func:`train` in this process, with all cores, up to one that a signal stops."""
    for number, (config, folder) in enumerate(trainings):
        result = train(config, folder)
        yield number, result
        if isinstance(result, int):
            return


def _received(connection: Any, process: BaseProcess, folder: Path, stopped: int | None) -> dict[str, Any] | int:
    """What a process sent before it ended.

    Raises:
        DataError: it died without a word, and no signal was sent to it. Whatever stopped its training.
    """
    try:
        result: dict[str, Any] | int | Exception = connection.recv()
    except EOFError:
        process.join()
        if not stopped:
            raise DataError(
                f"the process of the training in {folder} died ({process.exitcode}); see log.txt in it"
            ) from None
        result = 128 + stopped
    process.join()
    if isinstance(result, Exception):
        raise result
    return result
