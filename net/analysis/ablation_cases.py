"""The parts of the paper's network that :mod:`net.ablations` removes, one at a time."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.config import AlexNetConfig, Operation

#: Name of the complete network.
BASELINE = "baseline"


def _half(network: AlexNetConfig) -> dict[str, Any]:
    """The one-GPU net of section 3.2: half the channels, except in the last convolution, before the dense layers."""
    *others, last = network.convolutions
    halved = [dataclasses.replace(layer, channels=layer.channels // 2) for layer in others]
    return {"towers": 1, "convolutions": _tables([*halved, last])}


def _program_order(network: AlexNetConfig) -> dict[str, Any]:
    """Stage 1 normalizes and pools before its ReLU, and the last pooling comes before its ReLU (net 145 of 2012)."""
    order: dict[str, tuple[Operation, ...]] = {
        "conv1": ("lrn", "pool", "activation"),
        "conv5": ("pool", "activation"),
    }
    changed = [dataclasses.replace(layer, then=order.get(layer.name, layer.then)) for layer in network.convolutions]
    return {"convolutions": _tables(changed)}


def _tables(layers: Sequence[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(layer) for layer in layers]


@dataclass(frozen=True)
class Ablation:
    """The removal of one part.

    ``fields`` are the changed fields of the architecture, ``recipe`` those of the training. ``paper`` and ``program``
    are the changes of top-1 / top-5 error, in percentage points, from the paper and the notes of its 2012 program.
    """

    name: str
    title: str
    fields: Callable[[AlexNetConfig], Mapping[str, Any]] = lambda network: {}
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: str = ""
    program: str = ""


def _always(**fields: Any) -> Callable[[AlexNetConfig], Mapping[str, Any]]:
    return lambda network: fields


ABLATIONS = (
    Ablation("no_lrn", "no response normalization", _always(lrn=False), {}, "+1.4 / +1.2", "+1.37 / +1.15"),
    Ablation(
        "no_overlap", "pooling windows of 2", _always(overlapping_pooling=False), {}, "+0.4 / +0.3", "+0.39 / +0.30"
    ),
    Ablation("no_dropout", "no dropout", _always(dropout=0.0)),
    Ablation("no_colour", "no colour noise", recipe={"colour_noise": 0.0}, paper="more than +1 / -"),
    Ablation("no_crops", "no random crops", recipe={"crop": False}),
    Ablation("half", "the half net", _half, {}, "+1.7 / +1.2", "+1.70 / +1.23"),
    Ablation("one_tower", "one tower, all maps connected", _always(towers=1)),
    Ablation("no_exchange", "no exchange between the towers", _always(exchange=False), program="+1.16 / +1.12"),
    Ablation("tanh", "tanh in place of ReLU", _always(activation="tanh"), paper="slower: Figure 1"),
    *(
        Ablation(
            f"without_conv{number}",
            f"without convolution {number}",
            _always(without=[f"conv{number}"]),
            # Section 7 states this for the middle layers.
            paper="about +2 / -" if number in (2, 3, 4) else "",
        )
        for number in range(1, 6)
    ),
    Ablation("program_order", "the 2012 program's order of operations", _program_order),
)
