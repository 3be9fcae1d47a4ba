"""A run folder: configuration, metrics and curve.

==================  ==============================================================
``config.toml``     every flag as resolved; ``--config`` can read it
``metrics.jsonl``   one JSON object per line: ``kind`` is ``train`` or ``eval``
``metrics.csv``     the same as a table
``curve.png``       loss and error over the updates
``checkpoints/``    ``step_00000123.pt``; only the newest are kept
``model.safetensors``  the final weights
==================  ==============================================================
"""

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import pretrained
from ..common.errors import DataError, UsageError
from ..common.fields import flag_name
from ..common.files import atomic_write, locked, remove_partials
from ..data.config import SYNTHETIC
from ..readers import metrics
from ..readers.toml import read_toml
from .config import TrainConfig

RUNS = Path("runs")
CONFIG = "config.toml"


def _new_folder(preset: str) -> Path:
    """Create ``runs/PRESET-NNN`` with the next free number."""
    number = max(_numbers(preset), default=0)
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            folder = RUNS / f"{preset}-{number:03d}"
            folder.mkdir(parents=True)
            return folder


@contextlib.contextmanager
def claimed(folder: Path | None, preset: str) -> Iterator[Path]:
    """A run folder, locked until the block ends.

    Args:
        folder: created if necessary; None creates ``runs/PRESET-NNN``. A new folder that is still empty at the end is
            removed.
        preset: of the run.

    Raises:
        DataError: ``folder`` is a file, or in use by another process.
    """
    if folder is not None and folder.exists() and not folder.is_dir():
        raise DataError(f"--output-dir {folder} is a file")
    made = []
    if folder is None:
        folder = _new_folder(preset)
        made = [folder, RUNS]
    elif not folder.exists():
        made = [folder]
    with locked(folder):
        # Only the holder of the lock may remove folders.
        if (folder / "checkpoints").is_dir():
            remove_partials(folder / "checkpoints")
        try:
            yield folder
        finally:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()


def newest_folder(preset: str) -> Path | None:
    """The run folder with the highest number; None if there is none."""
    return RUNS / f"{preset}-{max(numbers):03d}" if (numbers := _numbers(preset)) else None


def _numbers(preset: str) -> list[int]:
    pattern = re.compile(re.escape(preset) + r"-(\d{3,})")
    found = RUNS.glob(f"{preset}-*")
    return [int(match[1]) for path in found if (match := pattern.fullmatch(path.name))]


def folder_of(path: Path) -> Path:
    """The run folder that ``path`` is or lies in: the folder, one of its checkpoints, or its weights."""
    if path.is_dir():
        return path.parent if path.name == "checkpoints" else path
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def results_folder(path: Path) -> Path:
    """The folder for output about the network in ``path``: its run folder or, for pretrained weights, the current
    folder."""
    return Path() if pretrained.is_shipped(path) else folder_of(path)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    # JSON strings, integers and booleans are valid TOML, except that TOML requires DEL to be escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_config(folder: Path) -> dict[str, Any]:
    """The flags a run was started with.

    Raises:
        DataError: the folder holds no run.
    """
    if not (folder / CONFIG).is_file():
        raise DataError(f"{folder} is not a run folder: it has no {CONFIG}")
    return read_toml(str(folder / CONFIG), TrainConfig)


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write ``config.toml``."""
    lines = [f"{name} = {_toml(value)}\n" for name, value in settings(config).items()]
    with atomic_write(folder / CONFIG) as file:
        file.write("".join(lines).encode())


def settings(config: TrainConfig) -> dict[str, Any]:
    """The flags that have a value, except those of a single invocation; paths are made absolute.

    ``tune`` is one of them: the forms that it led to are kept.

    Raises:
        UsageError: a path that is not valid UTF-8, which TOML requires.
    """
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    for name in ("data_path", "store", "val_labels", "init_from"):
        if name == "init_from" and values[name] in pretrained.names():
            continue
        if values[name] is not None and values[name].partition(":")[0] != SYNTHETIC:
            values[name] = os.path.abspath(values[name])
            try:
                values[name].encode()
            except UnicodeEncodeError:
                raise UsageError(
                    f"{flag_name(name)} {values[name]} is not valid UTF-8; rename it or use a symlink to it"
                ) from None
    return {
        name: value
        for name, value in values.items()
        if value is not None and name not in ("config", "resume", "output_dir", "tune")
    }


class Metrics:
    """Appends rows to ``metrics.jsonl`` and ``metrics.csv``.

    Args:
        folder: the run folder.
        step, evaluated_step: the last update and the last evaluated one. Rows beyond them, left by an interrupted run,
            are dropped.
    """

    def __init__(self, folder: Path, step: int, evaluated_step: int) -> None:
        self.json_path, self.csv_path = folder / "metrics.jsonl", folder / "metrics.csv"
        last = {"train": step, "eval": evaluated_step}
        kept = [row for row in read_metrics(folder) if row["step"] <= last[row["kind"]]]
        with atomic_write(self.json_path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        with atomic_write(self.csv_path) as file:
            file.write((",".join(metrics.COLUMNS) + "\n" + "".join(map(_csv_line, kept))).encode())

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; its keys are among :data:`net.readers.metrics.COLUMNS`."""
        for path, line in ((self.json_path, json.dumps(row) + "\n"), (self.csv_path, _csv_line(row))):
            with open(path, "a") as file:
                file.write(line)


def _csv_line(row: dict[str, Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([row.get(column, "") for column in metrics.COLUMNS])
    return text.getvalue()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; see :func:`net.readers.metrics.read_metrics`."""
    return metrics.read_metrics(folder / "metrics.jsonl")


def check_new(folder: Path) -> None:
    """Check that a new run would not overwrite another.

    Raises:
        UsageError: ``folder`` holds a run.
    """
    if (folder / CONFIG).exists():
        raise UsageError(f"--output-dir {folder} already holds a run: continue it with --resume, or use another folder")
