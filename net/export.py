"""A trained network for other programs: ``python -m net.export CHECKPOINT OUTPUT``; ``--help`` lists the flags."""

from collections.abc import Sequence
from pathlib import Path

from . import cli
from .config import ExportConfig
from .files import atomic_write, check_writable

DESCRIPTION = (
    "Write a trained network as ONNX, as a torch.export program or as a package that AOTInductor compiled. It reads "
    "any number of images, float32, pixels in 0..255 less the training images' mean, RGB, and gives logits."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says; returns the exit status."""
    config = cli.resolve(cli.given(ExportConfig, "net.export", DESCRIPTION, arguments), ExportConfig)
    output = Path(config.output)
    check_writable("OUTPUT", config.output)
    cli.check_exist(positional=config.checkpoint)
    cli.load("interchange", "trained")

    import torch

    from . import interchange
    from .device import choose, describe
    from .trained import open_trained

    device = choose(config.device)
    trained = open_trained(config.checkpoint, device)
    metadata = {
        "network": trained.network.to_dict(),
        "classes": trained.classes,
        "data_path": trained.data_path,
        "pixels": "RGB, 0..255, less the training images' mean image",
        "mean_rgb": None if trained.mean is None else [round(value, 4) for value in trained.mean.mean((0, 1)).tolist()],
    }
    if config.format == "aoti":
        print(f"compiling for {describe(device)}, a minute or so", flush=True)
    write = {
        "onnx": interchange.onnx_bytes,
        "torch-export": interchange.torch_export_bytes,
        "aoti": interchange.aoti_bytes,
    }[config.format]
    # torch.export saves other memory formats with a warning.
    content = write(trained.model.to(memory_format=torch.contiguous_format), metadata)  # type: ignore[call-overload]
    with atomic_write(output) as file:
        file.write(content)
    network = trained.network
    print(
        f"{trained.path}: {network.variant}, {network.parameters:,} parameters, as {config.format}: {output} "
        f"({len(content) / 2**20:,.1f} MiB)"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
