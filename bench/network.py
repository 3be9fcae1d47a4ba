"""The layers of a network one by one, and its whole steps, as calls that can be timed."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net.alexnet import AlexNet, Convolution, Dense, Stage, alexnet
from net.augmentation import TrainingInput, VariationTable
from net.config import VARIANTS, RecipeConfig, TrainConfig
from net.data.images import ColourComponents
from net.device import autocast, set_precision
from net.recipe import PaperSGD, Schedule, parameter_groups

from .cases import DTYPES
from .memory import kept_bytes
from .roofline import Work, layers, optimizer

#: Stored images are so much larger than the network's input.
STORED = 256
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


class Step(NamedTuple):
    """A call, what it must do, and what is known of it."""

    name: str
    mode: str
    call: Callable[[], object]
    work: Work
    columns: dict[str, Any]


def build(variant: str, device: torch.device) -> AlexNet:
    """A network with its start's weights, in channels_last."""
    torch.manual_seed(0)
    set_precision("fp32", device)
    model: AlexNet = alexnet(variant).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def images_and_labels(variant: str, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels less their mean, in channels_last, and classes."""
    size = VARIANTS[variant].image_size
    images = torch.randn(count, 3, size, size, device=device) * 60
    labels = torch.randint(0, VARIANTS[variant].classes, (count,), device=device)
    return images.contiguous(memory_format=torch.channels_last), labels


def paper_sgd(model: nn.Module) -> PaperSGD:
    """The paper's update at its first rate."""
    recipe = TrainConfig()
    optimizer = PaperSGD(parameter_groups(model, recipe), recipe.lr, recipe.momentum, recipe.weight_decay)
    Schedule(recipe).apply(optimizer)
    return optimizer


def training_loss(forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, dtype: str) -> Tensor:
    """The forward pass of a training step."""
    with autocast(PRECISIONS[dtype], images.device):
        return F.cross_entropy(forward(images), labels)


def update_step(
    model: AlexNet, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, dtype: str
) -> Callable[[], object]:
    """Forward, backward and update."""
    sgd = paper_sgd(model)

    def update() -> None:
        training_loss(forward, images, labels, dtype).backward()
        sgd.step()
        sgd.zero_grad()

    return update


def inference_step(forward: Callable[[Tensor], Tensor], images: Tensor, dtype: str) -> Callable[[], object]:
    """Logits without a gradient."""

    def infer() -> Tensor:
        with torch.inference_mode(), autocast(PRECISIONS[dtype], images.device):
            return forward(images)

    return infer


def layer_steps(variant: str, count: int, dtype: str, device: torch.device) -> Iterator[Step]:
    """Every layer of a network, forward without a gradient and forward and backward, as the eager network runs them.

    A dense layer has its activation and dropout with it. Loss, optimizer and input preparation come last; each has one
    mode.
    """
    model = build(variant, device)
    plan = model.config
    works = layers(plan, count, DTYPES[dtype].itemsize)
    biases: dict[str, Any] = {stage: model.get_submodule(name).bias for name, stage in model.trunk if name and stage}
    for number, layer in enumerate(plan.layers()):
        module = model.get_submodule(layer.name)
        assert isinstance(module, (Convolution, Dense, Stage))
        towers = 1 if number == 0 else plan.towers
        bias = biases.get(layer.name)
        parts = [_activations(count, layer.input_shape, towers, dtype, device) for _ in range(towers)]
        # A stage's input is a convolution's output, whose gradient is wanted; so is every other layer's but the first.
        wanted: list[Tensor] = [part.requires_grad_() for part in parts] if number else []
        wanted += [bias] if isinstance(module, Stage) and bias is not None else []
        # A convolution's bias is added, and has its gradient, in the stage behind it.
        wanted += [parameter for name, parameter in module.named_parameters() if not _is_bias(module, name)]

        def run(
            module: nn.Module = module, bias: Any = bias, parts: list[Tensor] = parts, name: str = layer.name
        ) -> list[Tensor]:
            with autocast(PRECISIONS[dtype], device):
                if isinstance(module, Stage):
                    return module(parts, bias, model.exchange)  # type: ignore[no-any-return]
                outputs: list[Tensor] = module(parts, model.exchange)
                if isinstance(module, Dense) and name != plan.output_name:
                    outputs = [model.dropout(F.relu(output)) for output in outputs]
                return outputs

        outputs = run()
        gradients = [torch.randn_like(output) for output in outputs]
        columns = {
            "parameters": layer.parameters,
            "output_mib": round(sum(output.numel() * output.element_size() for output in outputs) / 2**20, 3),
            "saved_mib": round(kept_bytes(run, model.parameters()) / 2**20, 3),
        }
        del outputs

        def train(
            run: Callable[[], list[Tensor]] = run, wanted: Any = wanted, gradients: list[Tensor] = gradients
        ) -> object:
            return torch.autograd.grad(run(), wanted, gradients)

        def infer(run: Callable[[], list[Tensor]] = run) -> object:
            with torch.no_grad():
                return run()

        yield Step(layer.name, "training", train, works[layer.name]["training"], columns)
        yield Step(layer.name, "inference", infer, works[layer.name]["inference"], {})
    yield from _others(model, count, dtype, device)


def _is_bias(module: nn.Module, name: str) -> bool:
    return isinstance(module, Convolution) and name == "bias"


def _activations(count: int, shape: tuple[int, ...], towers: int, dtype: str, device: torch.device) -> Tensor:
    """A tower's share of a layer's input, in the compute type; the image comes in float32."""
    channels, *sizes = shape
    part = torch.randn(count, channels // towers, *sizes, device=device) * 30
    if sizes:
        part = part.contiguous(memory_format=torch.channels_last)
    return part if towers == 1 or dtype == "float32" else part.bfloat16()


def _others(model: AlexNet, count: int, dtype: str, device: torch.device) -> Iterator[Step]:
    plan = model.config
    logits = torch.randn(count, plan.classes, device=device, requires_grad=True)
    labels = torch.randint(0, plan.classes, (count,), device=device)

    def loss() -> object:
        return torch.autograd.grad(F.cross_entropy(logits, labels), logits)

    # Exponentials, their sum and logarithm, and the difference from the labels; logits in twice, gradient out.
    elements = count * plan.classes
    yield Step("loss", "training", loss, Work(6 * elements, 3 * 4 * elements), {})
    sgd = paper_sgd(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-6
    yield Step("optimizer", "training", sgd.step, optimizer(plan.parameters), {"parameters": plan.parameters})
    generator = np.random.default_rng(0)
    stored = torch.from_numpy(generator.integers(0, 256, (count, STORED, STORED, 3), dtype=np.uint8)).to(device)
    mean = generator.uniform(0, 255, (STORED, STORED, 3)).astype(np.float32)
    colour = ColourComponents(np.array([9000.0, 400.0, 25.0]), np.eye(3))
    make = TrainingInput(mean, colour, plan.image_size, RecipeConfig(), device)
    varied = VariationTable(count, make.margin, RecipeConfig(), 0).rows(0, np.arange(count))
    pixels = math.prod((count, 3, plan.image_size, plan.image_size))
    # A byte and the mean in, a float32 out; two additions.
    yield Step("input preparation", "training", lambda: make(stored, varied), Work(2 * pixels, 9 * pixels), {})


def whole_work(variant: str, count: int, dtype: str, mode: str) -> Work:
    """What the layers must do for ``inference``, or with the optimizer for ``training``; input preparation apart."""
    plan = VARIANTS[variant]
    total = optimizer(plan.parameters) if mode == "training" else Work(0, 0)
    for work in layers(plan, count, DTYPES[dtype].itemsize).values():
        total += work[mode]
    return total


def describe_step(
    what: str, network: str, implementation: str, how: str, dtype: str, images: int
) -> tuple[dict[str, Any], Work]:
    """The columns that say what a row on a whole ``update`` or ``inference`` measures, and what that must do."""
    size = VARIANTS[network].image_size
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
