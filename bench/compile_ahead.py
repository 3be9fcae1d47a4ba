"""Compile programs before anything is timed: ``python -m bench.compile_ahead``, with a program per line on stdin.

A program is a JSON list: its kind, and the arguments of that kind's function below. It is called once, so that other
processes find the compiled code in Inductor's cache. A JSON string on stdout answers each: its error, empty if there is
none. A program that fails will fail again when it is timed.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from .cells import RUNTIME_BATCHES, Scale, here, modes
from .subjects.cases import BY_NAME, DTYPES, NEEDS_GPU, Case, Prepared, check, failure, prepare
from .subjects.network import images_and_labels
from .subjects.steps import Step
from .subjects.user_program import SHAPES, Stage

#: A kind, one of :data:`KINDS`, and its arguments.
Program = tuple[str | int, ...]
CPU = torch.device("cpu")


@cache
def checked(case: Case, implementation: str, dtype: str, scale: Scale) -> tuple[Prepared | None, str]:
    """The implementation if it passes its check; else None and the reason."""
    if implementation == "triton" and not scale.cuda:
        return None, NEEDS_GPU
    prepared = prepare(case, implementation)
    try:
        check(prepared, scale.images, DTYPES[dtype], torch.device(scale.device), modes(implementation, scale))
    except Exception as error:  # Any error becomes the row's status; this benchmark fails, and the others continue.
        return None, failure(error)
    return prepared, ""


def _operator(case: str, implementation: str, dtype: str) -> None:
    checked(BY_NAME[case], implementation, dtype, here())


def _stages(name: str, images: int) -> None:
    """Those of a user's program."""
    for shape in SHAPES:
        stage = Stage(name, images, shape)
        stage.backward(stage.forward())


def _inference(implementation: str) -> None:
    """For one image, and for any number."""
    from . import bench_rivals

    for count in RUNTIME_BATCHES[:2]:
        bench_rivals.ready(implementation, images_and_labels(bench_rivals.NETWORK, count, CPU)[0])


def _step(*step: Any) -> None:
    from . import bench_steps

    bench_steps.ready(Step(*step), CPU)


KINDS: dict[str, Callable[..., None]] = {
    "operator": _operator,
    "stages": _stages,
    "inference": _inference,
    "step": _step,
}


def share_keys() -> None:
    """Have this process look up compiled code under the keys that programs without a test runner store it under.

    A key holds the pickled memory formats of inputs. Pickle finds the module of ``torch.contiguous_format``, say,
    by trying all that are loaded, in their order, and ends with the first that has a ``torch``. That should be one of
    PyTorch's own, but a runner's plugins and conftest.py may have been there before.
    """
    for name in itertools.takewhile(lambda name: name.partition(".")[0] != "torch", list(sys.modules)):
        if "torch" in vars(sys.modules[name]):
            sys.modules[name] = sys.modules.pop(name)


def compile_ahead(programs: Sequence[Program], count: int, say: Callable[[str], None]) -> None:
    """Compile programs in ``count`` processes, in the order given, and report progress through ``say``."""
    share_keys()
    say(f"compiling {len(programs)} programs in {count} processes")
    begin = time.perf_counter()
    # The threads share it: each takes the next program.
    waiting = iter(programs)
    done: list[Program] = []
    workers: list[subprocess.Popen[str]] = []
    one_by_one = threading.Lock()

    def work() -> None:
        command = [sys.executable, "-m", "bench.compile_ahead"]
        pipe = subprocess.PIPE
        worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        workers.append(worker)
        assert worker.stdin is not None
        assert worker.stdout is not None
        for program in waiting:
            try:
                print(json.dumps(program), file=worker.stdin, flush=True)
                error = json.loads(worker.stdout.readline())
            except (BrokenPipeError, ValueError):
                # It has ended. The other processes go on.
                break
            with one_by_one:
                done.append(program)
                said = f"compiled {len(done)} of {len(programs)}: {', '.join(map(str, program))}"
                if error:
                    said += f": {error}"
                if left := len(programs) - len(done):
                    said += f"; about {(time.perf_counter() - begin) / len(done) * left:.0f} s left"
                say(said)
        worker.communicate()

    with ThreadPoolExecutor(count) as threads:
        try:
            for each in [threads.submit(work) for _ in range(count)]:
                each.result()
        finally:
            # If this is interrupted, the threads end with their processes.
            for worker in workers:
                worker.kill()


def main() -> None:
    # Libraries may print to stdout; answers go to a copy of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        error = ""
        try:
            KINDS[kind](*arguments)
        except Exception as raised:
            error = failure(raised)
        print(json.dumps(error), file=answers, flush=True)
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
