"""Forms: alternative implementations of a network's layers, which differ in speed, and in results only by rounding."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from .alexnet import AlexNet, Convolution, Stage


@dataclass(frozen=True)
class Forms:
    """The form of each part of the network that has more than one.

    Attributes:
        first: the first convolution reads ``pixels``, or ``blocks`` of them as channels (:mod:`net.model.blocks`).
        shared: towers with the same input are separate convolutions (``apart``), or one (``together``).
        towers: convolutions of different towers run sequentially (``in turn``), or concurrently on streams of their own
            (``at once``).
    """

    first: Literal["pixels", "blocks"] = "pixels"
    shared: Literal["apart", "together"] = "apart"
    towers: Literal["in turn", "at once"] = "in turn"

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


def forms(model: AlexNet, device: torch.device) -> Iterator[Forms]:
    """All distinct forms of ``model`` on ``device``."""
    convolutions = [module for module in model.modules() if isinstance(module, Convolution)]
    strided = any(module.reads == "image" and module.stride > 1 for module in convolutions)
    several = model.config.towers > 1
    slots: tuple[tuple[str, ...], ...] = (
        ("pixels", "blocks") if strided else ("pixels",),
        ("apart", "together") if several else ("apart",),
        ("in turn", "at once") if several and device.type == "cuda" else ("in turn",),
    )
    for choice in itertools.product(*slots):
        yield Forms(*choice)  # type: ignore[arg-type]


def untuned(model: AlexNet, device: torch.device) -> Forms:
    """Default forms for this type of device if nothing has been measured: on GPUs those fastest on an H100."""
    available = set(forms(model, device))
    for choice in (Forms("blocks", "together"), Forms("blocks"), Forms("pixels", "together")):
        if device.type == "cuda" and choice in available:
            return choice
    return Forms()


def use(model: AlexNet, chosen: Forms) -> None:
    """Switch ``model``, a whole network on one device, to these forms. Its parameters do not change."""
    towers = model.config.towers
    streams = None
    if chosen.towers == "at once" and towers > 1:
        streams = tuple(torch.cuda.Stream() for _ in range(towers - 1))
    reads = [None if name is None else model.get_submodule(name).reads for name, _ in model.trunk]
    for number, (convolution, stage) in enumerate(model.trunk):
        together = False
        if convolution is not None:
            module = model.get_submodule(convolution)
            assert isinstance(module, Convolution)
            module.read_blocks(chosen.first == "blocks")
            module.together = together = chosen.shared == "together" and module.reads != "tower" and towers > 1
            module.streams = streams
        if stage is not None:
            following = model.get_submodule(stage)
            assert isinstance(following, Stage)
            following.joint = towers if together else 1
            # What reads its own tower would copy it from a joint tensor, and copy the gradients back.
            apart = "tower" in reads[number + 1 : number + 2]
            following.split = together and apart and following.splits and not following.across_towers
            following.lrn["groups"] = 1 if following.across_towers or following.split else following.joint
