"""What ``python -m net.train`` is asked to do: the recipe, presets and every flag. Free of torch."""

from dataclasses import dataclass
from typing import Any, Literal

from ..common.errors import UsageError
from ..common.fields import (
    DEVICES,
    MOST_ROWS,
    MOST_SECONDS,
    MOST_WORKERS,
    at_least,
    at_most,
    flag,
    flag_name,
)
from ..model.config import VARIANTS

TIMEOUTS = ("timeout", "start_timeout", "progress_timeout")


@dataclass(frozen=True)
class RecipeConfig:
    """How the network learns (section 5) and how its images are varied (section 4.1)."""

    lr: float = flag(0.01, "learning rate at the start")
    momentum: float = flag(0.9, "momentum")
    weight_decay: float = flag(5e-4, "weight decay; multiplied by the rate, applied to weights and not to biases")
    bias_lr_multiplier: float = flag(1.0, "rate of the biases relative to the weights' (the 2012 program: 2)")
    lr_scheduler: Literal["plateau", "multistep"] = flag(
        "plateau", "divide the rate when the validation error stalls (the paper), or at the epochs of --lr-milestones"
    )
    lr_milestones: tuple[int, ...] = flag(
        (), "epochs at which multistep divides the rate; 60 and 85 % of --epochs by default", metavar="EPOCH"
    )
    gamma: float = flag(0.1, "factor of each division of the rate")
    patience: int = flag(5, "evaluations without improvement that count as a stall")
    reductions: int = flag(3, "divisions of the rate; the next stall ends the training")
    crop: bool = flag(True, "random crops when the images are larger than the network's input; else the central one")
    reflect: bool = flag(True, "random horizontal reflections")
    colour_noise: float = flag(0.1, "standard deviation of the PCA colour noise's three factors; 0 for none")
    colour_scale: Literal["stddev", "eigenvalue"] = flag(
        "stddev",
        "scale a factor by the component's standard deviation in gray levels (the 2012 program) or by its variance, on "
        "pixels in [0, 1] (the paper as printed)",
    )
    conv_lr_multiplier: float = flag(
        1.0, "rate of the convolutions relative to the dense layers' (Krizhevsky 2014, for larger batches)"
    )
    colour_rescale: bool = flag(False, "divide the image by 1 + colour noise, as the 2012 program does")

    def __post_init__(self) -> None:
        at_least(self, 0, "lr", "momentum", "weight_decay", "colour_noise", called=flag_name)
        at_least(self, 0, "bias_lr_multiplier", "conv_lr_multiplier", called=flag_name)
        at_least(self, 1, "patience", called=flag_name)
        at_least(self, 0, "reductions", called=flag_name)
        if not self.momentum < 1:
            raise UsageError(f"--momentum must be less than 1; got {self.momentum!r}")
        if not 0 < self.gamma < 1:
            raise UsageError(f"--gamma must be between 0 and 1; got {self.gamma!r}")
        if self.lr_scheduler == "multistep" and list(self.lr_milestones) != sorted(set(self.lr_milestones)):
            raise UsageError(f"--lr-milestones must be increasing epochs; got {' '.join(map(str, self.lr_milestones))}")


RECIPES: dict[str, dict[str, Any]] = {
    # The paper's text: section 4.1, section 4.2, section 5.
    "paper": {},
    # Net 145 of the 2012 program: its rate by epoch (notes of the run), biases at twice the rate, colour noise with
    # the image divided by 1.1. Its other habits are not here: one crop for 32 images, conv1 frozen and no colour noise
    # near the end.
    "original_code": {
        "lr_scheduler": "multistep",
        "lr_milestones": (25, 51, 79),
        "epochs": 91,
        "bias_lr_multiplier": 2.0,
        "colour_rescale": True,
    },
    # For small gray digits: reflection and colour noise would change what a digit is.
    "digits": {
        "lr_scheduler": "multistep",
        "reflect": False,
        "colour_noise": 0.0,
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"network": "digits", "recipe": "digits", "epochs": 20, "batch_size": 64, "time_budget": 60.0},
    # The rate is that of cuda-convnet's configuration for this network.
    "cifar10": {"network": "cifar10", "recipe": "paper", "epochs": 150, "lr": 0.001},
    "imagenet": {"network": "paper", "recipe": "paper", "epochs": 90},
}


