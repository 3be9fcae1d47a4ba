"""Every command behind one name: ``alexnet train ...`` is ``python -m net.train ...``."""

import importlib
import sys
from typing import NoReturn

from .common import cli

#: Module of this package: one-line summary.
COMMANDS = {
    "train": "train the network",
    "evaluate": "top-1 and top-5 errors of one network or an ensemble",
    "predict": "classify image files",
    "prepare": "pack a folder of images for training",
    "figures": "draw the paper's figures from a trained network",
    "hashing": "binary codes of the features, and retrieval with them",
    "export": "write a trained network as ONNX, torch.export or AOTInductor",
    "ablations": "train with each component removed and compare",
    "tune": "find the fastest forms of a network on this GPU",
    "data.shapes": "write synthetic images",
}


def _command() -> int | None:
    name, arguments = cli.subcommand("net", "The 2012 AlexNet. Each command has --help.", COMMANDS, None)
    status: int | None = importlib.import_module(f"{__package__}.{name}").main(arguments)
    return status


def main() -> NoReturn:
    """Run the command named in ``sys.argv`` and exit."""
    cli.run(_command)


if __name__ == "__main__":
    sys.exit(main())
