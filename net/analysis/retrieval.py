"""Nearest neighbours by Euclidean distance, and of binary codes by Hamming distance (section 6.1)."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Queries per batch; their distances to all codes are held in memory.
_QUERIES = 64


def nearest(queries: Tensor, batches: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The vectors nearest to each query by Euclidean distance, nearest first.

    Args:
        queries: float ``[Q, features]``.
        batches: the vectors to search, in batches ``[n, features]``, so that they need not fit into memory.
        count: neighbours per query; at most the number of vectors.

    Returns:
        Distances, float ``[Q, count]``, and indices of the vectors, int64 ``[Q, count]``.
    """
    own = queries.square().sum(1, keepdim=True)
    squares = queries.new_empty(len(queries), 0)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    first = 0
    for batch in batches:
        new = torch.addmm(own + batch.square().sum(1), queries, batch.T, alpha=-2).clamp_min(0)
        number = torch.arange(first, first + len(batch), device=queries.device).expand(len(queries), -1)
        first += len(batch)
        squares, numbers = torch.cat([squares, new], 1), torch.cat([numbers, number], 1)
        squares, kept = squares.topk(min(count, squares.shape[1]), largest=False)
        numbers = numbers.gather(1, kept)
    return squares.sqrt(), numbers


def packed(bits: Tensor) -> NDArray[np.uint64]:
    """Pack codes into 64-bit words: bool ``[N, bits]``, a multiple of 64, to uint64 ``[N, bits / 64]``."""
    return np.packbits(bits.cpu().numpy(), axis=1).view(np.uint64)


def nearest_codes(queries: NDArray[np.uint64], codes: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """The codes nearest to each query by Hamming distance, nearest first; ties go to the lower index.

    Args:
        queries, codes: uint64 ``[Q, words]`` and ``[N, words]``, see :func:`packed`.
        count: neighbours per query; at most N.

    Returns:
        Indices of the codes, int64 ``[Q, count]``.
    """
    found = np.empty((len(queries), count), np.int64)
    numbers = np.arange(len(codes), dtype=np.int64)
    for first in range(0, len(queries), _QUERIES):
        part = queries[first : first + _QUERIES]
        keys = np.zeros((len(part), len(codes)), np.int64)
        for word in range(codes.shape[1]):
            keys += np.bitwise_count(part[:, word, None] ^ codes[None, :, word])
        # Distance and index in one integer, so that the partition breaks ties by index.
        keys *= len(codes)
        keys += numbers
        nearest_keys = np.sort(np.partition(keys, count - 1, axis=1)[:, :count], axis=1)
        found[first : first + _QUERIES] = nearest_keys % len(codes)
    return found


def recall(found: NDArray[np.int64], exact: NDArray[np.int64]) -> float:
    """The mean fraction of each query's exact neighbours ``[Q, k]`` that are among the found ones ``[Q, m]``."""
    return float((found[:, :, None] == exact[:, None, :]).any(1).mean())
