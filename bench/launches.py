"""Estimates, without a GPU, a training step's kernel launches on a GPU and their memory traffic.

``python -m bench.launches`` runs the step of :class:`net.training.step.TrainingStep` on the CPU as it runs on a GPU. It
counts Triton kernels, without running them, and PyTorch's operators: one launch each, or one per gradient in a
convolution's backward pass. Bytes are those of the tensors that an operator reads and writes, each once. Kernels that
cuDNN and cuBLAS launch inside an operator (memsets, workspaces, transpositions: some 60 on an H100) are not counted;
``python -m bench.device_suite`` measures them in its profile. Use the estimate to compare forms and to see what a
change adds.
"""

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from net.common import cli
from net.common.fields import at_least, flag, flag_name
from net.model.config import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from net.model.forms import Forms

DESCRIPTION = (
    "Estimate, without a GPU, how many kernels one update launches there in each form of the network, and how many "
    "bytes they move."
)
#: Batch sizes at which bytes are counted; they are linear in the batch size, so two suffice.
COUNTED = 1, 2
#: The class of a launch, by its operator; all others are elementwise.
LIBRARY = {
    "aten::convolution": "convolutions",
    "aten::convolution_backward": "convolutions",
    "aten::addmm": "products",
    "aten::mm": "products",
}
#: On a GPU dropout is one kernel; here it is counted as the multiplication by its mask.
PARTS_OF_DROPOUT = ("aten::bernoulli_", "aten::div_")
#: Operators that compute nothing.
COPIES = ("aten::_to_copy", "aten::cat", "aten::clone", "aten::constant_pad_nd", "aten::copy_")
#: The class of a Triton kernel; all others are stages.
TRITON = {
    "bias_relu_kernel": "bias_relu",
    "bias_relu_backward_kernel": "bias_relu",
    "joint_update_kernel": "update",
    "loss_kernel": "loss",
}
CLASSES = ("convolutions", "products", "stages", "bias_relu", "elementwise", "loss", "update")
#: The classes whose bytes are counted; the optimizer's are known: 20 per parameter with a copy.
MOVED = ("stages", "bias_relu", "elementwise")


@dataclass(frozen=True)
class LaunchesConfig:
    """The flags of ``python -m bench.launches``."""

    network: Literal[tuple(VARIANTS)] = flag("paper", "architecture")  # type: ignore[valid-type]
    batch_size: int = flag(128, "batch size; only the bytes depend on it", short="b")
    record: bool = flag(False, "append the rows to reports/data")

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", called=flag_name)


@dataclass(frozen=True)
class Copy:
    """A copy, cast, transposition, concatenation or padding.

    Attributes:
        operator: one of :data:`COPIES`, without the namespace.
        shape: of the result.
        bytes: of the result.
        of: ``activations`` or, if its size does not depend on the batch's, ``weights``: weights or their gradients.
    """

    operator: str
    shape: tuple[int, ...]
    bytes: int
    of: str = ""

    def __str__(self) -> str:
        return f"{self.operator} {'x'.join(map(str, self.shape))} ({self.bytes / 1e3:,.0f} kB)"


@dataclass(frozen=True)
class Launches:
    """The launches of a training step.

    Attributes:
        counts: by class, one of :data:`CLASSES`.
        elementwise: the operators of that class, and how often each is launched.
        bytes: read and written, by class, one of :data:`MOVED`.
        copies: those in the class ``elementwise``, in the order in which they run.
    """

    counts: dict[str, int]
    elementwise: dict[str, int]
    bytes: dict[str, int]
    copies: list[Copy]

    @property
    def pointwise(self) -> int:
        """Launches forward and backward that are no convolution, product or stage with normalization or pooling."""
        return self.counts["bias_relu"] + self.counts["elementwise"]

    def copied(self) -> dict[str, list[Copy]]:
        """The copies of ``weights`` and of ``activations``, the largest first."""
        ordered = sorted(self.copies, key=lambda each: -each.bytes)
        return {of: [each for each in ordered if each.of == of] for of in ("weights", "activations")}


@contextmanager
def _triton_counted(count: Any) -> "Iterator[None]":
    """Makes Triton's interpreter call ``count(name, tensors)`` instead of a kernel."""
    import torch

    from kernels import private

    executor = private.found("triton.runtime.interpreter:GridExecutor")
    run = executor.__call__

    def called(self: Any, *arguments: Any, **keywords: Any) -> None:
        values = [*arguments, *keywords.values()]
        tensors = [value for value in private.tree_leaves(values) if isinstance(value, torch.Tensor)]
        count(self.fn.__name__, tensors)

    executor.__call__ = called
    try:
        yield
    finally:
        executor.__call__ = run


