"""The paper's training recipe (section 5): update rule and learning rate schedule. Initialization is the network's."""

import importlib.util
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from ..common.device import fuses_updates, is_gpu
from ..common.printing import first_line
from .config import RecipeConfig

if importlib.util.find_spec("triton") is not None:
    from kernels.gpu import update
else:
    update = None  # type: ignore[assignment]


class PaperSGD(torch.optim.Optimizer):
    """Stochastic gradient descent with learning rate and weight decay inside the velocity (section 5)::

        v <- momentum * v - weight_decay * lr * w - lr * g
        w <- w + v

    :class:`torch.optim.SGD` applies the learning rate outside its momentum buffer ``b`` (``w <- w - lr * b``). The two
    are equal while the rate is constant, with ``v = -lr * b``, and differ after it changes: the paper's velocity still
    carries the old rate. With ``fused=True`` the update is PyTorch's fused SGD, and the buffer is multiplied by
    old rate / new rate whenever the rate changes, which restores the paper's rule. At a learning rate of zero no such
    buffer exists (the velocity coasts), and the plain rule runs.

    Args:
        params: parameters or parameter groups.
        lr: learning rate, at least 0; the paper starts with 0.01.
        momentum: 0.9 in the paper.
        weight_decay: 0.0005 in the paper; multiplied by the learning rate.
        fused: the implementation. ``"triton"`` is this project's kernel, which applies the rule above in one pass over
            memory; on a GPU it can be captured in a CUDA graph. ``True`` is PyTorch's fused SGD, ``False`` the rule
            above in ``torch._foreach`` operations. ``None`` uses the first of the three that supports the parameters'
            device and dtype.

    Raises:
        ValueError: a negative learning rate, momentum or weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        *,
        fused: bool | Literal["triton"] | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0; got {value!r}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "fused": fused})
        #: By group, the learning rate last sent and the device tensor that holds it for the kernel.
        self._rates: dict[int, tuple[float, Tensor]] = {}
        #: Whether parameters share a launch, until that fails.
        self._together = True

    # PyTorch decorates these methods. On the first call the decorator imports the front end of torch.compile, which
    # takes as long as importing torch.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the parameters' ``.grad``; parameters without one are skipped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.send_rates()
        self.update({parameter: (parameter.grad,) for parameter in parameters if parameter.grad is not None})
        return loss

    @torch.no_grad()
    def update(
        self,
        gradients: Mapping[nn.Parameter, Sequence[Tensor]],
        copies: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        """One update from explicit gradients, at the learning rates of the last :meth:`send_rates`.

        Args:
            gradients: by parameter to update: its gradient, or those of its equal slices along dimension 0. The Triton
                kernel reads slices where they are, and also accepts half-precision gradients.
            copies: by parameter, half-precision tensors that receive the updated weights, rounded; Triton kernel only.
        """
        for index, group in enumerate(self.param_groups):
            parameters = [parameter for parameter in group["params"] if parameter in gradients]
            if not parameters:
                continue
            found = [gradients[parameter] for parameter in parameters]
            if self.kernel(group):
                self._launch(group, self._rates[index][1], parameters, found, copies or {})
            else:
                assert not copies, "only the kernel writes copies"
                whole = [slices[0] if len(slices) == 1 else torch.cat(list(slices)) for slices in found]
                self._update(group, parameters, list(map(_like, whole, parameters)))

    @staticmethod
    def kernel(group: dict[str, Any]) -> bool:
        """Whether a group is updated by the Triton kernel."""
        if group["fused"] is None:
            return update is not None and all(
                is_gpu(parameter.device) and update.suits(parameter) for parameter in group["params"]
            )
        return bool(group["fused"] == "triton")

    @property
    def capturable(self) -> bool:
        """Whether :meth:`update` can be captured in a CUDA graph; replays use the rates last sent."""
        return all(self.kernel(group) for group in self.param_groups)

    def send_rates(self) -> None:
        """Copy the groups' learning rates to the device, where the kernel reads them."""
        for index, group in enumerate(self.param_groups):
            if not group["params"] or not self.kernel(group):
                continue
            if index not in self._rates:
                rate = torch.empty((), dtype=torch.float32, device=group["params"][0].device)
                self._rates[index] = (math.nan, rate)
            sent, rate = self._rates[index]
            if sent != group["lr"]:
                rate.fill_(group["lr"])
                self._rates[index] = (group["lr"], rate)

    def _launch(
        self,
        group: dict[str, Any],
        rate: Tensor,
        parameters: list[nn.Parameter],
        gradients: list[Sequence[Tensor]],
        copies: Mapping[nn.Parameter, Tensor],
    ) -> None:
        assert update is not None
        velocities = self._states(parameters, "velocity", group["lr"])
        settings = rate, group["momentum"], group["weight_decay"]
        pieces: list[update.Parameter] = []
        for parameter, slices, velocity in zip(parameters, gradients, velocities, strict=True):
            copy, count = copies.get(parameter), len(slices)
            weights = parameter.chunk(count)
            own = [None] * count if copy is None else copy.chunk(count)
            found = map(_like, slices, weights)
            pieces += map(update.Parameter, weights, found, velocity.chunk(count), own)
        for alike in update.alike(pieces):
            if self._together:
                try:
                    update.update_together_(alike, *settings)
                    continue
                except Exception as error:  # Compilers and drivers raise anything.
                    print(f"note: the optimizer updates one parameter a launch, not all in one: {first_line(error)}")
                    self._together = False
            for one in alike:
                update.update_(one, *settings)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        fused = group["fused"]
        if fused is None:
            fused = fuses_updates(parameters[0].device)
        if fused and lr > 0:
            buffers = self._states(parameters, "momentum_buffer", lr)
            sgd(
                parameters,
                gradients,
                buffers,  # type: ignore[arg-type]
                fused=True,
                weight_decay=weight_decay,
                momentum=momentum,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
        else:
            velocities = self._states(parameters, "velocity", lr)
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, parameters, alpha=-weight_decay * lr)
            torch._foreach_add_(velocities, gradients, alpha=-lr)
            torch._foreach_add_(parameters, velocities)

    def _states(self, parameters: Sequence[Tensor], form: str, lr: float) -> list[Tensor]:
        """Each parameter's velocity, or the equivalent momentum buffer at the learning rate ``lr``."""
        tensors = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state[form] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            elif "momentum_buffer" in state and (form == "velocity" or state["lr"] != lr):
                buffer = state.pop("momentum_buffer")
                # velocity = -lr * buffer, with the rate at which the buffer was last used.
                state[form] = buffer.mul_(-state["lr"] if form == "velocity" else state["lr"] / lr)
            elif "velocity" in state and form == "momentum_buffer":
                state[form] = state.pop("velocity").mul_(-1 / lr)
            state["lr"] = lr
            tensors.append(state[form])
        return tensors


