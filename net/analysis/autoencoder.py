"""An auto-encoder from feature vectors to short binary codes and back (section 6.1)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common import seeds

#: Vectors per update.
BATCH = 128
RATE = 1e-3


class CodeAutoEncoder(nn.Module):
    """An auto-encoder with one hidden layer before and one after the code.

    A bit is the sign of a batch-normalized value, which balances it: it is one for half of the vectors. Training
    decodes the binary code itself; its gradient is that of tanh (a straight-through estimator).

    Args:
        features: size of a vector.
        bits: size of a code.
        mean, scale: subtracted from a vector, ``[features]``, and divided by; a single scale for all features preserves
            Euclidean neighbours.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, bits: int, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        hidden = max(features // 2, 2 * bits)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.encoder = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, bits), nn.BatchNorm1d(bits, affine=False)
        )
        self.decoder = nn.Sequential(nn.Linear(bits, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def normalized(self, vectors: Tensor) -> Tensor:
        """Normalized vectors, which are encoded and reconstructed."""
        return (vectors - self.mean) / self.scale

    def bits(self, vectors: Tensor) -> Tensor:
        """The codes of vectors ``[N, features]``: bool ``[N, bits]``. Call ``eval()`` first."""
        with torch.no_grad():
            return torch.cat([self.encoder(self.normalized(part)) > 0 for part in vectors.split(4096)])

    def forward(self, vectors: Tensor) -> Tensor:
        """Reconstruct the normalized vectors ``[N, features]`` from their codes; differentiable."""
        soft = torch.tanh(self.encoder(self.normalized(vectors)))
        hard = torch.where(soft > 0, 1.0, -1.0)
        decoded: Tensor = self.decoder(soft + (hard - soft).detach())
        return decoded


def learn(
    vectors: Tensor, bits: int, *, epochs: int, seed: int, progress: Callable[[int], None] = lambda count: None
) -> tuple[CodeAutoEncoder, float]:
    """Train an auto-encoder on vectors with Adam and a squared error.

    Args:
        vectors: float32 ``[N, features]``, at least two of them.
        bits: size of a code.
        epochs: passes over the vectors.
        seed: of weights and order; seeds PyTorch's default generator.
        progress: called after each update with its number of vectors.

    Returns:
        The auto-encoder in evaluation mode, and the fraction of the vectors' variance that the reconstruction missed in
        the last epoch.
    """
    seeds.weights(seed)
    mean = vectors.mean(0)
    scale = (vectors - mean).square().mean().sqrt().clamp_min(1e-12)
    model = CodeAutoEncoder(vectors.shape[1], bits, mean, scale).to(vectors.device)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    error = torch.zeros((), device=vectors.device)
    for _ in range(epochs):
        error.zero_()
        order = torch.randperm(len(vectors)).to(vectors.device)
        # Batches of nearly equal size: batch normalization needs more than one vector.
        for part in order.tensor_split(max(1, len(order) // BATCH)):
            batch = vectors[part]
            loss = F.mse_loss(model(batch), model.normalized(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            error += loss.detach() * len(batch) / len(vectors)
            progress(len(batch))
    return model.eval(), float(error)
