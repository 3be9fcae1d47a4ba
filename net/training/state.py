"""The content of a checkpoint: saved from a trainer and restored into one. Always in the one-device layout."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common import seeds
from ..common.device import random_state, set_random_state
from ..common.errors import DataError
from ..common.printing import printable
from .evaluation import Errors

if TYPE_CHECKING:
    from .trainer import Trainer


def metadata(trainer: "Trainer") -> dict[str, Any]:
    """The network's metadata in checkpoints and weight files."""
    return {
        "network": trainer.plan.to_dict(),
        "classes": list(trainer.data.classes),
        "data_path": trainer.data.path,
        "decoder": trainer.data.decoder,
        "step": trainer.step,
        "precision": trainer.config.precision,
        "pixels": "RGB, 0..255, less the training images' mean image",
    }


def whole_parameters(trainer: "Trainer") -> dict[str, Tensor]:
    """The network's parameters in the one-device layout; a collective."""
    return {name: trainer.part.whole(name, tensor) for name, tensor in trainer.model.state_dict().items()}


def take(trainer: "Trainer") -> dict[str, Any]:
    """The content of a checkpoint; a collective."""
    optimizer = trainer.optimizer.state_dict()
    optimizer["state"] = {
        index: {
            key: trainer.part.whole(name, value) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
        for (index, values), name in zip(optimizer["state"].items(), _names(trainer), strict=True)
    }
    mine = {kind: None if state is None else state.tolist() for kind, state in random_state(trainer.device).items()}
    random = [
        {kind: None if state is None else torch.tensor(state, dtype=torch.uint8) for kind, state in each.items()}
        for each in trainer.world.gathered(mine)
    ]
    return {
        "metadata": metadata(trainer),
        "parallel": _parallel(trainer),
        "forms": asdict(trainer.forms),
        "mean_image": torch.from_numpy(trainer.data.mean),
        "model": whole_parameters(trainer),
        "optimizer": optimizer,
        "schedule": trainer.schedule.state_dict(),
        "loader": trainer.train_loader.state_dict(),
        "interval": trainer.interval.state_dict(),
        "step": trainer.step,
        "epochs_closed": trainer.epochs_closed,
        "evaluated_step": trainer.evaluated_step,
        "errors": None if trainer.errors is None else dict(vars(trainer.errors)),
        "elapsed": trainer.elapsed,
        "random": {**random[0], "others": random[1:]},
    }


def restore(trainer: "Trainer", path: Path, state: dict[str, Any]) -> None:
    """Restore a trainer from ``state``, which :func:`take` created.

    Raises:
        DataError: the checkpoint ``path`` is of another architecture.
    """
    theirs, plan = state["metadata"]["network"], trainer.plan.to_dict()
    if theirs != plan:
        changed = [name for name, value in plan.items() if theirs.get(name) != value]
        raise DataError(f"checkpoint {path} is of another architecture: it differs in {', '.join(changed)}")
    part = trainer.part
    # load_state_dict copies into the parameters, which keep their memory format.
    trainer.model.load_state_dict({name: part.local(name, whole) for name, whole in state["model"].items()})
    parameters = dict(trainer.model.named_parameters())
    states = {
        index: {
            key: torch.empty_like(parameters[name]).copy_(part.local(name, value))
            if isinstance(value, Tensor)
            else value
            for key, value in values.items()
        }
        for (index, values), name in zip(state["optimizer"]["state"].items(), _names(trainer), strict=True)
    }
    trainer.optimizer.load_state_dict({**trainer.optimizer.state_dict(), "state": states})
    trainer.schedule.load_state_dict(state["schedule"])
    trainer.schedule.observe(state["epochs_closed"], None)  # --lr-milestones may have changed.
    trainer.train_loader.load_state_dict(state["loader"])
    trainer.interval.load_state_dict(state["interval"], trainer.world.first)
    trainer.step, trainer.epochs_closed = state["step"], state["epochs_closed"]
    trainer.evaluated_step, trainer.elapsed = state["evaluated_step"], state["elapsed"]
    trainer.errors = None if state["errors"] is None else Errors(**state["errors"])
    were, are = state["mean_image"].shape[0], trainer.data.size
    if were != are:
        print(
            f"note: this run's images were {were}x{were} and are now {are}x{are}: crops show another part of them, so "
            "resuming is not bit-exact"
        )
    decoded, decodes = state["metadata"].get("decoder"), trainer.data.decoder
    if decoded != decodes:
        ways = [f"decoded by {printable(str(each))}" if each else "stored as pixels" for each in (decoded, decodes)]
        print(
            f"note: this run's images were {ways[0]} and are now {ways[1]}: order, crops and colours stay "
            "the same, pixels may not, so resuming is not bit-exact"
        )
    used = state.get("forms", asdict(trainer.forms))
    if used != asdict(trainer.forms):
        were = ", ".join(f"{name} {value}" for name, value in used.items()) if isinstance(used, dict) else used
        print(
            f"note: this run used the forms {printable(str(were))} and now uses {trainer.forms}: they compute the same "
            "with other roundings, so resuming is not bit-exact"
        )
    before, now = state.get("parallel", {"strategy": "none", "ranks": 1}), _parallel(trainer)
    if before == now:
        set_random_state(trainer.device, [state["random"], *state["random"].get("others", ())][trainer.world.rank])
    else:
        torch.manual_seed(seeds.dropout(trainer.config.seed, trainer.step, trainer.world.rank))
        was, is_now = (f"--parallel {each['strategy']} on {each['ranks']}" for each in (before, now))
        print(
            f"note: this run used {was} and now uses {is_now}: images, order and augmentation stay the same, but "
            "dropout masks and the order of sums do not, so resuming is not bit-exact"
        )


def _parallel(trainer: "Trainer") -> dict[str, Any]:
    return {"strategy": trainer.config.parallel, "ranks": trainer.world.size}


def _names(trainer: "Trainer") -> list[str]:
    """The parameters' names in the order of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [names[id(parameter)] for group in trainer.optimizer.param_groups for parameter in group["params"]]
