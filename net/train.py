"""Train the network: ``python -m net.train``; ``--help`` lists the flags."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import pretrained
from .common import cli
from .common.errors import DataError, UsageError
from .common.fields import flag_name
from .parallel.launch import Launch, launched
from .training import runs
from .training.config import TrainConfig

DESCRIPTION = (
    "Train an AlexNet. Without flags: the embedded digits, in about a minute. With --preset imagenet --data-path "
    "FOLDER: the paper's run. Defaults, in parentheses, are those of the digits preset or of the --preset given."
)

#: Flags that cannot change when a run is resumed, with their defaults for configurations that lack them.
STARTING: dict[str, Any] = {
    "network": "paper",
    "architecture": {},
    "image_size": None,
    "new_head": False,
    "freeze": (),
    "hold_out": 0,
}


def _run_to_resume(flags: dict[str, Any]) -> Path | None:
    """The run folder that ``--resume`` refers to; None if there is no run yet."""
    wanted = flags["resume"]
    if wanted != "auto":
        path = Path(wanted)
        if not path.exists():
            raise DataError(f"--resume {path} does not exist")
        return runs.folder_of(path)
    folder = Path(flags["output_dir"]) if "output_dir" in flags else runs.newest_folder(flags.get("preset", "digits"))
    return folder if folder is not None and (folder / runs.CONFIG).exists() else None


def _launched(config: TrainConfig) -> Launch:
    """This process's rank and world size; ranks other than 0 stop printing."""
    launch = launched(config)
    if launch.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    return launch


@contextlib.contextmanager
def _claimed(folder: Path | None, preset: str, launch: Launch, new: bool) -> Iterator[Path | None]:
    """The run folder, created and locked by rank 0, which broadcasts it later."""
    if launch.rank > 0:
        yield folder
        return
    with runs.claimed(folder, preset) as claimed:
        if new:
            runs.check_new(claimed)
        yield claimed


def _train(
    config: TrainConfig, launch: Launch, folder: Path | None, resumed: tuple[Path, dict[str, Any]] | None
) -> int:
    """Join the other processes, build the run and train."""
    cli.load("parallel.process_group", "training.trainer")
    from .parallel.process_group import join
    from .training.trainer import Trainer

    world, device = join(launch, config)
    with world.watched():
        folder = Path(world.broadcast(str(folder)))
        trainer = Trainer(config, folder, resumed, device, world)
        if world.first:
            runs.write_config(folder, trainer.config)
        status = trainer.run()
        world.close()
    return status


def _check(config: TrainConfig) -> None:
    """Check what can be checked before anything is created or imported.

    Raises:
        UsageError: no data set is given, or a path is not valid UTF-8. DataError: a path does not exist.
    """
    config.check_data_path()
    runs.settings(config)
    cli.check_exist(data_path=config.data_path, val_labels=config.val_labels)
    if config.resume is None and config.init_from is not None:
        pretrained.find(config.init_from, "--init-from")


def _resume(flags: dict[str, Any], source: Path) -> int:
    """Continue the run in ``source``."""
    saved = runs.read_config(source)
    preset = saved.get("preset", "digits")
    if flags.get("preset", preset) != preset:
        raise UsageError(f"--preset {flags['preset']}: the run in {source} has the preset {preset}")
    config = cli.resolve(flags, TrainConfig, saved)
    for name, default in STARTING.items():
        if getattr(config, name) != saved.get(name, default):
            raise UsageError(f"{flag_name(name)} cannot change when resuming; the run in {source} keeps its own")
    _check(config)
    launch = _launched(config)
    folder = Path(config.output_dir) if config.output_dir is not None else source
    same = folder.resolve() == source.resolve()
    with _claimed(folder, config.preset, launch, not same):
        cli.load("training.checkpoint")
        from .readers.checkpoint import RESUMED, load
        from .training import checkpoint

        kept = checkpoint.checkpoints(source / "checkpoints")
        resumed: tuple[Path, dict[str, Any]] | None
        if config.resume != "auto" and Path(flags["resume"]).is_file() and Path(flags["resume"]).suffix == ".pt":
            path = Path(flags["resume"])
            resumed = path, load(path, RESUMED)
            if same and kept and path.resolve() != kept[0].resolve():
                raise UsageError(
                    f"{path} is not its run's newest checkpoint: to continue from it use a new --output-dir"
                )
        else:
            resumed = checkpoint.newest(source / "checkpoints", RESUMED)
        if resumed is None and kept:
            raise DataError(f"no checkpoint in {source / 'checkpoints'} is intact")
        if resumed is None:
            print(f"{source} has no checkpoint yet: starting from the beginning")
        else:
            changes = [
                f"{name} {saved.get(name)} -> {value}"
                for name, value in runs.settings(config).items()
                if saved.get(name) != value
            ]
            print(f"resuming from {resumed[0]}" + (f" with {', '.join(changes)}" if changes else ""))
            if config.time_budget and resumed[1]["elapsed"] >= config.time_budget:
                print(
                    f"note: its time budget of {config.time_budget:g} s is used up, so it trains no further; to "
                    "continue, raise --time-budget, or use 0 for no limit"
                )
        return _train(config, launch, folder, resumed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    flags = cli.given(TrainConfig, "net.train", DESCRIPTION, arguments)
    if "resume" in flags and "init_from" in flags:
        raise UsageError("--init-from starts a new run and --resume continues one: use one of them")
    if flags.get("resume") is not None and (source := _run_to_resume(flags)) is not None:
        return _resume(flags, source)
    config = cli.resolve(flags, TrainConfig)
    _check(config)
    launch = _launched(config)
    with _claimed(
        None if config.output_dir is None else Path(config.output_dir), config.preset, launch, True
    ) as folder:
        if config.resume is not None:
            print("there is no run to resume: starting a new one")
        print(f"training {config.network} on {config.data_path or 'the embedded digits'}", flush=True)
        return _train(config, launch, folder, None)


if __name__ == "__main__":
    cli.run(main)
