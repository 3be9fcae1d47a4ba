"""Binary codes of features: what the auto-encoder preserves, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from net.analysis.autoencoder import learn
from net.analysis.retrieval import nearest, nearest_codes, packed, recall
from tests.commands import one_line, run_here


def clusters(count: int, seed: int) -> torch.Tensor:
    """Vectors around 20 centres on a plane of 6 of their 40 dimensions."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(20, 6, generator=generator) @ torch.randn(6, 40, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    noise = 0.3 * torch.randn(count, 6, generator=generator) @ torch.randn(6, 40, generator=generator)
    return 50 + 10 * (centres[torch.randint(0, 20, (count,), generator=generator)] + noise)


def test_codes_keep_neighbours() -> None:
    vectors, queries = clusters(500, 0), clusters(60, 1)
    losses = [learn(vectors, 64, epochs=epochs, seed=0)[1] for epochs in (1, 15)]
    assert losses[1] < 0.6 * losses[0]
    model, _ = learn(vectors, 64, epochs=15, seed=0)
    bits = model.bits(vectors)
    assert (bits.dtype, bits.shape) == (torch.bool, (500, 64))
    assert bits.float().mean(0).sub(0.5).abs().max() < 0.3, "each bit is balanced"
    _, exact = nearest(queries, [vectors], 10)
    found = nearest_codes(packed(model.bits(queries)), packed(bits), 50)
    assert recall(found, exact.numpy()) > 0.6, "chance is 0.1"
    again, _ = learn(vectors, 64, epochs=15, seed=0)
    assert torch.equal(again.bits(vectors), bits)


def test_what_is_decoded_is_the_code() -> None:
    """With the straight-through estimator the decoder must still see only bits."""
    model, _ = learn(clusters(50, 0), 64, epochs=1, seed=0)
    vectors = clusters(9, 3)
    with torch.no_grad():
        expected = model.decoder(model.bits(vectors).float() * 2 - 1)
        assert torch.allclose(model(vectors), expected, atol=1e-5)


def test_the_command(shapes_run: Path) -> None:
    done = run_here("net.hashing", shapes_run, "--epochs", 3, "--bits", 128, "--queries", 40)
    assert done.returncode == 0, done.stderr
    result = json.loads((shapes_run / "hashing.json").read_text())
    assert (result["training_images"], result["queries"], result["features"], result["bits"]) == (144, 40, 256, 128)
    assert result["bytes_per_image"] == {"features": 1024, "code": 16}
    assert "(synthetic shapes)" in result["data"]
    assert result["chance"]["recall_at_100"] == pytest.approx(100 / 144)
    for name in ("autoencoder", "random_hyperplanes"):
        near, far = (result[name][f"recall_at_{count}"] for count in (10, 100))
        assert 10 / 144 < near < far <= 1
    assert min(result["queries_per_s"].values()) > 0
    assert "128 bits: 16 bytes per image instead of 1,024" in done.stdout
    assert np.isfinite(result["variance_missed"])


def test_what_cannot_be_hashed_costs_one_line(shapes_run: Path, tmp_path: Path) -> None:
    for status, says, *arguments in (
        (2, "--bits must be a multiple of 64; got 30", shapes_run, "--bits", 30),
        (2, "--queries must be at least 1; got 0", shapes_run, "--queries", 0),
        (1, "nowhere does not exist", tmp_path / "nowhere"),
        (1, "the classes of synthetic:200 differ", shapes_run, "--data-path", "synthetic:200"),
    ):
        one_line(run_here("net.hashing", *arguments), status, says)
