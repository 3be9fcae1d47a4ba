"""Export a trained network: ``python -m net.export CHECKPOINT OUTPUT``; ``--help`` lists the flags."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import pretrained
from .common import cli
from .common.errors import DataError, UsageError
from .common.fields import flag
from .common.files import atomic_write, check_writable
from .training import runs
from .training.config import RecipeConfig

if TYPE_CHECKING:
    import torch

    from .analysis.trained import Trained

DESCRIPTION = (
    "Write a trained network as ONNX, a torch.export program or a compiled AOTInductor package. Its input is a batch "
    "of any size of float32 RGB images, in 0..255 minus the training images' mean; its output is logits. Or write "
    "its weights in half precision, with all that net.load and the other commands need, to share them."
)


#: Flags that decide what a run learns, except architecture and precision, which a file contains anyway.
RECIPE = {item.name for item in fields(RecipeConfig)} | {
    *("preset", "epochs", "max_steps", "time_budget", "eval_every", "batch_size", "hold_out", "seed"),
    *("init_from", "new_head", "freeze"),
}
#: The parts of an evaluation that a weights file contains.
REPORTED = ("images", "loss", "top1_error_percent", "top5_error_percent")


@dataclass(frozen=True)
class ExportConfig:
    """The flags of ``python -m net.export``."""

    checkpoint: str = flag(
        "",
        "run folder, checkpoint (.pt), weights (.safetensors, .onnx) or the name of pretrained weights",
        positional=True,
    )
    output: str = flag("", "file to write: .onnx, .safetensors, or .pt2 for the other formats", positional=True)
    format: Literal["onnx", "torch-export", "aoti", "safetensors"] = flag(
        "onnx",
        "ONNX, a torch.export program, a compiled AOTInductor package, or half-precision weights with mean image, "
        "recipe and the error measured on that file",
    )
    data_path: str | None = flag(
        None,
        "images on which the error of --format safetensors is measured; by default the data the network was trained on",
        metavar="PATH",
    )
    device: str | None = flag(None, "as in net.train; the device an aoti package is compiled for")

    def __post_init__(self) -> None:
        suffix = {"onnx": ".onnx", "safetensors": ".safetensors"}.get(self.format, ".pt2")
        if not self.output.endswith(suffix):
            raise UsageError(f"OUTPUT must end in {suffix} for --format {self.format}; got {self.output}")
        if self.data_path is not None and self.format != "safetensors":
            raise UsageError("--data-path goes with --format safetensors, whose error is measured")


def _recipe(trained: "Trained") -> dict[str, Any]:
    """The flags of ``RECIPE``: those in the weights file, else those of its run, else none."""
    recipe = dict(trained.recipe)
    folder = runs.folder_of(trained.path)
    if not recipe and (folder / runs.CONFIG).is_file():
        recipe = runs.read_config(folder)
        if "init_from" in recipe:
            recipe["init_from"] = Path(recipe["init_from"]).name
    return {name: value for name, value in recipe.items() if name in RECIPE}


def _write_weights(trained: "Trained", output: Path, config: ExportConfig, device: "torch.device") -> None:
    """Half-precision weights to share, with the mean image, the training recipe and the errors."""
    from . import evaluate
    from .analysis.features import mean_image, open_its_data
    from .analysis.trained import open_trained
    from .model import weights

    if trained.mean is None:
        raise DataError(f"{trained.path} holds no mean image to subtract; give the run folder or a checkpoint")
    data, _ = open_its_data(trained, config.data_path, device)
    metadata: dict[str, Any] = {
        "network": trained.network.to_dict(),
        "classes": trained.classes,
        # The full path is private, but the name may be useful.
        "data_path": None if trained.data_path is None else Path(trained.data_path).name,
        "precision": trained.precision,
        "pixels": "RGB, 0..255, less mean_image",
        "recipe": _recipe(trained),
    }
    tensors = {name: tensor.half() for name, tensor in trained.model.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DataError(f"{trained.path}: {name} holds weights that are too large for half precision")
    tensors[weights.MEAN] = trained.mean
    # Measure weights that were read from a file, and write OUTPUT only once, with its errors.
    with tempfile.TemporaryDirectory(dir=output.absolute().parent) as folder:
        weights.save(Path(folder) / output.name, tensors, metadata)
        written = open_trained(str(Path(folder) / output.name), device)
    rows = evaluate.measured(
        [written], [mean_image(written, data, device)], data, evaluate.EvaluateConfig((str(output),)), device
    )
    metadata["errors"] = [{name: row[name] for name in ("crops", *REPORTED)} for row in rows]
    weights.save(output, tensors, metadata)
    for row in rows:
        crops = "the central crop" if row["crops"] == 1 else f"{row['crops']} crops"
        print(f"top-1 error from {crops}: {row['top1_error_percent']:.2f} %")
    count, size = trained.network.parameters, output.stat().st_size
    print(f"{trained.path}: {trained.network.variant}, {count:,} parameters: {output} ({size / 2**20:,.2f} MiB)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(ExportConfig, "net.export", DESCRIPTION, arguments), ExportConfig)
    output = Path(config.output)
    check_writable("OUTPUT", config.output)
    pretrained.find(config.checkpoint)
    cli.check_exist(data_path=config.data_path)
    cli.load("model.export", "analysis.trained")

    import torch

    from .analysis.trained import open_trained
    from .common.device import choose, describe
    from .model import export

    device = choose(config.device)
    trained = open_trained(config.checkpoint, device)
    if config.format == "safetensors":
        _write_weights(trained, output, config, device)
        return 0
    metadata = {
        "network": trained.network.to_dict(),
        "classes": trained.classes,
        "data_path": trained.data_path,
        "pixels": "RGB, 0..255, less the training images' mean image",
        "mean_rgb": None if trained.mean is None else [round(value, 4) for value in trained.mean.mean((0, 1)).tolist()],
    }
    if config.format == "aoti":
        print(f"compiling for {describe(device)}, about a minute", flush=True)
    write = {
        "onnx": export.onnx_bytes,
        "torch-export": export.torch_export_bytes,
        "aoti": export.aoti_bytes,
    }[config.format]
    # torch.export warns about other memory formats.
    content = write(trained.model.to(memory_format=torch.contiguous_format), metadata)  # type: ignore[call-overload]
    with atomic_write(output) as file:
        file.write(content)
    network = trained.network
    print(
        f"{trained.path}: {network.variant}, {network.parameters:,} parameters, as {config.format}: {output} "
        f"({len(content) / 2**20:,.1f} MiB)"
    )
    if config.format == "aoti":
        size = network.image_size
        print(
            f"It takes contiguous float32 images [N, {network.image_channels}, {size}, {size}] and by default does not "
            "check them: others give wrong logits. AOTI_RUNTIME_CHECK_INPUTS=1 in the environment turns the check on."
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
