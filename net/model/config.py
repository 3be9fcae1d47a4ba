"""Network architectures: layers, their geometry, and the named variants. Free of torch."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..common.errors import UsageError
from ..common.fields import at_least, at_most, from_table

Reads = Literal["image", "tower", "all"]
Operation = Literal["activation", "lrn", "map_norm", "pool"]


def _plain(value: Any) -> Any:
    """``value`` with tuples as lists, as after a JSON round trip."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class ConvolutionConfig:
    """A convolution, and the operations after it (``then``).

    ``reads``: ``"tower"`` reads the channels of its own tower, ``"all"`` those of every tower; the first layer reads
    the image. ``ceil_mode`` rounds the output size up and zero-pads the missing rows and columns at the bottom and
    right, as the 2012 program does. ``weight_std=None`` is PyTorch's default initialization.
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
    """A hidden fully-connected layer, followed by an activation and, in training, dropout."""

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
    """A layer's geometry for one image. Shapes are ``(channels, rows, columns)`` or ``(features,)``."""

    name: str
    kind: Literal["convolution", "stage", "dense"]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    groups: int = 1
    parameters: int = 0
    multiply_adds: int = 0


#: Limit of the normalization window in channels; a larger one would only add padding, and memory for it.
MOST_CHANNELS = 1025


