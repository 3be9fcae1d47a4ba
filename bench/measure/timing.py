"""Timing: on a GPU by replaying a graph with cold caches, on a CPU by the clock."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch

#: Minimum total duration of a sample's calls, so that the timer's own microseconds do not matter.
SAMPLE_SECONDS = 1e-3
SAMPLES = 30
#: On a CPU, sampling ends after this many seconds, once there are ENOUGH samples.
CPU_SECONDS, ENOUGH = 2.0, 5
#: Bytes moved between two uses of the same memory: more than any GPU's cache holds.
COLD_BYTES = 2**28

#: Clock cycles that a GPU waits while the host enqueues what is measured.
BUSY_CLOCKS = 1_000_000

Call = Callable[[], object]


def copies(bytes_moved: int) -> int:
    """The number of input sets that the calls must alternate between, so that none is in the cache."""
    return max(2, min(16, math.ceil(COLD_BYTES / max(1, bytes_moved)) + 1))


def _elapsed(run: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPU reaches the first event after the host has enqueued everything: host time is not measured.
    torch.cuda._sleep(BUSY_CLOCKS)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def _graph(calls: Sequence[Call], rounds: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
    except Exception:
        # After a failed capture, the random generator still considers itself captured.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph


def gpu_seconds(rivals: Sequence[Sequence[Call]], samples: int = SAMPLES) -> list[list[float]]:
    """Seconds per call of each rival, sampled interleaved.

    A rival is a list of calls that do the same with different inputs. They are captured in one CUDA graph, so that
    nothing waits for the host. If a rival cannot be captured, the capture's error is raised.

    The current stream must not be the default one, and everything that the calls depend on, such as the forward pass of
    a captured backward pass, must have run on it.
    """
    stream = torch.cuda.current_stream()
    graphs: list[tuple[torch.cuda.CUDAGraph, int]] = []
    for calls in rivals:
        for _ in range(2):
            for call in calls:
                call()
        stream.synchronize()
        once = _graph(calls, 1, stream)
        once.replay()
        rounds = max(1, min(50, math.ceil(SAMPLE_SECONDS / _elapsed(once.replay))))
        graphs.append((once if rounds == 1 else _graph(calls, rounds, stream), rounds * len(calls)))
    results: list[list[float]] = [[] for _ in rivals]
    for sample in range(samples + 3):
        for result, (graph, count) in zip(results, graphs, strict=True):
            seconds = _elapsed(graph.replay) / count
            if sample >= 3:
                result.append(seconds)
    return results


def seconds(rivals: Sequence[Sequence[Call]], device: torch.device, samples: int = SAMPLES) -> list[list[float]]:
    """Seconds per call of each rival, sampled interleaved: from graphs on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        return gpu_seconds(rivals, samples)
    results: list[list[float]] = [[] for _ in rivals]
    first = time.perf_counter()
    for sample in range(samples + 2):
        if sample >= ENOUGH + 2 and time.perf_counter() - first > CPU_SECONDS:
            break
        for result, calls in zip(results, rivals, strict=True):
            begin = time.perf_counter()
            for call in calls:
                call()
            if sample >= 2:
                result.append((time.perf_counter() - begin) / len(calls))
    return results


def kernels_launched(call: Call) -> int:
    """The number of kernels that a call launches on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())


def synchronized() -> float:
    """The clock, after a GPU has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """pytest-benchmark's timer: :func:`synchronized`, or during a replay a clock that advances by given times."""

    def __init__(self) -> None:
        self._replayed: float | None = None

    def __call__(self) -> float:
        return synchronized() if self._replayed is None else self._replayed

    def replay(self, times: Iterable[float]) -> Call:
        """Stop the clock; each call of the returned function advances it by the next of ``times``, in seconds."""
        left = iter(times)
        self._replayed = 0.0

        def pass_time() -> None:
            assert self._replayed is not None
            self._replayed += next(left)

        return pass_time

    def stop(self) -> None:
        """End the replay."""
        self._replayed = None


def wall_seconds(call: Call, samples: int = SAMPLES, warmup: int = 3) -> list[float]:
    """Seconds of consecutive calls, each followed by a synchronization."""
    results = []
    for sample in range(samples + warmup):
        begin = synchronized()
        call()
        if sample >= warmup:
            results.append(synchronized() - begin)
    return results


def chained_seconds(call: Call, samples: int = SAMPLES, warmup: int = 3) -> list[float]:
    """Seconds from the end of one call to the end of the next on a GPU, without synchronization in between.

    On a CPU, the same as :func:`wall_seconds`.
    """
    if not torch.cuda.is_available():
        return wall_seconds(call, samples, warmup)
    for _ in range(warmup):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in itertools.pairwise(events)]
