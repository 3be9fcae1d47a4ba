"""What a training run is made of, before its first update: network, data, forms, and whether it is compiled."""

import hashlib
import math
from dataclasses import replace

import numpy as np
import torch

from kernels import compiler

from .. import pretrained
from ..common.errors import DataError, UsageError
from ..common.fields import from_table
from ..data.images import ImageData
from ..data.sources import open_data, packed_size
from ..model import weights
from ..model.alexnet import AlexNet
from ..model.config import AlexNetConfig, network
from ..model.forms import Forms, forms, untuned
from . import runs
from .config import TrainConfig
from .tuning import tuned, worth_measuring

#: Compiling takes about a minute of a CPU's time, half of one for a GPU; it pays in runs that take many times that.
COMPILE_AFTER_SECONDS = {"cpu": 900.0, "cuda": 300.0}
#: A CPU core's rate in such networks, of the order of what is measured; it only decides whether to compile.
CPU_CORE_FLOP_PER_S = 30e9
#: Images of each split by which ranks find that they see the same.
COMPARED_IMAGES = 32


def architecture(config: TrainConfig, data: ImageData | None = None) -> AlexNetConfig:
    """The network that a run trains; its classes are the data set's."""
    for name in ("classes", "image_size", "image_channels", "variant"):
        if name in config.architecture:
            raise UsageError(f"--architecture {name}: it comes from the data, from --image-size or from --network")
    fields = dict(config.architecture)
    if config.image_size is not None:
        fields["image_size"] = config.image_size
    if data is not None:
        fields["classes"] = len(data.classes)
    return network(config.network, **fields)


def check_frozen(config: TrainConfig, plan: AlexNetConfig) -> None:
    """Refuse to freeze what is no layer, the layer that starts anew, or everything."""
    layers = [layer.name for layer in plan.layers() if layer.parameters]
    for name in config.freeze:
        if name not in layers:
            raise UsageError(f"--freeze {name}: {config.network} has the layers {', '.join(layers)}")
        if config.new_head and name == plan.output_name:
            raise UsageError(f"--freeze {name}: --new-head starts it anew, so it has to learn")
    if set(config.freeze) == set(layers):
        raise UsageError("--freeze names every layer; at least one has to learn")


def open_run_data(config: TrainConfig) -> tuple[ImageData, AlexNetConfig]:
    """The data set of a run and the network for it.

    Raises:
        UsageError: no data set is named. DataError: the images do not suit the network.
    """
    if config.data_path is None and config.preset != "digits":
        raise UsageError(f"--preset {config.preset} needs --data-path; synthetic gives random images, for speed")
    plan = architecture(config)
    check_frozen(config, plan)
    data = open_data(
        config.data_path,
        image_size=plan.image_size,
        classes=plan.classes,
        store=config.store,
        val_labels=config.val_labels,
        workers=None,
    )
    if data.size < plan.image_size:
        raise DataError(
            f"{data.name} holds images of {data.size}x{data.size} and {config.network} reads {plan.image_size}x"
            f"{plan.image_size}; prepare them with --size {packed_size(plan.image_size)} or give a smaller --image-size"
        )
    if len(data.classes) < 2:
        raise DataError(f"{data.name} has {len(data.classes)} class; at least two can be told apart")
    if (left := len(data.train) - config.hold_out) < config.batch_size:
        held_out = f" that --hold-out {config.hold_out} leaves" if config.hold_out else ""
        raise UsageError(f"--batch-size {config.batch_size} is more than the {max(0, left)} training images{held_out}")
    return data, architecture(config, data)


def start_from(model: AlexNet, config: TrainConfig) -> None:
    """Give ``model`` the weights of ``--init-from``, if there are any."""
    if config.init_from is None:
        return
    head = model.config.output_name
    source = pretrained.find(config.init_from, "--init-from")
    report = weights.load_weights(model, source, without=[head] if config.new_head else [])
    new = f", {head} anew for {model.config.classes} classes" if config.new_head else ""
    print(f"starting from {config.init_from}: {len(report.loaded)} tensors{new}")