@dataclass(frozen=True)
class TrainConfig(RecipeConfig):
    """What ``python -m net.train`` is asked to do."""

    preset: Literal["digits", "cifar10", "imagenet"] = flag("digits", "defaults for everything below")
    config: str | None = flag(None, "TOML file of flags, without the dashes; flags given here win", metavar="FILE.toml")
    data_path: str | None = flag(
        None,
        "image folder (train/CLASS/*, val/CLASS/*), packed store, CIFAR-10 archive or its folder, or synthetic[:COUNT]"
        " for random images; the digits preset brings its own",
        metavar="PATH",
    )
    store: str | None = flag(None, "where an image folder is packed (PATH.packed)", metavar="DIR")
    val_labels: str | None = flag(None, "label file of a flat validation folder; see net.prepare", metavar="FILE")
    network: Literal[tuple(VARIANTS)] = flag("paper", "architecture")  # type: ignore[valid-type]
    architecture: dict[str, Any] = flag(
        {}, "fields of the architecture, such as lrn=false dropout=0.3 activation=tanh", key_values=True
    )
    image_size: int | None = flag(None, "rows and columns of the network's input; the architecture's own by default")
    recipe: Literal[tuple(RECIPES)] = flag("paper", "training recipe")  # type: ignore[valid-type]
    epochs: int = flag(90, "passes over the training images; the schedule may end sooner")
    max_steps: int | None = flag(None, "stop after so many updates")
    time_budget: float | None = flag(None, "stop training after so many seconds; 0 for no limit", metavar="SECONDS")
    batch_size: int = flag(128, "images in an update", short="b")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = flag(
        "auto",
        "fp32 (TF32 off), tf32, or bf16 (compute; weights, update and loss stay fp32); auto is bf16 on GPUs that have"
        " it, else fp32",
    )
    channels_last: bool = flag(True, "keep activations in channels_last memory format")
    compile: bool | None = flag(
        None,
        "torch.compile the network; by default in long runs on a CPU, and of several processes on CUDA unless"
        " --time-budget is under five minutes",
    )
    cuda_graph: bool | None = flag(
        None, "record the update as a CUDA graph and replay it; by default where one process trains on a GPU"
    )
    tune: Literal["auto", "off", "again"] = flag(
        "auto", "measure the network's forms on a GPU: auto once for a machine and before long runs only, again, or off"
    )
    forms: dict[str, Any] = flag(
        {},
        "how the network computes, such as first=blocks shared=together; what was measured by default",
        key_values=True,
    )
    device: str | None = flag(None, DEVICES)
    parallel: Literal["none", "data", "tower", "hybrid"] = flag(
        "none",
        "what torchrun's processes share: slices of the batch (data), the paper's towers (tower), or slices for the "
        " convolutions and neurons of the dense layers (hybrid)",
    )
    gradient_compression: Literal["none", "bf16"] = flag(
        "none", "send averaged gradients as bfloat16 (--parallel data, the convolutions of hybrid, pairs of towers)"
    )
    timeout: float = flag(20.0, "end the run when a process keeps the others waiting for so long", metavar="SECONDS")
    start_timeout: float = flag(300.0, "wait so long for all processes to start", metavar="SECONDS")
    progress_timeout: float = flag(
        600.0, "end a process that packs, compiles or saves and reports no progress for so long", metavar="SECONDS"
    )
    workers: int = flag(2, "threads that read images", short="j")
    cache: Literal["device", "host", "none"] = flag(
        "none", "keep the training images in the device's or the host's memory when they fit"
    )
    seed: int = flag(0, "of weights, order, crops, reflections, colour and dropout")
    resume: str | None = flag(
        None, "go on from a checkpoint, or from the newest intact one (auto)", optional_value="auto", metavar="PATH"
    )
    init_from: str | None = flag(
        None, "start from these weights (run folder, checkpoint, state dict, .safetensors or .onnx)", metavar="PATH"
    )
    new_head: bool = flag(False, "with --init-from: start the last layer anew, for other classes (transfer)")
    freeze: tuple[str, ...] = flag((), "with --init-from: layers that stay as they are, such as conv1", metavar="LAYER")
    checkpoint_every: int = flag(0, "updates between checkpoints besides the one of every epoch", metavar="STEPS")
    keep: int = flag(3, "newest checkpoints that are kept")
    output_dir: str | None = flag(None, "run folder; runs/PRESET-NNN by default", metavar="DIR")
    eval_every: int = flag(1, "epochs between evaluations", metavar="EPOCHS")
    log_every: int = flag(20, "updates between lines of progress", metavar="STEPS")
    tensorboard: bool = flag(False, "write TensorBoard events too (needs the extra tensorboard)")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs", "batch_size", "workers", "keep", "eval_every", "log_every", called=flag_name)
        at_least(self, 0, "checkpoint_every", "seed", "time_budget", called=flag_name)
        at_least(self, 1, "max_steps", "image_size", *TIMEOUTS, called=flag_name)
        at_most(self, MOST_WORKERS, "workers", called=flag_name)
        at_most(self, MOST_ROWS, "image_size", called=flag_name)
        at_most(self, MOST_SECONDS, *TIMEOUTS, called=flag_name)
        if self.seed >= 2**63:
            raise UsageError(f"--seed must be less than 2**63; got {self.seed}")
        for name in ("new_head", "freeze"):
            if getattr(self, name) and self.init_from is None:
                raise UsageError(f"{flag_name(name)} goes with --init-from, the weights to start from")
        if self.lr_scheduler == "multistep" and not self.lr_milestones:
            milestones = sorted({max(1, round(0.6 * self.epochs)), max(1, round(0.85 * self.epochs))})
            object.__setattr__(self, "lr_milestones", tuple(milestones))
