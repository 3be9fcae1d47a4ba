"""Several training runs, sequentially or in parallel processes."""

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
    """Train in ``folder``, resuming from its newest checkpoint if there is one; output goes to ``log.txt``.

    Returns:
        The results, or the exit status of a signal.
    """
    from ..common.device import choose, describe
    from ..parallel.process_group import World
    from ..readers.checkpoint import RESUMED
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
    """Process target: run :func:`train` and send its result, or the exception, through ``connection``."""
    import torch

    processes.end_with_parent()
    # Leave the terminal's process group, so that Ctrl-C arrives only once, through the parent.
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
    """Run :func:`train` in parallel processes, each with its share of the cores.

    The first SIGTERM or SIGINT is passed on to them; a second one ends this process and them at once.

    Args:
        trainings: configuration and folder of each run.
        workers: number of simultaneous processes.

    Yields:
        In order of completion, the index of a run and its results, or the exit status of the signal that stopped it. No
        run is started after a signal.

    Raises:
        DataError: a process died. Also re-raises the exception of a run. The other runs are stopped then, and can be
            resumed.
    """
    from .signals import StopSignal

    # Preload the module that a run would otherwise import at its end, which takes a second.
    start = processes.context("net.training.trainer", "net.training.curve")
    threads = max(1, processes.available_cores() // workers)
    waiting = iter(enumerate(trainings))
    running: dict[Any, tuple[int, BaseProcess]] = {}
    terminated = reported = False
    with StopSignal() as stop:
        try:
            while True:
                while len(running) < workers and not stop.number and (task := next(waiting, None)) is not None:
                    number, (config, folder) = task
                    receiving, sending = start.Pipe(duplex=False)
                    process: BaseProcess = start.Process(target=_apart, args=(sending, config, folder, threads))
                    process.start()
                    # Now only the child holds this end, so that recv raises EOFError if it dies.
                    sending.close()
                    running[receiving] = number, process
                if not running:
                    if stop.number and not reported and (task := next(waiting, None)) is not None:
                        # The signal arrived while no run was active: report it for the next one.
                        yield task[0], 128 + stop.number
                    return
                # The timeout is for noticing signals.
                for connection in wait(running, timeout=0.2):
                    number, process = running.pop(connection)
                    result = _received(connection, process, trainings[number][1], stop.number)
                    if isinstance(result, int) and stop.number:
                        # Children always get SIGTERM; report the signal this process received.
                        result, reported = 128 + stop.number, True
                    yield number, result
                if stop.number and not terminated:
                    terminated = True
                    for _, process in running.values():
                        process.terminate()
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join()


def one_by_one(trainings: Sequence[tuple[TrainConfig, Path]]) -> Iterator[tuple[int, dict[str, Any] | int]]:
    """Run :func:`train` sequentially in this process, with all cores, until a signal stops one."""
    for number, (config, folder) in enumerate(trainings):
        result = train(config, folder)
        yield number, result
        if isinstance(result, int):
            return


def _received(connection: Any, process: BaseProcess, folder: Path, stopped: int | None) -> dict[str, Any] | int:
    """The result that a process sent before it ended.

    Raises:
        DataError: it died without a result, and not because of a signal. Also re-raises its exception.
    """
    try:
        result: dict[str, Any] | int | Exception = connection.recv()
    except EOFError:
        process.join()
        if not stopped:
            raise DataError(
                f"the process training in {folder} died (exit code {process.exitcode}); see its log.txt"
            ) from None
        result = 128 + stopped
    process.join()
    if isinstance(result, Exception):
        raise result
    return result
