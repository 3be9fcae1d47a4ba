"""Ablation study of the paper's network: ``python -m net.ablations``; ``--help`` lists the flags."""

import contextlib
import dataclasses
import datetime
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .analysis.ablation_cases import ABLATIONS, BASELINE, Ablation
from .common import cli
from .common.errors import DataError, UsageError
from .common.fields import DEVICES, MOST_WORKERS, at_least, at_most, flag, flag_name, near
from .common.files import atomic_write, locked
from .common.progress import duration
from .data import processes
from .model.config import AlexNetConfig
from .readers.metrics import read_results
from .readers.toml import read_toml
from .training import runs
from .training.concurrent import one_by_one, side_by_side
from .training.config import TrainConfig

if TYPE_CHECKING:
    from .data.images import ImageData

DESCRIPTION = (
    "Train the network with each of its parts removed, with several seeds, and compare the validation error with that "
    "of the whole network, seed by seed. After an interruption, the same command continues. Ablations: "
)
RESULTS = "results.jsonl"
#: Where the data is; its checksums say what it is.
PLACES = ("data_path", "store", "val_labels")
#: Epochs and batch size of the digits network: all its runs on the embedded digits take about a quarter of an hour on
#: two cores.
EPOCHS, BATCH_SIZE = 6, 32
#: --quick divides the epochs by this.
QUICK = 6
#: Data sets whose stored images have at least this many rows use the paper's network.
LARGE = 256


@dataclass(frozen=True)
class AblationsConfig:
    """The flags of ``python -m net.ablations``."""

    names: tuple[str, ...] = flag((), "ablations; all by default", positional=True, nargs="*", metavar="NAME")
    data_path: str | None = flag(None, "as in net.train; the embedded digits by default", metavar="PATH")
    baseline: str | None = flag(
        None,
        "TOML file of net.train's flags for the baseline; by default the small network of the digits preset, or the "
        "paper's for stored images of 256x256 or more",
        metavar="FILE.toml",
    )
    seeds: int = flag(3, "runs of each network, with the seeds 0, 1, ...; at least 3", metavar="COUNT")
    quick: bool = flag(False, "a sixth of the epochs: a smoke test, not a measurement")
    workers: int | None = flag(
        None,
        "parallel runs, each in a process with its share of the cores; by default one per core for small images on a "
        "CPU, else one",
        short="j",
    )
    device: str | None = flag(None, DEVICES)
    output_dir: str | None = flag(
        None, "folder of the results; runs/ablations or runs/ablations-quick by default", metavar="DIR"
    )

    def __post_init__(self) -> None:
        at_least(self, 3, "seeds", called=flag_name)
        at_least(self, 1, "workers", called=flag_name)
        at_most(self, MOST_WORKERS, "workers", called=flag_name)


def _effective(network: AlexNetConfig) -> AlexNetConfig:
    """``network`` in a canonical form: ``exchange`` has no effect with one tower."""
    return dataclasses.replace(network, exchange=True) if network.towers == 1 else network


def _chosen(names: Sequence[str]) -> list[Ablation]:
    known = {ablation.name: ablation for ablation in ABLATIONS}
    for name in names:
        if name not in known:
            raise UsageError(f"unknown ablation {name!r}{near(name, known)}; available are {', '.join(known)}")
    return [ablation for ablation in ABLATIONS if ablation.name in names or not names]


