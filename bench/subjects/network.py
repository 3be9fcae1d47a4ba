"""The layers and whole steps of a network, as calls that can be timed."""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net.common.device import autocast, repeat_bits, set_precision
from net.data.augmentation import TrainingInput, VariationTable
from net.data.images import ColourComponents
from net.model.alexnet import AlexNet, Convolution, Dense, Stage, alexnet
from net.model.blocks import blocks
from net.model.config import VARIANTS, AlexNetConfig, Layer
from net.model.forms import untuned, use
from net.training.config import RecipeConfig, TrainConfig
from net.training.recipe import PaperSGD, Schedule, parameter_groups
from net.training.step import TrainingStep

from ..measure.memory import kept_bytes
from ..measure.timing import copies
from ..predict.roofline import PRODUCT_MODES, STAGE_MODES, InOrder, Work, layers, optimizer
from .cases import DTYPES

#: Pixels along the side of a stored image, which is larger than the network's input.
STORED = 256
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


#: torchvision's network, where that is installed; its layers are those of ``one_weird_trick``.
TORCHVISION = "torchvision's alexnet"


class LayerCalls(NamedTuple):
    """Calls that do the same with different inputs, the work of one call, and further columns of its row."""

    name: str
    mode: str
    calls: list[Callable[[], object]]
    work: Work
    columns: dict[str, Any]


def plan_of(network: str) -> AlexNetConfig:
    """The layers of a variant, or of :data:`TORCHVISION`."""
    return VARIANTS["one_weird_trick" if network == TORCHVISION else network]


