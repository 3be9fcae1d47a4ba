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
CLASSES = ("convolutions", "products", "stages", "update", "elementwise")
#: The classes whose bytes are counted; the optimizer's are known: 20 per parameter with a copy.
MOVED = ("stages", "elementwise")


@dataclass(frozen=True)
class LaunchesConfig:
    """The flags of ``python -m bench.launches``."""

    network: Literal[tuple(VARIANTS)] = flag("paper", "architecture")  # type: ignore[valid-type]
    batch_size: int = flag(128, "batch size; only the bytes depend on it", short="b")
    record: bool = flag(False, "append the rows to reports/data")

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", called=flag_name)


@dataclass(frozen=True)
class Launches:
    """The launches of a training step.

    Attributes:
        counts: by class, one of :data:`CLASSES`.
        elementwise: the operators of that class, and how often each is launched.
        bytes: read and written, by class, one of :data:`MOVED`.
        copies: bytes of the largest copy, cast or transposition of a weight or its gradient.
    """

    counts: dict[str, int]
    elementwise: dict[str, int]
    bytes: dict[str, float]
    copies: int


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
    largest = 0

    def size(tensors: Sequence[torch.Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def triton(name: str, tensors: Sequence[torch.Tensor]) -> None:
        kind = {"joint_update_kernel": "update", "loss_kernel": "elementwise"}.get(name, "stages")
        counts[kind] += 1
        if kind in MOVED:
            moved[kind] += size(tensors)
        if kind == "elementwise":
            elementwise[name] += 1

    mode: Any = private.found("torch.utils._python_dispatch:TorchDispatchMode")

    class Counted(mode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            name = func._schema.name
            inputs = [each for each in private.tree_leaves(args) if isinstance(each, torch.Tensor)]
            outputs = [each for each in private.tree_leaves(result) if isinstance(each, torch.Tensor)]
            reads = {each.untyped_storage().data_ptr() for each in inputs}
            view = not func._schema.is_mutable and all(
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
            counts["elementwise"] += 1
            elementwise[name.removeprefix("aten::")] += 1
            moved["elementwise"] += size([*inputs, *outputs])
            if any(each.numel() in weights for each in outputs):
                largest = max(largest, size(outputs))
            return result

    plan = network(variant)
    with torch.device("meta"):
        model = AlexNet(plan)
    # The values do not matter.
    model = model.to_empty(device="cpu").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    use(model, chosen)
    # Of both towers, and of one.
    weights = {p.numel() // parts for p in model.parameters() if p.dim() > 1 for parts in (1, plan.towers)}
    optimizer = PaperSGD(parameter_groups(model, RecipeConfig()), 0.01, 0.9, 5e-4, fused="triton")
    step = TrainingStep(model, model, optimizer, "bf16", copies=True)
    images = torch.zeros(batch, plan.image_channels, plan.image_size, plan.image_size, dtype=torch.bfloat16)
    if model.input_layout.block > 1:
        images = blocks(images, *model.input_layout)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64)
    with _triton_counted(triton), kernels.implementation("triton"):
        # The first step allocates the velocities.
        step(images, labels)
        for counter in (counts, elementwise, moved):
            counter.clear()
        largest = 0
        with Counted():
            step(images, labels)
    return Launches(dict(counts), dict(elementwise), dict(moved), largest)


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
    slope = 1 / (COUNTED[1] - COUNTED[0])
    moved = {
        kind: few.bytes[kind] + (batch - COUNTED[0]) * slope * (more.bytes[kind] - few.bytes[kind])
        for kind in few.bytes
    }
    return Launches(few.counts, few.elementwise, moved, few.copies)


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
    titles = [f"{kind:>14}" for kind in CLASSES] + [f"{'all':>6}"] + [f"{f'{kind} MB':>16}" for kind in MOVED]
    print(f"{'forms':<42}{''.join(titles)}")
    rows = []
    for chosen in forms(model, torch.device("cpu")):
        found = launches(config.network, chosen, config.batch_size)
        name, total = f"{chosen.first}, {chosen.shared}", sum(found.counts.values())
        row = "".join(f"{found.counts.get(kind, 0):>14}" for kind in CLASSES)
        moved = {kind: found.bytes.get(kind, 0) / 1e6 for kind in MOVED}
        print(f"{name:<42}{row}{total:>6}" + "".join(f"{moved[kind]:>16,.0f}" for kind in MOVED))
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
                **{f"{kind}_launches": found.counts.get(kind, 0) for kind in CLASSES},
                "all_launches": total,
                **{f"{kind}_mb": round(moved[kind], 1) for kind in MOVED},
            }
        )
    kinds = ", ".join(f"{n} {name}" for name, n in sorted(found.elementwise.items()))
    print(f"elementwise of {name}: {kinds}")
    if config.record:
        from .measure.records import write

        print(f"recorded {len(rows)} rows in {write(rows)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
