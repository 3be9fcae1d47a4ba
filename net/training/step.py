"""A training step: forward pass, loss, backward pass and optimizer update; on a GPU as one CUDA graph.

A training step of the paper's network is more than a hundred kernels, and launching them from Python takes longer than
running them on a GPU. The first steps run eagerly; then one is captured, and every later step replays it in a single
launch.

In bfloat16, the optimizer writes a rounded copy of each weight and each dense bias along with the parameter, and the
network reads the copies. So the forward pass does not cast them, and the backward pass casts no gradient. The module's
parameters stay float32.
"""

import contextlib
import importlib.util
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import private

from ..common.device import autocast
from ..common.printing import first_line
from ..model.alexnet import Convolution, Dense
from .recipe import PaperSGD

if importlib.util.find_spec("triton") is not None:
    from kernels.gpu import loss as loss_kernel
    from kernels.gpu import runtime

#: Warm-up updates before the capture: one-time initialization must not be captured.
UNRECORDED = 3
#: Maximum number of updates queued on the GPU, which bounds how long a signal or a checkpoint waits.
QUEUED = 2


@contextlib.contextmanager
def _reading(slices: Mapping[Convolution, tuple[Tensor, ...]]) -> Iterator[None]:
    """Inside a ``with`` block, convolutions read these slices of their weights."""
    try:
        for module, its in slices.items():
            module.slices = its
        yield
    finally:
        for module in slices:
            module.slices = None