def build(variant: str, device: torch.device) -> AlexNet:
    """A variant with its initial weights, in channels_last."""
    torch.manual_seed(0)
    set_precision("fp32", device)
    repeat_bits()
    model: AlexNet = alexnet(variant).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_any(network: str, device: torch.device) -> nn.Module:
    """As :func:`build`; also :data:`TORCHVISION`."""
    if network != TORCHVISION:
        return build(network, device)
    torch.manual_seed(0)
    set_precision("fp32", device)
    repeat_bits()
    model: nn.Module = importlib.import_module("torchvision").models.alexnet()
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def images_and_labels(network: str, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean-subtracted pixels in channels_last, and labels."""
    plan = plan_of(network)
    images = torch.randn(count, 3, plan.image_size, plan.image_size, device=device) * 60
    labels = torch.randint(0, plan.classes, (count,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


def paper_sgd(model: nn.Module) -> PaperSGD:
    """The paper's optimizer at its initial learning rate."""
    recipe = TrainConfig()
    optimizer = PaperSGD(parameter_groups(model, recipe), recipe.lr, recipe.momentum, recipe.weight_decay)
    Schedule(recipe).apply(optimizer)
    return optimizer


def training_loss(forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, dtype: str) -> Tensor:
    """The forward pass of a training step."""
    with autocast(PRECISIONS[dtype], images.device):
        return F.cross_entropy(forward(images), labels)


def update_step(
    model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, dtype: str
) -> Callable[[], object]:
    """Forward, backward and update."""
    sgd = paper_sgd(model)

    def update() -> None:
        training_loss(forward, images, labels, dtype).backward()
        sgd.step()
        sgd.zero_grad()

    return update


def training_step(
    model: nn.Module, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, dtype: str, *, record: bool
) -> Callable[[], object]:
    """A training step as net.train runs it on a GPU: captured as a CUDA graph, images in the compute dtype.

    This project's network is uncompiled, uses the forms that net.train uses before tuning, takes images in the layout
    of its input kernel, and in bfloat16 reads copies of its weights. Other networks use the same optimizer and are
    captured too.
    """
    sgd = paper_sgd(model)
    images = images.to(DTYPES[dtype])
    ours = False
    if forward is model and isinstance(model, AlexNet):
        ours = True
        use(model, untuned(model, images.device))
        layout = model.input_layout
        if layout.block > 1:
            images = blocks(images, *layout)
    copies = ours and dtype == "bfloat16" and sgd.capturable
    step = TrainingStep(model, forward, sgd, PRECISIONS[dtype], record=record, copies=copies)

    def update() -> None:
        step(images if step.images is None else step.images, labels)
        if record and not step.record:
            raise RuntimeError(f"the update cannot be captured: {step.obstacle}")

    return update


def inference_step(forward: Callable[[Tensor], Tensor], images: Tensor, dtype: str) -> Callable[[], object]:
    """Logits without a gradient."""

    def infer() -> Tensor:
        with torch.inference_mode(), autocast(PRECISIONS[dtype], images.device):
            return forward(images)

    return infer


def layer_modes(variant: str) -> Iterator[tuple[str, str]]:
    """Name and mode of each of :func:`layer_calls`, in its order."""
    for number, layer in enumerate(VARIANTS[variant].layers()):
        for mode in STAGE_MODES if layer.kind == "stage" else PRODUCT_MODES:
            if number or mode != "input_gradient":
                yield layer.name, mode
    yield from ((name, "training") for name in ("loss", "optimizer", "input preparation"))


def layer_calls(variant: str, count: int, dtype: str, device: torch.device) -> Iterator[LayerCalls]:
    """Every layer of a network by itself; weights and activations are stored in ``dtype``, so nothing is cast.

    A convolution or dense layer has the modes ``forward``, ``input_gradient`` (except the first layer) and
    ``weight_gradient``, each for all towers together, without bias, activation and dropout. A stage has ``forward``,
    which saves what its gradient needs, and ``backward``. On a GPU there are enough calls, each with its own tensors,
    that none finds them in the cache. Loss, optimizer and input preparation come last, in the mode ``training``.
    """
    model = build(variant, device)
    plan = model.config
    works = layers(plan, count, DTYPES[dtype].itemsize)
    biases: dict[str, Any] = {stage: model.get_submodule(name).bias for name, stage in model.trunk if name and stage}
    for number, layer in enumerate(plan.layers()):
        module = model.get_submodule(layer.name)
        assert isinstance(module, (Convolution, Dense, Stage))
        work = works[layer.name]
        sets = copies(work["forward"].bytes) if device.type == "cuda" else 1
        make: Any = _stage_calls if isinstance(module, Stage) else _product_calls
        made = []
        for _ in range(sets):
            towers = 1 if number == 0 else plan.towers
            parts = [_activations(count, layer.input_shape, towers, dtype, device) for _ in range(towers)]
            made.append(make(module, parts, biases.get(layer.name), model, DTYPES[dtype]))
        for mode in STAGE_MODES if isinstance(module, Stage) else PRODUCT_MODES:
            if number or mode != "input_gradient":
                columns = _columns(model, layer, parts, biases.get(layer.name), dtype) if mode == "forward" else {}
                yield LayerCalls(layer.name, mode, [calls[mode] for calls in made], work[mode], columns)
        del made, parts
    yield from _others(model, count, dtype, device)


Calls = dict[str, Callable[[], object]]


def _product_calls(module: Any, parts: list[Tensor], bias: None, model: AlexNet, dtype: torch.dtype) -> Calls:
    """A convolution or dense layer's towers, in one call per mode."""
    if isinstance(module, Dense):
        parts = [part.flatten(1) for part in parts]
    inputs = module.inputs(parts, model.exchange)
    if isinstance(module, Convolution) and module.missing:
        border = (0, module.missing, 0, module.missing)
        inputs = [_laid_out(F.pad(inputs[0], border))] * len(inputs)
    weights = [_laid_out(weight.detach().to(dtype, copy=True)) for weight in module.weight.chunk(module.towers)]
    pairs = list(zip(inputs, weights, strict=True))
    if isinstance(module, Dense):
        # A layer that reads every tower is one product.
        gradients = [torch.randn(len(input), len(weight), device=input.device).to(dtype) for input, weight in pairs]
        return {
            "forward": lambda: [F.linear(input, weight) for input, weight in pairs],
            "input_gradient": lambda: [g @ weight for g, weight in zip(gradients, weights, strict=True)],
            "weight_gradient": lambda: [g.t() @ input for g, input in zip(gradients, inputs, strict=True)],
        }
    stride, padding = [module.stride] * 2, [module.padding] * 2

    def forward() -> list[Tensor]:
        return [F.conv2d(input, weight, None, stride, padding) for input, weight in pairs]

    gradients = [torch.randn_like(output) for output in forward()]

    def backward(*wanted: bool) -> list[Any]:
        return [
            torch.ops.aten.convolution_backward(
                gradient, input, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [*wanted, False]
            )
            for gradient, (input, weight) in zip(gradients, pairs, strict=True)
        ]

    return {
        "forward": forward,
        "input_gradient": lambda: backward(True, False),
        "weight_gradient": lambda: backward(False, True),
    }


def _stage_calls(module: Stage, parts: list[Tensor], bias: Any, model: AlexNet, dtype: torch.dtype) -> Calls:
    for part in parts:
        part.requires_grad_()
    wanted = [*parts, bias] if bias is not None else parts

    def forward() -> list[Tensor]:
        return module(parts, bias, model.exchange)  # type: ignore[no-any-return]

    outputs = forward()
    gradients = [torch.randn_like(output) for output in outputs]
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True),
    }


