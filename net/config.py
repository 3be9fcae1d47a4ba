"""Every dataclass of the project: network variants, training recipe, and what each command is asked to do.

Nothing here imports torch, so that ``--help`` is instant. A command's flags are made from its dataclass by
:mod:`net.cli`; the text beside a field is its help.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import UsageError
from .fields import at_least, at_most, flag, flag_name, from_table

Reads = Literal["image", "tower", "all"]
Operation = Literal["activation", "lrn", "map_norm", "pool"]

#: Help of ``--device``.
DEVICES = (
    "cpu, cuda, cuda:1, mps (an Apple GPU, with PyTorch's own operators, in one process); a CUDA GPU when there is one"
)


def _plain(value: Any) -> Any:
    """``value`` with lists for tuples, as JSON would give it back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class ConvolutionConfig:
    """A convolution and what follows it, in order.

    ``reads``: ``"tower"`` sees the maps of its own tower, ``"all"`` those of every tower. (The first layer reads the
    image.) ``ceil_mode`` rounds the output size up and pads the missing rows and columns with zeros at the bottom and
    right, as the 2012 program does. ``weight_std=None`` is PyTorch's own initialisation.
    """

    name: str
    channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    reads: Reads = "tower"
    then: tuple[Operation, ...] = ("activation",)
    ceil_mode: bool = False
    weight_std: float | None = 0.01
    bias: float = 0.0

    def __post_init__(self) -> None:
        at_least(self, 1, "channels", "kernel_size", "stride", called=self._called)
        at_least(self, 0, "padding", "weight_std", called=self._called)

    def _called(self, field: str) -> str:
        return f"{self.name}: {field}"


@dataclass(frozen=True)
class DenseConfig:
    """A hidden fully-connected layer; an activation and, in training, dropout follow it."""

    name: str
    features: int
    reads: Reads = "all"
    weight_std: float | None = 0.01
    bias: float = 1.0

    def __post_init__(self) -> None:
        at_least(self, 1, "features", called=self._called)
        at_least(self, 0, "weight_std", called=self._called)

    def _called(self, field: str) -> str:
        return f"{self.name}: {field}"


STAGE: tuple[Operation, ...] = ("activation", "lrn", "pool")

#: Section 3.5 and section 5: N(0, 0.01^2) weights; biases of 1 in conv2, conv4, conv5 and the hidden dense layers.
PAPER_CONVOLUTIONS = (
    ConvolutionConfig("conv1", 96, 11, stride=4, ceil_mode=True, then=STAGE),
    ConvolutionConfig("conv2", 256, 5, padding=2, then=STAGE, bias=1.0),
    ConvolutionConfig("conv3", 384, 3, padding=1, reads="all"),
    ConvolutionConfig("conv4", 384, 3, padding=1, bias=1.0),
    ConvolutionConfig("conv5", 256, 3, padding=1, then=("activation", "pool"), bias=1.0),
)
PAPER_HIDDEN = (DenseConfig("fc6", 4096), DenseConfig("fc7", 4096))


@dataclass(frozen=True)
class Layer:
    """The geometry of one layer for one image. Shapes are ``(channels, rows, columns)`` or ``(features,)``."""

    name: str
    kind: Literal["convolution", "stage", "dense"]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    groups: int = 1
    parameters: int = 0
    multiply_adds: int = 0


#: Channels that a normalization's window may span; a larger one would only be padded, with memory for each.
MOST_CHANNELS = 1025


