"""The paper's figures: ``python -m net.figures FIGURE ...``; ``--help`` lists them, ``FIGURE --help`` the flags."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pretrained
from .common import cli
from .common.errors import DataError, UsageError
from .common.fields import DEVICES, at_least, check_png, flag, flag_name
from .common.files import check_writable
from .model.config import network
from .training import runs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .analysis.trained import Trained

DESCRIPTION = "Draw a figure of the paper from a trained network, as a PNG file."
#: Images in Figure 4, left; queries and neighbours per query in Figure 4, right.
SHOWN, QUERIES, NEIGHBOURS = 8, 5, 6
#: Maximum number of queries for the share of neighbours of the same class.
COUNTED = 1000


@dataclass(frozen=True)
class FiltersConfig:
    """The flags of ``python -m net.figures filters``."""

    checkpoints: tuple[str, ...] = flag(
        (),
        "run folder, checkpoint (.pt), weights (.safetensors) or the name of pretrained weights; several of one "
        "architecture are compared",
        positional=True,
        metavar="CHECKPOINT",
    )
    output: str | None = flag(None, "filters.png in the (first) run folder by default", metavar="FILE.png")

    def __post_init__(self) -> None:
        check_png(self.output)


@dataclass(frozen=True)
class PredictionsConfig:
    """The flags of ``python -m net.figures predictions``."""

    checkpoint: str = flag(
        "", "run folder, checkpoint (.pt), weights (.safetensors) or the name of pretrained weights", positional=True
    )
    data_path: str | None = flag(
        None, "as in net.train; by default the data the network was trained on", metavar="PATH"
    )
    seed: int = flag(0, "seed of the choice of images")
    device: str | None = flag(None, DEVICES)
    output: str | None = flag(None, "predictions.png in the run folder by default", metavar="FILE.png")

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", called=flag_name)
        check_png(self.output)


@dataclass(frozen=True)
class NeighboursConfig:
    """The flags of ``python -m net.figures neighbours``."""

    checkpoint: str = flag(
        "", "run folder, checkpoint (.pt), weights (.safetensors) or the name of pretrained weights", positional=True
    )
    data_path: str | None = flag(
        None, "as in net.train; by default the data the network was trained on", metavar="PATH"
    )
    seed: int = flag(0, "seed of the choice of images")
    batch_size: int = flag(128, "images per batch", short="b")
    device: str | None = flag(None, DEVICES)
    output: str | None = flag(None, "neighbours.png in the run folder by default", metavar="FILE.png")

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", called=flag_name)
        at_least(self, 1, "batch_size", called=flag_name)
        check_png(self.output)


@dataclass(frozen=True)
class ActivationsConfig:
    """The flags of ``python -m net.figures activations``."""

    data_path: str | None = flag(None, "as in net.train; the embedded digits by default", metavar="PATH")
    rates: tuple[float, ...] = flag(
        (0.001, 0.003, 0.01), "learning rates to try; each activation keeps its fastest", metavar="RATE"
    )
    max_epochs: int = flag(60, "epochs after which a run that has not reached 25 % is stopped")
    batch_size: int = flag(128, "images per update", short="b")
    seeds: int = flag(
        1, "trainings of each network, with seeds 0, 1, ...; the first tries all --rates, the others use its fastest"
    )
    device: str | None = flag(None, DEVICES)
    output: str | None = flag(
        None,
        "runs/activations.png by default; finished trainings are stored in FILE.curves.jsonl and not repeated",
        metavar="FILE.png",
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "max_epochs", "batch_size", "seeds", called=flag_name)
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise UsageError(f"--rates must be more than 0; got {rate!r}")
        check_png(self.output)


def _output(given: str | None, checkpoint: Path, name: str) -> Path:
    """The output file: ``given``, or ``name`` in the run folder."""
    return Path(given) if given is not None else runs.results_folder(checkpoint) / name


def colour_selectivity(kernels: "NDArray[np.float32]") -> "NDArray[np.float32]":
    """The fraction of each kernel's energy that is colour: that of the kernel minus its mean over R, G and B.

    Args:
        kernels: ``[kernels, 3, rows, columns]``.

    Returns:
        ``[kernels]``, between 0 for a gray kernel and 1; about 2/3 for independent random weights.
    """
    colour = kernels - kernels.mean(1, keepdims=True)
    energy = (kernels**2).sum((1, 2, 3))
    share: NDArray[np.float32] = (colour**2).sum((1, 2, 3)) / energy.clip(1e-30)
    return share


def towers_differ(first: "NDArray[np.float32]", second: "NDArray[np.float32]") -> bool:
    """Whether the mean colour selectivities of two towers differ by more than two standard errors of the difference.

    Args:
        first, second: each kernel's selectivity, ``[kernels]``, from :func:`colour_selectivity`.
    """
    error = (first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second)) ** 0.5
    return bool(abs(first.mean() - second.mean()) > 2 * error)


def _first_layer(trained: "Trained") -> "tuple[str, NDArray[np.float32]]":
    """The name of a network's first layer and its kernels, ``[kernels, 3, rows, columns]``."""
    name = next(layer for layer, _ in trained.model.trunk if layer is not None)
    kernels: NDArray[np.float32] = trained.model.get_parameter(f"{name}.weight").detach().contiguous().numpy()
    if kernels.shape[1] != 3:
        raise DataError(
            f"{trained.path}: its first layer, {name}, reads {kernels.shape[1]} channels; Figure 3 needs a network "
            "that reads RGB"
        )
    return name, kernels


