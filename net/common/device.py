"""Where and how precisely the network computes."""

import contextlib
import ctypes
import sys
from collections.abc import Mapping

import torch

from .errors import UsageError


def choose(name: str | None) -> torch.device:
    """The device called ``name``, made the current one; without a name CUDA's GPU, or the CPU where there is none.

    Raises:
        UsageError: no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda, cuda:N or mps; got {name!r}") from None
    if device.type not in ("cpu", "cuda", "mps") or (device.type != "cuda" and device.index is not None):
        raise UsageError(f"--device must be cpu, cuda, cuda:N or mps; got {name!r}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch finds no Apple GPU that it can use here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda":
        # set_device takes no device without a number.
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next ones instead of giving it back.

    By default glibc unmaps every large tensor when it is freed, and each new one faults its pages in again: a third of
    a training step on a CPU. Elsewhere than on glibc this does nothing.
    """
    # Windows has no library of that kind.
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def set_precision(precision: str, device: torch.device) -> None:
    """Turn TF32 on for ``tf32`` and off for everything else.

    Raises:
        UsageError: tf32 on a device that has none.
    """
    tf32 = precision == "tf32"
    if tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UsageError("--precision tf32 needs an NVIDIA GPU of compute capability 8.0 or more; use fp32 or bf16")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def resolve_precision(wanted: str, device: torch.device, trained: str | None = None) -> str:
    """What ``--precision`` means on a device: ``auto`` is bf16 on GPUs with bfloat16 units, else fp32.

    Args:
        wanted: ``auto``, or what stays as it is.
        device: where the network runs.
        trained: the precision that a network was trained in; ``auto`` takes it where the device has it.
    """
    if wanted != "auto":
        return wanted
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return (trained or "bf16") if able else "fp32"


def repeat_bits() -> None:
    """Have cuDNN take algorithms that give the same bits every time."""
    torch.backends.cudnn.deterministic = True


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The context the network's forward pass runs in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def peak_memory_mib(device: torch.device) -> float:
    """The most memory taken so far: by tensors on a GPU (on Apple's, what is taken now), by the process on a CPU.

    Returns:
        0 where the system does not tell, as on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    # The kernel's own count where there is one: getrusage's begins with the peak of whatever started this process.
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    try:
        import resource
    except ImportError:
        return 0.0
    # In bytes on macOS, in KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def random_state(device: torch.device) -> dict[str, torch.Tensor | None]:
    """The states of the random numbers of the CPU and of ``device``, by the kind of device."""
    state: dict[str, torch.Tensor | None] = {"cpu": torch.get_rng_state(), "cuda": None}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(device: torch.device, state: Mapping[str, torch.Tensor | None]) -> None:
    """Go on from what :func:`random_state` returned; a device of another kind goes its own way."""
    assert state["cpu"] is not None
    torch.set_rng_state(state["cpu"])
    own = state.get(device.type)
    if own is not None and device.type == "cuda":
        torch.cuda.set_rng_state(own, device)
    elif own is not None and device.type == "mps":
        torch.mps.set_rng_state(own)


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over a data set are kept in: float64, which Apple's GPUs lack; counts are exact there up to 2**24."""
    return torch.float32 if device.type == "mps" else torch.float64


def describe(device: torch.device) -> str:
    """The device in words, for the first lines of a log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU (mps)"
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''}"
