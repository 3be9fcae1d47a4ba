"""Pack an image folder: ``python -m net.prepare SOURCE TARGET``; ``--help`` lists the flags."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .common import cli
from .common.errors import UsageError
from .common.fields import MOST_ROWS, MOST_WORKERS, at_least, at_most, flag, flag_name
from .data.config import JPEG_QUALITY

DESCRIPTION = (
    "Decode, scale and crop the images of SOURCE into TARGET, from which training reads. After an "
    "interruption, the same command continues."
)


@dataclass(frozen=True)
class PrepareConfig:
    """The flags of ``python -m net.prepare``."""

    source: str = flag(
        "",
        "image folder, or a .tar or .zip of one: train/CLASS/*, val/CLASS/* (or val/* with --val-labels)",
        positional=True,
    )
    target: str | None = flag(None, "folder of the packed store", positional=True, optional_value=None)
    size: int = flag(256, "rows and columns of a packed image")
    format: Literal["pixels", "jpeg"] = flag(
        "pixels", "how images are stored: pixels read faster, JPEG takes a tenth of the space"
    )
    quality: int | None = flag(None, f"JPEG quality, 1 to 100 ({JPEG_QUALITY})")
    val_labels: str | None = flag(
        None,
        "label file of a flat val folder: lines of 'FILE CLASS' or a table with such columns, ImageNet's "
        "LOC_val_solution.csv, or one class per line in the order of the file names",
        metavar="FILE",
    )
    workers: int | None = flag(None, "processes; one per core by default", short="j")
    verify: bool = flag(False, "compare every byte of the finished store SOURCE with its checksums, and stop")

    def __post_init__(self) -> None:
        at_least(self, 1, "size", "quality", "workers", called=flag_name)
        at_most(self, 100, "quality", called=flag_name)
        at_most(self, MOST_WORKERS, "workers", called=flag_name)
        at_most(self, MOST_ROWS, "size", called=flag_name)
        if self.quality is not None and self.format != "jpeg":
            raise UsageError("--quality goes with --format jpeg")
        if (self.target is None) != self.verify:
            raise UsageError("give SOURCE and TARGET, or --verify and a store")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(PrepareConfig, "net.prepare", DESCRIPTION, arguments), PrepareConfig)
    cli.check_exist(positional=config.source, val_labels=config.val_labels)
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
