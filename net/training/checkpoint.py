"""A run's checkpoints: written atomically, listed newest first. :mod:`net.readers.checkpoint` reads them."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from ..common.errors import DataError, MissingError
from ..common.files import atomic_write, remove_partials
from ..readers.checkpoint import FORMAT, TRAINED, digest, load
from . import runs

_NAME = re.compile(r"step_(\d{8})\.pt")


def path_of(folder: Path, step: int) -> Path:
    """The path of the checkpoint of update ``step`` in a run's ``checkpoints`` folder."""
    return folder / f"step_{step:08d}.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically; it is synced to disk on return.

    Raises:
        OSError: it cannot be written; an existing file is left intact.
    """
    state = {"format": FORMAT, **state}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        try:
            torch.save({**state, "digest": digest(state)}, file)
        except RuntimeError as error:
            # After a failed write torch.save fails to close its archive and reports only that.
            cause = error.__cause__ or error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(f"{path}: {error}")) from None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def newest(folder: Path, needed: tuple[str, ...] = ()) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint and its content; None if there is none. Prints a line for each damaged one.

    Args:
        folder: the ``checkpoints`` folder.
        needed: members it must have; see :func:`net.readers.checkpoint.load`.
    """
    passed: set[Path] = set()
    while left := [path for path in checkpoints(folder) if path not in passed]:
        path = left[0]
        try:
            return path, load(path, needed)
        except DataError as error:
            if isinstance(error, MissingError) and not os.path.lexists(path):
                # A run in progress has pruned it, and has written newer ones.
                continue
            passed.add(path)
            print(f"{error}; trying the previous one")
    return None


def of_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """The newest intact checkpoint of the run folder ``path`` and its content.

    Raises:
        DataError: there is none.
    """
    found = newest(runs.folder_of(path) / "checkpoints", TRAINED)
    if found is None:
        raise DataError(f"{path} holds no intact checkpoint (checkpoints/step_*.pt)")
    return found


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and leftovers of interrupted saves."""
    for path in checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)
    remove_partials(folder)
