"""The network: one definition for every variant, on one device or with its towers on several.

Activations are a list with one tensor for each tower on this device. A layer that reads its own tower applies a slice
of its weights to each tensor; a layer that reads all towers first calls ``exchange``. On one device the exchange is a
concatenation; a parallel strategy replaces it with a collective, without changing this file. The paper's grouped
convolutions are therefore computed as one ungrouped convolution per tower, while the parameters keep the usual grouped
layout (``conv2.weight`` is ``[256, 48, 5, 5]``).

:class:`net.model.forms.Forms` selects between implementations of a layer that differ only in rounding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.reference import memory_format

from ..common.device import Streams, at_once
from .blocks import BlockLayout, block_count, block_weight, blocks
from .config import AlexNetConfig, Layer, network
from .linear import linear

Exchange = Callable[[list[Tensor]], Tensor]

# The first call must be single-threaded, for the same reason as the square root in kernels.traced.
torch.tanh(torch.ones(1, device="cpu"))


def concatenate(towers: list[Tensor]) -> Tensor:
    """The exchange on one device: concatenate the towers' channels or features along dimension 1."""
    return towers[0] if len(towers) == 1 else torch.cat(towers, 1)


def parts(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split dimension 0 by tower. A single part is the tensor itself, which avoids a copy of its gradient."""
    return (tensor,) if count == 1 else tensor.chunk(count)


class _TowerLayer(nn.Module):
    """Base of convolutions and dense layers: selects the inputs, by tower or of all towers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: Layer, reads: str, towers: int) -> None:
        super().__init__()
        self.layer = layer
        self.reads = reads
        #: Number of towers whose weights this module holds. In a layer that reads all towers, the split of its rows
        #: only matters to later layers that read by tower.
        self.towers = towers

    def inputs(self, towers: list[Tensor], exchange: Exchange) -> list[Tensor]:
        """One input per slice of the weights."""
        if self.reads == "image":
            return [towers[0]] * self.towers
        if self.reads == "all":
            return [exchange(towers)] * self.towers
        if len(towers) != self.towers:
            # Made contiguous once, else the convolution copies each slice in forward and again in backward.
            slices = exchange(towers).chunk(self.towers, 1)
            # A slice keeps the memory format of the whole.
            towers = [part.contiguous(memory_format=memory_format(part)) for part in slices]
        return towers

    def extra_repr(self) -> str:
        shapes = " -> ".join("x".join(map(str, shape)) for shape in (self.layer.input_shape, self.layer.output_shape))
        return f"{shapes}, weight={list(self.weight.shape)}, reads={self.reads}"