def _like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` in its parameter's memory format: the fused kernel traverses both in memory order."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def parameter_groups(model: nn.Module, recipe: RecipeConfig) -> list[dict[str, Any]]:
    """Trainable weights, with weight decay, and biases, without (the paper states its rule for weights).

    If the convolutions have a learning rate of their own, each of the two groups is split into one for convolutions and
    one for dense layers; the order of the parameters is the same.
    """
    weights: list[tuple[nn.Parameter, bool]] = []
    biases: list[tuple[nn.Parameter, bool]] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            convolution = any(other.dim() == 4 for other in module.parameters(recurse=False))
            (weights if parameter.dim() > 1 else biases).append((parameter, convolution))
    groups = []
    for members, weight_decay, multiplier in (
        (weights, recipe.weight_decay, 1.0),
        (biases, 0.0, recipe.bias_lr_multiplier),
    ):
        parts = [(members, multiplier)]
        if recipe.conv_lr_multiplier != 1:
            rates = {True: recipe.conv_lr_multiplier * multiplier, False: multiplier}
            parts = [([member for member in members if member[1] == kind], rate) for kind, rate in rates.items()]
        for part, rate in parts:
            params = [parameter for parameter, _ in part]
            groups.append({"params": params, "weight_decay": weight_decay, "multiplier": rate})
    return groups


class Schedule:
    """Learning rate schedule, and when training ends.

    ``plateau`` is the paper's: reduce the learning rate when the validation error has not improved for ``patience``
    evaluations, ``reductions`` times; the next plateau ends training. ``multistep`` reduces it at the epochs in
    ``lr_milestones``. Each reduction multiplies it by ``gamma``, a tenth in the paper.
    """

    def __init__(self, recipe: RecipeConfig) -> None:
        self.recipe = recipe
        self.best = float("inf")
        self.stalled = 0
        self.reductions = 0
        self.finished = False

    @property
    def lr(self) -> float:
        """The current learning rate."""
        return self.recipe.lr * self.recipe.gamma**self.reductions

    def observe(self, epoch: float, error: float | None) -> None:
        """Step at the end of an epoch, counted from 1.

        Args:
            epoch: epochs completed.
            error: the validation error; None without an evaluation.
        """
        if self.recipe.lr_scheduler == "multistep":
            self.reductions = sum(epoch >= milestone for milestone in self.recipe.lr_milestones)
        elif error is not None:
            if error < self.best:
                self.best, self.stalled = error, 0
            else:
                self.stalled += 1
            if self.stalled >= self.recipe.patience:
                self.stalled = 0
                if self.reductions == self.recipe.reductions:
                    self.finished = True
                else:
                    self.reductions += 1

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rates of the optimizer's groups."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr * group["multiplier"]

    def state_dict(self) -> dict[str, Any]:
        names = ("best", "stalled", "reductions", "finished")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
