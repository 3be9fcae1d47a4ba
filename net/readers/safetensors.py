"""``.safetensors`` files."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import DataError, MissingError
from .files import opened, reason

#: Metadata key under which this project stores a JSON description of the network.
METADATA = "alexnet"


def metadata_of(path: Path, text: str) -> dict[str, Any]:
    """Parse a weight file's network metadata.

    Raises:
        DataError: it is not a JSON object.
    """
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its network metadata is invalid: {reason(error)}") from None
    if not isinstance(metadata, dict):
        raise DataError(f"{path}: its network metadata is invalid: not a JSON object")
    return metadata


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file, and this project's metadata; None in a file of another program.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with opened(path, "weights"), safe_open(path, framework="pt") as file:
            # The library has checked that the tensors' byte ranges do not overlap.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            text = (file.metadata() or {}).get(METADATA)
    except MissingError:
        raise DataError(f"weights {path} do not exist") from None
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"weights {path} are damaged: {reason(error)}") from None
    return tensors, None if text is None else metadata_of(path, text)
