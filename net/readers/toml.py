"""TOML files of flags. Does not import torch."""

import tomllib
import typing
from pathlib import Path
from typing import Any

from ..common.errors import DataError, UsageError
from ..common.fields import near, typed
from .files import read_text, reason

#: Maximum bytes of a file and characters of a line: parsing a key takes quadratic time in its length. A file of all
#: flags has 2 KB, and a line with all layers of a network 2,000 characters.
_LIMIT, _LINE = 2**16, 2**13


def toml(text: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ValueError: invalid TOML, brackets nested too deeply for the recursive parser, or an integer with too many
            digits for Python.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def read_toml(path: str, config: type[Any], flag: str = "--config") -> dict[str, Any]:
    """Read a TOML file of flags, given by ``flag``, and check their types.

    Raises:
        UsageError: the file cannot be read, or has an unknown flag or a value of the wrong type.
    """
    try:
        text = read_text(Path(path), "file", _LIMIT).replace("\r\n", "\n")
        if max(map(len, text.split("\n"))) > _LINE:
            raise ValueError(f"it has a line of more than {_LINE:,} characters")
        values = toml(text)
    except DataError as error:
        raise UsageError(f"{flag}: {error}") from None
    except ValueError as error:
        raise UsageError(f"{flag}: {path} is not TOML: {reason(error)}") from None
    hints = typing.get_type_hints(config)
    result = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in hints or name == "config":
            raise UsageError(f"{flag}: {path}: unknown flag {key!r}{near(name, hints)}")
        result[name] = typed(f"{flag}: {path}: {key}", value, hints[name])
    return result
