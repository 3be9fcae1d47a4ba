"""``fuse(model)``: these operators in a model that was written with PyTorch's own."""

from .model import fuse

__all__ = ["fuse"]
