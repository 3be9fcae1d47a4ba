"""Messages between ranks: counted while a step runs, and predicted by formula."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kernels import private
from net.model.config import AlexNetConfig

_TorchDispatchMode: Any = private.found("torch.utils._python_dispatch:TorchDispatchMode")
#: The collective of each torch.distributed operator.
_KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
}
#: Bytes that a rank sends per byte of the largest tensor (the result of an all-gather, the input of the others) if
#: none is sent twice; Thakur, Rabenseifner and Gropp 2005 give algorithms that reach them.
SENT: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: (ranks - 1) / ranks,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_to_all": lambda ranks: (ranks - 1) / ranks,
}


@dataclass(frozen=True)
class Message:
    """A collective among ``ranks``: what it carries, and the bytes of its largest tensor."""

    what: str
    kind: str
    size: int
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that each rank sends."""
        return self.size * SENT[self.kind](self.ranks)


class Count(_TorchDispatchMode):
    """Records every collective inside its ``with`` block: in forward, backward and gradient buckets."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.messages: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = private.schema(func).name.partition("::")
        if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd") and name in _KINDS:
            tensors = private.tree_leaves((result, args))
            size = max(item.nbytes for item in tensors if isinstance(item, Tensor))
            self.messages.append(Message(name, _KINDS[name], size, self.ranks))
        return result


#: DistributedDataParallel's bucket sizes in bytes: of the first bucket, and of the others.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20


def _averaged(sizes: Iterable[int], ranks: int) -> list[Message]:
    """The buckets of gradients of ``sizes`` bytes, which become ready in reverse order."""
    buckets: list[int] = []
    bytes_in_bucket = 0
    for size in reversed(list(sizes)):
        bytes_in_bucket += size
        if bytes_in_bucket >= (BUCKET if buckets else FIRST_BUCKET):
            buckets.append(bytes_in_bucket)
            bytes_in_bucket = 0
    if bytes_in_bucket:
        buckets.append(bytes_in_bucket)
    return [Message("gradients", "all_reduce", size, ranks) for size in buckets]


def _exchanged(what: str, size: int, ranks: int) -> list[Message]:
    """An all-gather, and in backward its adjoint."""
    return [
        Message(what, "all_gather", size, ranks),
        Message(f"{what}, gradient", "reduce_scatter", size, ranks),
    ]


def expected(
    config: AlexNetConfig, strategy: str, ranks: int, batch: int, width: int = 4, gradient_width: int = 4
) -> list[Message]:
    """The messages of one step, by formula.

    Args:
        config: the network.
        strategy: ``data``, ``tower`` or ``hybrid``.
        ranks: processes.
        batch: images in the global batch.
        width: bytes of an activation; ``gradient_width`` of a parameter's gradient.
    """
    layers = [layer for layer in config.layers() if layer.kind != "stage"]
    # Weight and bias, in the order of the network.
    sizes = {
        layer.name: [
            (layer.parameters - layer.output_shape[0]) * gradient_width,
            layer.output_shape[0] * gradient_width,
        ]
        for layer in layers
    }
    if strategy == "data":
        return _averaged(itertools.chain(*sizes.values()), ranks)
    messages: list[Message] = []
    if strategy == "tower":
        pairs = ranks // 2
        images = batch // pairs
        for layer in layers[1:]:
            if layer.groups == 1:
                size = images * math.prod(layer.input_shape) * width
                messages += _exchanged(f"what {layer.name} reads", size, 2)
        classes = 2 * math.ceil(config.classes / 2)
        messages.append(Message("logits", "all_gather", images * classes * width, 2))
        if pairs > 1:
            halves = [math.ceil(size / 2) for size in itertools.chain(*sizes.values())]
            messages += _averaged(halves, pairs)
        return messages
    dense = [layer for layer in layers if layer.kind == "dense"]
    for layer in dense:
        features = layer.input_shape[0]
        if layer is not dense[0]:
            features = ranks * math.ceil(features / ranks)
        messages += _exchanged(f"what {layer.name} reads", batch * features * width, ranks)
    size = batch * math.ceil(config.classes / ranks) * width
    messages += [Message("logits", "all_to_all", size, ranks), Message("logits, gradient", "all_to_all", size, ranks)]
    convolutions = [sizes[layer.name] for layer in layers if layer.kind == "convolution"]
    return messages + _averaged(itertools.chain(*convolutions), ranks)