def compile_wanted(config: TrainConfig, plan: AlexNetConfig, steps: int, device: torch.device) -> bool:
    """Whether to compile: as asked, else where a run may take long enough. The same for a resumed run.

    On CUDA that is every run of several processes but those with a budget of a few minutes; of one process the update
    is recorded as it is. On an Apple GPU none is compiled.
    """
    if config.compile is False:
        return False
    if config.compile is None and (device.type not in COMPILE_AFTER_SECONDS or record_wanted(config, device)):
        return False
    if config.compile is None:
        seconds = config.time_budget or math.inf
        if device.type == "cpu":
            # Forward and backward are three times the forward's multiply-additions, two operations each.
            flop = steps * config.batch_size * 6 * plan.multiply_adds
            seconds = min(seconds, flop / (CPU_CORE_FLOP_PER_S * torch.get_num_threads()))
        if seconds < COMPILE_AFTER_SECONDS[device.type]:
            return False
    if (obstacle := compiler.obstacle()) is not None:
        print(f"running eager, because torch.compile finds {obstacle}")
        return False
    return True


def record_wanted(config: TrainConfig, device: torch.device) -> bool:
    """Whether updates are replays of a recorded CUDA graph.

    Raises:
        UsageError: it is asked for and cannot be.
    """
    able = device.type == "cuda" and config.parallel == "none"
    if config.cuda_graph and not able:
        raise UsageError("--cuda-graph needs a GPU and --parallel none; leave it out, or give --no-cuda-graph")
    return able if config.cuda_graph is None else config.cuda_graph


def forms_wanted(config: TrainConfig, model: AlexNet, training_images: int, device: torch.device) -> Forms:
    """How the network computes: as asked or as the run began, else as measured on this GPU.

    Args:
        config: the flags, with their precision resolved.
        model: the network, on ``device``.
        training_images: of the data set.
        device: where it computes.
    """
    available = list(forms(model, device))
    if config.forms:
        chosen = from_table(Forms, config.forms, "--forms")
        if chosen not in available:
            print(f"note: --forms {chosen}: not to be had here; the bits will differ from those of a run that has it")
            chosen = untuned(model, device)
    elif device.type != "cuda" or not config.channels_last:
        chosen = Forms()
    elif config.parallel == "none" and record_wanted(config, device) and not config.compile:
        images = config.epochs * training_images
        if config.max_steps is not None:
            images = min(images, config.max_steps * config.batch_size)
        worth = worth_measuring(model.config, images, config.time_budget)
        chosen = tuned(model.config, config.batch_size, config.precision, device, config.tune, worth)
    else:
        chosen = untuned(model, device)
    if config.parallel in ("tower", "hybrid"):
        # A rank has its own rows of the weights.
        chosen = replace(chosen, shared="apart", towers="in turn")
    return chosen


def identity(config: TrainConfig, data: ImageData, step: int) -> dict[str, object]:
    """What must be the same on all ranks: flags, images and the update to go on from, in words."""
    places = ("data_path", "store", "val_labels", "init_from", "device")
    flags = {f"--{name}": value for name, value in runs.settings(config).items() if name not in places}
    labels, images = hashlib.sha256(), hashlib.sha256()
    for split in (data.train, data.val):
        labels.update(split.labels.tobytes())
        for image in np.linspace(0, len(split) - 1, COMPARED_IMAGES).astype(int):
            images.update(split.images[image].tobytes())
    return {
        **flags,
        "training images": len(data.train),
        "validation images": len(data.val),
        "pixels of an image": data.size**2,
        "classes": ", ".join(data.classes)[:200],
        "labels with the checksum": labels.hexdigest()[:16],
        "pixels with the checksum": images.hexdigest()[:16],
        "mean image with the checksum": hashlib.sha256(data.mean.tobytes()).hexdigest()[:16],
        "update": step,
    }
