"""Measure in which forms a network trains fastest on this GPU: ``python -m net.tune``; ``--help`` lists the flags."""

from collections.abc import Sequence

from . import cli
from .config import TuneConfig, network
from .errors import UsageError

DESCRIPTION = (
    "Measure one update of a network in each form it has, and remember the fastest for net.train. Long runs do it by "
    "themselves before their first update."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as the command line says; returns the exit status."""
    config = cli.resolve(cli.given(TuneConfig, "net.tune", DESCRIPTION, arguments), TuneConfig)
    from .device import choose, resolve_precision, set_precision
    from .tuning import tuned

    device = choose(config.device)
    if device.type != "cuda":
        raise UsageError("net.tune measures on a GPU; on a CPU there is nothing to choose")
    precision = resolve_precision(config.precision, device)
    set_precision(precision, device)
    tuned(network(config.network), config.batch_size, precision, device, "again", True)
    return 0


if __name__ == "__main__":
    cli.run(main)