def _columns(model: AlexNet, layer: Layer, parts: list[Tensor], bias: Any, dtype: str) -> dict[str, Any]:
    """Parameters and memory of a layer as in the network: a dense layer includes its activation and dropout."""
    module = model.get_submodule(layer.name)
    parts = [part.detach().requires_grad_(layer.name != model.config.layers()[0].name) for part in parts]

    def run() -> list[Tensor]:
        with autocast(PRECISIONS[dtype], parts[0].device):
            if isinstance(module, Stage):
                return module(parts, bias, model.exchange)  # type: ignore[no-any-return]
            outputs: list[Tensor] = module(parts, model.exchange)
            if isinstance(module, Dense) and layer.name != model.config.output_name:
                outputs = [model.dropout(F.relu(output)) for output in outputs]
            return outputs

    return {
        "parameters": layer.parameters,
        "output_mib": round(sum(output.numel() * output.element_size() for output in run()) / 2**20, 3),
        "saved_mib": round(kept_bytes(run, model.parameters()) / 2**20, 3),
    }


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()


def _activations(count: int, shape: tuple[int, ...], towers: int, dtype: str, device: torch.device) -> Tensor:
    """A tower's part of a layer's input."""
    channels, *sizes = shape
    return _laid_out((torch.randn(count, channels // towers, *sizes, device=device) * 30).to(DTYPES[dtype]))


def _others(model: AlexNet, count: int, dtype: str, device: torch.device) -> Iterator[LayerCalls]:
    plan = model.config
    logits = torch.randn(count, plan.classes, device=device, requires_grad=True)
    labels = torch.randint(0, plan.classes, (count,), device=device)

    def loss() -> object:
        return torch.autograd.grad(F.cross_entropy(logits, labels), logits)

    # Exponentials, their sum and logarithm, and the difference from the labels; logits in twice, gradient out.
    elements = count * plan.classes
    yield LayerCalls("loss", "training", [loss], Work(6 * elements, 3 * 4 * elements), {})
    sgd = paper_sgd(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-6
    yield LayerCalls("optimizer", "training", [sgd.step], optimizer(plan.parameters), {"parameters": plan.parameters})
    generator = np.random.default_rng(0)
    stored = torch.from_numpy(generator.integers(0, 256, (count, STORED, STORED, 3), dtype=np.uint8)).to(device)
    mean = generator.uniform(0, 255, (STORED, STORED, 3)).astype(np.float32)
    colour = ColourComponents(np.array([9000.0, 400.0, 25.0]), np.eye(3))
    make = TrainingInput(mean, colour, plan.image_size, RecipeConfig(), device)
    varied = VariationTable(count, make.margin, RecipeConfig(), 0).rows(0, np.arange(count))
    pixels = math.prod((count, 3, plan.image_size, plan.image_size))
    # A byte and the mean in, a float32 out; two additions.
    yield LayerCalls("input preparation", "training", [lambda: make(stored, varied)], Work(2 * pixels, 9 * pixels), {})


def whole_work(network: str, count: int, dtype: str, mode: str) -> InOrder:
    """Work of all layers for ``inference``, or with the optimizer for ``training``; without input preparation.

    Its limit is the sum over modes and layers, run one after the other.
    """
    plan = plan_of(network)
    parts = [optimizer(plan.parameters)] if mode == "training" else []
    for work in layers(plan, count, DTYPES[dtype].itemsize).values():
        if mode == "inference":
            parts.append(work["inference"])
        else:
            parts += [work[each] for each in (*PRODUCT_MODES, "backward") if each in work]
    return InOrder.of(parts)


def describe_step(
    what: str, network: str, implementation: str, how: str, dtype: str, images: int
) -> tuple[dict[str, Any], Work]:
    """The columns that describe a row for a whole ``update`` or ``inference``, and its work."""
    size = plan_of(network).image_size
    columns = {
        "suite": "steps",
        "case": f"{what} of {network}",
        "implementation": f"{implementation}, {how}",
        "mode": "train_step" if what == "update" else what,
        "shape": f"{images}x3x{size}x{size}",
        "dtype": dtype,
        "memory_format": "channels_last",
        "images": images,
    }
    return columns, whole_work(network, images, dtype, "training" if what == "update" else what)
