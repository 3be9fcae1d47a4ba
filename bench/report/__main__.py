"""``python -m bench.report``."""

from net import cli

from . import main

cli.run(main)
