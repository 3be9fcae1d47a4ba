"""Checkpoints: one file each, whole or not there, with a checksum of its content inside.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries, written by ``torch.save``, so that
``torch.load(path, weights_only=True)`` reads it anywhere. Its ``"digest"`` is a SHA-256 over everything else in it.
"""

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import runs
from .errors import DataError
from .files import PARTIAL, atomic_write

FORMAT = 1
_NAME = re.compile(r"step_(\d{8})\.pt")


def _feed(hasher: Any, value: Any) -> None:
    """Hash a value of a checkpoint, with what tells apart values whose bytes are the same."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        hasher.update(f"tensor {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        hasher.update(f"dict {len(value)}".encode())
        for key, item in value.items():
            _feed(hasher, key)
            _feed(hasher, item)
    elif isinstance(value, (list, tuple)):
        hasher.update(f"list {len(value)}".encode())
        for item in value:
            _feed(hasher, item)
    else:
        hasher.update(f"{type(value).__name__} {value!r}".encode())


def digest(state: dict[str, Any]) -> str:
    """SHA-256 of a checkpoint's content, its own ``"digest"`` left out."""
    hasher = hashlib.sha256()
    _feed(hasher, {key: value for key, value in state.items() if key != "digest"})
    return hasher.hexdigest()


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of an update in a run's ``checkpoints`` folder."""
    return folder / f"step_{step:08d}.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, on the disk and under its name when this returns.

    Raises:
        OSError: it cannot be written; what was there before is as it was.
    """
    state = {"format": FORMAT, **state}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        try:
            torch.save({**state, "digest": digest(state)}, file)
        except RuntimeError as error:
            # torch.save closes its archive on the way out of a failed write and reports that, not the cause.
            cause = error.__cause__ or error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(f"{path}: {error}")) from None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and verify it.

    Raises:
        DataError: no file, a damaged one, or one of another format.
    """
    if not path.exists():
        raise DataError(f"checkpoint {path} does not exist")
    if not zipfile.is_zipfile(path):
        # PyTorch would explain its formats, at length.
        raise DataError(f"checkpoint {path} is damaged or none: not a whole file of torch.save")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damage shows in many ways while an archive is unpacked.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"checkpoint {path} is damaged or none: {reason[:200]}") from None
    if not isinstance(state, dict) or "digest" not in state or "format" not in state:
        raise DataError(f"checkpoint {path} was not written by this program")
    if state["format"] != FORMAT:
        raise DataError(f"checkpoint {path}: format {state['format']} is not {FORMAT}")
    if digest(state) != state["digest"]:
        raise DataError(f"checkpoint {path} is damaged: its checksum is wrong")
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [path for path in folder.glob("step_*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is intact, and its content; says so for each damaged one that is passed over."""
    for path in checkpoints(folder):
        try:
            return path, load(path)
        except DataError as error:
            print(f"{error}; trying the one before")
    return None


def of_run(path: Path) -> tuple[Path, dict[str, Any]]:
    """The newest intact checkpoint of the run folder ``path``, and its content.

    Raises:
        DataError: there is none.
    """
    found = newest(runs.folder_of(path) / "checkpoints")
    if found is None:
        raise DataError(f"{path} holds no intact checkpoint (checkpoints/step_*.pt)")
    return found


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what an interrupted save left."""
    for path in [*checkpoints(folder)[keep:], *folder.glob(f"step_*.pt{PARTIAL}")]:
        path.unlink(missing_ok=True)