class TrainingStep:
    """Callable that performs one update of a network.

    Args:
        model: the network whose parameters the optimizer updates.
        forward: computes the logits: ``model``, or its compiled or parallel wrapper.
        optimizer: of the model's parameters.
        precision: ``fp32``, ``tf32`` or ``bf16``.
        record: capture the update as a CUDA graph and replay it. Requires a GPU and a single process.
        copies: have the network read bfloat16 copies of the weights. ``forward`` must be ``model``.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor],
        optimizer: PaperSGD,
        precision: str,
        *,
        record: bool = False,
        copies: bool = False,
    ) -> None:
        self.model, self.forward, self.optimizer, self.precision = model, forward, optimizer, precision
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.record = record
        #: Why the update could not be captured.
        self.obstacle = ""
        #: By name, a parameter and the copy that the network reads in its place.
        self.copied: dict[str, tuple[nn.Parameter, Tensor]] = {}
        if copies:
            assert forward is model
            assert optimizer.capturable
            # What autocast would cast: the stage after a convolution adds its bias in float32.
            biases = {module.bias for module in model.modules() if isinstance(module, Dense)}
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 or parameter in biases:
                    copy = parameter.detach().to(torch.bfloat16).requires_grad_(parameter.requires_grad)
                    self.copied[name] = parameter, copy
        #: The towers' slices of a convolution's copy. Gradients of slices stay where the convolutions left them, while
        #: those of slices taken in the forward pass would be concatenated.
        self.slices: dict[Convolution, tuple[Tensor, ...]] = {}
        replaced: dict[Tensor, Tensor] = dict(self.copied.values())
        for module in model.modules():
            if isinstance(module, Convolution) and module.weight in replaced:
                copy = replaced[module.weight]
                slices = copy.detach().chunk(module.towers)
                self.slices[module] = tuple(each.requires_grad_(copy.requires_grad) for each in slices)
        self._versions = [private.version(parameter) for parameter, _ in self.copied.values()]
        #: Whether the loss is computed by this project's kernel: on a GPU, where one process holds the whole network.
        self.loss_kernel = optimizer.capturable and (forward is model or record)
        #: Whether the first update compiles the kernels, several at once.
        self.compiles = self.device.type == "cuda" and self.loss_kernel
        self.updates = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        #: Static inputs of the captured update; None before the capture.
        self.images: Tensor | None = None
        self._labels: Tensor | None = None
        self._results: tuple[Tensor, Tensor] | None = None
        self._queue: deque[torch.cuda.Event] = deque()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Perform one update.

        Args:
            images: the network's input; passing :attr:`images` itself avoids a copy.
            labels: int64 ``[N]``.

        Returns:
            The mean loss of the batch, float32, and the number of correctly classified images, both from before the
            update and on the device.
        """
        self.optimizer.send_rates()
        self._refresh()
        if self.compiles and not self.updates:
            self._compile(images, labels)
        if self.record and self.graph is None and self.updates >= UNRECORDED:
            self._record(images, labels)
        if self.graph is None or self.images is None or images.shape != self.images.shape:
            results = self._compute(images, labels)
        else:
            assert self._labels is not None
            assert self._results is not None
            if images is not self.images:
                self.images.copy_(images)
            self._labels.copy_(labels)
            self.graph.replay()
            loss, correct = self._results
            # The next replay overwrites them.
            results = loss.clone(), correct.clone()
        # Only now: a first update that failed may be repeated with other forms.
        self.updates += 1
        if self.device.type == "cuda":
            self._wait()
        return results

    def _compute(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        alone = self.forward is self.model or self.record
        sliced = {module: slices for module, slices in self.slices.items() if module.sliced}
        with autocast(self.precision, self.device), _reading(sliced):
            if self.copied:
                copies = {name: copy for name, (_, copy) in self.copied.items()}
                logits: Tensor = torch.func.functional_call(self.model, copies, (images,))
            else:
                logits = self.forward(images)
        loss, correct, gradient = self._loss(logits, labels)
        if alone:
            # Gradients of the copies have a dtype that the parameters' .grad cannot have.
            replaced = dict(self.copied.values())
            pieces: dict[Tensor, tuple[Tensor, ...]] = {module.weight: its for module, its in sliced.items()}
            leaves = [pieces.get(each, (replaced.get(each, each),)) for each in self.parameters]
            flat = list(itertools.chain.from_iterable(leaves))
            found = iter(torch.autograd.grad(loss if gradient is None else logits, flat, gradient))
            gradients = [tuple(itertools.islice(found, len(each))) for each in leaves]
            self.optimizer.update(dict(zip(self.parameters, gradients, strict=True)), replaced)
        else:
            # DistributedDataParallel works through the parameters' .grad.
            torch.autograd.backward(loss if gradient is None else logits, gradient)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach(), correct

    def _loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean loss, number of correct predictions, and the logits' gradient if already computed."""
        if self.loss_kernel and loss_kernel.suits(logits):
            try:
                return loss_kernel.cross_entropy(logits.detach(), labels)
            except Exception as error:  # Compilers and drivers raise anything.
                print(f"note: the loss is computed by PyTorch's operators: {first_line(error)}")
                self.loss_kernel = False
        loss = F.cross_entropy(logits.float(), labels)
        return loss, (logits.detach().argmax(1) == labels).sum(), None

    def _compile(self, images: Tensor, labels: Tensor) -> None:
        """Compile an update's Triton kernels, several at once.

        PyTorch's operators run, on the kernels' uninitialized outputs. The kernels themselves do not run, so neither
        parameters nor copies change.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), runtime.compile_only():
            self._compute(images, labels)

    def _record(self, images: Tensor, labels: Tensor) -> None:
        """Capture an update, without running it; if that fails, later updates run eagerly."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.current_stream(self.device)
        try:
            graph = torch.cuda.CUDAGraph()
            self.images, self._labels = images.clone(memory_format=torch.preserve_format), labels.clone()
            # The loader's threads keep running and call CUDA too.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._results = self._compute(self.images, self._labels)
        except Exception as error:  # Compilers and drivers raise anything.
            # After a failed capture the generator still considers itself captured.
            generator = torch.cuda.default_generators[self.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            # Ending the capture failed too, which left its stream current and hides the cause.
            torch.cuda.set_stream(before)
            cause: BaseException = error
            while cause.__context__ is not None:
                cause = cause.__context__
            self.obstacle = first_line(cause)
            print(f"note: the update cannot be captured as a CUDA graph and runs eagerly: {self.obstacle}")
            self.record, self.images, self._labels, self._results = False, None, None, None
            return
        self.graph = graph

    def _refresh(self) -> None:
        """Update the copies if the parameters were modified outside this class."""
        versions = [private.version(parameter) for parameter, _ in self.copied.values()]
        if versions != self._versions:
            with torch.no_grad():
                for parameter, copy in self.copied.values():
                    copy.copy_(parameter)
            self._versions = versions

    def _wait(self) -> None:
        """Wait until at most :data:`QUEUED` updates are queued."""
        event = torch.cuda.Event()
        event.record()
        self._queue.append(event)
        if len(self._queue) > QUEUED:
            self._queue.popleft().synchronize()
