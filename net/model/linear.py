"""Dense layers in inference on a CPU.

``F.linear`` multiplies in PyTorch's BLAS library, usually MKL; convolutions run in oneDNN. On an AVX2 processor by AMD,
oneDNN takes 37 to 86 % of MKL's time for the paper's dense layers and 1 to 128 images (``reports/LOG.md``,
2026-11-28). Nothing was measured on Intel's processors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import cpu, private

from ..common.device import onednn_enabled, runs_onednn

#: Elements of the smallest weights that gain. Smaller products take less time than the conversions.
LEAST = 2**21


def _in_onednn(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Checked here and not in linear(), because Dynamo cannot trace the check.
    if not onednn_enabled():
        return F.linear(input, weight, bias)
    # oneDNN ignores the strides of a bias.
    return F.linear(input.to_mkldnn(), weight, bias.contiguous()).to_dense()


# Dynamo cannot trace tensors in oneDNN's layouts.
_operator = torch.library.custom_op("alexnet_fused::linear", _in_onednn, mutates_args=())


@_operator.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[0])


def _suits(*tensors: Tensor) -> bool:
    """Whether these are plain float32 tensors on a CPU, without derivatives, and no call is intercepted."""
    plain = all(
        runs_onednn(tensor.device)
        and tensor.dtype == torch.float32
        and tensor.layout == torch.strided
        and type(tensor) in (Tensor, nn.Parameter)
        for tensor in tensors
    )
    if not plain or torch.is_grad_enabled() or private.derivatives_beyond_autograd():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():
        return not private.exporting()
    return cpu.suits(tensors[0]) and not private.functions_replaced()


def linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear`` of a matrix; by oneDNN in float32 on a CPU if the weight is large and no gradient can be asked for.

    Args:
        input: ``[N, in_features]``.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``.

    Returns:
        ``input @ weight.T + bias``, ``[N, out_features]``.
    """
    if (
        _suits(input, weight, bias)
        and weight.numel() >= LEAST
        and input.shape[1] == weight.shape[1]
        and bias.shape == weight.shape[:1]
    ):
        product: Tensor = (_operator if torch.compiler.is_compiling() else _in_onednn)(input, weight, bias)
        return product
    return F.linear(input, weight, bias)
