"""The operators as modules, for ``nn.Sequential`` and wherever PyTorch expects a module.

The constructor takes the operator's arguments and rejects those that are invalid for any input. The modules have no
parameters. If the operator has a ``bias``, it is the second argument of ``forward``, so that it remains the
convolution's parameter::

    stage = ReLULRNMaxPool2d(5, alpha=5e-4, k=2.0)
    output = stage(F.conv2d(input, conv.weight, stride=4), conv.bias)
"""

from torch import Tensor, nn

from .arguments import Pair, normalization, pooling
from .functional import (
    local_response_norm,
    max_pool2d,
    relu_local_response_norm,
    relu_lrn_max_pool2d,
    relu_max_pool2d,
)


class _Normalization(nn.Module):
    """Arguments of a local response normalization."""

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, groups: int = 1) -> None:
        super().__init__()
        self._normalize(size, alpha, beta, k, groups)

    def _normalize(self, size: int, alpha: float, beta: float, k: float, groups: int) -> None:
        self.size, self.alpha, self.beta, self.k, self.groups = normalization(
            type(self).__name__, size, alpha, beta, k, groups
        )

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, groups={self.groups}"


class LocalResponseNorm(_Normalization):
    """:func:`kernels.local_response_norm`; :class:`torch.nn.LocalResponseNorm` with ``groups``."""

    def forward(self, input: Tensor) -> Tensor:
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k, groups=self.groups)


class ReLULocalResponseNorm(_Normalization):
    """:func:`kernels.relu_local_response_norm`."""

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return relu_local_response_norm(input, self.size, self.alpha, self.beta, self.k, groups=self.groups, bias=bias)


class _Pooling(nn.Module):
    """Arguments of a max pooling."""

    def __init__(
        self,
        kernel_size: Pair,
        stride: Pair | None = None,
        padding: Pair = 0,
        dilation: Pair = 1,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        self._pool(kernel_size, stride, padding, dilation, ceil_mode)

    def _pool(self, kernel_size: Pair, stride: Pair | None, padding: Pair, dilation: Pair, ceil_mode: bool) -> None:
        pooling(type(self).__name__, kernel_size, stride, padding, dilation, ceil_mode)
        self.kernel_size, self.stride = kernel_size, kernel_size if stride is None else stride
        self.padding, self.dilation, self.ceil_mode = padding, dilation, ceil_mode

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"ceil_mode={self.ceil_mode}"
        )


class MaxPool2d(_Pooling):
    """:func:`kernels.max_pool2d`; :class:`torch.nn.MaxPool2d` without ``return_indices``."""

    def forward(self, input: Tensor) -> Tensor:
        return max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


class ReLUMaxPool2d(_Pooling):
    """:func:`kernels.relu_max_pool2d`."""

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return relu_max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, bias=bias
        )


class ReLULRNMaxPool2d(_Normalization, _Pooling):
    """:func:`kernels.relu_lrn_max_pool2d`."""

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        groups: int = 1,
        kernel_size: Pair = 3,
        stride: Pair | None = 2,
        padding: Pair = 0,
        dilation: Pair = 1,
        ceil_mode: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self._normalize(size, alpha, beta, k, groups)
        self._pool(kernel_size, stride, padding, dilation, ceil_mode)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return relu_lrn_max_pool2d(
            input,
            self.size,
            self.alpha,
            self.beta,
            self.k,
            groups=self.groups,
            bias=bias,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
        )

    def extra_repr(self) -> str:
        return f"{_Normalization.extra_repr(self)}, {_Pooling.extra_repr(self)}"
