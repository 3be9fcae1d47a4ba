"""Find the forms in which a network trains fastest on this GPU: ``python -m net.tune``; ``--help`` lists the flags."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .common import cli
from .common.errors import UsageError
from .common.fields import at_least, flag, flag_name
from .model.config import VARIANTS, network

DESCRIPTION = (
    "Time a network's training step in each of its forms, and cache the fastest for net.train. Long runs do this "
    "automatically before their first step."
)


@dataclass(frozen=True)
class TuneConfig:
    """The flags of ``python -m net.tune``."""

    network: Literal[tuple(VARIANTS)] = flag("paper", "architecture")  # type: ignore[valid-type]
    batch_size: int = flag(128, "images per update", short="b")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = flag("auto", "as in net.train")
    device: str | None = flag(None, "cuda, cuda:1, ...; the first GPU by default")

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", called=flag_name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(TuneConfig, "net.tune", DESCRIPTION, arguments), TuneConfig)
    from .common.device import choose, resolve_precision, set_precision
    from .training.tuning import tuned

    device = choose(config.device)
    if device.type != "cuda":
        raise UsageError("--device must be cuda or cuda:N; on a CPU there is nothing to tune")
    precision = resolve_precision(config.precision, device)
    set_precision(precision, device)
    tuned(network(config.network), config.batch_size, precision, device, "again", True)
    return 0


if __name__ == "__main__":
    cli.run(main)
