"""Every command behind one name: ``alexnet train ...`` is ``python -m net.train ...``."""

import importlib
import sys
from typing import NoReturn

from .common import cli

#: A module of this package, and what it does.
COMMANDS = {
    "train": "train the network",
    "evaluate": "errors on validation images, of one network or several",
    "predict": "the most probable classes of image files",
    "prepare": "pack a folder of images for training",
    "figures": "the paper's figures from a trained network",
    "hashing": "binary codes for the features, and searches among them",
    "export": "a trained network for other programs",
    "ablations": "train without each part and compare",
    "tune": "measure the network's forms on this GPU",
    "data.shapes": "write synthetic images",
}


def _command() -> int | None:
    name, arguments = cli.subcommand("net", "The 2012 AlexNet. Each command has --help.", COMMANDS, None)
    status: int | None = importlib.import_module(f"{__package__}.{name}").main(arguments)
    return status


def main() -> NoReturn:
    """Run the command that ``sys.argv`` names, and exit."""
    cli.run(_command)


if __name__ == "__main__":
    sys.exit(main())
