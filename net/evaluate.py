"""Evaluate trained networks: ``python -m net.evaluate RUN...``; ``--help`` lists the flags."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import pretrained
from .analysis.published import Published, is_ilsvrc, published
from .common import cli
from .common.errors import DataError
from .common.fields import (
    DEVICES,
    MEAN_RGB,
    MOST_IMAGES,
    MOST_WORKERS,
    PRECISION,
    at_least,
    at_most,
    check_rgb,
    flag,
    flag_name,
)
from .common.files import atomic_write, check_writable
from .common.printing import printable
from .training import runs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .analysis.trained import Trained
    from .data.images import ImageData

DESCRIPTION = (
    "Top-1 and top-5 errors on the validation images, with the centre crop and with ten crops. Several networks are "
    "evaluated individually and as an ensemble with averaged softmax outputs."
)


@dataclass(frozen=True)
class EvaluateConfig:
    """The flags of ``python -m net.evaluate``."""

    checkpoints: tuple[str, ...] = flag(
        (),
        "run folders, checkpoints (.pt), weights (.safetensors, .onnx, .pt, .pth) or names of pretrained weights; "
        "several form an ensemble",
        positional=True,
    )
    data_path: str | None = flag(
        None, "as in net.train; by default the data the first network was trained on", metavar="PATH"
    )
    ten_crops: bool = flag(True, "also average over ten crops where the images are larger than the network's input")
    batch_size: int = flag(128, "images per batch", short="b")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = flag("auto", PRECISION)
    channels_last: bool = flag(True, "keep activations in channels_last memory format")
    device: str | None = flag(None, DEVICES)
    workers: int = flag(2, "threads that read images", short="j")
    output: str | None = flag(
        None, "JSON file; evaluation.json next to the first checkpoint by default", metavar="FILE"
    )
    mean_rgb: tuple[float, ...] | None = flag(None, MEAN_RGB, nargs=3, metavar=("R", "G", "B"))

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "workers", called=flag_name)
        at_most(self, MOST_IMAGES, "batch_size", called=flag_name)
        at_most(self, MOST_WORKERS, "workers", called=flag_name)
        check_rgb(self.mean_rgb)


def errors(config: EvaluateConfig) -> list[dict[str, Any]]:
    """A row for each network and for the ensemble, with each kind of crops."""
    from .analysis.features import mean_image, open_its_data
    from .analysis.trained import check_mean_rgb, open_trained
    from .common.device import choose

    device = choose(config.device)
    trained = [open_trained(argument, device, config.mean_rgb) for argument in config.checkpoints]
    check_mean_rgb(config.mean_rgb, trained)
    first = trained[0]
    for other in trained[1:]:
        if other.classes != first.classes:
            raise DataError(f"{other.path} and {first.path} have different classes: their outputs cannot be averaged")
    data, mean = open_its_data(first, config.data_path, device)
    means = [mean] + [mean_image(other, data, device) for other in trained[1:]]
    return measured(trained, means, data, config, device)


def measured(
    trained: "Sequence[Trained]",
    means: "Sequence[Tensor]",
    data: "ImageData",
    config: EvaluateConfig,
    device: "torch.device",
) -> list[dict[str, Any]]:
    """:func:`errors` of networks that are open.

    Args:
        trained: the networks, on ``device``.
        means: the mean image that each subtracts, float32 ``[size, size, 3]`` in gray levels 0..255.
        data: whose validation images are evaluated.
        config: how; its checkpoints, data_path, device and mean_rgb are not read.
        device: where to compute.
    """
    import torch

    from .common.allocator import keep_freed_memory
    from .common.device import describe, resolve_precision, set_precision
    from .common.progress import Progress
    from .data.augmentation import centre_crop, ten_crops
    from .data.loader import Loader
    from .training.evaluation import evaluate

    keep_freed_memory()
    precision = resolve_precision(config.precision, device, trained[0].precision)
    set_precision(precision, device)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    models = [item.model.to(memory_format=memory_format) for item in trained]  # type: ignore[call-overload]
    sizes = [item.network.image_size for item in trained]
    print(f"{len(data.val):,} validation images of {data.name} on {describe(device)}, {precision}")
    names = [item.name for item in trained] + (["average"] if len(trained) > 1 else [])
    ways = [("1", centre_crop)]
    if config.ten_crops:
        if data.size > max(sizes):
            ways.append(("10", ten_crops))
        else:
            size = f"{data.size}x{data.size}"
            print(f"ten crops need images larger than the network's input; those of {data.name} are {size}")
    variants = [[item.network.variant] for item in trained]
    if len(trained) > 1:
        variants.append([item.network.variant for item in trained])
    rows = []
    for crops, cut in ways:
        loader = Loader(data.val, config.batch_size, device, shuffle=False, threads=config.workers)
        with Progress("images", len(data.val)) as progress:
            results = evaluate(
                models,
                loader,
                means,
                sizes,
                cut,
                precision=precision,
                memory_format=memory_format,
                progress=progress.update,
            )
        assert results is not None
        rows += [
            {
                "network": name,
                "data": data.name,
                "crops": int(crops),
                **asdict(found),
                "published": [
                    asdict(item) for item in (published(nets, int(crops)) if is_ilsvrc(data.classes) else ())
                ],
            }
            for name, nets, found in zip(names, variants, results, strict=True)
        ]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(EvaluateConfig, "net.evaluate", DESCRIPTION, arguments), EvaluateConfig)
    check_writable("--output", config.output)
    networks = [pretrained.find(network) for network in config.checkpoints]
    cli.check_exist(data_path=config.data_path)
    cli.load("training.evaluation", "analysis.features", "analysis.trained")
    rows = errors(config)
    names = [printable(row["network"]) for row in rows]
    width = max(map(len, names))
    beside = "  published top-1 / top-5" if any(row["published"] for row in rows) else ""
    print(f"{'network':<{width}}  crops  top-1 error  top-5 error{beside}")
    for name, row in zip(names, rows, strict=True):
        top5 = row["top5_error_percent"]
        last = f"{top5:.2f} %" if top5 is not None else "-"
        line = f"{name:<{width}}  {row['crops']:>5}  {row['top1_error_percent']:>9.2f} %  {last:>11}"
        print(f"{line}  {'; '.join(str(Published(**item)) for item in row['published'])}".rstrip())
    if rows[0]["top5_error_percent"] is None:
        print("no top-5 error with five classes or fewer")
    output = Path(config.output) if config.output is not None else runs.results_folder(networks[0]) / "evaluation.json"
    with atomic_write(output) as file:
        file.write(json.dumps({"results": rows}, indent=1).encode())
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    cli.run(main)
