"""Checkpoints of this project, and state dicts that other programs saved with ``torch.save``.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries, saved with ``torch.save`` and
readable with ``torch.load(path, weights_only=True)``. Its ``"digest"`` is a SHA-256 of everything else in it.
"""

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..common.device import is_cpu
from ..common.errors import DataError, UsageError
from ..common.fields import typed
from .files import opened, reason
from .pickles import values

FORMAT = 1
#: Globals that the pickle of a state dict or a checkpoint may reference. ``torch.load`` allows more, some of which can
#: allocate any amount of memory: ``bytearray(10**11)``, a codec applied thirty times.
_ALLOWED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)|torch (Size|device)|"
    r"torch(\.storage)? \w+Storage|torch (b?float|u?int|complex|bool)\w*"
)
#: Pickles before the tensors in a file from before PyTorch 1.6: magic number, protocol, machine, content, keys.
_LEGACY_PICKLES = 5
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
#: Maximum bytes of a file's pickle; that of a thousand classes has 100 KiB.
_PICKLE_LIMIT = 64 * 2**20
#: Keys under which other programs' checkpoints store the state dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")


def _feed(hasher: Any, value: Any) -> None:
    """Hash a value of a checkpoint, including type and shape, so that equal bytes of different types differ."""
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
    """SHA-256 of a checkpoint's content, without its ``"digest"``."""
    hasher = hashlib.sha256()
    _feed(hasher, {key: value for key, value in state.items() if key != "digest"})
    return hasher.hexdigest()


def _check_archive(file: BinaryIO, size: int) -> int:
    """Check the member sizes of a ``torch.save`` archive against the file's; returns the number of pickled values."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(set(names)) < len(names):
            raise ValueError("two of its members have the same name")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its members are compressed; torch.save does not compress them")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its members are larger than the file")
        pickles = [member for member in members if member.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("not written by torch.save")
        if pickles[0].file_size > _PICKLE_LIMIT:
            raise ValueError(f"its pickle is larger than {_PICKLE_LIMIT:,} bytes")
        return values(io.BytesIO(archive.read(pickles[0])), _ALLOWED)


def _check_size(value: Any, described: int) -> None:
    """Check that an unpickled value is not much larger than its pickle.

    :func:`values` undercounts lists and dictionaries that are memoized before they are filled and used again later.
    Checkpoints use few values twice.

    Args:
        value: the unpickled value.
        described: the number of values in its pickle.

    Raises:
        ValueError: it is larger, or holds anything but tensors, numbers, strings, lists and dictionaries.
    """
    waiting, characters, budget = [value], 0, 16 * described
    while waiting:
        item = waiting.pop()
        budget -= 1
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, Tensor):
            _check_tensor(item)
        elif isinstance(item, str):
            characters += len(item)
        elif item is not None and not isinstance(item, (bool, int, float, torch.device, torch.dtype)):
            raise ValueError(f"it holds a {type(item).__name__}")
        if budget < len(waiting) or characters > _PICKLE_LIMIT:
            raise ValueError("it is much larger than its pickle")


def _check_tensor(tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or not is_cpu(tensor.device):
        raise ValueError("it holds a tensor that is sparse, quantized or on the meta device")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError("it holds a tensor that is larger than its storage in the file")


def _content(path: Path) -> Any:
    """Load a ``torch.save`` file, after checking that it takes no more memory than the file.

    Raises:
        DataError: the file is missing or damaged.
    """
    with opened(path, "checkpoint") as file:
        size = file.seek(0, 2)
        try:
            file.seek(0)
            if zipfile.is_zipfile(file):
                described = _check_archive(file, size)
            else:
                file.seek(0)
                head = io.BytesIO(file.read(_PICKLE_LIMIT))
                if not head.getvalue().startswith(_LEGACY_START):
                    # torch.load would print a long explanation of its formats.
                    raise ValueError("truncated, or not written by torch.save")
                described = sum(values(head, _ALLOWED) for _ in range(_LEGACY_PICKLES))
            file.seek(0)
            with warnings.catch_warnings():
                # Deprecation warnings about old storage classes are of no use to a reader.
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True)
            _check_size(content, described)
        except (DataError, MemoryError):
            raise
        except Exception as error:
            # Unpacking a damaged archive can raise almost anything.
            hint = "; save a model's state_dict(), not the model" if str(error).startswith("its pickle") else ""
            raise DataError(f"checkpoint {path} is damaged or not a checkpoint: {reason(error)}{hint}") from None
    return content


def _has(value: Any, schema: Any, name: str) -> None:
    """Check a value against a schema: a type, a dictionary of required members, ``[schema]`` for each item of a list,
    or a function ``check(value, name)`` that raises.

    Raises:
        ValueError: it does not match.
    """
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is a {type(value).__name__}, not a dictionary")
        for key, part in schema.items():
            member = f"{name}: {key}" if name else key
            if key not in value:
                raise ValueError(f"{member} is missing")
            _has(value[key], part, member)
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise ValueError(f"{name} is a {type(value).__name__}, not a list")
        for index, item in enumerate(value):
            _has(item, schema[0], f"{name}[{index}]")
    elif isinstance(schema, type):
        try:
            typed(name, value, schema)
        except UsageError as error:
            raise ValueError(error) from None
    else:
        schema(value, name)


def _optional(schema: Any) -> Callable[[Any, str], None]:
    def check(value: Any, name: str) -> None:
        if value is not None:
            _has(value, schema, name)

    return check


def _count(value: Any, name: str) -> None:
    _has(value, int, name)
    if value < 0:
        raise ValueError(f"{name} is {value}")


def _parameters(value: Any, name: str) -> None:
    _has(value, {}, name)
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name}: {key} is not a floating-point tensor")


def _bytes(value: Any, name: str) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise ValueError(f"{name} is not a 1-d uint8 tensor")


def check_mean_image(value: Any, name: str) -> None:
    """Raise ValueError unless it is float32 ``[size, size, 3]`` of gray levels 0..255."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        raise ValueError(f"{name} is not a float32 tensor")
    rows, columns, colours = value.shape if value.dim() == 3 else (0, 0, 0)
    if rows < 1 or rows != columns or colours != 3:
        raise ValueError(f"{name} has shape {list(value.shape)}, not [size, size, 3]")
    if not ((value >= 0) & (value <= 255)).all():
        raise ValueError(f"{name} holds values outside of 0..255")


