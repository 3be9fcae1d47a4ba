"""Dense layers in inference on a CPU.

``F.linear`` multiplies in PyTorch's BLAS library, usually MKL; convolutions run in oneDNN. On an AVX2 processor by AMD,
oneDNN computes the paper's dense layers in 37 to 86 % of MKL's time for 1 to 128 images (``reports/LOG.md``,
2026-11-28). Nothing was measured on Intel's processors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu, private

from ..common.device import runs_onednn


def _in_onednn(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(input.to_mkldnn(), weight, bias).to_dense()


# Dynamo does not trace tensors in oneDNN's layouts.
_operator = torch.library.custom_op("alexnet_fused::linear", _in_onednn, mutates_args=())


@_operator.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[0])


def linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear`` of a matrix; computed by oneDNN in float32 on a CPU if no derivative can be asked for.

    Args:
        input: ``[N, in_features]``.
        weight: ``[out_features, in_features]``.
        bias: ``[out_features]``.

    Returns:
        ``input @ weight.T + bias``, ``[N, out_features]``.
    """
    if (
        runs_onednn(input.device)
        and input.dtype == weight.dtype == bias.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not private.derivatives_beyond_autograd()
    ):
        if torch.compiler.is_compiling():
            if not private.exporting():
                product: Tensor = _operator(input, weight, bias)
                return product
        elif cpu.suits(input) and cpu.suits(weight):
            return _in_onednn(input, weight, bias)
    return F.linear(input, weight, bias)
