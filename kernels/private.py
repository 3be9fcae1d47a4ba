"""Everything undocumented or unstable that this project uses of PyTorch and Triton.

All other code imports it from here; only a module's ``_modules``, ``_parameters`` and ``_buffers`` are used elsewhere.
If a version renames something, only this file is affected, and one test fails and names what is missing. If a version
lacks a name that only saves time, the code takes the slower documented way.
"""

import contextlib
import datetime
import functools
import importlib
import importlib.metadata
import pkgutil
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

#: First and last minor version that tests have run with: all of them, or a part. CONTRIBUTING.md has the table.
TRIED = {"torch": ((2, 11), (2, 15)), "triton": ((3, 6), (3, 9))}

#: The names in use, and where. Names of packages that are not installed are skipped.
NAMES = (
    "torch._C._len_torch_function_stack",  # net.model.linear
    "torch._C._len_torch_dispatch_stack",  # kernels.cpu: whether operators are recorded
    "torch._C._are_functorch_transforms_active",  # kernels.autograd: whether a derivative may be asked for
    "torch._C._functorch:get_interpreter_stack",
    "torch._C._functorch:TransformType",
    "torch._C._functorch:is_legacy_batchedtensor",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",  # kernels.threads
    "torch.Tensor._is_view",
    "torch.Tensor._version",  # net.training.step
    "torch._C._autograd._top_saved_tensors_default_hooks",  # kernels.fuse: activation checkpointing
    "torch.nn.modules.module:_has_any_global_hook",
    "torch._assert",  # kernels.fuse
    "torch.fx._symbolic_trace:is_fx_symbolic_tracing",
    "torch.jit._trace:is_tracing",
    "torch.utils._pytree:tree_leaves",
    "torch.utils._pytree:tree_map",
    "torch.compiler._is_exporting_flag",  # kernels.dispatch
    "torch._dynamo.config:patch",  # kernels.inductor
    "torch._dynamo.config:recompile_limit",
    "torch._dynamo.config:accumulated_recompile_limit",  # bench
    "torch._foreach_mul_",  # net.training.recipe
    "torch._foreach_add_",
    "torch.optim.sgd:sgd",
    "torch._inductor.aoti_compile_and_package",  # net.model.export
    "torch.distributed._functional_collectives:all_to_all_single_autograd",  # net.parallel
    "torch.distributed._functional_collectives:AsyncCollectiveTensor",
    "torch.distributed.distributed_c10d:_set_pg_timeout",
    "torch.distributed.distributed_c10d:_world",  # net.parallel.heartbeat
    "torch.distributed.ProcessGroup._get_sequence_number_for_group",
    "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model",
    "torch._C._autograd.DeviceType",  # bench
    "torch.utils._python_dispatch:TorchDispatchMode",
    "torch.cuda._sleep",
    "torch._dynamo.reset",
    "torch._functorch.config:patch",
    "torch._functorch.config:donated_buffer",
    "torch.testing._internal.distributed.fake_pg:FakeStore",
    "triton.backends.compiler:GPUTarget",  # kernels.aot
    "triton.compiler:ASTSource",
    "triton.runtime.interpreter:GridExecutor",  # bench.launches
)
#: Functions that exist under one of several names.
RENAMED = (
    # The first since PyTorch 2.13.
    (
        "torch.distributed._functional_collectives:all_gather_single_autograd",
        "torch.distributed._functional_collectives:all_gather_tensor_autograd",
    ),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@functools.cache
def found(*names: str) -> Any:
    """The object that the first existing one of ``names`` refers to: ``package.module:attribute``, or dots alone.

    Raises:
        ImportError: the installed version has none of them.
    """
    for name in names:
        with contextlib.suppress(ImportError, AttributeError):
            return pkgutil.resolve_name(name)
    package = names[0].partition(".")[0]
    raise ImportError(f"{package} {importlib.metadata.version(package)} has no {' or '.join(names)}; {_tried(package)}")


def missing() -> list[str]:
    """Names in :data:`NAMES`, in :data:`RENAMED` and of module hooks that the installed versions lack."""
    installed = [package for package in TRIED if importlib.util.find_spec(package)]
    names = [(name,) for name in NAMES] + list(RENAMED)
    result = [f"torch.nn.Module.{name}" for name in _HOOKS if not hasattr(nn.Module(), name)]
    for each in names:
        if each[0].partition(".")[0] in installed:
            try:
                found(*each)
            except ImportError:
                result.append(" or ".join(each))
    return result


def _tried(package: str) -> str:
    least, most = (".".join(map(str, version)) for version in TRIED[package])
    return f"its tests ran with {package} {least} to {most}"


@functools.cache
def warn_untested() -> None:
    """Warn once per process about versions that the tests have not run with."""
    for package, (least, most) in TRIED.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            numbers = re.match(r"(\d+)\.(\d+)", version)
            if numbers is not None and not least <= (int(numbers[1]), int(numbers[2])) <= most:
                # Tests filter this warning by its first words.
                warnings.warn(f"kernels was not tried with {package} {version}: {_tried(package)}", stacklevel=3)


def recorded() -> bool:
    """Whether this thread's operators are recorded or intercepted."""
    with contextlib.suppress(ImportError):
        return bool(found("torch._C._len_torch_dispatch_stack")() > 0)
    return True


def functions_replaced() -> bool:
    """Whether a ``TorchFunctionMode``, such as that of ``torch.set_default_device``, sees this thread's calls."""
    with contextlib.suppress(ImportError):
        return bool(found("torch._C._len_torch_function_stack")() > 0)
    return True


def derivatives_beyond_autograd() -> bool:
    """Whether forward mode or a transform of ``torch.func`` is active in this thread."""
    with contextlib.suppress(AttributeError):
        return bool(forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active())
    return True


def nested_forward_mode() -> bool:
    """Whether ``torch.func.jvp`` is active in this thread inside another ``jvp``."""
    stack = found("torch._C._functorch:get_interpreter_stack")() or ()
    kind = found("torch._C._functorch:TransformType")
    return bool(sum(level.key() == kind.Jvp for level in stack) > 1)


def is_batch_of_gradients(tensor: Tensor) -> bool:
    """Whether ``tensor`` comes from ``torch.autograd.grad(..., is_grads_batched=True)``."""
    return bool(found("torch._C._functorch:is_legacy_batchedtensor")(tensor))


def exporting() -> bool:
    """Whether ``torch.export`` is tracing.

    In what Dynamo traces, ``torch.compiler.is_exporting()`` of PyTorch 2.11 is always true.
    """
    return bool(torch.compiler._is_exporting_flag)


def without_forward_mode() -> contextlib.AbstractContextManager[Any]:
    """Turns forward-mode derivatives off inside a ``with`` block."""
    return found("torch.autograd.forward_ad._set_fwd_grad_enabled")(False)  # type: ignore[no-any-return]


def is_view(tensor: Tensor) -> bool:
    """Whether autograd tracks ``tensor`` as a view of another."""
    return tensor._is_view()


def version(tensor: Tensor) -> int:
    """A number that changes whenever the contents of ``tensor`` are modified in place."""
    return tensor._version


def schema(operator: Any) -> Any:
    """The signature of an operator, with its name."""
    return operator._schema


def saved_tensor_hooks() -> Any:
    """The hooks that are active for tensors saved for backward, such as activation checkpointing's."""
    return found("torch._C._autograd._top_saved_tensors_default_hooks")(True)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook runs before or after the forward or backward of ``module``."""
    return any(getattr(module, kind) for kind in _HOOKS)


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of nested lists, tuples and dictionaries."""
    return found("torch.utils._pytree:tree_leaves")(tree)  # type: ignore[no-any-return]


def tree_map(function: Any, tree: Any) -> Any:
    """The same nesting, with ``function`` applied to each leaf."""
    return found("torch.utils._pytree:tree_map")(function, tree)


def dynamo(**settings: Any) -> contextlib.AbstractContextManager[Any]:
    """``torch.compile``'s own settings inside a ``with`` block."""
    return found("torch._dynamo.config:patch")(**settings)  # type: ignore[no-any-return]


def functorch(**settings: Any) -> contextlib.AbstractContextManager[Any]:
    """AOTAutograd's settings inside a ``with`` block."""
    return found("torch._functorch.config:patch")(**settings)  # type: ignore[no-any-return]


def collectives_started() -> dict[str, int]:
    """The number of collectives that this rank has started, by the name of the process group."""
    groups: list[Any] = list(found("torch.distributed.distributed_c10d:_world").pg_map)
    return {group.group_name: group._get_sequence_number_for_group() for group in groups}


def set_group_timeout(group: torch.distributed.ProcessGroup, seconds: float) -> None:
    """Set the timeout of messages in ``group``."""
    found("torch.distributed.distributed_c10d:_set_pg_timeout")(datetime.timedelta(seconds=seconds), group)


def leave_to_ranks(model: nn.Module, names: Iterable[str]) -> None:
    """Make DistributedDataParallel ignore the parameters ``names`` of ``model``; call this before wrapping it."""
    found("torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model")(model, list(names))
