"""The device and the precision the network runs in."""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError

# At import, because Dynamo cannot trace the call.
_ONEDNN = torch.backends.mkldnn.is_available()
#: Streams of a GPU other than the current one.
Streams = tuple[torch.cuda.Stream, ...]


def choose(name: str | None) -> torch.device:
    """The device ``name``, made the current one; by default a CUDA GPU if there is one, else the CPU.

    Raises:
        UsageError: no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda, cuda:N or mps; got {name!r}") from None
    if device.type not in ("cpu", "cuda", "mps") or (device.type != "cuda" and device.index is not None):
        raise UsageError(f"--device must be cpu, cuda, cuda:N or mps; got {name!r}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch finds no usable Apple GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda":
        # set_device requires an index.
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def is_gpu(device: torch.device) -> bool:
    """Whether it is a GPU that Triton kernels and NCCL run on; an Apple GPU is not."""
    return device.type == "cuda"


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on it: a GPU, with Triton installed."""
    return is_gpu(device) and importlib.util.find_spec("triton") is not None


def is_cpu(device: torch.device) -> bool:
    """Whether it is the CPU."""
    return device.type == "cpu"


def runs_onednn(device: torch.device) -> bool:
    """Whether oneDNN computes on it: the CPU, in a PyTorch that contains oneDNN."""
    return device.type == "cpu" and _ONEDNN


def onednn_enabled() -> bool:
    """Whether the user left oneDNN on; see ``torch.backends.mkldnn.flags``."""
    return bool(torch.backends.mkldnn.enabled)


def fuses_updates(device: torch.device) -> bool:
    """Whether PyTorch has fused optimizers for it."""
    return device.type in ("cpu", "cuda")


def joins_processes(device: torch.device) -> bool:
    """Whether processes on such devices can exchange tensors."""
    return device.type != "mps"


def gpu_count() -> int:
    """The number of this machine's GPUs for which :func:`is_gpu` is true."""
    return torch.cuda.device_count()


def gpu_model(device: torch.device) -> dict[str, list[Any]]:
    """What a GPU's speed depends on: its model, and the versions of CUDA and cuDNN."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": [properties.name, properties.major, properties.minor, properties.multi_processor_count],
        "libraries": [torch.version.cuda, torch.backends.cudnn.version()],
    }


def gpu_milliseconds(call: Callable[[], object], count: int) -> float:
    """Milliseconds that the current GPU takes for one of ``count`` calls in a row."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / count


def free_gpu_memory() -> None:
    """Return the memory of freed tensors to the GPU."""
    torch.cuda.empty_cache()


def forget_peak_memory(device: torch.device) -> None:
    """Reset the peak that :func:`peak_memory_mib` reports for a GPU to its current memory."""
    torch.cuda.reset_peak_memory_stats(device)


def set_precision(precision: str, device: torch.device) -> None:
    """Enable TF32 for ``tf32`` and disable it for every other precision.

    Raises:
        UsageError: tf32 on a device without it, or bf16 on a GPU without it.
    """
    tf32 = precision == "tf32"
    if (tf32 or (precision == "bf16" and device.type == "cuda")) and not _ampere(device):
        raise UsageError(
            f"--precision {precision} needs an NVIDIA GPU of compute capability 8.0 or more; use --precision fp32"
        )
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def resolve_precision(wanted: str, device: torch.device, trained: str | None = None) -> str:
    """Resolve ``--precision``: ``auto`` is bf16 on GPUs with bfloat16 units, else fp32.

    Args:
        wanted: ``auto``, or a precision, which is returned unchanged.
        device: where the network runs.
        trained: the precision the network was trained in; ``auto`` uses it where the device supports it.
    """
    if wanted != "auto":
        return wanted
    return (trained or "bf16") if _ampere(device) else "fp32"


def _ampere(device: torch.device) -> bool:
    """Whether ``device`` is a GPU with TF32 and bfloat16 units."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def repeat_bits() -> None:
    """Have cuDNN use deterministic algorithms."""
    torch.backends.cudnn.deterministic = True


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The context the network's forward pass runs in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far: of tensors on a GPU (current memory on an Apple GPU), of the process on a CPU.

    Returns:
        MiB; 0 where the system does not report it, as on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    # Linux's VmHWM where it exists: getrusage's value starts at the peak of the parent process.
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
    """The random generator states of the CPU and of ``device``, by device type."""
    state: dict[str, torch.Tensor | None] = {"cpu": torch.get_rng_state(), "cuda": None}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(device: torch.device, state: Mapping[str, torch.Tensor | None]) -> None:
    """Restore what :func:`random_state` returned; the generator of another type of device keeps its state."""
    assert state["cpu"] is not None
    torch.set_rng_state(state["cpu"])
    own = state.get(device.type)
    if own is not None and device.type == "cuda":
        torch.cuda.set_rng_state(own, device)
    elif own is not None and device.type == "mps":
        torch.mps.set_rng_state(own)


def streams(count: int) -> Streams:
    """New streams of the current GPU."""
    return tuple(torch.cuda.Stream() for _ in range(count))


def at_once(calls: Sequence[Callable[[], Tensor]], streams: Streams) -> list[Tensor]:
    """Run the first of ``calls`` on the current stream and each of the others on a stream of its own.

    Autograd runs their backward passes on the same streams. All streams wait for the current one before they start, and
    it waits for all of them afterwards, so that no memory is reused too early by another stream.
    """
    current = torch.cuda.current_stream()
    for stream in streams:
        stream.wait_stream(current)
    results = []
    for call, stream in zip(calls, (current, *streams), strict=True):
        with torch.cuda.stream(stream):
            results.append(call())
    for stream, result in zip(streams, results[1:], strict=True):
        current.wait_stream(stream)
        result.record_stream(current)
    return results


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over a data set: float64, or float32 on Apple GPUs, where counts are exact up to 2**24."""
    return torch.float32 if device.type == "mps" else torch.float64


def describe(device: torch.device) -> str:
    """The device's name, for the first lines of a log."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU (mps)"
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' if threads > 1 else ''}"
