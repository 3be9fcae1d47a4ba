"""``python -m bench.report``."""

from net.common import cli

from . import main

cli.run(main)
