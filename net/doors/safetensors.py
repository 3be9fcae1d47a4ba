"""Weights in ``.safetensors`` files."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import DataError, MissingError
from .files import opened, reason

#: The key of what this program says of a network, as JSON.
METADATA = "alexnet"


def metadata_of(path: Path, text: str) -> dict[str, Any]:
    """What a file of weights says of its network.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: what it says of its network cannot be used: {reason(error)}") from None
    if not isinstance(metadata, dict):
        raise DataError(f"{path}: what it says of its network cannot be used: it is no table of names and values")
    return metadata


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Tensors and what this program says of them; None in a file of another program.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with opened(path, "weights"), safe_open(path, framework="pt") as file:
            # Their bytes in the file are theirs alone, which the library has checked.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            text = (file.metadata() or {}).get(METADATA)
    except MissingError:
        raise DataError(f"weights {path} do not exist") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"weights {path} are damaged: {reason(error)}") from None
    return tensors, None if text is None else metadata_of(path, text)
