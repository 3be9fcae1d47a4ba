"""Find the forms in which a network trains fastest on this GPU: ``python -m net.tune``; ``--help`` lists the flags."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .common import cli
from .common.errors import UsageError
from .common.fields import MOST_ROWS, at_least, at_most, flag, flag_name
from .model.config import VARIANTS
from .training.config import TrainConfig

DESCRIPTION = (
    "Time a network's training step in each of its forms, and cache the fastest for net.train. Long runs do this "
    "automatically before their first step."
)


@dataclass(frozen=True)
class TuneConfig:
    """The flags of ``python -m net.tune``."""

    network: Literal[tuple(VARIANTS)] = flag("paper", "architecture")  # type: ignore[valid-type]
    architecture: dict[str, Any] = flag({}, "as in net.train", key_values=True)
    image_size: int | None = flag(None, "as in net.train", metavar="N")
    batch_size: int = flag(128, "images per update", short="b")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = flag("auto", "as in net.train")
    device: str | None = flag(None, "cuda, cuda:1, ...; the first GPU by default")

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "image_size", called=flag_name)
        at_most(self, MOST_ROWS, "image_size", called=flag_name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(TuneConfig, "net.tune", DESCRIPTION, arguments), TuneConfig)
    from .common.device import choose, is_gpu, repeat_bits, resolve_precision, set_precision
    from .training.setup import architecture
    from .training.tuning import tuned

    device = choose(config.device)
    if not is_gpu(device):
        raise UsageError("--device must be cuda or cuda:N; on a CPU there is nothing to tune")
    if importlib.util.find_spec("triton") is None:
        raise UsageError("net.tune needs Triton, which is not installed here; net.train runs without it")
    precision = resolve_precision(config.precision, device)
    set_precision(precision, device)
    # As in net.train.
    repeat_bits()
    run = TrainConfig(network=config.network, architecture=config.architecture, image_size=config.image_size)
    tuned(architecture(run), config.batch_size, precision, device, "again")
    return 0


if __name__ == "__main__":
    cli.run(main)