def _optimizer_state(value: Any, name: str) -> None:
    _has(value, {}, name)
    for index, members in value.items():
        _has(index, int, f"{name}: {index}")
        _has(members, {}, f"{name}: {index}")


def _random(value: Any, name: str) -> None:
    one = {"cpu": _bytes, "cuda": _optional(_bytes)}
    _has(value, one, name)
    # The states of ranks 1 and up; a single-process checkpoint may lack it.
    _has(value.get("others", []), [one], f"{name}: others")


#: Schema of a checkpoint's members. A caller names those that it needs; others are not checked.
_SCHEMA: dict[str, Any] = {
    "metadata": {"network": dict, "classes": _optional([str]), "data_path": _optional(str)},
    "mean_image": check_mean_image,
    "model": _parameters,
    "optimizer": {"state": _optimizer_state, "param_groups": [dict]},
    "schedule": {"best": float, "stalled": int, "reductions": int, "finished": bool},
    "loader": {"epoch": _count, "batch": _count},
    "interval": {"losses": [Tensor], "correct": Tensor, "images": _count, "seconds": float},
    "step": _count,
    "epochs_closed": _count,
    "evaluated_step": int,
    "errors": _optional(
        {"images": int, "loss": float, "top1_error_percent": float, "top5_error_percent": _optional(float)}
    ),
    "elapsed": float,
    "random": _random,
}
#: Members needed for inference, and for resuming a run.
TRAINED = ("metadata", "mean_image", "model")
RESUMED = tuple(_SCHEMA)


def load(path: Path, needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and verify it.

    Args:
        path: the file.
        needed: members that it must have: ``TRAINED`` or ``RESUMED``.

    Raises:
        DataError: the file is missing, damaged, of another format, or lacks a needed member.
    """
    state = _content(path)
    if not _is_ours(state):
        raise DataError(f"checkpoint {path} was not written by net.train")
    return _verified(path, state, needed)


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and "digest" in content and "format" in content


def _verified(path: Path, state: dict[str, Any], needed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(state["format"], int) or state["format"] != FORMAT:
        raise DataError(f"checkpoint {path}: format {str(state['format'])[:20]} is not {FORMAT}")
    if not isinstance(state["digest"], str) or digest(state) != state["digest"]:
        raise DataError(f"checkpoint {path} is damaged: its checksum is wrong")
    try:
        _has(state, {name: _SCHEMA[name] for name in needed}, "")
    except ValueError as error:
        raise DataError(f"checkpoint {path} cannot be used: {error}") from None
    return state


def load_weights(path: Path, needed: tuple[str, ...] = ("model",)) -> dict[str, Any]:
    """A checkpoint, or another program's state dict as the only member ``"model"``.

    The state dict may be nested in a training checkpoint, under one of the usual keys.

    Args:
        path: the file.
        needed: members that a checkpoint of this project must have.

    Raises:
        DataError: the file is missing or damaged, or holds no state dict.
    """
    content = _content(path)
    if _is_ours(content):
        return _verified(path, content, needed)
    while isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        content = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        raise DataError(
            f"checkpoint {path} holds no state dict; it must be a dictionary of tensors, at the top level or under "
            f"{', '.join(_WRAPPERS)}"
        )
    return {"model": {name: tensor.detach() for name, tensor in content.items()}}
