"""Where and how precisely the network computes."""

import contextlib
import ctypes
import resource

import torch

from .errors import UsageError


def choose(name: str | None) -> torch.device:
    """The device called ``name``, made the current one; without a name a GPU, or the CPU where there is none.

    Raises:
        UsageError: no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UsageError(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next ones instead of giving it back.

    By default glibc unmaps every large tensor when it is freed, and each new one faults its pages in again: a third of
    a training step on a CPU. Elsewhere than on glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
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


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The context the network's forward pass runs in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def peak_memory_mib(device: torch.device) -> float:
    """The most memory taken so far: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # The kernel's own count where there is one: getrusage's begins with the peak of whatever started this process.
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def describe(device: torch.device) -> str:
    """The device in words, for the first lines of a log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''}"