def baseline(config: AblationsConfig) -> "tuple[TrainConfig, ImageData]":
    """The baseline's configuration and its data set.

    Raises:
        UsageError: flags in ``--baseline`` that net.ablations sets itself. DataError: unusable data.
    """
    from .data.sources import open_data
    from .training.setup import open_run_data

    flags: dict[str, Any] = {}
    if config.baseline is not None:
        flags = read_toml(config.baseline, TrainConfig, "--baseline")
        for name in ("resume", "output_dir", "seed", "data_path", "device"):
            if name in flags:
                raise UsageError(f"--baseline: {config.baseline}: {name} is set by net.ablations itself")
    else:
        data = open_data(config.data_path, image_size=32, classes=10)
        if data.size >= LARGE:
            flags = {"preset": "imagenet"}
        else:
            # Crops of 7/8 of an image's rows and columns, as in the paper (224 of 256).
            recipe = "digits" if config.data_path is None else "paper"
            flags = {"network": "digits", "recipe": recipe, "image_size": round(data.size * 7 / 8)}
            flags |= {"epochs": EPOCHS, "batch_size": BATCH_SIZE}
    given = {name: getattr(config, name) for name in ("data_path", "device") if getattr(config, name) is not None}
    result = cli.resolve({**flags, **given, "keep": 1}, TrainConfig)
    if config.quick:
        flags["epochs"] = max(1, result.epochs // QUICK)
        result = cli.resolve({**flags, **given, "keep": 1}, TrainConfig)
    data, _ = open_run_data(result)
    return result, data


def ablated(ablation: Ablation, config: TrainConfig, data: "ImageData") -> TrainConfig | str:
    """The configuration with a part removed, or why that would show nothing."""
    from .training.setup import architecture

    network = architecture(config, data)
    if "colour_noise" in ablation.recipe and data.colour.values[1] <= 1e-9 * data.colour.values[0]:
        return "not shown by this data: its images are gray"
    if "crop" in ablation.recipe and data.size == network.image_size:
        return "not shown by this data: its images are no larger than the network's input"
    try:
        fields = {**config.architecture, **ablation.fields(network)}
        changed = dataclasses.replace(config, architecture=fields, **ablation.recipe)
        same = _effective(architecture(changed, data)) == _effective(network)
    except UsageError as error:
        return f"cannot be built: {error}"
    if same and all(getattr(config, name) == value for name, value in ablation.recipe.items()):
        return "the whole network is without it"
    return changed


def _commit() -> str:
    """The checkout's commit, with "-dirty" if modified; empty outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return ""


def _read(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results so far; a truncated last line is skipped.

    Raises:
        UsageError: they are of runs with other settings.
    """
    if not path.exists():
        return []
    before, results = read_results(path)
    # Earlier versions stored tune and the places, and no checksums.
    compared = {*before, *settings} - {"data", "tune", *PLACES} - ({"checksums"} - before.keys())
    if changed := [name for name in compared if before.get(name) != settings.get(name)]:
        raise UsageError(
            f"--output-dir {path.parent} holds results of other settings: they differ in {', '.join(sorted(changed))}"
        )
    return results


def _settings(config: TrainConfig, data: "ImageData") -> dict[str, Any]:
    """The settings that results depend on, except the seed, after a JSON round trip."""
    from .training.setup import checksums

    values = runs.settings(config)
    for name in ("seed", "device", "workers", "cache", "keep", "log_every", "checkpoint_every", "tensorboard", *PLACES):
        values.pop(name, None)
    name = data.name if data.path is None else data.short_name
    counts = {"train_images": len(data.train), "val_images": len(data.val)}
    values |= {"data": name, **counts, "checksums": checksums(data)}
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result


def _workers(config: AblationsConfig, base: TrainConfig, data: "ImageData") -> int:
    """Number of parallel runs. Two threads train a small network no faster than one, so each core gets its own run."""
    from .common.device import choose, is_cpu

    if config.workers is not None:
        return config.workers
    small = is_cpu(choose(base.device)) and data.size < LARGE
    return processes.available_cores() if small else 1


def _machine() -> dict[str, Any]:
    import torch

    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    description = DESCRIPTION + ", ".join(ablation.name for ablation in ABLATIONS) + "."
    config = cli.resolve(cli.given(AblationsConfig, "net.ablations", description, arguments), AblationsConfig)
    chosen = _chosen(config.names)
    folder = Path(config.output_dir or runs.RUNS / ("ablations-quick" if config.quick else "ablations"))
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output-dir {folder} is a file")
    cli.check_exist(data_path=config.data_path, baseline=config.baseline)
    cli.load("analysis.ablation_report", "training.trainer")
    from .analysis import ablation_report

    base, data = baseline(config)
    settings, machine = _settings(base, data), _machine()
    with locked(folder):
        results = _read(folder / RESULTS, settings)
        trainings: dict[str, TrainConfig] = {BASELINE: base}
        for ablation in chosen:
            changed = ablated(ablation, base, data)
            if isinstance(changed, TrainConfig):
                trainings[ablation.name] = changed
            else:
                print(f"{ablation.title}: {changed}")
                results = [row for row in results if row["ablation"] != ablation.name]
                results.append({"ablation": ablation.name, "not_shown": changed})
        with atomic_write(folder / RESULTS) as file:
            lines = [{"settings": settings}, *results]
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        done = {(row["ablation"], row.get("seed")) for row in results}
        seeds = config.seeds
        # Seed by seed, so that an interruption leaves about equally many runs of every network.
        missing = [(name, seed) for seed in range(seeds) for name in trainings if (name, seed) not in done]
        total = seeds * len(trainings)
        workers = max(1, min(_workers(config, base, data), len(missing)))
        print(
            f"{len(trainings)} networks on {data.name}, {seeds} seeds: {total} runs of "
            f"{ablation_report.epochs(settings)}, {total - len(missing)} of them already done, {workers} in parallel; "
            f"results in {folder / RESULTS}",
            flush=True,
        )
        plans = [
            (dataclasses.replace(trainings[name], seed=seed), folder / f"{name}-seed{seed}") for name, seed in missing
        ]
        ended, seconds, status = 0, 0.0, 0
        for number, row in side_by_side(plans, workers) if workers > 1 else one_by_one(plans):
            name, seed = missing[number]
            if isinstance(row, int):
                print(f"stopped in {name}, seed {seed}; continue with the same command", flush=True)
                status = row
                continue
            with open(folder / RESULTS, "a") as file:
                file.write(json.dumps({"ablation": name, "seed": seed, **row, **machine}) + "\n")
            ended, seconds = ended + 1, seconds + row["seconds"]
            left = seconds / ended * (len(missing) - ended) / workers
            outcome = "diverged" if "diverged" in row else f"top-1 error {row['top1_error_percent']:.2f} %"
            print(
                f"{total - len(missing) + ended}/{total}  {name}, seed {seed}: {outcome} in {row['seconds']:.1f} s  "
                f"ETA {duration(left)}",
                flush=True,
            )
        if status:
            return status
        written = ablation_report.write(folder / RESULTS, folder)
    print(f"\n{ablation_report.table(folder / RESULTS)}")
    print(f"written to {' and '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    cli.run(main)
