"""Nearest neighbours against a loop over all distances."""

import numpy as np
import torch

from net.analysis.retrieval import nearest, nearest_codes, packed, recall


def test_nearest_by_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(7, 33, generator=generator)
    vectors = torch.randn(50, 33, generator=generator)
    distances, numbers = nearest(queries, vectors.split(4), 6)
    exact = np.sqrt(((queries.double().numpy()[:, None] - vectors.double().numpy()[None]) ** 2).sum(2))
    assert np.array_equal(numbers.numpy(), exact.argsort(1)[:, :6])
    assert np.allclose(distances.numpy(), np.sort(exact, 1)[:, :6], rtol=1e-5)


def test_a_vector_is_nearest_to_itself() -> None:
    vectors = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)) * 100
    distances, numbers = nearest(vectors, [vectors], 1)
    assert numbers[:, 0].tolist() == list(range(20))
    assert distances.max() < 0.5


def test_nearest_codes_with_ties_by_number() -> None:
    generator = torch.Generator().manual_seed(2)
    # 100 queries are more than one batch; two words per code, and few distinct codes, so that there are ties.
    bits = torch.rand(30, 128, generator=generator) < 0.5
    codes = bits[torch.randint(0, 30, (200,), generator=generator)]
    queries = bits[torch.randint(0, 30, (100,), generator=generator)] ^ (
        torch.rand(100, 128, generator=generator) < 0.1
    )
    assert packed(codes).shape == (200, 2)
    found = nearest_codes(packed(queries), packed(codes), 9)
    for query, row in zip(queries.numpy(), found, strict=True):
        distance = (query != codes.numpy()).sum(1)
        assert row.tolist() == np.lexsort((np.arange(200), distance))[:9].tolist()


def test_recall_by_hand() -> None:
    exact = np.array([[1, 2], [3, 4]])
    assert recall(np.array([[2, 9, 1], [5, 6, 7]]), exact) == 0.5
    assert recall(np.array([[1], [4]]), exact) == 0.5
