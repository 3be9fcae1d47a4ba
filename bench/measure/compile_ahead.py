"""Compile operators before they are timed: ``python -m bench.measure.compile_ahead CASE,IMPLEMENTATION,DTYPE...``.

What a process has compiled, others find in Inductor's cache. A line on stdout says which variant is done. What fails
here fails again when it is to be timed.
"""

import sys

import torch

from ..bench_kernels import BY_NAME, checked

if __name__ == "__main__":
    for name in sys.argv[1:]:
        case, implementation, dtype = name.split(",")
        checked(BY_NAME[case], implementation, dtype, torch.device("cpu"))
        print(name, flush=True)
