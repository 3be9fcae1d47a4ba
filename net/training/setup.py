"""Setting up a training run: architecture, data, forms, and whether to compile or capture."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import torch

from kernels import compiler

from .. import pretrained
from ..common.device import describe, is_cpu, is_gpu, runs_triton
from ..common.errors import DataError, UsageError
from ..common.fields import flag_name, from_table
from ..data.images import ImageData
from ..data.sources import open_data, packed_size
from ..model import weights
from ..model.alexnet import AlexNet
from ..model.config import AlexNetConfig, network
from ..model.forms import Forms, forms, untuned
from . import runs
from .config import TrainConfig
from .tuning import measuring_time, tuned

#: Compiling takes about a minute on a CPU and half a minute for a GPU; it pays off in runs many times longer.
COMPILE_AFTER_SECONDS = {"cpu": 900.0, "cuda": 300.0}
#: Rough throughput of a CPU core in such networks; used only to decide whether to compile.
CPU_CORE_FLOP_PER_S = 30e9
#: Images of each split that ranks compare to verify that they have the same data.
COMPARED_IMAGES = 32


def architecture(config: TrainConfig, data: ImageData | None = None) -> AlexNetConfig:
    """The architecture that a run trains, with the number of classes of ``data``."""
    for name in ("classes", "image_size", "image_channels", "variant"):
        if name in config.architecture:
            raise UsageError(f"--architecture {name}: set by the data, --image-size or --network")
    fields = dict(config.architecture)
    if config.image_size is not None:
        fields["image_size"] = config.image_size
    if data is not None:
        fields["classes"] = len(data.classes)
    return network(config.network, **fields)


def check_frozen(config: TrainConfig, plan: AlexNetConfig) -> None:
    """Check that ``--freeze`` names existing layers, but not the new head and not all layers."""
    layers = [layer.name for layer in plan.layers() if layer.parameters]
    for name in config.freeze:
        if name not in layers:
            raise UsageError(f"--freeze {name}: the layers of {config.network} are {', '.join(layers)}")
        if config.new_head and name == plan.output_name:
            raise UsageError(f"--freeze {name}: --new-head reinitializes it, so it must be trained")
    if set(config.freeze) == set(layers):
        raise UsageError("--freeze names every layer; at least one must be trained")


def open_run_data(config: TrainConfig, resumed: bool = False) -> tuple[ImageData, AlexNetConfig]:
    """Open the data set of a run, and complete the architecture from it.

    Args:
        config: the flags.
        resumed: whether the run continues; :func:`.state.restore` then compares the image decoder with the earlier one.

    Raises:
        UsageError: no data set is given. DataError: the images do not fit the network.
    """
    config.check_data_path()
    plan = architecture(config)
    check_frozen(config, plan)
    data = open_data(
        config.data_path,
        image_size=plan.image_size,
        classes=plan.classes,
        store=config.store,
        val_labels=config.val_labels,
        workers=None,
        note=not resumed,
    )
    if data.size < plan.image_size:
        raise DataError(
            f"the images of {data.name} are {data.size}x{data.size}, but {config.network} reads {plan.image_size}x"
            f"{plan.image_size}; prepare them with --size {packed_size(plan.image_size)} or use a smaller --image-size"
        )
    if len(data.classes) < 2:
        raise DataError(f"training needs at least two classes; got {len(data.classes)} in {data.name}")
    if (left := len(data.train) - config.hold_out) < config.batch_size:
        held_out = f" that --hold-out {config.hold_out} leaves" if config.hold_out else ""
        raise UsageError(f"--batch-size {config.batch_size} is more than the {max(0, left)} training images{held_out}")
    return data, architecture(config, data)


def start_from(model: AlexNet, config: TrainConfig) -> None:
    """Load the weights of ``--init-from``, if given, into ``model``."""
    if config.init_from is None:
        return
    head = model.config.output_name
    source = pretrained.find(config.init_from, "--init-from")
    report = weights.load_weights(model, source, without=[head] if config.new_head else [])
    new = f", {head} reinitialized for {model.config.classes} classes" if config.new_head else ""
    print(f"starting from {config.init_from}: {len(report.loaded)} tensors{new}")


def compile_wanted(config: TrainConfig, plan: AlexNetConfig, steps: int, device: torch.device) -> bool:
    """Whether to compile: as ``--compile`` says, by default if the run may take long enough. A resumed run makes the
    same decision.

    On CUDA the default compiles every run of several processes except those with a budget of a few minutes; the update
    of a single process is captured uncompiled. On an Apple GPU the default never compiles.
    """
    if config.compile is False:
        return False
    after = COMPILE_AFTER_SECONDS.get(device.type)
    if config.compile is None and (after is None or record_wanted(config, device)):
        return False
    if after is not None and config.compile is None:
        seconds = config.time_budget or math.inf
        if is_cpu(device):
            flop = steps * config.batch_size * plan.training_flop
            seconds = min(seconds, flop / (CPU_CORE_FLOP_PER_S * torch.get_num_threads()))
        if seconds < after:
            return False
    if (obstacle := compiler.obstacle()) is not None:
        print(f"note: running eager, torch.compile is not usable here: {obstacle}")
        return False
    return True


def record_wanted(config: TrainConfig, device: torch.device) -> bool:
    """Whether to capture the update as a CUDA graph.

    Raises:
        UsageError: ``--cuda-graph`` was given where it is not supported.
    """
    able = config.parallel == "none" and runs_triton(device)
    if config.cuda_graph and not able:
        raise UsageError("--cuda-graph needs a CUDA GPU, Triton and --parallel none; omit it, or use --no-cuda-graph")
    return able if config.cuda_graph is None else config.cuda_graph


def forms_wanted(
    config: TrainConfig, model: AlexNet, training_images: int, device: torch.device, ranks: int = 1
) -> Forms:
    """The forms to use: those of ``--forms`` or of the resumed run, else the fastest measured on this GPU.

    With ``--parallel data`` they are measured on the captured update of a single process with a rank's share of the
    batch. The ranks' own updates communicate and are not captured, but run the same kernels. The other strategies use
    the default forms, because a rank holds only some rows of the weights.

    Prints a note if ``--tune again`` cannot measure.

    Args:
        config: the flags, with the precision resolved.
        model: the network, on ``device``.
        training_images: images of an epoch.
        device: where the network runs.
        ranks: number of processes.
    """
    available = list(forms(model, device))
    several = config.parallel != "none"
    captured = record_wanted(config, device) and not config.compile
    tunable = config.channels_last and (captured or (config.parallel == "data" and runs_triton(device)))
    if config.tune == "again" and (config.forms or not tunable):
        print(
            "note: --tune again measures nothing: "
            + (
                "the forms are those of --forms or of the resumed run"
                if config.forms
                else "it needs a CUDA GPU and --parallel none or data, without --no-channels-last, and in a single "
                "process without --compile and --no-cuda-graph"
            )
        )
    if config.forms:
        chosen = from_table(Forms, config.forms, "--forms")
        if chosen not in available:
            wanted, chosen = chosen, untuned(model, device)
            print(
                f"note: --forms {wanted}: not available on {describe(device)}; using {chosen}, which rounds differently"
            )
    elif not is_gpu(device) or not config.channels_last:
        chosen = Forms()
    elif tunable:
        images = config.epochs * training_images
        if config.max_steps is not None:
            images = min(images, config.max_steps * config.batch_size)
        allowed = measuring_time(model.config, images // ranks, config.time_budget)
        given = model.config, config.batch_size // ranks, config.precision, device, config.tune, allowed
        chosen = tuned(*given, several=several)
    else:
        chosen = untuned(model, device)
    if several:
        # Streams are tested only in a single process's captured update.
        chosen = replace(chosen, towers="in turn")
    return replace(chosen, shared="apart") if config.parallel in ("tower", "hybrid") else chosen


def checksums(data: ImageData) -> dict[str, str]:
    """Checksums that identify a data set: of all labels, of some images and of the mean image."""
    labels, images = hashlib.sha256(), hashlib.sha256()
    for split in (data.train, data.val):
        labels.update(split.labels.tobytes())
        for image in np.linspace(0, len(split) - 1, COMPARED_IMAGES).astype(int):
            images.update(split.images[image].tobytes())
    mean = hashlib.sha256(data.mean.tobytes())
    return {
        name: each.hexdigest()[:16] for name, each in (("labels", labels), ("pixels", images), ("mean image", mean))
    }


def identity(config: TrainConfig, data: ImageData, step: int) -> dict[str, object]:
    """What must agree on all ranks, by description: flags, data and the update to continue from."""
    places = ("data_path", "store", "val_labels", "init_from", "device")
    flags = {flag_name(name): value for name, value in runs.settings(config).items() if name not in places}
    return {
        **flags,
        "training images": len(data.train),
        "validation images": len(data.val),
        "pixels of an image": data.size**2,
        "classes": ", ".join(data.classes)[:200],
        **{f"{name} with the checksum": value for name, value in checksums(data).items()},
        "decoder of the images": data.decoder,
        "update": step,
    }
