"""Pretrained weights by name: half-precision ``NAME.safetensors`` files next to this file.

``python -m net.export RUN NAME.safetensors --format safetensors`` writes them.
"""

import os
from pathlib import Path

from ..common.errors import DataError, UsageError

FOLDER = Path(__file__).resolve().parent


def names() -> tuple[str, ...]:
    """The names of the pretrained weights, in alphabetical order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


def find(network: str | os.PathLike[str], called: str = "") -> Path:
    """The file or folder of a network: a path, or the name of pretrained weights.

    Args:
        network: the user's input.
        called: its flag, for messages.

    Raises:
        UsageError: it is both. DataError: it is neither.
    """
    path, shipped, called = Path(network), names(), called and f"{called} "
    if os.fspath(network) not in shipped:
        if not path.exists():
            raise DataError(
                f"{called}{os.fspath(network)} does not exist, and is not the name of pretrained weights: "
                f"{', '.join(shipped)}"
            )
        return path
    if os.path.lexists(path):
        raise UsageError(
            f"{called}{path} is ambiguous: the existing path {path}, or the pretrained weights of this name; "
            f"give ./{path} for the first, or rename it"
        )
    return FOLDER / f"{path}.safetensors"


def is_shipped(path: Path) -> bool:
    """Whether ``path``, as returned by :func:`find`, is part of the package."""
    return path.parent == FOLDER
