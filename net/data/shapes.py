"""Synthetic images to learn from: ``python -m net.data.shapes DIR``; ``--help`` lists the flags."""

import os
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from ..common import cli
from ..common.errors import DataError
from ..common.files import PARTIAL
from .config import SHAPES, ShapesConfig

DESCRIPTION = (
    f"Render an image folder (train/CLASS/*.jpg, val/CLASS/*.jpg) of {len(SHAPES)} classes of shapes on textured "
    "backgrounds. Colour, texture and shape are all needed to tell the classes apart. The images are synthetic: what "
    "is measured on them says nothing of photographs."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(ShapesConfig, "net.data.shapes", DESCRIPTION, arguments), ShapesConfig)
    folder = Path(config.folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there already; give an empty or a new folder")
    cli.load("data.rendering")
    from .rendering import write_folder

    cli.end_in_order()
    began = time.monotonic()
    # Render under another name, so that the folder is either complete or absent.
    partial = folder.with_name(f"{folder.name}.{os.getpid()}{PARTIAL}")
    partial.mkdir(parents=True)
    try:
        write_folder(partial, config)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    count = len(SHAPES) * (config.train + config.val)
    seconds = time.monotonic() - began
    print(f"rendered {count:,} synthetic images of {len(SHAPES)} classes into {folder}, {count / seconds:,.0f}/s")
    print(f"next: python -m net.train --data-path {shlex.quote(str(folder))} --network digits --image-size 32")
    return 0


if __name__ == "__main__":
    cli.run(main)
