"""All random streams, derived from a seed in one place so that no two coincide by accident.

numpy's :class:`~numpy.random.SeedSequence` hashes all its entries and pads with zeros. The streams of a run therefore
differ in their last entry: 0 (omitted), 1, 2. Commands that draw a sample, and the synthetic images, have seeds of
their own and belong to no run. Which images are held out is drawn once for all runs, by the stream that is also the
order of the first epoch under seed 2012; published errors are of these images, so that stays.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def order(seed: int, epoch: int) -> np.random.Generator:
    """The order of the training images in an epoch."""
    return np.random.default_rng([seed, epoch])


def augmentation(seed: int, epoch: int) -> np.random.Generator:
    """Crops, reflections and colour noise of an epoch, for every image of the data set."""
    return np.random.default_rng([seed, epoch, 1])


def dropout(seed: int, step: int, rank: int) -> int:
    """The seed of a rank's dropout from update ``step`` on, where it does not continue the weights' stream."""
    return int(np.random.SeedSequence([seed, step, rank, 2]).generate_state(1, np.uint64)[0])


def weights(seed: int) -> None:
    """Seed PyTorch's default generators: initial weights and, after them, dropout of a single-process run."""
    import torch

    torch.manual_seed(seed)


def held_out() -> np.random.Generator:
    """Which training images are held out: the same for every seed, so that their trainings can be compared."""
    return np.random.default_rng(2012)


def sample(seed: int) -> np.random.Generator:
    """Which validation images a command draws or uses as queries."""
    return np.random.default_rng(seed)


def planes(seed: int) -> "torch.Generator":
    """Random projections of features."""
    import torch

    return torch.Generator().manual_seed(seed)


def shape(*numbers: int) -> np.random.Generator:
    """A synthetic shape, from the seed, its split, its index and its class."""
    return np.random.default_rng(numbers)


def noise() -> np.random.Generator:
    """Images of random bytes, always the same ones."""
    return np.random.default_rng(0)
