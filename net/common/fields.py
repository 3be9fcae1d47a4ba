"""Fields of the configuration dataclasses: command-line flags, and type-checked values from plain data.

Does not import torch.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import UsageError

#: Help of ``--device``.
DEVICES = (
    "cpu, cuda, cuda:1, mps (an Apple GPU, with PyTorch's own operators, in one process); a CUDA GPU when there is one"
)
#: Help of ``--mean-rgb``, and of ``--precision`` where a trained network is used.
MEAN_RGB = (
    "mean colour to subtract, in 0..255, if the network's file has no mean image; 123 117 104 for Caffe's ImageNet "
    "models"
)
PRECISION = "as in net.train; auto: the precision of training, if the device supports it"
#: Generous upper limits that catch a digit too many: threads and processes, images in an inference batch, rows of an
#: image, seconds of waiting.
MOST_WORKERS, MOST_IMAGES, MOST_ROWS, MOST_SECONDS = 1024, 2**16, 2**16, 10**6

Record = TypeVar("Record")


def flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that is a command-line flag.

    Args:
        default: used when neither the command line, the configuration file nor the preset sets it.
        help: its text in ``--help``.
        options: ``short`` (a one-letter flag), ``metavar``, ``positional``, ``nargs`` (of a tuple; ``"*"`` allows
            none), ``optional_value`` (the flag's value when it is given without one), ``key_values`` (NAME=VALUE
            items), ``group`` (its heading in ``--help``).
    """
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata={"help": help, **options})
    return dataclasses.field(default=default, metadata={"help": help, **options})


def flag_name(name: str) -> str:
    """The flag of a field: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")


def unwrapped(annotation: Any) -> Any:
    """The type of a field without its ``| None``."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (annotation,) = [item for item in typing.get_args(annotation) if item is not type(None)]
    return annotation


def typed(name: str, value: Any, annotation: Any) -> Any:
    """``value`` converted to the type of a field: integer to float, list to tuple, table to dataclass.

    Raises:
        UsageError: ``value`` has another type; the message calls it ``name``.
    """
    if value is None and unwrapped(annotation) is not annotation:
        return None
    annotation = unwrapped(annotation)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        if value not in arguments:
            raise UsageError(f"{name} must be one of {', '.join(arguments)}; got {shown(value)}")
        return value
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{name} must be a list; got {shown(value)}")
        return tuple(typed(f"{name}[{index}]", item, arguments[0]) for index, item in enumerate(value))
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return from_table(annotation, value, name)
    expected = typing.get_origin(annotation) or annotation
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise UsageError(f"{name} must be of type {expected.__name__}; got {shown(value)}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{name} must be less than 2**63; got {shown(value)}")
    if isinstance(value, str) and (not value or "\0" in value):
        raise UsageError(f"{name} must be a non-empty string without null bytes; got {shown(value)}")
    return value


def shown(value: object) -> str:
    """``repr(value)`` for a message, truncated to 100 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # Python refuses to format integers of more than 4,300 digits.
        return "a value too large to print"
    return text if len(text) <= 100 else text[:100] + "..."


def from_table(cls: type[Record], values: Mapping[str, Any], name: str) -> Record:
    """A dataclass from a table of its fields, with their types checked.

    Raises:
        UsageError: an unknown key, a required field that is missing, or a value of the wrong type; the message calls
            the table ``name``.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{name} must be a table of {cls.__name__}'s fields; got {shown(values)}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UsageError(f"{name}: unknown field {key!r}{near(str(key), fields)}; fields are {', '.join(fields)}")
    for key, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and key not in values:
            raise UsageError(f"{name}: {key} is missing")
    return cls(**{key: typed(f"{name}: {key}", value, hints[key]) for key, value in values.items()})


def near(word: str, known: typing.Iterable[str]) -> str:
    """``; did you mean X?`` with the closest known word; empty if none is close."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def at_least(record: object, least: float, *names: str, called: typing.Callable[[str], str] = str) -> None:
    """Check that fields are at least ``least`` and neither infinite nor NaN; None passes.

    Raises:
        UsageError: one is not; the message calls it ``called(name)``.
    """
    for name in names:
        value = getattr(record, name)
        if value is not None and not least <= value < math.inf:
            raise UsageError(f"{called(name)} must be at least {least}; got {shown(value)}")


def at_most(record: object, most: float, *names: str, called: typing.Callable[[str], str] = str) -> None:
    """Check that fields are at most ``most``; None passes.

    Raises:
        UsageError: one is not; the message calls it ``called(name)``.
    """
    for name in names:
        value = getattr(record, name)
        if value is not None and value > most:
            raise UsageError(f"{called(name)} must be at most {most:,}; got {shown(value)}")


def check_rgb(colour: tuple[float, ...] | None) -> None:
    """Check that ``--mean-rgb`` is a colour."""
    if colour is not None and not (len(colour) == 3 and all(0 <= value <= 255 for value in colour)):
        raise UsageError(f"--mean-rgb must be three numbers in 0..255; got {' '.join(map(str, colour))}")


def check_png(output: str | None) -> None:
    """Check that ``--output`` is a PNG file."""
    if output is not None and not output.endswith(".png"):
        raise UsageError(f"--output must end in .png; got {output}")
