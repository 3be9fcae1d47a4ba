"""Reads a profiler's trace: which kernels ran in which order, for how long, and which layer each belongs to.

A CUDA graph launches all its kernels in one call, so its trace does not say which operator each belongs to. But their
order and names match the kernels of the same network running uncaptured. There, every kernel is launched by an operator
whose shapes identify the layer, which is then carried over by name and order.
"""

import bisect
import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from net.model.config import AlexNetConfig

Event = dict[str, Any]
Shape = tuple[int, ...]
#: Placeholders for no layer: before the first, after the last, and unknown.
INPUT, LOSS, OPTIMIZER, UNKNOWN = "input", "loss", "optimizer", "-"
#: The trace's categories of GPU activity, and of the host calls that launch it.
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHING = ("cuda_runtime", "cuda_driver")
#: Operators identified by name instead of by a layer's shape.
_NAMED = (
    (re.compile(r"sgd|adam|update_kernel", re.I), OPTIMIZER),
    (re.compile(r"softmax|nll_?loss|cross_?entropy|^loss_kernel", re.I), LOSS),
)
#: The kernel that separates steps in a trace: that of ``torch.cuda._sleep``.
MARK = "spin_kernel"
#: Maximum characters of a kernel's name.
NAME_LENGTH = 100


def named(name: str) -> str | None:
    """What an operator or kernel belongs to, if its name reveals it."""
    return next((known for pattern, known in _NAMED if pattern.search(name)), None)


class Launch(NamedTuple):
    """A kernel that ran, and the layers that it may belong to; none if unknown."""

    name: str
    microseconds: float
    layers: frozenset[str] = frozenset()


