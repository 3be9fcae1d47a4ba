"""A model of a training step on many devices: compute from records, messages by formula, assumed links.

``reports/parallelism.md`` compares it with measurements.
"""

import math
from dataclasses import dataclass

from net.model.config import VARIANTS, AlexNetConfig

from .messages import Message, expected

#: Fraction of a step's compute that can hide the all-reduce of gradients: the backward pass, two of three products.
BACKWARD = 2 / 3
#: Rounds of messages of a collective in which the number of ranks reached doubles in each round.
ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


PAPER = VARIANTS["paper"]
#: Images per device when the batch size grows with the number of devices: the paper's batch size, as in 2014.
IMAGES = 128
STRATEGIES = ("data", "tower", "hybrid")


@dataclass(frozen=True)
class Link:
    """A link between devices: bytes per second in each direction, latency in seconds, and the source of both."""

    name: str
    bytes_per_s: float
    latency_s: float
    source: str


#: Seconds per round between today's GPUs, including the launch: an assumption, of the order seen in NCCL's own tests.
LATENCY = 10e-6
PCIE_2012 = Link("PCIe 2 x16 (2012)", 6.0e9, LATENCY, "NVIDIA's CUDA questions and answers: up to 6.0 GB/s measured")
LINKS = (
    PCIE_2012,
    Link("PCIe 5 x16", 54.3e9, LATENCY, "github.com/lukealonso/p2pmark: 54.3 GB/s of 63"),
    Link("NVLink 4", 450e9, LATENCY, "NVIDIA's data sheet: 900 GB/s, both directions"),
    Link("400 Gb/s network", 50e9, LATENCY, "its rate"),
)


@dataclass(frozen=True)
class Prediction:
    """Seconds per step: compute, exposed communication and overlapped communication."""

    compute_s: float
    exposed_s: float
    hidden_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.exposed_s


def message_seconds(message: Message, link: Link) -> float:
    """Latency of its rounds, and its bytes over the link."""
    if message.ranks == 1:
        return 0.0
    return ROUNDS[message.kind] * math.ceil(math.log2(message.ranks)) * link.latency_s + message.sent / link.bytes_per_s


def predict(
    config: AlexNetConfig,
    strategy: str,
    ranks: int,
    batch: int,
    seconds_per_image: float,
    link: Link,
    *,
    width: int = 4,
    overlap: bool = True,
) -> Prediction:
    """A step of ``batch`` images in total.

    Args:
        config: the network.
        strategy: ``none``, ``data``, ``tower`` or ``hybrid``.
        ranks: world size.
        batch: global batch size.
        seconds_per_image: compute of one device for forward, backward and update; ranks share it evenly.
        link: between any two ranks.
        width: bytes of an activation in a message; gradients have four.
        overlap: the all-reduce of gradients overlaps the backward pass.
    """
    compute = batch * seconds_per_image / ranks
    if ranks == 1:
        return Prediction(compute, 0.0, 0.0)
    messages = expected(config, strategy, ranks, batch, width)
    averaged = sum(message_seconds(each, link) for each in messages if each.what == "gradients")
    exchanged = sum(message_seconds(each, link) for each in messages if each.what != "gradients")
    hidden = min(averaged, BACKWARD * compute) if overlap else 0.0
    return Prediction(compute, exchanged + averaged - hidden, hidden)


def scaled_seconds(strategy: str, ranks: int, seconds_per_image: float, link: Link, width: int) -> float:
    """An update of the paper's network with :data:`IMAGES` on each of ``ranks`` devices; see :func:`predict`."""
    return predict(PAPER, strategy, ranks, IMAGES * ranks, seconds_per_image, link, width=width).seconds


def gtx_580_seconds_per_multiply_add() -> float:
    """From the paper: 90 epochs of 1.2 million images in 5 to 6 days on two GTX 580, minus messages over PCIe 2."""
    images_per_s = 90 * 1.2e6 / (5.5 * 86400)
    paper = PAPER
    exchange = predict(paper, "tower", 2, 128, 0.0, PCIE_2012).exposed_s
    return (128 / images_per_s - exchange) / (128 * paper.multiply_adds / 2)


def published() -> list[dict[str, object]]:
    """The model against published figures; see :func:`gtx_580_seconds_per_multiply_add` for the first.

    The two-GPU net of 2012 "takes slightly less time to train" than the one-GPU net (section 3.2). Speedups are from
    Krizhevsky 2014, on K20s with 128 images per GPU; 98.05 hours for 90 epochs on one.
    """
    per_multiply_add = gtx_580_seconds_per_multiply_add()
    two = 128 * PAPER.multiply_adds / 2 * per_multiply_add
    two += predict(PAPER, "tower", 2, 128, 0.0, PCIE_2012).exposed_s
    one = 128 * VARIANTS["half"].multiply_adds * per_multiply_add
    rows: list[dict[str, object]] = [
        {
            "check": "two-GPU net's time / one-GPU net's, GTX 580",
            "published": "slightly less than 1",
            "model": round(two / one, 3),
        }
    ]
    seconds_per_image = 98.05 * 3600 / (90 * 1.2e6)
    config = VARIANTS["one_weird_trick"]
    for ranks, speed_up in ((2, 1.95), (4, 3.74), (8, 6.25)):
        alone = predict(config, "none", 1, 128, seconds_per_image, PCIE_2012).seconds
        together = predict(config, "hybrid", ranks, 128 * ranks, seconds_per_image, PCIE_2012).seconds
        found = ranks * alone / together
        rows.append(
            {
                "check": f"speedup of the hybrid on {ranks} K20",
                "published": speed_up,
                "model": round(found, 2),
                "error_percent": round(100 * (found / speed_up - 1), 1),
            }
        )
    return rows
