"""Name what is in images: ``python -m net.predict CHECKPOINT IMAGE...``; ``--help`` lists the flags."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import cli, pretrained
from .config import PredictConfig
from .errors import DataError, UsageError
from .files import atomic_write, check_writable
from .printing import printable

DESCRIPTION = (
    "The five most probable classes of each image, which is scaled and cropped as the training images were and has the "
    "run's own mean image subtracted."
)


def _predict(config: PredictConfig) -> dict[str, Any]:
    """The answers as they are written with ``--json``; writes the features if they are wanted."""
    import numpy as np
    import torch

    from .augmentation import centre_crop, ten_crops
    from .data.decode import decode
    from .device import choose, keep_freed_memory, resolve_precision, set_precision
    from .doors.image import UnreadableImageError
    from .evaluation import TOP, probabilities
    from .features import check_colours, class_names, features
    from .progress import Progress
    from .trained import MEAN_RGB_HINT, check_mean_rgb, open_trained

    device = choose(config.device)
    keep_freed_memory()
    trained = open_trained(config.checkpoint, device, config.mean_rgb)
    precision = resolve_precision(config.precision, device, trained.precision)
    set_precision(precision, device)
    check_colours(trained)
    check_mean_rgb(config.mean_rgb, [trained])
    size = trained.network.image_size
    mean = trained.mean_image()
    if mean is None:
        raise DataError(
            f"{trained.path} holds no mean image to subtract; give the run folder or a checkpoint ({MEAN_RGB_HINT})"
        )
    stored = mean.shape[0]
    if config.ten_crops and stored == size:
        raise UsageError(f"--ten-crops: {trained.path} was trained on images of {size}x{size}, which it reads whole")
    classes = class_names(trained)
    count = min(TOP, len(classes))
    crops = ten_crops if config.ten_crops else centre_crop
    answers, vectors = [], []
    with Progress("images", len(config.images)) as progress, torch.no_grad():
        for first in range(0, len(config.images), config.batch_size):
            names = config.images[first : first + config.batch_size]
            pixels = []
            for name in names:
                try:
                    pixels.append(decode(Path(name), stored))
                except UnreadableImageError as error:
                    raise DataError(f"{name} cannot be read as an image: {error}") from None
            images = torch.from_numpy(np.stack(pixels)).to(device)
            input = crops(images, mean, size)
            top = probabilities(trained.model, input, precision, torch.channels_last).topk(count)
            for name, values, labels in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
                likely = [
                    {"class": classes[label], "probability": value} for label, value in zip(labels, values, strict=True)
                ]
                answers.append({"image": name, "top": likely})
            if config.features is not None:
                vectors.append(features(trained, images, mean).cpu().numpy())
            progress.update(len(names))
    if config.features is not None:
        with atomic_write(Path(config.features)) as file:
            np.save(file, np.concatenate(vectors))
    return {"network": trained.name, "crops": 10 if config.ten_crops else 1, "predictions": answers}


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict as the command line says; returns the exit status."""
    config = cli.resolve(cli.given(PredictConfig, "net.predict", DESCRIPTION, arguments), PredictConfig)
    check_writable("--features", config.features)
    pretrained.find(config.checkpoint)
    for path in config.images:
        if not os.path.exists(path):
            raise DataError(f"{path} cannot be read as an image: does not exist")
    cli.load("evaluation", "features", "trained")
    # With --json nothing but JSON is printed to stdout.
    with contextlib.redirect_stdout(sys.stderr) if config.json else contextlib.nullcontext():
        result = _predict(config)
    if config.json:
        print(json.dumps(result, indent=1))
        return 0
    answers: list[dict[str, Any]] = [
        {
            "image": printable(answer["image"]),
            "top": [{**item, "class": printable(item["class"])} for item in answer["top"]],
        }
        for answer in result["predictions"]
    ]
    image = max(len("image"), *(len(answer["image"]) for answer in answers))
    name = max(len("class"), *(len(item["class"]) for answer in answers for item in answer["top"]))
    print(f"{'image':<{image}}  {'class':<{name}}  probability")
    for answer in answers:
        for position, item in enumerate(answer["top"]):
            first = answer["image"] if position == 0 else ""
            print(f"{first:<{image}}  {item['class']:<{name}}  {100 * item['probability']:>9.2f} %")
    if config.features is not None:
        print(f"features written to {config.features}")
    return 0


if __name__ == "__main__":
    cli.run(main)
