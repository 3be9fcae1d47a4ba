"""Top-1 and top-5 errors of single networks and of ensembles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.device import autocast, sum_dtype
from ..data.augmentation import Crops
from ..data.loader import Loader

#: The k of the top-k error (top-5, section 6).
TOP = 5


@dataclass(frozen=True)
class Errors:
    """Errors in percent over ``images`` images. ``loss`` is the mean cross-entropy of the averaged probabilities."""

    images: int
    loss: float
    top1_error_percent: float
    #: None with five classes or fewer, where it is always 0.
    top5_error_percent: float | None


def probabilities(model: nn.Module, crops: Tensor, precision: str, memory_format: torch.memory_format) -> Tensor:
    """Softmax of the logits, averaged over an image's crops.

    Args:
        crops: ``[N, crops, 3, size, size]``.

    Returns:
        float32 ``[N, classes]``.
    """
    outputs = []
    # One crop after the other: together, ten of 128 images of 224x224 take 7 GB of activations.
    for images in crops.unbind(1):
        with autocast(precision, images.device):
            logits = model(images.contiguous(memory_format=memory_format))
        outputs.append(F.softmax(logits.float(), 1))
    return torch.stack(outputs).mean(0)


def evaluate(
    models: Sequence[nn.Module],
    loader: Loader,
    means: Sequence[Tensor],
    sizes: Sequence[int],
    crops: Crops,
    *,
    precision: str = "fp32",
    memory_format: torch.memory_format = torch.channels_last,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda count: None,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> list[Errors] | None:
    """Errors over one pass of ``loader``.

    Args:
        models: networks with the same classes.
        loader: a loader that does not shuffle.
        means, sizes: the mean image and the input size of each network.
        crops: :func:`net.data.augmentation.centre_crop` or :func:`net.data.augmentation.ten_crops`.
        precision, memory_format: of the forward passes.
        stop: called before each batch; True aborts.
        progress: called after each batch with its number of images.
        total: sums over processes that each see part of the images.

    Returns:
        The errors of each network and, if there are several, of their averaged softmax outputs (the paper's
        ensembles); None if aborted.
    """
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    rows = len(models) + (len(models) > 1)
    #: For each row the sums of -log probability, top-1 errors, top-5 errors and images; they stay on the device.
    sums = torch.zeros(rows, 4, dtype=sum_dtype(loader.device), device=loader.device)
    classes = 0
    batches = iter(loader)
    try:
        with torch.no_grad():
            for _ in range(loader.batches):
                if stop():
                    return None
                batch = next(batches)
                outputs = [
                    probabilities(model, crops(batch.images, mean, size), precision, memory_format)
                    for model, mean, size in zip(models, means, sizes, strict=True)
                ]
                if len(models) > 1:
                    outputs.append(torch.stack(outputs).mean(0))
                output = torch.stack(outputs)
                classes = output.shape[2]
                of_label = output.gather(2, batch.labels.expand(rows, -1)[..., None])
                # A prediction is right if enough classes are strictly less probable than the label, so that neither
                # equal probabilities nor NaN ever count as right.
                less = (output < of_label).sum(2)
                sums[:, 0] -= of_label[..., 0].clamp_min(torch.finfo(torch.float32).tiny).log().sum(1)
                sums[:, 1] += (less < classes - 1).sum(1)
                sums[:, 2] += (less < classes - TOP).sum(1)
                sums[:, 3] += len(batch.labels)
                progress(len(batch.labels))
    finally:
        batches.close()
        for model, training in zip(models, was_training, strict=True):
            model.train(training)
    sums = total(sums)
    return [
        Errors(int(count), loss, 100 * wrong, 100 * wrong_top if classes > TOP else None)
        for (loss, wrong, wrong_top), count in zip(
            (sums[:, :3] / sums[:, 3:]).tolist(), sums[:, 3].tolist(), strict=True
        )
    ]


def accuracies(errors: Errors) -> str:
    """Top-1 and top-5 accuracy, formatted for a log."""
    text = f"top-1 {100 - errors.top1_error_percent:.2f} %"
    if errors.top5_error_percent is not None:
        text += f"  top-5 {100 - errors.top5_error_percent:.2f} %"
    return text
