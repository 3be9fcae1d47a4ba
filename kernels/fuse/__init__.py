"""``fuse(model)``: puts these operators into a model written with PyTorch's own."""

from .model import fuse

__all__ = ["fuse"]
