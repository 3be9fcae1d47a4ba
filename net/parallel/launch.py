"""This process's rank and the world size, from torchrun's environment, checked for the strategy. Free of torch."""

import os
from dataclasses import dataclass

from ..common.errors import UsageError
from ..training.config import TrainConfig


@dataclass(frozen=True)
class Launch:
    """This process's rank and world size, of the whole run and on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def batch_parts(strategy: str, ranks: int) -> int:
    """Number of slices of a global batch."""
    return {"none": 1, "tower": ranks // 2}.get(strategy, ranks)


def launched(config: TrainConfig) -> Launch:
    """Read torchrun's environment.

    Raises:
        UsageError: several processes without a strategy, a strategy without torchrun, or a world size that does not fit
            the strategy or the batch size.
    """
    strategy = config.parallel
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if strategy == "none":
        if ranks > 1:
            raise UsageError(
                f"--parallel none runs in one process, but torchrun started {ranks}: use --parallel data, tower or "
                "hybrid, or run without torchrun"
            )
        return Launch()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UsageError(
            f"--parallel {strategy} needs torchrun: torchrun --standalone --nproc-per-node=2 -m net.train "
            f"--parallel {strategy} ..."
        )
    if strategy == "tower" and ranks % 2:
        raise UsageError(
            f"--parallel tower needs 2 processes, one for each tower, or a multiple of 2; torchrun started "
            f"{_processes(ranks)}. data and hybrid take any number"
        )
    if config.batch_size % batch_parts(strategy, ranks):
        least = 2 if strategy == "tower" else 1
        possible = [
            number
            for number in range(least, 2 * ranks + 1, least)
            if config.batch_size % batch_parts(strategy, number) == 0
        ]
        raise UsageError(
            f"--batch-size {config.batch_size} cannot be split equally among {_processes(ranks)} of --parallel "
            f"{strategy}; possible numbers of processes: {', '.join(map(str, possible))}"
        )
    local = {name: int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))}
    return Launch(int(os.environ["RANK"]), ranks, local["LOCAL_RANK"], local["LOCAL_WORLD_SIZE"])


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
