"""The flags of ``python -m net.train``: recipe, presets and everything else. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

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

#: The groups of flags in ``--help``.
GROUPS = (
    "data",
    "model",
    "optimization",
    "augmentation",
    "precision and speed",
    "logging and checkpoints",
    "several processes (torchrun)",
)
_data, _model, _optimization, _augmentation, _speed, _run, _parallel = (partial(flag, group=group) for group in GROUPS)


@dataclass(frozen=True)
class RecipeConfig:
    """How the network learns (section 5) and how its images are varied (section 4.1)."""

    lr: float = _optimization(0.01, "initial learning rate", metavar="X")
    momentum: float = _optimization(0.9, "momentum", metavar="X")
    weight_decay: float = _optimization(5e-4, "weight decay, for weights and not for biases", metavar="X")
    bias_lr_multiplier: float = _optimization(
        1.0, "learning rate of biases relative to weights (2012 program: 2)", metavar="X"
    )
    conv_lr_multiplier: float = _optimization(
        1.0, "learning rate of convolutions relative to dense layers (Krizhevsky 2014, for large batches)", metavar="X"
    )
    lr_scheduler: Literal["plateau", "multistep"] = _optimization(
        "plateau", "reduce the learning rate when the validation error plateaus (the paper), or at --lr-milestones"
    )
    lr_milestones: tuple[int, ...] = _optimization(
        (),
        "epochs at which multistep reduces it, by default 60 and 85 % of --epochs; those of a preset or recipe scale "
        "with --epochs",
        metavar="EPOCH",
    )
    gamma: float = _optimization(0.1, "factor of each reduction", metavar="X")
    patience: int = _optimization(5, "plateau: evaluations without improvement before a reduction", metavar="N")
    reductions: int = _optimization(3, "plateau: number of reductions; the next plateau ends training", metavar="N")
    crop: bool = _augmentation(True, "random crops of images larger than the network's input; else the centre crop")
    reflect: bool = _augmentation(True, "random horizontal reflections")
    colour_noise: float = _augmentation(0.1, "standard deviation of the PCA colour noise; 0 disables it", metavar="X")
    colour_scale: Literal["stddev", "eigenvalue"] = _augmentation(
        "stddev", "unit of that noise: the component's standard deviation (2012 program) or variance (paper)"
    )
    colour_rescale: bool = _augmentation(False, "divide the image by 1 + colour noise, as the 2012 program does")

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
    # Net 145 of the 2012 program: its learning rate by epoch (notes of the run), biases at twice the rate, colour noise
    # with the image divided by 1.1. Not reproduced: one crop for 32 images, and near the end conv1 frozen and no colour
    # noise.
    "original_code": {
        "lr_scheduler": "multistep",
        "lr_milestones": (25, 51, 79),
        "epochs": 91,
        "bias_lr_multiplier": 2.0,
        "colour_rescale": True,
    },
    # On small gray digits, reflection and colour noise do not preserve the class.
    "digits": {
        "lr_scheduler": "multistep",
        "reflect": False,
        "colour_noise": 0.0,
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"network": "digits", "recipe": "digits", "epochs": 20, "batch_size": 64, "time_budget": 60.0},
    # The learning rate is that of cuda-convnet's configuration for this network.
    "cifar10": {"network": "cifar10", "recipe": "paper", "epochs": 150, "lr": 0.001},
    # The paper's recipe at fixed epochs; crops of 28x28 out of 32x32.
    "alexnet32": {
        "network": "alexnet32",
        "recipe": "paper",
        "epochs": 48,
        "lr_scheduler": "multistep",
        "lr_milestones": (30, 42),
    },
    "imagenet": {"network": "paper", "recipe": "paper", "epochs": 90},
}


@dataclass(frozen=True)
class TrainConfig(RecipeConfig):
    """The flags of ``python -m net.train``."""

    GROUPS: ClassVar = GROUPS

    preset: Literal["digits", "cifar10", "alexnet32", "imagenet"] = flag(
        "digits", "data set, and the defaults of all other flags; --preset NAME --help shows them"
    )
    config: str | None = flag(None, "TOML file of flags; the command line overrides it", metavar="FILE.toml")
    data_path: str | None = _data(
        None,
        "image folder (train/CLASS/*, val/CLASS/*) or a .tar or .zip of one, packed store, CIFAR-10 archive or its "
        "folder, or synthetic[:COUNT] for random images; by default the embedded digits",
        metavar="PATH",
    )
    store: str | None = _data(None, "where an image folder is packed; PATH.SIZExSIZE.packed by default", metavar="DIR")
    val_labels: str | None = _data(None, "label file of a flat validation folder; see net.prepare", metavar="FILE")
    hold_out: int = _data(
        0,
        "validate on N training images (the same ones for every seed, in proportion to class size) and train on the "
        "rest",
        metavar="N",
    )
    workers: int = _data(2, "threads that read images", short="j", metavar="N")
    cache: Literal["device", "host", "none"] = _data(
        "none", "keep training images in device or host memory if they fit"
    )
    network: Literal[tuple(VARIANTS)] = _model("paper", "architecture")  # type: ignore[valid-type]
    architecture: dict[str, Any] = _model(  # noqa: RUF009 - a default factory
        {}, "fields of the architecture, such as lrn=false dropout=0.3 activation=tanh", key_values=True
    )
    image_size: int | None = _model(
        None, "rows and columns of the input; the architecture's own by default", metavar="N"
    )
    init_from: str | None = _model(
        None,
        "start from these weights (run folder, checkpoint, state dict, .safetensors, .onnx, pretrained name)",
        metavar="PATH",
    )
    new_head: bool = _model(False, "with --init-from: reinitialize the last layer, for other classes (transfer)")
    freeze: tuple[str, ...] = _model((), "with --init-from: layers to freeze, such as conv1", metavar="LAYER")
    recipe: Literal[tuple(RECIPES)] = _optimization(  # type: ignore[valid-type]
        "paper", "named defaults of optimization and augmentation"
    )
    epochs: int = _optimization(90, "passes over the training images; the schedule may end earlier", metavar="N")
    max_steps: int | None = _optimization(None, "stop after this many updates", metavar="N")
    time_budget: float | None = _optimization(
        None, "stop after this many seconds of training; 0 for no limit", metavar="SECONDS"
    )
    batch_size: int = _optimization(128, "images per update, over all processes", short="b", metavar="N")
    seed: int = _optimization(0, "seed of weights, order, augmentation and dropout", metavar="N")
    device: str | None = _speed(None, DEVICES)
    precision: Literal["auto", "fp32", "tf32", "bf16"] = _speed(
        "auto", "fp32 (TF32 off), tf32, or bf16 with fp32 weights and loss; auto: bf16 on GPUs that have it, else fp32"
    )
    channels_last: bool = _speed(True, "channels_last memory format")
    compile: bool | None = _speed(
        None, "torch.compile; by default for long runs on a CPU, and on several GPUs unless --time-budget is under 300"
    )
    cuda_graph: bool | None = _speed(
        None, "replay updates as a CUDA graph; by default when one process trains on a GPU"
    )
    tune: Literal["auto", "off", "again"] = _speed(
        "auto",
        "measure the network's forms on a GPU: before long runs, once per machine (auto), now (again), or never (off, "
        "which still uses what was measured earlier)",
    )
    forms: dict[str, Any] = _speed(  # noqa: RUF009 - a default factory
        {}, "forms to use, such as first=blocks shared=together; by default the fastest measured", key_values=True
    )
    output_dir: str | None = _run(None, "run folder; runs/PRESET-NNN by default", metavar="DIR")
    resume: str | None = _run(
        None,
        "continue from a checkpoint or run folder; without PATH, from the newest run",
        optional_value="auto",
        metavar="PATH",
    )
    checkpoint_every: int = _run(0, "updates between checkpoints, besides those at ends of epochs", metavar="STEPS")
    keep: int = _run(3, "number of checkpoints to keep, the newest", metavar="N")
    eval_every: int = _run(1, "epochs between evaluations", metavar="EPOCHS")
    log_every: int = _run(20, "updates between log lines", metavar="STEPS")
    tensorboard: bool = _run(False, "also write TensorBoard events (needs the extra tensorboard)")
    parallel: Literal["none", "data", "tower", "hybrid"] = _parallel(
        "none",
        "split the batch (data), the paper's two towers (tower), or the batch in convolutions and the neurons in dense"
        " layers (hybrid)",
    )
    gradient_compression: Literal["none", "bf16"] = _parallel(
        "none", "reduce gradients in bfloat16 (data, the convolutions of hybrid, several pairs of towers)"
    )
    timeout: float = _parallel(20.0, "end the run if a process does not answer for this long", metavar="SECONDS")
    start_timeout: float = _parallel(300.0, "how long to wait for all processes to start", metavar="SECONDS")
    progress_timeout: float = _parallel(
        600.0, "end the run if packing, compiling or saving makes no progress for this long", metavar="SECONDS"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs", "batch_size", "workers", "keep", "eval_every", "log_every", called=flag_name)
        at_least(self, 0, "checkpoint_every", "seed", "time_budget", "hold_out", called=flag_name)
        at_least(self, 1, "max_steps", "image_size", *TIMEOUTS, called=flag_name)
        at_most(self, MOST_WORKERS, "workers", called=flag_name)
        at_most(self, MOST_ROWS, "image_size", called=flag_name)
        at_most(self, MOST_SECONDS, *TIMEOUTS, called=flag_name)
        if self.seed >= 2**63:
            raise UsageError(f"--seed must be less than 2**63; got {self.seed}")
        for name in ("new_head", "freeze"):
            if getattr(self, name) and self.init_from is None:
                raise UsageError(f"{flag_name(name)} needs --init-from, the weights to start from")
        if self.lr_scheduler == "multistep" and not self.lr_milestones:
            milestones = sorted({max(1, round(0.6 * self.epochs)), max(1, round(0.85 * self.epochs))})
            object.__setattr__(self, "lr_milestones", tuple(milestones))

    def check_data_path(self) -> None:
        """Check that a data set is given to presets other than digits, whose own is embedded.

        Raises:
            UsageError: none is.
        """
        if self.data_path is None and self.preset != "digits":
            raise UsageError(
                f"--preset {self.preset} needs --data-path; synthetic gives random images, to measure speed"
            )

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults of the preset and recipe in ``given``; an explicit recipe overrides the preset's values.

        With another number of epochs the learning rate falls at the same fractions of them.
        """
        defaults = dict(PRESETS[given.get("preset", "digits")])
        recipe = RECIPES[given.get("recipe", defaults["recipe"])]
        defaults = {**defaults, **recipe} if "recipe" in given else {**recipe, **defaults}
        if "epochs" in given or "max_steps" in given:
            # An explicit length of training overrides the preset's time budget.
            defaults.pop("time_budget", None)
        if "epochs" in given and "lr_milestones" in defaults:
            scale = given["epochs"] / defaults["epochs"]
            milestones = sorted({max(1, round(scale * epoch)) for epoch in defaults["lr_milestones"]})
            defaults["lr_milestones"] = tuple(milestones)
        return defaults