def _one(variant: str, chosen: "Forms", batch: int) -> Launches:
    """The launches of a training step of ``batch`` images."""
    import torch

    import kernels
    from kernels import private
    from net.model.alexnet import AlexNet
    from net.model.blocks import blocks
    from net.model.config import network
    from net.model.forms import use
    from net.training.config import RecipeConfig
    from net.training.recipe import PaperSGD, parameter_groups
    from net.training.step import TrainingStep

    counts, elementwise, moved = Counter[str](), Counter[str](), Counter[str]()
    copies: list[Copy] = []
    # Of operators that are neither convolution nor product.
    other = "elementwise"

    def size(tensors: Sequence[torch.Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def triton(name: str, tensors: Sequence[torch.Tensor]) -> None:
        kind = TRITON.get(name, "stages")
        counts[kind] += 1
        moved[kind] += size(tensors)

    mode: Any = private.found("torch.utils._python_dispatch:TorchDispatchMode")

    class Counted(mode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = private.schema(func).name
            inputs = [each for each in private.tree_leaves(args) if isinstance(each, torch.Tensor)]
            outputs = [each for each in private.tree_leaves(result) if isinstance(each, torch.Tensor)]
            reads = {each.untyped_storage().data_ptr() for each in inputs}
            view = not private.schema(func).is_mutable and all(
                each.untyped_storage().data_ptr() in reads for each in outputs if each.numel()
            )
            if name == "alexnet_fused::stage_backward" and outputs[1].numel():
                # Its body sums the rows of the bias gradient.
                counts["elementwise"] += 1
                elementwise["sum"] += 1
            skipped = (
                name.startswith(("aten::empty", "aten::new_empty"))
                or not name.startswith("aten::")
                or name in PARTS_OF_DROPOUT
            )
            if skipped or (view and inputs):
                return result
            if name in LIBRARY:
                gradients = len(outputs) if name.endswith("backward") else 1
                counts[LIBRARY[name]] += gradients
                return result
            counts[other] += 1
            moved[other] += size([*inputs, *outputs])
            if other == "elementwise":
                elementwise[name.removeprefix("aten::")] += 1
                if name in COPIES:
                    copies.append(Copy(name.removeprefix("aten::"), tuple(outputs[0].shape), size(outputs)))
            return result

    plan = network(variant)
    with torch.device("meta"):
        model = AlexNet(plan)
    # The values do not matter.
    model = model.to_empty(device="cpu").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use(model, chosen)
    optimizer = PaperSGD(parameter_groups(model, RecipeConfig()), 0.01, 0.9, 5e-4, fused="triton")
    step = TrainingStep(model, model, optimizer, "bf16", copies=True)
    compute_loss = step._loss

    def loss(*arguments: Any) -> Any:
        nonlocal other
        other = "loss"
        try:
            return compute_loss(*arguments)
        finally:
            other = "elementwise"

    step._loss = loss  # type: ignore[assignment,method-assign]
    images = torch.zeros(batch, plan.image_channels, plan.image_size, plan.image_size, dtype=torch.bfloat16)
    if model.input_layout.block > 1:
        images = blocks(images, *model.input_layout)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64)
    with _triton_counted(triton), kernels.implementation("triton"):
        # The first step allocates the velocities.
        step(images, labels)
        for found in (counts, elementwise, moved, copies):
            found.clear()
        with Counted():
            step(images, labels)
    return Launches(dict(counts), dict(elementwise), {kind: moved[kind] for kind in MOVED}, copies)


def launches(variant: str, chosen: "Forms", batch: int) -> Launches:
    """The launches of a training step, with the bytes at ``batch`` images.

    Args:
        variant: a key of :data:`net.model.config.VARIANTS`.
        chosen: the forms.
        batch: images in the update.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("this runs in Triton's interpreter; set TRITON_INTERPRET=1 before importing kernels")
    few, more = (_one(variant, chosen, count) for count in COUNTED)
    assert few.counts == more.counts, "launches must not depend on the batch"

    def scaled(one: float, other: float) -> int:
        return round(one + (batch - COUNTED[0]) * (other - one) / (COUNTED[1] - COUNTED[0]))

    moved = {kind: scaled(few.bytes[kind], more.bytes[kind]) for kind in few.bytes}
    copies = [
        Copy(
            one.operator,
            tuple(map(scaled, one.shape, other.shape)),
            scaled(one.bytes, other.bytes),
            "weights" if one.bytes == other.bytes else "activations",
        )
        for one, other in zip(few.copies, more.copies, strict=True)
    ]
    return Launches(few.counts, few.elementwise, moved, copies)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(LaunchesConfig, "bench.launches", DESCRIPTION, arguments), LaunchesConfig)
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from net.model.alexnet import AlexNet
    from net.model.config import network
    from net.model.forms import forms

    with torch.device("meta"):
        model = AlexNet(network(config.network))
    print(f"update of {config.network}, {config.batch_size} images, bf16; kernel launches by class, and MB moved")
    titles = [f"{kind:>14}" for kind in (*CLASSES, "pointwise", "all")] + [f"{f'{kind} MB':>16}" for kind in MOVED]
    print(f"{'forms':<42}{''.join(titles)}")
    rows = []
    for chosen in forms(model, torch.device("cpu")):
        found = launches(config.network, chosen, config.batch_size)
        name = f"{chosen.first}, {chosen.shared}"
        counted = {kind: found.counts.get(kind, 0) for kind in CLASSES}
        counted |= {"pointwise": found.pointwise, "all": sum(counted.values())}
        moved = {kind: round(found.bytes[kind] / 1e6, 1) for kind in MOVED}
        print(
            f"{name:<42}"
            + "".join(f"{count:>14}" for count in counted.values())
            + "".join(f"{megabytes:>16,.0f}" for megabytes in moved.values())
        )
        rows.append(
            {
                "suite": "launches",
                # The counts do not depend on the machine or the number of threads.
                "machine": "a GPU, estimated without one",
                "threads": None,
                "case": f"launches of {config.network}",
                "implementation": name,
                "shape": f"{config.batch_size} images",
                "dtype": "bfloat16",
                **{f"{kind}_launches": count for kind, count in counted.items()},
                **{f"{kind}_mb": megabytes for kind, megabytes in moved.items()},
                **{f"copied_{of}": ", ".join(map(str, copies)) for of, copies in found.copied().items()},
            }
        )
    kinds = ", ".join(f"{n} {name}" for name, n in sorted(found.elementwise.items()))
    print(f"elementwise of {name}: {kinds}")
    for of, copies in found.copied().items():
        print(f"copies of {of}: {', '.join(map(str, copies)) or 'none'}")
    if config.record:
        from .measure.records import write

        print(f"recorded {len(rows)} rows in {write(rows)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
