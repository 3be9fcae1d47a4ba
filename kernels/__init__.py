"""Operators of the 2012 AlexNet with PyTorch's conventions: local response normalization and overlapping max pooling.

``kernels`` knows no network and can be used in any model. :func:`implementation` chooses how the operators run.
"""

from . import private
from .dispatch import IMPLEMENTATIONS, implementation
from .fuse import fuse
from .local_response_norm import local_response_norm, relu_local_response_norm
from .max_pool2d import max_pool2d, relu_max_pool2d
from .modules import LocalResponseNorm, MaxPool2d, ReLULocalResponseNorm, ReLULRNMaxPool2d, ReLUMaxPool2d
from .relu_lrn_max_pool2d import relu_lrn_max_pool2d

private.say_untried()

__all__ = [
    "IMPLEMENTATIONS",
    "LocalResponseNorm",
    "MaxPool2d",
    "ReLULRNMaxPool2d",
    "ReLULocalResponseNorm",
    "ReLUMaxPool2d",
    "fuse",
    "implementation",
    "local_response_norm",
    "max_pool2d",
    "relu_local_response_norm",
    "relu_lrn_max_pool2d",
    "relu_max_pool2d",
]
