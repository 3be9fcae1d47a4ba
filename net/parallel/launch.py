"""Which of a run's processes this is, as torchrun says, and whether a strategy can use so many. Without torch."""

import os
from dataclasses import dataclass

from ..common.errors import UsageError
from ..training.config import TrainConfig


@dataclass(frozen=True)
class Launch:
    """This process among those of the run, and among those of the run on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def batch_parts(strategy: str, ranks: int) -> int:
    """How many slices a global batch is cut into."""
    return {"none": 1, "tower": ranks // 2}.get(strategy, ranks)


def launched(config: TrainConfig) -> Launch:
    """The processes that torchrun started.

    Raises:
        UsageError: there are several without a strategy, a strategy without torchrun, or a number of processes that
            the strategy or the batch size cannot use.
    """
    strategy = config.parallel
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if strategy == "none":
        if ranks > 1:
            raise UsageError(
                f"--parallel none runs in one process and torchrun started {ranks}: give --parallel data, tower or "
                "hybrid, or start it without torchrun"
            )
        return Launch()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UsageError(
            f"--parallel {strategy} needs processes that torchrun starts: torchrun --standalone --nproc-per-node=2 "
            f"-m net.train --parallel {strategy} ..."
        )
    if strategy == "tower" and ranks % 2:
        raise UsageError(
            f"--parallel tower: torchrun started {_processes(ranks)}; it takes 2, one for each tower, or a multiple of "
            "2. data and hybrid take any number"
        )
    if config.batch_size % batch_parts(strategy, ranks):
        least = 2 if strategy == "tower" else 1
        possible = [
            number
            for number in range(least, 2 * ranks + 1, least)
            if config.batch_size % batch_parts(strategy, number) == 0
        ]
        raise UsageError(
            f"--batch-size {config.batch_size} cannot be shared equally by {_processes(ranks)} of --parallel "
            f"{strategy}; it can by {', '.join(map(str, possible))}"
        )
    local = {name: int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))}
    return Launch(int(os.environ["RANK"]), ranks, local["LOCAL_RANK"], local["LOCAL_WORLD_SIZE"])


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