@dataclass(frozen=True)
class AlexNetConfig:
    """A network architecture. Every ablation of the paper is a field.

    Attributes:
        variant: the name of the preset it derives from, for messages and checkpoints.
        image_size: rows and columns of the input.
        image_channels: 3 for RGB.
        classes: number of outputs of the last layer.
        towers: 2 for the paper's two towers; 1 for a network without grouped layers.
        exchange: False removes all exchanges between towers except the last layer's ("no exchange" in the 2012 runs).
        activation: the function that ``"activation"`` in a layer's ``then`` stands for.
        lrn: False removes all response normalization.
        lrn_size, lrn_alpha, lrn_beta, lrn_k: its parameters; alpha is divided by size, so 5e-4 is the paper's 1e-4.
        lrn_across_towers: True normalizes over the channels of both towers (Caffe), False within each tower.
        overlapping_pooling: windows of 3, else of 2; the stride is 2 (section 3.4).
        pool_ceil_mode: round the output size of pooling up.
        dropout: probability of dropping a hidden feature in training; 0 disables it.
        dropout_position: on the outputs of the hidden dense layers (the paper) or on their inputs (torchvision).
        without: names of removed convolutions (section 7). Their pooling stays, so that later sizes do not change.
        convolutions, hidden: the layers. ``output_name`` and ``output_weight_std`` describe the last one.
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
            raise UsageError("lrn_k must be more than 0: zero activations would be divided by zero")
        if self.towers not in (1, 2):
            raise UsageError(f"towers must be 1 or 2; got {self.towers!r}")
        if not self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and less than 1; got {self.dropout!r}")
        known = [convolution.name for convolution in self.convolutions]
        names = [*known, *(dense.name for dense in self.hidden), self.output_name]
        if len(set(names)) < len(names):
            raise UsageError(f"layer names must be unique; got {', '.join(names)}")
        for name in names:
            # Layer names become attributes of the module and must not collide with others.
            if not re.fullmatch(r"conv[0-9]{1,9}" if name in known else r"fc[0-9]{1,9}", name):
                raise UsageError(f"layer names must be conv or fc and a number, such as conv1 and fc6; got {name!r}")
        for name in self.without:
            if name not in known:
                raise UsageError(f"without: {name!r} is not a convolution of {self.variant}; it has {', '.join(known)}")
        if len(set(self.without)) == len(known):
            raise UsageError("without: at least one convolution must remain")
        self.layers()

    @property
    def pool_size(self) -> int:
        """Rows and columns of a pooling window; the stride is 2."""
        return 3 if self.overlapping_pooling else 2

    def operations(self, convolution: ConvolutionConfig) -> tuple[Operation, ...]:
        """The operations after ``convolution`` in this network."""
        if convolution.name in self.without:
            return tuple(item for item in convolution.then if item == "pool")
        return tuple(item for item in convolution.then if self.lrn or item not in ("lrn", "map_norm"))

    def reads(self, layer: ConvolutionConfig | DenseConfig, first: bool) -> Reads:
        """Which channels ``layer`` reads; ``first`` if no convolution comes before it."""
        if first:
            return "image"
        return "all" if self.towers == 1 else layer.reads if self.exchange else "tower"

    def layers(self) -> tuple[Layer, ...]:
        """All layers with their shapes, parameters and multiply-adds for one image.

        Raises:
            UsageError: a layer's input is too small, or its channels are not divisible by the number of towers.
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
            raise UsageError(f"{name}: {outputs} outputs cannot be split into {self.towers} towers")
        if inputs % groups:
            raise UsageError(f"{name}: {inputs} inputs cannot be split into {self.towers} towers")
        return groups

    def _convolution(self, convolution: ConvolutionConfig, reads: Reads, channels: int, size: int) -> Layer:
        kernel, stride = convolution.kernel_size, convolution.stride
        padded = size + 2 * convolution.padding
        if padded < kernel:
            raise UsageError(
                f"{convolution.name}: its {kernel}x{kernel} kernel does not fit its {padded}x{padded} input "
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
                f"{name}: its {self.pool_size}x{self.pool_size} window does not fit its {size}x{size} input "
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
        """Number of weights and biases; 60,965,224 for the paper's network."""
        return sum(layer.parameters for layer in self.layers())

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one image's forward pass."""
        return sum(layer.multiply_adds for layer in self.layers())

    @property
    def training_flop(self) -> int:
        """FLOPs of an image's forward and backward pass, two per multiply-add; the image itself needs no gradient."""
        return 6 * self.multiply_adds - 2 * self.layers()[0].multiply_adds

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries, for checkpoints."""
        values: dict[str, Any] = _plain(dataclasses.asdict(self))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AlexNetConfig":
        """The inverse of :meth:`to_dict`.

        Raises:
            UsageError: an unknown key, or an invalid value.
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
    # Section 3.5: two towers that exchange at conv3 and at the dense layers.
    "paper": AlexNetConfig(),
    # The one-GPU net of section 3.2: half the channels in conv1 to conv4; conv5 and the dense layers keep their size so
    # that both nets have about the same number of parameters.
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
    # within each channel, conv5 pools before its ReLU; alpha is divided by 5; conv3 to conv5 start from N(0, 0.03^2).
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
    # Krizhevsky 2014, as in torchvision: one tower, no normalization, dropout before the dense layers.
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
    # Caffe's bvlc_alexnet: 227x227 input, k=1, alpha divided by 5, LRN windows across the groups, biases of 0.1.
    # Its published weights expect BGR channels.
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
    # The pre-training net of section 6 and Table 2 (1 CNN*): a sixth convolution after the last pooling. Its width, and
    # that it reads both towers, are from net 146 of the 2012 program.
    "sixth_conv": AlexNetConfig(
        variant="sixth_conv",
        convolutions=(*PAPER_CONVOLUTIONS, ConvolutionConfig("conv6", 256, 3, padding=1, reads="all", bias=1.0)),
    ),
    # The 4-layer net of Figure 1 and section 3.3, after cuda-convnet's layers-conv-local-11pct.cfg: 64 and 64 channels
    # with normalization and overlapping pooling, then 32 and 32 channels. The last two are locally connected layers
    # there, and convolutions here.
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
    # The paper's layers and two towers at the size of the embedded digits. The smaller layers need larger initial
    # weights: 0.01 suits fan-ins of thousands.
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
    # The paper's sequence of layers and its two towers for 32x32 photographs, read as crops of the paper's proportion,
    # 28/32 = 224/256. Width and dropout are chosen so that a CPU trains the network within an hour. conv1's weights
    # start small because its inputs are gray levels: starting from 0.01, a learning rate of 0.01 learned nothing.
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
    """A named architecture, with some fields replaced.

    Args:
        variant: a key of :data:`VARIANTS`.
        fields: fields of :class:`AlexNetConfig`.

    Raises:
        UsageError: an unknown name or field, or an invalid combination.
    """
    if variant not in VARIANTS:
        raise UsageError(f"network must be one of {', '.join(VARIANTS)}; got {variant!r}")
    return AlexNetConfig.from_dict({**VARIANTS[variant].to_dict(), **fields})
