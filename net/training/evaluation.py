"""Top-1 and top-5 errors of networks, alone and averaged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.device import autocast, sum_dtype
from ..data.augmentation import Crops
from ..data.loader import Loader

#: Labels that may be named for an image to count as right in the top-5 error (section 6).
TOP = 5


@dataclass(frozen=True)
class Errors:
    """Errors in percent over ``images`` images. ``loss`` is the mean of -log of the label's probability."""

    images: int
    loss: float
    top1_error_percent: float
    #: None with five classes or fewer, where it says nothing.
    top5_error_percent: float | None


def probabilities(model: nn.Module, crops: Tensor, precision: str, memory_format: torch.memory_format) -> Tensor:
    """Softmax of the logits, averaged over the crops ``[N, crops, 3, size, size]``: float32 ``[N, classes]``."""
    count, views = crops.shape[:2]
    images = crops.flatten(0, 1).contiguous(memory_format=memory_format)
    with autocast(precision, images.device):
        logits = model(images)
    return F.softmax(logits.float(), 1).view(count, views, -1).mean(1)


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
        models: networks of the same classes.
        loader: a loader that does not shuffle.
        means, sizes: the mean image and the input size of each network.
        crops: :func:`net.data.augmentation.centre_crop` or :func:`net.data.augmentation.ten_crops`.
        precision, memory_format: how the networks run.
        stop: asked before each batch; True gives up.
        progress: told the number of images of each batch that is done.
        total: adds up the sums of processes that each see a part of the images.

    Returns:
        The errors of each network, then, if there are several, those of their averaged softmax outputs (the paper's
        ensembles); None when it gave up.
    """
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    rows = len(models) + (len(models) > 1)
    #: For each row the sums of -log probability, of top-1 and top-5 mistakes, and of images; they stay on the device.
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
                # Only classes less probable than the label's count for it, so that neither a network that says the same
                # of every class nor one that says not-a-number is ever right.
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
    """Top-1 and top-5 accuracy in words."""
    text = f"top-1 {100 - errors.top1_error_percent:.2f} %"
    if errors.top5_error_percent is not None:
        text += f"  top-5 {100 - errors.top5_error_percent:.2f} %"
    return text
