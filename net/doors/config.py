"""TOML files of flags. Nothing here imports torch."""

import tomllib
import typing
from pathlib import Path
from typing import Any

from ..common.errors import DataError, UsageError
from ..common.fields import near, typed
from .files import read_text, reason

#: Bytes of a file, and characters of a line: reading a key takes the square of its length. Every flag takes 2 KB, and a
#: network with all its layers 2,000 characters.
_LIMIT, _LINE = 2**16, 2**13


def toml(text: str) -> dict[str, Any]:
    """A TOML text.

    Raises:
        ValueError: it is none. Python's reader calls itself for each bracket, and Python refuses to convert integers of
            thousands of digits.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def read_toml(path: str, config: type[Any], flag: str = "--config") -> dict[str, Any]:
    """The flags in a TOML file that ``flag`` names, with their types checked.

    Raises:
        UsageError: the file cannot be read, or holds what is no flag or no value for it.
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
            raise UsageError(f"{flag}: {path}: {key!r} is no flag{near(name, hints)}")
        result[name] = typed(f"{flag}: {path}: {key}", value, hints[name])
    return result
