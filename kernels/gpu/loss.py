"""A batch's mean cross-entropy, its gradient and the number of correct predictions, in one pass over the logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import FOUR_WARPS
from .runtime import launch

#: Most classes: a program holds an image's logits in registers.
CLASSES = 8192


@triton.jit
def loss_kernel(logits, labels, gradient, results, stride, classes, images, BLOCK: tl.constexpr):
    """Writes an image's part of the mean loss and whether it is correct to ``results``, and its logits' gradient."""
    image = tl.program_id(0)
    number = tl.arange(0, BLOCK)
    inside = number < classes
    label = tl.load(labels + image)
    value = tl.load(logits + image.to(tl.int64) * stride + number, mask=inside, other=-float("inf")).to(tl.float32)
    highest = tl.max(value, 0)
    # A NaN among the logits makes the sum, and with it the loss, NaN.
    power = tl.exp(value - highest)
    total = tl.sum(power, 0)
    loss = tl.log(total) - tl.sum(tl.where(number == label, value - highest, 0.0), 0)
    found = (power / total - tl.where(number == label, 1.0, 0.0)) / images
    tl.store(gradient + image.to(tl.int64) * classes + number, found.to(gradient.dtype.element_ty), mask=inside)
    # If several logits are highest, the first counts, as in PyTorch.
    first = tl.min(tl.where(value == highest, number, BLOCK), 0)
    tl.store(results + image, loss / images)
    tl.store(results + images + image, tl.where(first == label, 1.0, 0.0))


def suits(logits: Tensor) -> bool:
    """Whether :func:`cross_entropy` supports these logits."""
    return logits.dtype != torch.float64 and logits.shape[1] <= CLASSES and logits.stride(1) == 1


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean cross-entropy, the number of correct predictions, and the gradient of the logits.

    Args:
        logits: ``[N, C]``, float32 or a half type, for which :func:`suits` is true; arithmetic is float32.
        labels: int64 ``[N]``, each below ``C``.

    Returns:
        The loss, float32; the number of images whose label's logit is the first of the highest, int64; and the
        gradient of the logits, ``[N, C]`` in their dtype.
    """
    images, classes = logits.shape
    gradient = torch.empty(images, classes, dtype=logits.dtype, device=logits.device)
    results = torch.empty(2, images, dtype=torch.float32, device=logits.device)
    launch(
        loss_kernel,
        (images,),
        logits.device,
        logits,
        labels.contiguous(),
        gradient,
        results,
        logits.stride(0),
        classes,
        images,
        BLOCK=triton.next_power_of_2(classes),
        **FOUR_WARPS,
    )
    loss, correct = results.sum(1)
    return loss, correct.long(), gradient
