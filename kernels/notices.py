"""Warnings that point to the line of the user's program, skipping the frames of this package and PyTorch."""

import inspect
import os
import warnings

import torch

#: Code that is not the user's: this package, PyTorch, and code that torch.fx generates.
_SKIPPED = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, "<eval_with_key>")


def warn(text: str) -> None:
    """Warn with the line that called this package, directly, through a module or from a compiled function."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
