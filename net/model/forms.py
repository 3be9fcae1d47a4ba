"""Forms: alternative implementations of a network's layers, which differ in speed, and in results only by rounding."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from ..common.device import is_gpu, streams
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
        ("in turn", "at once") if several and is_gpu(device) else ("in turn",),
    )
    for choice in itertools.product(*slots):
        yield Forms(*choice)  # type: ignore[arg-type]


def untuned(model: AlexNet, device: torch.device) -> Forms:
    """Default forms for this type of device if nothing has been measured: on GPUs those fastest on an H100."""
    available = set(forms(model, device))
    for choice in (Forms("blocks", "together"), Forms("blocks"), Forms("pixels", "together")):
        if is_gpu(device) and choice in available:
            return choice
    return Forms()


def use(model: AlexNet, chosen: Forms) -> None:
    """Switch ``model``, a whole network on one device, to these forms. Its parameters do not change."""
    towers = model.config.towers
    own = None
    if chosen.towers == "at once" and towers > 1:
        own = streams(towers - 1)
    # What the layer after each stage reads.
    following = [name for name, _ in model.trunk[1:]] + [dense.name for dense in model.config.hidden[:1]]
    reads = [None if name is None else model.get_submodule(name).reads for name in following] + ["all"]
    # Whether the towers are one tensor at this point.
    joint = False
    for number, (convolution, stage) in enumerate(model.trunk):
        if convolution is not None:
            module = model.get_submodule(convolution)
            assert isinstance(module, Convolution)
            module.read_blocks(chosen.first == "blocks")
            module.together = joint = chosen.shared == "together" and module.reads != "tower" and towers > 1
            module.streams = own
        if stage is not None:
            module = model.get_submodule(stage)
            assert isinstance(module, Stage)
            module.joined = reads[number] == "all"
            # Towers that are one tensor before and after the stage need one launch and no special operator.
            several = convolution is not None and module.one_operator and not (joint and module.joined)
            module.towers = towers if several else 1
            module.lrn["groups"] = towers if joint and not several and not module.across_towers else 1
            joint = module.joined if several else joint or module.across_towers
