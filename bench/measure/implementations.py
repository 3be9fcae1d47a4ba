"""Whose code a row measured, by the name of its implementation."""

from collections.abc import Mapping
from typing import Any

#: PyTorch's own code, of the version in the row's column ``torch``.
PYTORCH = ("aten", "compiled", "cudnn", "torchvision")
#: Implementations that are not this project's.
RIVALS = (*PYTORCH, "xla", "onnxruntime", "openvino")
#: How a step is called with all of cuDNN's algorithms. net.train does not, and neither do the rivals' steps.
NONDETERMINISTIC = "nondeterministic"


def name_of(row: Mapping[str, Any]) -> str:
    """The implementation, without how it was called: ``aten`` for ``aten, eager``."""
    return str(row.get("implementation")).partition(", ")[0]


def ours(row: Mapping[str, Any]) -> bool:
    """Whether a row is of this project's operators."""
    return name_of(row) not in RIVALS
