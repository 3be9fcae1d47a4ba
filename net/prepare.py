"""Pack an image folder: ``python -m net.prepare SOURCE TARGET``; ``--help`` lists the flags."""

from collections.abc import Sequence
from pathlib import Path

from . import cli
from .config import JPEG_QUALITY, PrepareConfig

DESCRIPTION = (
    "Decode, scale and crop the images of SOURCE into TARGET, from which training reads. An interrupted run goes on "
    "where it stopped when the same command is given again."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare as the command line says; returns the exit status."""
    config = cli.resolve(cli.given(PrepareConfig, "net.prepare", DESCRIPTION, arguments), PrepareConfig)
    cli.check_exist(positional=config.source, val_labels=config.val_labels)
    if not config.verify:
        from .data import processes

        # What the worker processes come from imports PyTorch, too, and does so meanwhile.
        processes.context("net.data.prepare")
    cli.load("data.prepare")
    from .data.prepare import prepare, verify

    cli.end_in_order()
    if config.verify:
        verify(Path(config.source))
        print(f"{config.source} is whole")
        return 0
    assert config.target is not None
    labels = None if config.val_labels is None else Path(config.val_labels)
    prepare(
        Path(config.source),
        Path(config.target),
        size=config.size,
        quality=(config.quality or JPEG_QUALITY) if config.format == "jpeg" else None,
        val_labels=labels,
        workers=config.workers,
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