class Shapes:
    """The layers of a network that an operator may belong to, by the shapes of its inputs.

    Args:
        plan: the network.
        images: the batch.
    """

    def __init__(self, plan: AlexNetConfig, images: int) -> None:
        layers = plan.layers()
        self.order = [INPUT, *(layer.name for layer in layers), LOSS]
        self.image = (plan.image_channels, plan.image_size)
        #: Shapes of weights; sizes of a product's two matrices; what is read and what is written, without the batch;
        #: lengths of biases, a convolution's being added in the stage after it.
        self.weights: dict[Shape, set[str]] = defaultdict(set)
        self.products: dict[Shape, set[str]] = defaultdict(set)
        self.inputs: dict[Shape, set[str]] = defaultdict(set)
        self.outputs: dict[Shape, set[str]] = defaultdict(set)
        self.biases: dict[int, set[str]] = defaultdict(set)
        kernel_sizes = {convolution.name: convolution.kernel_size for convolution in plan.convolutions}
        for layer in layers:
            into, out = layer.input_shape[0] // layer.groups, layer.output_shape[0]
            # Of a tower, and of the whole layer.
            for towers in sorted({1, plan.towers}):
                if layer.kind == "dense":
                    rows = out // towers if layer.groups > 1 else out
                    self.weights[rows, into].add(layer.name)
                    self.weights[into, rows].add(layer.name)
                    self.products[tuple(sorted((images, rows, into)))].add(layer.name)
                    self.outputs[images, rows].add(layer.name)
                    self.biases[rows].add(layer.name)
                elif layer.kind == "convolution":
                    size = kernel_sizes[layer.name]
                    self.weights[out // towers, into, size, size].add(layer.name)
                    self.biases[out // towers].add("stage" + layer.name.removeprefix("conv"))
                else:
                    self.inputs[layer.input_shape[0] // towers, layer.input_shape[1]].add(layer.name)
                    self.outputs[layer.output_shape[0] // towers, layer.output_shape[1]].add(layer.name)

    def product(self, name: str, shapes: Sequence[Shape]) -> frozenset[str] | None:
        """The layer whose convolution or matrix product this is, or whose weights it reads; None if it reads several
        layers' weights or is something else."""
        by_weights = set().union(*(self.weights.get(shape, set()) for shape in shapes))
        if by_weights:
            return frozenset(by_weights if len(by_weights) == 1 else ())
        matrices = [shape for shape in shapes if len(shape) == 2]
        if len(matrices) >= 2 and name.endswith("mm"):
            sizes = (*matrices[-2], matrices[-1][1])
            return frozenset(self.products.get(tuple(sorted(sizes)), ()))
        return None

    def layers(self, name: str, shapes: Iterable[Any], outer: frozenset[str] = frozenset()) -> frozenset[str]:
        """The layers that an operator may belong to; ``outer`` are those of its caller."""
        if known := named(name):
            return frozenset({known})
        shapes = [tuple(shape) for shape in shapes if shape and all(isinstance(size, int) for size in shape)]
        found = self.product(name, shapes)
        if found:
            return found
        # Preparing a convolution's input belongs to the convolution, not to the layer before it.
        if len(outer) == 1:
            return outer
        return (self._elementwise(name, shapes) if found is None else found) or outer

    def _elementwise(self, name: str, shapes: Sequence[Shape]) -> frozenset[str]:
        maps = sorted((shape for shape in shapes if len(shape) == 4), key=lambda shape: -shape[1] * shape[2] * shape[3])
        for shape in maps:
            if shape[1] == self.image[0] and shape[2] >= self.image[1]:
                return frozenset({INPUT})
            found = set(self.inputs.get((shape[1], shape[2]), ()))
            if "::stage" not in name:
                # One stage's output may have the shape of another one's input.
                found |= self.outputs.get((shape[1], shape[2]), set())
            if found:
                return frozenset(found)
        for matrix in shapes:
            if len(matrix) == 2 and matrix in self.outputs:
                return frozenset(self.outputs[matrix])
        return frozenset(set().union(*(self.biases.get(shape[0], set()) for shape in shapes if len(shape) == 1)))

    def placed(self, found: Sequence[Launch]) -> list[str]:
        """A layer for each kernel of a step.

        If shapes leave several layers, or none, the kernels before and after decide, provided they belong to
        neighbouring layers. If nothing decides, all candidates are named.
        """
        sure = [next(iter(launch.layers)) if len(launch.layers) == 1 else None for launch in found]
        after: list[str | None] = [None] * len(found)
        following: str | None = None
        for place in range(len(found) - 1, -1, -1):
            after[place] = following
            following = sure[place] or following
        result: list[str] = []
        before: str | None = None
        backward = False
        for launch, layer, behind in zip(found, sure, after, strict=True):
            backward = backward or layer == LOSS
            result.append(layer or self._between(before, behind, launch.layers, backward))
            before = layer or before
        return result

    def _between(self, before: str | None, after: str | None, allowed: frozenset[str], backward: bool) -> str:
        """The layer of a kernel that comes between those of two others."""
        guess = None
        if before in (None, OPTIMIZER):
            # The beginning of an update.
            guess = INPUT if after in self.order[:2] else None
        elif before in self.order and after in self.order:
            low, high = sorted((self.order.index(str(before)), self.order.index(str(after))))
            if high - low <= 2:
                # Between neighbours it belongs to the earlier layer; if one layer lies between the two, to that one.
                guess = self.order[(low + high) // 2]
        if not allowed:
            # A backward pass ends with many small kernels of all layers.
            return guess if guess and not (backward and before == after) else UNKNOWN
        if guess in allowed:
            return str(guess)
        if after in self.order:
            here = self.order.index(after)
            # In backward the order of layers is reversed.
            near = sorted(
                (abs(self.order.index(layer) - here), -self.order.index(layer) if backward else 0, layer)
                for layer in allowed
                if layer in self.order
            )
            if near and near[0][0] <= 1:
                return near[0][2]
        return " or ".join(sorted(allowed))


def short(name: str) -> str:
    """A kernel's name, without return type, template arguments and parameters if it is long."""
    name = name.removeprefix("void ")
    if len(name) > NAME_LENGTH:
        name = re.sub(r"\(anonymous namespace\)::|at::native::|std::", "", name)
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 3] + "..."


class _Host:
    """The host operators in a trace, by thread, each with its caller."""

    def __init__(self, events: Iterable[Event], shapes: Shapes) -> None:
        operators = [event for event in events if event.get("cat") == "cpu_op"]
        operators.sort(key=lambda event: (event["ts"], -event["dur"]))
        self.layers: dict[int, frozenset[str]] = {}
        self.own: dict[int, float] = {}
        self.starts: dict[Any, list[float]] = defaultdict(list)
        self.by_thread: dict[Any, list[Event]] = defaultdict(list)
        self.parents: dict[int, Event] = {}
        open_ones: dict[Any, list[Event]] = defaultdict(list)
        for event in operators:
            stack = open_ones[event["tid"]]
            while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
                stack.pop()
            self.own[id(event)] = event["dur"]
            outer: frozenset[str] = frozenset()
            if stack:
                self.parents[id(event)] = stack[-1]
                self.own[id(stack[-1])] -= event["dur"]
                outer = self.layers[id(stack[-1])]
            dims = event.get("args", {}).get("Input Dims", ())
            self.layers[id(event)] = shapes.layers(event["name"], dims, outer)
            stack.append(event)
            self.starts[event["tid"]].append(event["ts"])
            self.by_thread[event["tid"]].append(event)
        self.operators = operators

    def around(self, event: Event) -> Event | None:
        """The innermost operator that was running when an event began on the same thread."""
        place = bisect.bisect_right(self.starts[event["tid"]], event["ts"]) - 1
        found = self.by_thread[event["tid"]][place] if place >= 0 else None
        while found is not None and found["ts"] + found["dur"] < event["ts"]:
            found = self.parents.get(id(found))
        return found


def launches(events: Sequence[Event], shapes: Shapes) -> list[Launch]:
    """Kernels in start order, with their layers if an operator launched them.

    If nothing ran on a GPU, returns the host's operators, each with its exclusive time.
    """
    events = [event for event in events if event.get("ph") == "X"]
    host = _Host(events, shapes)
    device = sorted((event for event in events if event.get("cat") in ON_DEVICE), key=lambda event: event["ts"])
    if not device:
        return [
            Launch(short(event["name"]), host.own[id(event)], host.layers[id(event)])
            for event in host.operators
            if not event["name"].startswith("autograd::engine")
        ]
    calls = {event["args"].get("correlation"): event for event in events if event.get("cat") in LAUNCHING}
    found = []
    for event in device:
        call = calls.get(event.get("args", {}).get("correlation"))
        operator = host.around(call) if call else None
        layers = host.layers[id(operator)] if operator else frozenset()
        found.append(Launch(short(event["name"]), event["dur"], layers))
    return found


def with_layers(replayed: Sequence[Launch], known: Sequence[Launch]) -> list[Launch]:
    """The kernels of a replayed step with the layers from an uncaptured step, matched by name and order.

    If the order does not match, a name that always belongs to one layer keeps it.
    """
    names, known_names = [launch.name for launch in replayed], [launch.name for launch in known]
    everywhere: dict[str, set[frozenset[str]]] = defaultdict(set)
    for launch in known:
        everywhere[launch.name].add(launch.layers)
    layers = [next(iter(everywhere[name])) if len(everywhere[name]) == 1 else frozenset() for name in names]
    for block in difflib.SequenceMatcher(None, names, known_names, autojunk=False).get_matching_blocks():
        for offset in range(block.size):
            layers[block.a + offset] = known[block.b + offset].layers
    return [launch._replace(layers=its) for launch, its in zip(replayed, layers, strict=True)]


def updates(found: Sequence[Launch], count: int) -> list[list[Launch]]:
    """The last ``count`` complete steps of a trace with a marker before each and after the last.

    A profiler may lose the first kernels of its trace, including a marker. So only steps with the most frequent number
    of kernels count.
    """
    parts: list[list[Launch]] = []
    begun = False
    current: list[Launch] = []
    for launch in found:
        if MARK in launch.name:
            if begun:
                parts.append(current)
            begun, current = True, []
        else:
            current.append(launch)
    if not parts:
        return []
    usual = Counter(map(len, parts)).most_common(1)[0][0]
    return [part for part in parts if len(part) == usual][-count:]


class Line(NamedTuple):
    """A row of the table: a kernel in a layer, per step."""

    kernel: str
    layer: str
    launches: float
    microseconds: float


def table(found: Sequence[Launch], count: int) -> list[Line]:
    """Kernels of ``count`` steps by name and layer, the most expensive first; each is in one layer."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(list)
    for launch in found:
        (layer,) = launch.layers
        sums[launch.name, layer].append(launch.microseconds)
    lines = [Line(*key, len(times) / count, sum(times) / count) for key, times in sums.items()]
    return sorted(lines, key=lambda line: -line.microseconds)