class Convolution(_TowerLayer):
    """A convolution, for each tower on this device; the stage after it adds the bias."""

    def __init__(self, layer: Layer, reads: str, towers: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__(layer, reads, towers)
        self.stride, self.padding = stride, padding
        in_channels, size, _ = layer.input_shape
        out_channels, out_size, _ = layer.output_shape
        #: Zero padding at the bottom and right that completes the last window (``ceil_mode``).
        self.missing = max(0, (out_size - 1) * stride + kernel_size - size - 2 * padding)
        #: Rows and columns of pixel blocks, if the layer reads blocks; 0 if it reads pixels.
        self.blocks = 0
        #: Whether towers with the same input are one convolution with a single output tensor.
        self.together = False
        #: Each tower's weights as a tensor of its own. If None, the forward pass slices :attr:`weight`, and autograd
        #: concatenates the slices' gradients.
        self.slices: tuple[Tensor, ...] | None = None
        #: Streams of the second and further towers; None runs the towers sequentially.
        self.streams: Streams | None = None
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // layer.groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))

    @property
    def sliced(self) -> bool:
        """Whether each tower is a convolution of its own, with a slice of the weights."""
        return self.towers > 1 and not self.blocks and not self.together

    def read_blocks(self, wanted: bool) -> None:
        """Read blocks of ``stride`` x ``stride`` pixels as channels, if this layer reads the image with a stride."""
        able = self.reads == "image" and self.stride > 1
        size = self.layer.output_shape[1]
        self.blocks = block_count(size, self.weight.shape[-1], self.stride) if wanted and able else 0

    def forward(self, towers: list[Tensor], exchange: Exchange) -> list[Tensor]:
        stride, padding, weight = self.stride, self.padding, self.weight
        if self.blocks:
            (images,) = towers
            if images.shape[1] == self.layer.input_shape[0]:
                images = blocks(images, stride, self.blocks, padding)
            towers, weight, stride, padding = [images], block_weight(weight, stride), 1, 0
        inputs = self.inputs(towers, exchange)
        shared = inputs[0] is inputs[-1]
        if self.missing and not self.blocks:
            border = (0, self.missing, 0, self.missing)
            inputs = [F.pad(inputs[0], border)] * len(inputs) if shared else [F.pad(input, border) for input in inputs]
        if self.together and shared:
            return [F.conv2d(inputs[0], weight, None, stride, padding)]
        pairs = zip(inputs, self.slices or parts(weight, self.towers), strict=True)
        calls = [partial(F.conv2d, input, part, None, stride, padding) for input, part in pairs]
        return [call() for call in calls] if self.streams is None else at_once(calls, self.streams)


class Dense(_TowerLayer):
    """A fully-connected layer; a single matrix product unless it reads by tower."""

    def __init__(self, layer: Layer, reads: str, towers: int) -> None:
        super().__init__(layer, reads, towers if reads == "tower" else 1)
        self.weight = nn.Parameter(torch.empty(layer.output_shape[0], layer.input_shape[0] // layer.groups))
        self.bias = nn.Parameter(torch.empty(layer.output_shape[0]))

    def forward(self, towers: list[Tensor], exchange: Exchange) -> list[Tensor]:
        inputs = self.inputs([tower.flatten(1) for tower in towers], exchange)
        slices = zip(inputs, parts(self.weight, self.towers), parts(self.bias, self.towers), strict=True)
        return [linear(input, weight, bias) for input, weight, bias in slices]


class Stage(nn.Module):
    """The operations after a convolution: bias, activation, normalization and pooling in the configured order."""

    def __init__(self, config: AlexNetConfig, operations: tuple[str, ...]) -> None:
        super().__init__()
        self.operations = operations
        self.activation = config.activation
        self.lrn: dict[str, Any] = {
            "size": config.lrn_size,
            "alpha": config.lrn_alpha,
            "beta": config.lrn_beta,
            "k": config.lrn_k,
        }
        self.pool: dict[str, Any] = {
            "kernel_size": config.pool_size,
            "stride": 2,
            "ceil_mode": config.pool_ceil_mode,
        }
        self.across_towers = "lrn" in operations and config.lrn_across_towers
        #: Number of towers that one operator computes together; 1 computes each tensor by itself.
        self.towers = 1
        #: Whether it writes them to one tensor, for a layer that reads all towers.
        self.joined = False

    @property
    def one_operator(self) -> bool:
        """Whether one operator computes the whole stage of a tower, so that :attr:`towers` may exceed 1."""
        return self.activation == "relu" and not self.across_towers and self.operations in (
            ("activation",), ("activation", "lrn"), ("activation", "pool"), ("activation", "lrn", "pool")
        )  # fmt: skip

    def forward(self, towers: list[Tensor], bias: Tensor | None, exchange: Exchange) -> list[Tensor]:
        if self.across_towers:
            towers = [exchange(towers)]
        elif self.towers > 1:
            assert bias is not None
            lrn = self.lrn if "lrn" in self.operations else None
            pool = self.pool if "pool" in self.operations else None
            return kernels.relu_chunks(towers, bias, self.towers, lrn, pool, joined=self.joined)
        biases = [None] * len(towers) if bias is None else parts(bias, len(towers))
        return [self.run(tower, part) for tower, part in zip(towers, biases, strict=True)]

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the operations to one tower."""
        match (self.activation, *self.operations):
            case ("relu", "activation", "lrn", "pool"):
                return kernels.relu_lrn_max_pool2d(x, **self.lrn, bias=bias, **self.pool)
            case ("relu", "activation", "lrn", *rest):
                x = kernels.relu_local_response_norm(x, **self.lrn, bias=bias)
            case ("relu", "activation", "pool", *rest):
                x = kernels.relu_max_pool2d(x, **self.pool, bias=bias)
            case ("relu", "activation", *rest):
                x = kernels.bias_relu(x, bias)
            case (_, *rest):
                if bias is not None:
                    x = x + bias.to(x.dtype).reshape(-1, 1, 1)
        for operation in rest:
            if operation == "activation":
                x = F.relu(x) if self.activation == "relu" else torch.tanh(x)
            elif operation == "lrn":
                x = kernels.local_response_norm(x, **self.lrn)
            elif operation == "pool":
                x = kernels.max_pool2d(x, **self.pool)
            else:
                x = map_norm(x)
        return x

    def extra_repr(self) -> str:
        return ", ".join(self.activation if item == "activation" else item for item in self.operations)


def map_norm(x: Tensor) -> Tensor:
    """The 2012 program's second normalization of stage 2: over 5x5 pixels of the same channel, scale 0.001 / 25."""
    mean_square = F.avg_pool2d(x * x, 5, stride=1, padding=2)
    return x * (1 + 0.001 * mean_square) ** -0.75


class AlexNet(nn.Module):
    """The network of ``config``. Input: ``[N, 3, image_size, image_size]``, mean-subtracted pixels in 0..255 units.

    Parameters are named ``conv1.weight``, ``conv1.bias``, ..., ``fc8.bias`` and initialized as in the paper
    (section 5) from PyTorch's default generator.

    Args:
        config: the architecture; see :func:`net.model.config.network` for the named ones.
    """

    def __init__(self, config: AlexNetConfig) -> None:
        super().__init__()
        self.config = config
        self.exchange: Exchange = concatenate
        layers = {layer.name: layer for layer in config.layers()}
        #: In order, (convolution, or None if it was removed; stage, or None if no operation follows).
        self.trunk: list[tuple[str | None, str | None]] = []
        first = True
        for convolution in config.convolutions:
            name: str | None = None
            if convolution.name in layers:
                name = convolution.name
                reads = config.reads(convolution, first)
                shape = (convolution.kernel_size, convolution.stride, convolution.padding)
                self.add_module(name, Convolution(layers[name], reads, config.towers, *shape))
                first = False
            stage = None
            if operations := config.operations(convolution):
                stage = "stage" + convolution.name.removeprefix("conv")
                self.add_module(stage, Stage(config, operations))
            self.trunk.append((name, stage))
        for dense in config.hidden:
            self.add_module(dense.name, Dense(layers[dense.name], config.reads(dense, False), config.towers))
        self.add_module(config.output_name, Dense(layers[config.output_name], "all", 1))
        self.dropout = nn.Dropout(config.dropout)
        # On the meta device there are no values, and initializing them would import the front end of torch.compile.
        if not self.get_parameter(f"{config.output_name}.weight").is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialize weights and biases (section 5; PyTorch's default where ``weight_std`` is None)."""
        config = self.config
        starts = [(layer.name, layer.weight_std, layer.bias) for layer in config.convolutions]
        starts += [(layer.name, layer.weight_std, layer.bias) for layer in config.hidden]
        starts.append((config.output_name, config.output_weight_std, 0.0))
        for name, std, bias in starts:
            if name in config.without:
                continue
            module = self.get_submodule(name)
            assert isinstance(module, _TowerLayer)
            if std is None:
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -bound, bound)
            else:
                nn.init.normal_(module.weight, 0.0, std)
                nn.init.constant_(module.bias, bias)

    @property
    def input_layout(self) -> BlockLayout:
        """The layout in which the first convolution reads images: pixels, or blocks of pixels."""
        for name, _ in self.trunk:
            module = None if name is None else self.get_submodule(name)
            if isinstance(module, Convolution) and module.blocks:
                return BlockLayout(module.stride, module.blocks, module.padding)
        return BlockLayout(1, self.config.image_size, 0)

    def _check(self, images: Tensor) -> None:
        size, channels = self.config.image_size, self.config.image_channels
        block, count, _ = self.input_layout
        if block > 1 and images.shape[1:] == (channels * block**2, count, count):
            return
        if images.dim() != 4 or images.shape[1] != channels or tuple(images.shape[2:]) != (size, size):
            raise ValueError(
                f"images must have shape [N, {channels}, {size}, {size}] (variant {self.config.variant}); "
                f"got {list(images.shape)}"
            )
        if not images.is_floating_point():
            raise TypeError(f"images must be floating-point, mean-subtracted pixels; got {images.dtype}")

    def hidden(self, images: Tensor) -> list[Tensor]:
        """The last hidden layer's activations, for each tower on this device; in training after dropout."""
        self._check(images)
        towers = [images]
        for convolution, stage in self.trunk:
            bias = None
            if convolution is not None:
                module = self.get_submodule(convolution)
                towers, bias = module(towers, self.exchange), module.bias
            if stage is not None:
                towers = self.get_submodule(stage)(towers, bias, self.exchange)
        for dense in self.config.hidden:
            if self.config.dropout_position == "input":
                towers = [self.dropout(tower) for tower in towers]
            towers = self.get_submodule(dense.name)(towers, self.exchange)
            activation = F.relu if self.config.activation == "relu" else torch.tanh
            towers = [activation(tower) for tower in towers]
            if self.config.dropout_position == "output":
                towers = [self.dropout(tower) for tower in towers]
        return towers

    def features(self, images: Tensor) -> Tensor:
        """The activations of the last hidden layer (fc7 in the paper, with 4096 features): ``[N, features]``.

        In training mode dropout is applied to them if the architecture has it; call ``eval()`` first for the features
        of section 6.1.
        """
        return self.exchange(self.hidden(images)).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]``.

        Args:
            images: ``[N, 3, image_size, image_size]``, floating point, mean-subtracted pixels in 0..255 units; or, if
                the first convolution reads blocks, the output of :func:`net.model.blocks.blocks`.

        Raises:
            ValueError: another shape. TypeError: not floating point.
        """
        logits: list[Tensor] = self.get_submodule(self.config.output_name)(self.hidden(images), self.exchange)
        return logits[0]


def alexnet(variant: str = "paper", **fields: Any) -> AlexNet:
    """Build a named variant, with fields of :class:`net.model.config.AlexNetConfig` replaced.

    >>> alexnet("paper", classes=100, lrn=False)
    """
    return AlexNet(network(variant, **fields))
