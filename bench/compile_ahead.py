"""Compile operators before they are timed: ``python -m bench.compile_ahead CASE,IMPLEMENTATION,DTYPE...``.

Other processes find the compiled code in Inductor's cache. A line on stdout names each finished variant. A variant that
fails here will fail again when it is timed.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

from .cells import Scale, here, modes
from .subjects.cases import BY_NAME, DTYPES, NEEDS_GPU, Case, Prepared, check, failure, prepare


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


def compile_ahead(names: Sequence[str], count: int, say: Callable[[str], None]) -> None:
    """Run this module for variants in ``count`` processes, and report progress through ``say``."""
    say(f"compiling {len(names)} variants in {count} processes")
    begin = time.perf_counter()
    answers, answer = os.pipe()
    shares = [[sys.executable, "-m", "bench.compile_ahead", *names[number::count]] for number in range(count)]
    processes = [subprocess.Popen(share, stdout=answer, stderr=subprocess.DEVNULL) for share in shares]
    os.close(answer)
    try:
        # The pipe closes when all processes have ended, whether or not they compiled everything.
        with os.fdopen(answers) as lines:
            for done, line in enumerate(lines, 1):
                left = (time.perf_counter() - begin) / done * (len(names) - done)
                say(f"compiled {done} of {len(names)}: {line.strip()}" + (f"; about {left:.0f} s left" if left else ""))
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        case, implementation, dtype = name.split(",")
        checked(BY_NAME[case], implementation, dtype, here())
        print(name, flush=True)
