"""Classify images: ``python -m net.predict CHECKPOINT IMAGE...``; ``--help`` lists the flags."""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import pretrained
from .common import cli
from .common.errors import DataError, UsageError
from .common.fields import DEVICES, MEAN_RGB, MOST_IMAGES, PRECISION, at_least, at_most, check_rgb, flag, flag_name
from .common.files import atomic_write, check_writable
from .common.printing import printable

DESCRIPTION = (
    "The five most probable classes of each image. Images are scaled, cropped and mean-subtracted as in training."
)


@dataclass(frozen=True)
class PredictConfig:
    """The flags of ``python -m net.predict``."""

    checkpoint: str = flag(
        "", "run folder, checkpoint (.pt), weights or the name of pretrained weights", positional=True
    )
    images: tuple[str, ...] = flag((), "image files", positional=True)
    ten_crops: bool = flag(False, "average over ten crops instead of the centre crop")
    json: bool = flag(False, "JSON instead of a table")
    features: str | None = flag(
        None, "write the last hidden features (fc7) of the centre crops, float32 [images, features]", metavar="FILE.npy"
    )
    mean_rgb: tuple[float, ...] | None = flag(None, MEAN_RGB, nargs=3, metavar=("R", "G", "B"))
    batch_size: int = flag(128, "images per batch", short="b")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = flag("auto", PRECISION)
    device: str | None = flag(None, DEVICES)

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", called=flag_name)
        at_most(self, MOST_IMAGES, "batch_size", called=flag_name)
        check_rgb(self.mean_rgb)
        if self.features is not None and not self.features.endswith(".npy"):
            raise UsageError(f"--features must end in .npy; got {self.features}")


def _predict(config: PredictConfig) -> dict[str, Any]:
    """The predictions in the form that ``--json`` prints; also writes ``--features``."""
    import numpy as np
    import torch

    from .analysis.features import check_colours, class_names, features
    from .analysis.trained import MEAN_RGB_HINT, check_mean_rgb, open_trained
    from .common.allocator import keep_freed_memory
    from .common.device import choose, resolve_precision, set_precision
    from .common.progress import Progress
    from .data.augmentation import centre_crop, ten_crops
    from .data.decode import decode
    from .readers.image import UnreadableImageError
    from .training.evaluation import TOP, probabilities

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
        raise UsageError(f"--ten-crops: {trained.path} was trained on uncropped {size}x{size} images")
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
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(PredictConfig, "net.predict", DESCRIPTION, arguments), PredictConfig)
    check_writable("--features", config.features)
    pretrained.find(config.checkpoint)
    for path in config.images:
        if not os.path.exists(path):
            raise DataError(f"{path} cannot be read as an image: does not exist")
    cli.load("training.evaluation", "analysis.features", "analysis.trained")
    # With --json, only JSON goes to stdout.
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