@dataclass(frozen=True)
class AlexNetConfig:
    """The network's architecture. Every ablation of the paper is a field.

    Attributes:
        variant: the name it came from, for messages and checkpoints.
        image_size: rows and columns of the network's input.
        image_channels: 3 for RGB.
        classes: outputs of the last layer.
        towers: 2 for the paper's two columns of maps; 1 connects every map with every map.
        exchange: False removes the exchanges between towers but the last layer's (the 2012 runs' "no exchange").
        activation: what ``"activation"`` in a layer's ``then`` stands for.
        lrn: False removes every response normalization.
        lrn_size, lrn_alpha, lrn_beta, lrn_k: its parameters; alpha is divided by size, so 5e-4 is the paper's 1e-4.
        lrn_across_towers: the window crosses the border between the towers (Caffe).
        overlapping_pooling: windows of 3, else of 2; the stride is 2 (section 3.4).
        pool_ceil_mode: round the number of pooling windows up.
        dropout: probability of dropping a hidden feature in training; 0 removes it.
        dropout_position: on the outputs of the hidden dense layers (the paper) or on their inputs (torchvision).
        without: names of convolutions left out (section 7). Their pooling stays, so that later sizes do not change.
        convolutions, hidden: the layers. ``output_name`` and ``output_weight_std`` belong to the last one.
    """

    variant: str = "paper"
    image_size: int = 224
    image_channels: int = 3
    classes: int = 1000
    towers: int = 2
    exchange: bool = True
    activation: Literal["relu", "tanh"] = "relu"
    lrn: bool = True
    lrn_size: int = 5
    lrn_alpha: float = 5e-4
    lrn_beta: float = 0.75
    lrn_k: float = 2.0
    lrn_across_towers: bool = False
    overlapping_pooling: bool = True
    pool_ceil_mode: bool = False
    dropout: float = 0.5
    dropout_position: Literal["output", "input"] = "output"
    without: tuple[str, ...] = ()
    convolutions: tuple[ConvolutionConfig, ...] = PAPER_CONVOLUTIONS
    hidden: tuple[DenseConfig, ...] = PAPER_HIDDEN
    output_name: str = "fc8"
    output_weight_std: float | None = 0.01

    def __post_init__(self) -> None:
        at_least(self, 1, "image_size", "image_channels", "classes", "lrn_size")
        at_least(self, 0, "lrn_alpha", "lrn_beta", "lrn_k", "dropout", "output_weight_std")
        at_most(self, MOST_CHANNELS, "lrn_size")
        if self.lrn_k == 0:
            raise UsageError("lrn_k must be more than 0: maps of zeros would be divided by zero")
        if self.towers not in (1, 2):
            raise UsageError(f"towers must be 1 or 2; got {self.towers!r}")
        if not self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and less than 1; got {self.dropout!r}")
        known = [convolution.name for convolution in self.convolutions]
        names = [*known, *(dense.name for dense in self.hidden), self.output_name]
        if len(set(names)) < len(names):
            raise UsageError(f"the layers' names must differ; got {', '.join(names)}")
        for name in names:
            # They are attributes of the network, beside its others.
            if not re.fullmatch(r"conv[0-9]{1,9}" if name in known else r"fc[0-9]{1,9}", name):
                raise UsageError(f"layers are called conv and fc with a number, such as conv1 and fc6; got {name!r}")
        for name in self.without:
            if name not in known:
                raise UsageError(f"without: {name!r} is no convolution of {self.variant}; it has {', '.join(known)}")
        if len(set(self.without)) == len(known):
            raise UsageError("without: at least one convolution must stay")
        self.layers()

    @property
    def pool_size(self) -> int:
        """Rows and columns of a pooling window; windows are 2 apart."""
        return 3 if self.overlapping_pooling else 2

    def operations(self, convolution: ConvolutionConfig) -> tuple[Operation, ...]:
        """What follows ``convolution`` in this network."""
        if convolution.name in self.without:
            return tuple(item for item in convolution.then if item == "pool")
        return tuple(item for item in convolution.then if self.lrn or item not in ("lrn", "map_norm"))

    def reads(self, layer: ConvolutionConfig | DenseConfig, first: bool) -> Reads:
        """Whose maps ``layer`` reads; ``first`` says that no convolution comes before it."""
        if first:
            return "image"
        return "all" if self.towers == 1 else layer.reads if self.exchange else "tower"

    def layers(self) -> tuple[Layer, ...]:
        """Every layer that computes, with its shapes, parameters and multiply-additions for one image.

        Raises:
            UsageError: a layer whose input is too small, or whose channels the towers do not divide.
        """
        layers: list[Layer] = []
        channels, size = self.image_channels, self.image_size
        first = True
        for convolution in self.convolutions:
            number = convolution.name.removeprefix("conv")
            if convolution.name not in self.without:
                reads = self.reads(convolution, first)
                layer = self._convolution(convolution, reads, channels, size)
                layers.append(layer)
                channels, size, first = layer.output_shape[0], layer.output_shape[1], False
            operations = self.operations(convolution)
            if operations:
                before = (channels, size, size)
                if "pool" in operations:
                    size = self._pooled(f"pool{number}", size)
                layers.append(Layer(f"stage{number}", "stage", before, (channels, size, size)))
        features = channels * size * size
        for dense in self.hidden:
            layers.append(self._dense(dense.name, self.reads(dense, False), features, dense.features))
            features = dense.features
        layers.append(self._dense(self.output_name, "all", features, self.classes))
        return tuple(layers)

    def _groups(self, name: str, reads: Reads, inputs: int, outputs: int) -> int:
        groups = self.towers if reads == "tower" else 1
        if outputs % self.towers and name != self.output_name:
            raise UsageError(f"{name}: {outputs} outputs cannot be shared by {self.towers} towers")
        if inputs % groups:
            raise UsageError(f"{name}: {inputs} inputs cannot be shared by {self.towers} towers")
        return groups

    def _convolution(self, convolution: ConvolutionConfig, reads: Reads, channels: int, size: int) -> Layer:
        kernel, stride = convolution.kernel_size, convolution.stride
        padded = size + 2 * convolution.padding
        if padded < kernel:
            raise UsageError(
                f"{convolution.name}: its {kernel}x{kernel} kernel does not fit the {padded}x{padded} map it reads "
                f"(image_size {self.image_size} is too small for variant {self.variant})"
            )
        rounded = math.ceil if convolution.ceil_mode else math.floor
        out = rounded((padded - kernel) / stride) + 1
        groups = self._groups(convolution.name, reads, channels, convolution.channels)
        weights = convolution.channels * (channels // groups) * kernel * kernel
        return Layer(
            convolution.name,
            "convolution",
            (channels, size, size),
            (convolution.channels, out, out),
            groups,
            weights + convolution.channels,
            weights * out * out,
        )

    def _pooled(self, name: str, size: int) -> int:
        if size < self.pool_size:
            raise UsageError(
                f"{name}: its {self.pool_size}x{self.pool_size} window does not fit the {size}x{size} map it reads "
                f"(image_size {self.image_size} is too small for variant {self.variant})"
            )
        rounded = math.ceil if self.pool_ceil_mode else math.floor
        return rounded((size - self.pool_size) / 2) + 1

    def _dense(self, name: str, reads: Reads, inputs: int, outputs: int) -> Layer:
        groups = self._groups(name, reads, inputs, outputs)
        weights = outputs * (inputs // groups)
        return Layer(name, "dense", (inputs,), (outputs,), groups, weights + outputs, weights)

    @property
    def parameters(self) -> int:
        """Weights and biases; the paper's network has 60,965,224."""
        return sum(layer.parameters for layer in self.layers())

    @property
    def multiply_adds(self) -> int:
        """Multiply-additions of one image, forward."""
        return sum(layer.multiply_adds for layer in self.layers())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, for checkpoints."""
        values: dict[str, Any] = _plain(dataclasses.asdict(self))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AlexNetConfig":
        """The inverse of :meth:`to_dict`.

        Raises:
            UsageError: a key that is no field, or a value that is not allowed.
        """
        if isinstance(without := values.get("without"), str):
            values = {**values, "without": [without]}
        return from_table(cls, values, "network")


def _changed(layers: tuple[Any, ...], changes: Mapping[str, Mapping[str, Any]]) -> tuple[Any, ...]:
    """``layers`` with fields replaced, by layer name."""
    return tuple(dataclasses.replace(layer, **changes.get(layer.name, {})) for layer in layers)


_LINEAR_STAGE: tuple[Operation, ...] = ("lrn", "pool", "activation")

#: Named architectures. Where the paper's text and its 2012 program differ, ``paper`` follows the text.
VARIANTS: dict[str, AlexNetConfig] = {
    # Section 3.5: two towers that meet at conv3 and at the dense layers.
    "paper": AlexNetConfig(),
    # The one-GPU net the paper compares with (section 3.2): half the maps in conv1 to conv4; conv5 and the dense layers
    # keep their size so that both nets have about as many parameters.
    "half": AlexNetConfig(
        variant="half",
        towers=1,
        convolutions=_changed(
            PAPER_CONVOLUTIONS,
            {
                "conv1": {"channels": 48},
                "conv2": {"channels": 128},
                "conv3": {"channels": 192},
                "conv4": {"channels": 192},
            },
        ),
    ),
    # Net 145 of the 2012 program: stage 1 normalizes and pools before its ReLU, stage 2 has a second normalization
    # inside each map, conv5 pools before its ReLU; alpha is divided by 5; conv3 to conv5 start from N(0, 0.03^2).
    "original_code": AlexNetConfig(
        variant="original_code",
        lrn_alpha=1e-4,
        convolutions=_changed(
            PAPER_CONVOLUTIONS,
            {
                "conv1": {"then": _LINEAR_STAGE},
                "conv2": {"then": ("activation", "lrn", "map_norm", "pool")},
                "conv3": {"weight_std": 0.03},
                "conv4": {"weight_std": 0.03},
                "conv5": {"weight_std": 0.03, "then": ("pool", "activation")},
            },
        ),
    ),
    # Krizhevsky 2014, as torchvision builds it: one tower, no normalization, dropout before the dense layers.
    "one_weird_trick": AlexNetConfig(
        variant="one_weird_trick",
        towers=1,
        lrn=False,
        dropout_position="input",
        convolutions=(
            ConvolutionConfig("conv1", 64, 11, stride=4, padding=2, then=("activation", "pool"), weight_std=None),
            ConvolutionConfig("conv2", 192, 5, padding=2, then=("activation", "pool"), weight_std=None),
            ConvolutionConfig("conv3", 384, 3, padding=1, weight_std=None),
            ConvolutionConfig("conv4", 256, 3, padding=1, weight_std=None),
            ConvolutionConfig("conv5", 256, 3, padding=1, then=("activation", "pool"), weight_std=None),
        ),
        hidden=(DenseConfig("fc6", 4096, weight_std=None), DenseConfig("fc7", 4096, weight_std=None)),
        output_weight_std=None,
    ),
    # Caffe's bvlc_alexnet: 227x227 input, k=1, alpha divided by 5, windows across the groups' border, biases of 0.1.
    # Its published weights expect the channels in the order blue, green, red.
    "caffe": AlexNetConfig(
        variant="caffe",
        image_size=227,
        lrn_alpha=1e-4,
        lrn_k=1.0,
        lrn_across_towers=True,
        convolutions=_changed(
            PAPER_CONVOLUTIONS,
            {
                "conv1": {"ceil_mode": False},
                "conv2": {"bias": 0.1},
                "conv4": {"bias": 0.1},
                "conv5": {"bias": 0.1},
            },
        ),
        hidden=(
            DenseConfig("fc6", 4096, weight_std=0.005, bias=0.1),
            DenseConfig("fc7", 4096, weight_std=0.005, bias=0.1),
        ),
    ),
    # The pre-training net of section 6 and Table 2 (1 CNN*): a sixth convolution behind the last pooling. Its width and
    # that it reads both towers are net 146 of the 2012 program.
    "sixth_conv": AlexNetConfig(
        variant="sixth_conv",
        convolutions=(*PAPER_CONVOLUTIONS, ConvolutionConfig("conv6", 256, 3, padding=1, reads="all", bias=1.0)),
    ),
    # The 4-layer net of Figure 1 and section 3.3, after cuda-convnet's layers-conv-local-11pct.cfg: 64 and 64 maps with
    # normalization and overlapping pooling, then 32 and 32 maps. Those last two are locally connected layers there;
    # here they are convolutions, which share their weights over the map.
    "cifar10": AlexNetConfig(
        variant="cifar10",
        image_size=32,
        classes=10,
        towers=1,
        lrn_alpha=1e-3,
        lrn_k=1.0,
        pool_ceil_mode=True,
        dropout=0.0,
        convolutions=(
            ConvolutionConfig("conv1", 64, 5, padding=2, then=STAGE, weight_std=0.0001),
            ConvolutionConfig("conv2", 64, 5, padding=2, then=STAGE),
            ConvolutionConfig("conv3", 32, 3, padding=1, weight_std=0.04),
            ConvolutionConfig("conv4", 32, 3, padding=1, weight_std=0.04),
        ),
        hidden=(),
        output_name="fc5",
    ),
    # The paper's sequence of layers and its two towers at the size of the embedded digits. The smaller layers need
    # larger initial weights: 0.01 suits fan-ins of thousands.
    "digits": AlexNetConfig(
        variant="digits",
        image_size=32,
        classes=10,
        convolutions=(
            ConvolutionConfig("conv1", 32, 5, stride=1, padding=2, then=STAGE),
            ConvolutionConfig("conv2", 64, 5, padding=2, then=STAGE, weight_std=0.05),
            ConvolutionConfig("conv3", 96, 3, padding=1, reads="all", weight_std=0.05),
            ConvolutionConfig("conv4", 96, 3, padding=1, weight_std=0.05),
            ConvolutionConfig("conv5", 64, 3, padding=1, then=("activation", "pool"), weight_std=0.05),
        ),
        hidden=(DenseConfig("fc6", 256, weight_std=0.05, bias=0.0), DenseConfig("fc7", 256, weight_std=0.05, bias=0.0)),
        output_weight_std=0.05,
    ),
    # The paper's sequence of layers and its two towers for 32x32 photographs, of which it reads crops of the paper's
    # share, 28/32 = 224/256. Widths and dropout are those of a network that a CPU trains within an hour. conv1's
    # weights start small because its inputs are gray levels: from 0.01 on, a rate of 0.01 turned every ReLU off.
    "alexnet32": AlexNetConfig(
        variant="alexnet32",
        image_size=28,
        classes=10,
        dropout=0.3,
        convolutions=(
            ConvolutionConfig("conv1", 32, 5, padding=2, then=STAGE, weight_std=0.003),
            ConvolutionConfig("conv2", 64, 5, padding=2, then=STAGE, weight_std=0.05),
            ConvolutionConfig("conv3", 128, 3, padding=1, reads="all", weight_std=0.05),
            ConvolutionConfig("conv4", 128, 3, padding=1, weight_std=0.05),
            ConvolutionConfig("conv5", 96, 3, padding=1, then=("activation", "pool"), weight_std=0.05),
        ),
        hidden=(DenseConfig("fc6", 512, weight_std=0.05, bias=0.0), DenseConfig("fc7", 512, weight_std=0.05, bias=0.0)),
    ),
}


def network(variant: str, **fields: Any) -> AlexNetConfig:
    """The named architecture with some fields replaced.

    Args:
        variant: a key of :data:`VARIANTS`.
        fields: fields of :class:`AlexNetConfig`.

    Raises:
        UsageError: an unknown name, or a combination that cannot be built.
    """
    if variant not in VARIANTS:
        raise UsageError(f"network must be one of {', '.join(VARIANTS)}; got {variant!r}")
    return AlexNetConfig.from_dict({**VARIANTS[variant].to_dict(), **fields})


#: Limits far beyond what helps, so that a number with a digit too many is refused by name: threads and processes,
#: images in a batch that is only looked at, rows of an image, seconds of waiting.
MOST_WORKERS, MOST_IMAGES, MOST_ROWS, MOST_SECONDS = 1024, 2**16, 2**16, 10**6
TIMEOUTS = ("timeout", "start_timeout", "progress_timeout")

#: The ``--data-path`` of random images, perhaps with a number behind it: ``synthetic:2048``.
SYNTHETIC = "synthetic"

#: The classes of the synthetic shapes (net.data.shapes), in the order of their folders: three words each, and each word
#: is needed to tell them apart.
SHAPES = tuple(
    f"{colour}_{texture}_{shape}"
    for colour in ("blue", "green", "red")
    for texture in ("chequered", "striped")
    for shape in ("disc", "triangle")
)


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
    """What ``python -m net.train`` is asked to do."""

    preset: Literal["digits", "cifar10", "alexnet32", "imagenet"] = flag("digits", "defaults for everything below")
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
    hold_out: int = flag(
        0,
        "evaluate on so many training images, the same share of each class and the same images whatever the seed, and "
        "learn from the others; the validation images are not looked at (to choose a recipe)",
        metavar="IMAGES",
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
        at_least(self, 0, "checkpoint_every", "seed", "time_budget", "hold_out", called=flag_name)
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


@dataclass(frozen=True)
class EvaluateConfig:
    """What ``python -m net.evaluate`` is asked to do."""

    checkpoints: tuple[str, ...] = flag(
        (),
        "run folders, checkpoints (.pt) or weights (.safetensors, .onnx, .pt, .pth); several are averaged",
        positional=True,
    )
    data_path: str | None = flag(None, "as in net.train; by default what the first was trained on", metavar="PATH")
    ten_crops: bool = flag(True, "also average over ten crops where the images are larger than the network's input")
    batch_size: int = flag(128, "images in a batch", short="b")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = flag(
        "auto", "as in net.train; auto is what the network was trained in, where the device has it"
    )
    channels_last: bool = flag(True, "keep activations in channels_last memory format")
    device: str | None = flag(None, DEVICES)
    workers: int = flag(2, "threads that read images", short="j")
    output: str | None = flag(None, "JSON file; evaluation.json beside the first checkpoint by default", metavar="FILE")
    mean_rgb: tuple[float, ...] | None = flag(
        None,
        "colour to subtract, in 0..255, for a network whose file holds no mean image; Caffe's ImageNet models were "
        "trained with 123 117 104",
        nargs=3,
        metavar=("R", "G", "B"),
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "workers", called=flag_name)
        at_most(self, MOST_IMAGES, "batch_size", called=flag_name)
        at_most(self, MOST_WORKERS, "workers", called=flag_name)
        _check_colour(self.mean_rgb)


@dataclass(frozen=True)
class PredictConfig:
    """What ``python -m net.predict`` is asked to do."""

    checkpoint: str = flag("", "run folder, checkpoint (.pt) or weights", positional=True)
    images: tuple[str, ...] = flag((), "image files", positional=True)
    ten_crops: bool = flag(False, "average over ten crops; else the central one")
    json: bool = flag(False, "JSON instead of a table")
    features: str | None = flag(
        None, "write the central crops' last hidden features (fc7), float32 [images, features]", metavar="FILE.npy"
    )
    mean_rgb: tuple[float, ...] | None = flag(
        None,
        "colour to subtract, in 0..255, for a network whose file holds no mean image; Caffe's ImageNet models were "
        "trained with 123 117 104",
        nargs=3,
        metavar=("R", "G", "B"),
    )
    batch_size: int = flag(128, "images in a batch", short="b")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = flag(
        "auto", "as in net.train; auto is what the network was trained in, where the device has it"
    )
    device: str | None = flag(None, DEVICES)

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", called=flag_name)
        at_most(self, MOST_IMAGES, "batch_size", called=flag_name)
        _check_colour(self.mean_rgb)
        if self.features is not None and not self.features.endswith(".npy"):
            raise UsageError(f"--features must end in .npy; got {self.features}")


def _check_colour(colour: tuple[float, ...] | None) -> None:
    if colour is not None and not (len(colour) == 3 and all(0 <= value <= 255 for value in colour)):
        raise UsageError(f"--mean-rgb must be three numbers in 0..255; got {' '.join(map(str, colour))}")


@dataclass(frozen=True)
class TuneConfig:
    """What ``python -m net.tune`` is asked to do."""

    network: Literal[tuple(VARIANTS)] = flag("paper", "architecture")  # type: ignore[valid-type]
    batch_size: int = flag(128, "images in an update", short="b")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = flag("auto", "as in net.train")
    device: str | None = flag(None, "cuda, cuda:1, ...; the first GPU by default")

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", called=flag_name)


@dataclass(frozen=True)
class FiltersConfig:
    """What ``python -m net.figures filters`` is asked to do."""

    checkpoint: str = flag("", "run folder, checkpoint (.pt) or weights (.safetensors)", positional=True)
    output: str | None = flag(None, "filters.png in the run folder by default", metavar="FILE.png")

    def __post_init__(self) -> None:
        _is_png(self.output)


@dataclass(frozen=True)
class PredictionsConfig:
    """What ``python -m net.figures predictions`` is asked to do."""

    checkpoint: str = flag("", "run folder, checkpoint (.pt) or weights (.safetensors)", positional=True)
    data_path: str | None = flag(None, "as in net.train; by default what it was trained on", metavar="PATH")
    seed: int = flag(0, "which images are drawn")
    device: str | None = flag(None, DEVICES)
    output: str | None = flag(None, "predictions.png in the run folder by default", metavar="FILE.png")

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", called=flag_name)
        _is_png(self.output)


@dataclass(frozen=True)
class NeighboursConfig:
    """What ``python -m net.figures neighbours`` is asked to do."""

    checkpoint: str = flag("", "run folder, checkpoint (.pt) or weights (.safetensors)", positional=True)
    data_path: str | None = flag(None, "as in net.train; by default what it was trained on", metavar="PATH")
    seed: int = flag(0, "which images are drawn")
    batch_size: int = flag(128, "images in a batch", short="b")
    device: str | None = flag(None, DEVICES)
    output: str | None = flag(None, "neighbours.png in the run folder by default", metavar="FILE.png")

    def __post_init__(self) -> None:
        at_least(self, 0, "seed", called=flag_name)
        at_least(self, 1, "batch_size", called=flag_name)
        _is_png(self.output)


@dataclass(frozen=True)
class ActivationsConfig:
    """What ``python -m net.figures activations`` is asked to do."""

    data_path: str | None = flag(None, "as in net.train; the embedded digits by default", metavar="PATH")
    rates: tuple[float, ...] = flag(
        (0.001, 0.003, 0.01), "learning rates to try; each activation keeps its fastest", metavar="RATE"
    )
    max_epochs: int = flag(60, "epochs after which a training that has not come to 25 % is given up")
    batch_size: int = flag(128, "images in an update", short="b")
    seed: int = flag(0, "of weights and order")
    device: str | None = flag(None, DEVICES)
    output: str | None = flag(None, "runs/activations.png by default", metavar="FILE.png")

    def __post_init__(self) -> None:
        at_least(self, 1, "max_epochs", "batch_size", called=flag_name)
        at_least(self, 0, "seed", called=flag_name)
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise UsageError(f"--rates must be more than 0; got {rate!r}")
        _is_png(self.output)


def _is_png(output: str | None) -> None:
    if output is not None and not output.endswith(".png"):
        raise UsageError(f"--output must end in .png; got {output}")


@dataclass(frozen=True)
class HashingConfig:
    """What ``python -m net.hashing`` is asked to do."""

    checkpoint: str = flag("", "run folder, checkpoint (.pt) or weights (.safetensors)", positional=True)
    data_path: str | None = flag(None, "as in net.train; by default what it was trained on", metavar="PATH")
    bits: int = flag(64, "bits of a code, a multiple of 64")
    epochs: int = flag(30, "passes of the auto-encoder over the training images' features")
    queries: int = flag(1000, "validation images that are searched for")
    seed: int = flag(0, "of the auto-encoder and of the queries")
    batch_size: int = flag(128, "images in a batch", short="b")
    device: str | None = flag(None, DEVICES)
    output: str | None = flag(None, "JSON file; hashing.json in the run folder by default", metavar="FILE")

    def __post_init__(self) -> None:
        at_least(self, 1, "bits", "epochs", "queries", "batch_size", called=flag_name)
        at_least(self, 0, "seed", called=flag_name)
        if self.bits % 64:
            raise UsageError(f"--bits must be a multiple of 64; got {self.bits}")


@dataclass(frozen=True)
class ShapesConfig:
    """What ``python -m net.data.shapes`` is asked to do."""

    folder: str = flag("", "folder to render into; new or empty", positional=True)
    train: int = flag(400, "training images of each class")
    val: int = flag(100, "validation images of each class")
    size: int = flag(64, "rows and columns of an image")
    seed: int = flag(0, "the same seed gives the same images")
    workers: int | None = flag(None, "processes; one a core by default", short="j")

    def __post_init__(self) -> None:
        at_least(self, 1, "train", "val", "workers", called=flag_name)
        at_most(self, MOST_WORKERS, "workers", called=flag_name)
        at_most(self, MOST_ROWS, "size", called=flag_name)
        at_least(self, 8, "size", called=flag_name)
        at_least(self, 0, "seed", called=flag_name)


@dataclass(frozen=True)
class AblationsConfig:
    """What ``python -m net.ablations`` is asked to do."""

    names: tuple[str, ...] = flag((), "ablations; all by default", positional=True, nargs="*", metavar="NAME")
    data_path: str | None = flag(None, "as in net.train; the embedded digits by default", metavar="PATH")
    baseline: str | None = flag(
        None,
        "TOML file of net.train's flags for the network that is compared with; by default the small network of the "
        "digits preset, and the paper's on stored images of 256x256 and more",
        metavar="FILE.toml",
    )
    seeds: int = flag(3, "trainings of each network, with the seeds 0, 1, ...; at least 3", metavar="COUNT")
    quick: bool = flag(False, "a sixth of the epochs: to see that it works, not to learn much")
    workers: int | None = flag(
        None,
        "trainings at a time, each in a process with its share of the cores; by default as many as there are cores for "
        "small images on a CPU, else one",
        short="j",
    )
    device: str | None = flag(None, DEVICES)
    output_dir: str | None = flag(
        None, "folder of the results, runs/ablations or runs/ablations-quick by default", metavar="DIR"
    )

    def __post_init__(self) -> None:
        at_least(self, 3, "seeds", called=flag_name)
        at_least(self, 1, "workers", called=flag_name)
        at_most(self, MOST_WORKERS, "workers", called=flag_name)


@dataclass(frozen=True)
class ExportConfig:
    """What ``python -m net.export`` is asked to do."""

    checkpoint: str = flag("", "run folder, checkpoint (.pt) or weights (.safetensors, .onnx)", positional=True)
    output: str = flag("", "file to write: .onnx, .safetensors, or .pt2 for the other formats", positional=True)
    format: Literal["onnx", "torch-export", "aoti", "safetensors"] = flag(
        "onnx",
        "ONNX, a torch.export program, a package that AOTInductor compiled, or half-precision weights with the mean "
        "image, the recipe and the error of that very file",
    )
    data_path: str | None = flag(
        None,
        "images on which the error of --format safetensors is measured, as in net.evaluate; by default what the "
        "network was trained on",
        metavar="PATH",
    )
    device: str | None = flag(None, "as in net.train; where an aoti package runs")

    def __post_init__(self) -> None:
        suffix = {"onnx": ".onnx", "safetensors": ".safetensors"}.get(self.format, ".pt2")
        if not self.output.endswith(suffix):
            raise UsageError(f"OUTPUT of --format {self.format} must end in {suffix}; got {self.output}")
        if self.data_path is not None and self.format != "safetensors":
            raise UsageError("--data-path goes with --format safetensors, whose error is measured")


@dataclass(frozen=True)
class PrepareConfig:
    """What ``python -m net.prepare`` is asked to do."""

    source: str = flag("", "image folder: train/CLASS/*, val/CLASS/* (or val/* with --val-labels)", positional=True)
    target: str | None = flag(None, "folder of the packed store", positional=True, optional_value=None)
    size: int = flag(256, "rows and columns of a packed image")
    val_labels: str | None = flag(
        None,
        "label file of a flat val folder: lines of 'FILE CLASS' or a table with such columns, ImageNet's "
        "LOC_val_solution.csv, or one class a line in the order of the file names",
        metavar="FILE",
    )
    workers: int | None = flag(None, "processes; one a core by default", short="j")
    verify: bool = flag(False, "compare every byte of the finished store SOURCE with its checksums, and stop")

    def __post_init__(self) -> None:
        at_least(self, 1, "size", "workers", called=flag_name)
        at_most(self, MOST_WORKERS, "workers", called=flag_name)
        at_most(self, MOST_ROWS, "size", called=flag_name)
        if (self.target is None) != self.verify:
            raise UsageError("give SOURCE and TARGET, or --verify and a store")
