"""The chain as PyTorch's own operators: the baseline of every measurement, also used for empty tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Normalization, Pooling


def forward(
    input: Tensor,
    bias: Tensor | None,
    relu: bool,
    normalization: Normalization | None,
    pooling: Pooling | None,
) -> Tensor:
    """Like :func:`kernels.autograd.run`, but each operator rounds to ``input``'s dtype; PyTorch differentiates it."""
    values = input
    if bias is not None:
        values = (values + bias.reshape(-1, *[1] * (input.dim() - 2))).to(input.dtype)
    if relu:
        values = F.relu(values)
    if normalization is not None and values.numel() > 0:
        size, alpha, beta, k, groups = normalization
        parts = [F.local_response_norm(part, size, alpha, beta, k) for part in values.chunk(groups, 1)]
        values = torch.cat(parts, 1) if groups > 1 else parts[0]
    if pooling is not None:
        values = F.max_pool2d(values, *pooling)
    return values.clone() if values is input else values
