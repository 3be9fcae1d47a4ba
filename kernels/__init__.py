"""Operators of the 2012 AlexNet with PyTorch's conventions: local response normalization and overlapping max pooling.

``kernels`` does not depend on any network and works in any model. :func:`implementation` selects how operators run.
"""

from typing import NoReturn

from . import private
from .dispatch import IMPLEMENTATIONS, implementation
from .functional import (
    bias_relu,
    local_response_norm,
    max_pool2d,
    relu_chunks,
    relu_local_response_norm,
    relu_lrn_max_pool2d,
    relu_max_pool2d,
)
from .fuse import fuse
from .modules import LocalResponseNorm, MaxPool2d, ReLULocalResponseNorm, ReLULRNMaxPool2d, ReLUMaxPool2d

__version__ = "0.1.0"
#: Names that users import from Hugging Face's package of the same name.
_THEIRS = frozenset(
    (
        *("get_kernel", "get_local_kernel", "has_kernel", "load_kernel", "get_loaded_kernels", "install_kernel"),
        *("kernelize", "Mode", "Device", "LayerRepository", "LocalLayerRepository", "FuncRepository"),
        *("use_kernel_forward_from_hub", "replace_kernel_forward_from_hub", "use_kernel_func_from_hub"),
        *("register_kernel_mapping", "use_kernel_mapping"),
    )
)

private.warn_untested()


def __getattr__(name: str) -> NoReturn:
    if name in _THEIRS:
        raise ImportError(
            f"{name} belongs to Hugging Face's package kernels, and the one that is imported, {__path__[0]}, is "
            "alexnet-fused's: give each an environment of its own, or start Python outside the checkout"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "IMPLEMENTATIONS",
    "LocalResponseNorm",
    "MaxPool2d",
    "ReLULRNMaxPool2d",
    "ReLULocalResponseNorm",
    "ReLUMaxPool2d",
    "bias_relu",
    "fuse",
    "implementation",
    "local_response_norm",
    "max_pool2d",
    "relu_chunks",
    "relu_local_response_norm",
    "relu_lrn_max_pool2d",
    "relu_max_pool2d",
]