def filters(config: FiltersConfig) -> Path:
    """Figure 3: the kernels of the first layer and how colour-selective each tower is."""
    import numpy as np
    import torch

    from .analysis import drawings
    from .analysis.trained import open_trained
    from .data.images import short_name

    networks = [open_trained(checkpoint, torch.device("cpu")) for checkpoint in config.checkpoints]
    first, several = networks[0], len(networks) > 1
    name, kernels = _first_layer(first)
    count = first.network.towers
    towers, captions, differ = [], [], 0
    for given, trained in zip(config.checkpoints, networks, strict=True):
        own = np.split(_first_layer(trained)[1], trained.network.towers)
        if (trained.network.towers, own[0].shape) != (count, (len(kernels) // count, *kernels.shape[1:])):
            raise DataError(f"{trained.path} and {first.path} differ in towers or in the shape of {name}'s kernels")
        selectivity = [colour_selectivity(tower) for tower in own]
        for number, each in enumerate(selectivity, 1):
            captions.append(
                (f"{given}, " if several else "")
                + (f"tower {number}" if count > 1 else "all kernels")
                + f": colour selectivity {each.mean():.2f} on average, {each.min():.2f} to {each.max():.2f}"
            )
            print(captions[-1])
        differ += count == 2 and towers_differ(*selectivity)
        towers += own
    print("(0: a gray kernel, 0.67: random weights, 1: colour alone)")
    if count == 2:
        print(f"the towers' averages differ by more than two standard errors in {differ} of {len(networks)} networks")
    gray = first.mean is not None and bool((first.mean == first.mean[..., :1]).all())
    if gray:
        print("the training images are gray: any colour in the kernels is left over from their initialization")
    title = f"{name}, {len(kernels)} kernels, trained on {short_name(first.data_path, first.classes or ())}" + (
        "\n(gray images: any colour is left over from the initialization)" if gray else ""
    )
    path = _output(config.output, first.path, "filters.png")
    drawings.filters(path, title, towers, captions, across=count if several else 1)
    return path


def predictions(config: PredictionsConfig) -> Path:
    """Figure 4, left: eight validation images and the five most probable labels."""
    import torch

    from .analysis import drawings
    from .analysis.features import open_its_data
    from .analysis.trained import open_trained
    from .common import seeds
    from .common.allocator import keep_freed_memory
    from .common.device import choose
    from .data.augmentation import centre_crop
    from .training.evaluation import TOP, probabilities

    device = choose(config.device)
    keep_freed_memory()
    trained = open_trained(config.checkpoint, device)
    data, mean = open_its_data(trained, config.data_path, device)
    generator = seeds.sample(config.seed)
    drawn = generator.choice(len(data.val), min(SHOWN, len(data.val)), replace=False)
    images = data.val.images[drawn]
    with torch.no_grad():
        crops = centre_crop(torch.from_numpy(images).to(device), mean, trained.network.image_size)
        top = probabilities(trained.model, crops, "fp32", torch.channels_last).topk(min(TOP, len(data.classes)))
    likely = [
        [(data.classes[label], value) for label, value in zip(labels, values, strict=True)]
        for labels, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
    truth = [data.classes[label] for label in data.val.labels[drawn]]
    right = sum(bars[0][0] == name for bars, name in zip(likely, truth, strict=True))
    print(f"top-1 is correct for {right} of these {len(drawn)} validation images")
    path = _output(config.output, trained.path, "predictions.png")
    title = f"{data.short_name}: validation images, most probable labels (true one red, bar ends at 1)"
    drawings.predictions(path, title, images, truth, likely)
    return path


def neighbours(config: NeighboursConfig) -> Path:
    """Figure 4, right: validation images and the six training images nearest by fc7 features."""
    import numpy as np
    import torch

    from .analysis import drawings
    from .analysis.features import features_of, open_its_data
    from .analysis.retrieval import nearest
    from .analysis.trained import open_trained
    from .common import seeds
    from .common.allocator import keep_freed_memory
    from .common.device import choose
    from .common.progress import Progress
    from .data.images import Split

    device = choose(config.device)
    keep_freed_memory()
    trained = open_trained(config.checkpoint, device)
    data, mean = open_its_data(trained, config.data_path, device)
    if len(data.train) < NEIGHBOURS:
        raise DataError(
            f"the figure shows {NEIGHBOURS} neighbours; got {len(data.train)} training images in {data.name}"
        )
    generator = seeds.sample(config.seed)
    drawn = generator.choice(len(data.val), min(COUNTED, len(data.val)), replace=False)
    query_images = Split(data.val.images[drawn], data.val.labels[drawn])
    with Progress("images", len(query_images) + len(data.train)) as progress:
        queries = torch.cat(list(features_of(trained, query_images, mean, config.batch_size, progress.update)))
        searched = features_of(trained, data.train, mean, config.batch_size, progress.update)
        _, found = nearest(queries, searched, NEIGHBOURS)
    numbers = found.cpu().numpy()
    same = 100 * (data.train.labels[numbers] == query_images.labels[:, None]).mean()
    print(f"{same:.1f} % of the {NEIGHBOURS} nearest training images have the class of the query")
    print(f"({len(query_images):,} validation images against {len(data.train):,}; {queries.shape[1]} features)")
    shown = min(QUERIES, len(query_images))
    path = _output(config.output, trained.path, "neighbours.png")
    drawings.neighbours(
        path,
        f"{data.short_name}: validation images (left) and nearest training images (another class: red)",
        query_images.images[:shown],
        [data.classes[label] for label in query_images.labels[:shown]],
        np.stack([data.train.images[row] for row in numbers[:shown]]),
        [[data.classes[label] for label in data.train.labels[row]] for row in numbers[:shown]],
    )
    return path


def activations(config: ActivationsConfig) -> Path:
    """Figure 1: the 4-layer network with ReLU and with tanh, trained to 25 % training error."""
    from .analysis import drawings
    from .analysis.activations import TARGET, Results, fastest, outcome
    from .common.allocator import keep_freed_memory
    from .common.device import choose
    from .common.progress import Progress
    from .data.cifar10 import CLASSES
    from .data.sources import open_data

    device = choose(config.device)
    keep_freed_memory()
    plan = network("cifar10")
    data = open_data(config.data_path, image_size=plan.image_size, classes=plan.classes)
    if data.size < plan.image_size:
        raise DataError(f"the images of {data.name} are {data.size}x{data.size}; the 4-layer network reads 32x32")
    if len(data.train) < config.batch_size:
        raise UsageError(f"--batch-size {config.batch_size} is more than the {len(data.train)} training images")
    theirs = data.classes == CLASSES
    print(f"the 4-layer network on {data.name}" + ("" if theirs else "; the paper used CIFAR-10"))
    path = Path(config.output) if config.output is not None else runs.RUNS / "activations.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(path.with_suffix(".curves.jsonl"), data, config.batch_size)
    updates = len(data.train) // config.batch_size * config.max_epochs
    curves = []
    for activation in ("relu", "tanh"):
        with Progress("updates at most", updates * (len(config.rates) + config.seeds - 1)) as progress:
            search = partial(
                fastest,
                data,
                activation,
                max_epochs=config.max_epochs,
                batch_size=config.batch_size,
                device=device,
                results=results,
                progress=partial(progress.update, 1),
            )
            first = search(config.rates, seed=0)
            curves.append([first, *(search([first.rate], seed=seed) for seed in range(1, config.seeds))])
    relu, tanh = curves
    said = outcome(relu, tanh, config.max_epochs)
    print(said)
    for curve, *_ in curves:
        if len(config.rates) > 1 and curve.rate in (min(config.rates), max(config.rates)):
            print(
                f"{curve.activation} was fastest at an end of --rates, {curve.rate:g}: a rate beyond it may be faster"
            )
    title = f"{data.short_name}" + ("" if theirs else " (the paper used CIFAR-10)") + f"\n{said}"
    labels = (f"ReLU, rate {relu[0].rate:g}", f"tanh, rate {tanh[0].rate:g}")
    drawn = [
        (label, [(curve.epochs, curve.errors) for curve in group]) for label, group in zip(labels, curves, strict=True)
    ]
    drawings.activations(path, title, drawn, TARGET)
    return path


FIGURES: dict[str, tuple[Any, Callable[[Any], Path]]] = {
    "filters": (FiltersConfig, filters),
    "predictions": (PredictionsConfig, predictions),
    "neighbours": (NeighboursConfig, neighbours),
    "activations": (ActivationsConfig, activations),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    summaries = {name: draw.__doc__ or "" for name, (_, draw) in FIGURES.items()}
    name, rest = cli.subcommand("net.figures", DESCRIPTION, summaries, arguments)
    config_type, draw = FIGURES[name]
    config = cli.resolve(cli.given(config_type, f"net.figures {name}", summaries[name], rest), config_type)
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        check_writable("--output", config.output)
    if hasattr(config, "checkpoint"):
        pretrained.find(config.checkpoint)
    for checkpoint in getattr(config, "checkpoints", ()):
        pretrained.find(checkpoint)
    cli.check_exist(data_path=getattr(config, "data_path", None))
    cli.load("analysis.drawings", "analysis.trained")
    print(f"written to {draw(config)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
