"""The first and last lines of a run, and the files that it leaves at the end."""

import shlex
from typing import TYPE_CHECKING

from torch import Tensor

from ..common.device import describe
from ..common.progress import duration
from ..data.sources import packed_size
from ..model import weights
from . import checkpoint
from .evaluation import accuracies
from .state import metadata

if TYPE_CHECKING:
    from .trainer import Trainer


def announce(trainer: "Trainer") -> None:
    """Print what is trained on what, how and for how long."""
    plan, config, data = trainer.plan, trainer.config, trainer.data
    print(
        f"{plan.variant}: {plan.parameters:,} parameters, {plan.multiply_adds / 1e6:,.1f} million multiply-adds per "
        f"image; {len(trainer.train_loader):,} training and {len(trainer.eval_loader):,} {trainer.judged_by} images, "
        f"{len(data.classes)} classes" + (", synthetic" if data.synthetic else "")
    )
    if data.size > 1.5 * plan.image_size:
        print(
            f"note: a crop covers {100 * (plan.image_size / data.size) ** 2:.0f} % of a stored image "
            f"({data.size}x{data.size}); of images prepared with --size {packed_size(plan.image_size)} it would "
            "cover 77 %, as in the paper"
        )
    limits = f"{config.epochs} epochs of {trainer.steps_per_epoch:,} updates"
    if config.max_steps is not None:
        limits += f", at most {config.max_steps:,} updates"
    if config.time_budget:
        limits += f", at most {duration(config.time_budget)} of training"
    mode = "compiled (the first update takes a minute or more)" if trainer.compiled else "eager"
    mode += ", captured as a CUDA graph" if trainer.update.record else ""
    if config.parallel != "none":
        held = sum(parameter.numel() for parameter in trainer.model.parameters())
        print(
            f"--parallel {config.parallel}: {trainer.world.describe()}; each holds {held:,} parameters and sees "
            f"{config.batch_size // trainer.part.training.replicas} of {config.batch_size} images"
        )
    print(f"{describe(trainer.device)}, {config.precision}, {mode}; {limits}; run folder {trainer.folder}", flush=True)


def finish(trainer: "Trainer", parameters: dict[str, Tensor]) -> None:
    """Write weights and curve, and print a summary."""
    # Imported here because matplotlib takes a second, and longer the first time.
    from . import curve

    weights.save(trainer.folder / "model.safetensors", parameters, metadata(trainer))
    curve.draw(trainer.folder, trainer.config, trainer.data.short_name)
    assert trainer.errors is not None
    why = " (the schedule ended)" if trainer.schedule.finished else " (the time budget is used up)"
    if trainer.step >= trainer.total_steps:
        why = ""
    print(
        f"\ntrained {trainer.step:,} updates in {duration(trainer.elapsed)}{why}: {accuracies(trainer.errors)} of "
        f"{trainer.errors.images:,} {trainer.judged_by} images; "
        f"{trainer.step * trainer.config.batch_size / trainer.elapsed:,.0f} images/s including evaluations"
    )
    for name, value in (
        ("checkpoint", checkpoint.path_of(trainer.checkpoints, trainer.step)),
        ("weights", trainer.folder / "model.safetensors"),
        ("metrics", f"{trainer.folder / 'metrics.csv'} and metrics.jsonl"),
        ("curve", trainer.folder / "curve.png"),
        ("next", f"python -m net.evaluate {shlex.quote(str(trainer.folder))}"),
    ):
        print(f"  {name:<11} {value}")
