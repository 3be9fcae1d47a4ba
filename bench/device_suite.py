"""Everything worth knowing of a GPU, in order of value: ``python -m bench.device_suite``.

Each part writes its rows to the record as soon as it ends, and no part begins after ``--budget-s`` seconds.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from net.alexnet import alexnet
from net.config import VARIANTS, TrainConfig
from net.device import autocast, set_precision
from net.recipe import PaperSGD, Schedule, parameter_groups

from .environment import ROOT
from .records import DATA, time_columns, write
from .timing import copies, gpu_seconds, wall_seconds

Rows = Iterator[dict[str, Any]]
#: [channels, rows and columns] of what stages 1 and 2 of the paper's network read.
STAGES = {"stage1": (96, 55), "stage2": (256, 27)}


def gate() -> Rows:
    """The kernels' tests on this device; a failure ends the suite."""
    tests = ["tests/test_triton_stage.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise SystemExit("error: the kernels' tests fail on this device; nothing is timed")
    yield {"case": "the kernels' tests", "median_us": round((time.perf_counter() - begin) * 1e6)}


def ceilings() -> Rows:
    """Copies of several sizes, and matrix products."""
    for mib in (16, 64, 1024):
        columns = _copy(2 * mib * 2**20)
        gb = 2 * mib * 2**20 / columns["median_us"] * 1e-3
        yield {"case": "copy", "shape": f"{mib} MiB", "implementation": "aten", **columns, "gb_per_s": round(gb)}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        (times,) = gpu_seconds([[lambda a=a, b=b: torch.mm(a, b)]], 10)  # type: ignore[misc]
        columns = time_columns(times)
        rate = 2 * 8192**3 / columns["median_us"] * 1e-6
        name = str(dtype).removeprefix("torch.")
        yield {
            "case": "matrix product",
            "shape": "8192x8192x8192",
            "dtype": name,
            **columns,
            "tflop_per_s": round(rate),
        }


def _copy(moved: int) -> dict[str, float]:
    """Times of reading and writing ``moved`` bytes, half of them each."""
    # By an elementwise kernel: a graph's own copies are slower for some sizes.
    size = moved // 8
    pairs = [torch.randn(2, size, device="cuda") for _ in range(copies(moved))]
    (times,) = gpu_seconds([[lambda pair=pair: torch.neg(pair[1], out=pair[0]) for pair in pairs]])  # type: ignore[misc]
    return time_columns(times)


def _rivals() -> dict[str, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]]:
    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    return {"triton": lambda f: f, "aten": lambda f: f, "compiled": compiled, "compiled reference": compiled}


def stages(batch: int) -> Rows:
    """Stages 1 and 2 of the paper's network, each implementation against a copy of as many bytes."""
    functorch_config.donated_buffer = False
    for dtype in (torch.bfloat16, torch.float32):
        for name, (channels, size) in STAGES.items():
            out_size = (size - 3) // 2 + 1
            whole, windows = (batch * channels * side * side for side in (size, out_size))
            width = dtype.itemsize
            moved = {
                "inference": (whole + windows) * width,
                "forward": (whole + windows) * width + windows,
                "backward": (2 * whole + windows) * width + windows,
            }
            moved["forward_backward"] = moved["forward"] + moved["backward"]
            count = copies(moved["inference"])
            bias = torch.randn(channels, device="cuda", requires_grad=True)
            inputs, gradients = [], []
            for _ in range(count):
                x = (torch.randn(batch, channels, size, size, device="cuda") * 20).to(dtype)
                inputs.append(x.contiguous(memory_format=torch.channels_last).requires_grad_())
                g = torch.randn(batch, channels, out_size, out_size, device="cuda").to(dtype)
                gradients.append(g.contiguous(memory_format=torch.channels_last))

            def stage(x: Tensor, bias: Tensor) -> Tensor:
                return kernels.relu_lrn_max_pool2d(x, 5, 5e-4, 0.75, 2.0, groups=2, bias=bias)

            for mode in moved:
                copy = _copy(moved[mode])
                found: dict[str, Sequence[Callable[[], object]]] = {}
                for rival, prepare in _rivals().items():
                    chosen = {"compiled": "aten", "compiled reference": "reference"}.get(rival, rival)
                    with kernels.implementation(chosen):
                        found[rival] = _calls(prepare(stage), mode, inputs, bias, gradients)
                        for call in found[rival]:
                            call()
                        (times,) = gpu_seconds([found[rival]])
                    columns = time_columns(times)
                    yield {
                        "case": name,
                        "implementation": rival,
                        "mode": mode,
                        "shape": f"{batch}x{channels}x{size}x{size}",
                        "dtype": str(dtype).removeprefix("torch."),
                        "memory_format": "channels_last",
                        **columns,
                        "fewest_mb": round(moved[mode] * 1e-6, 1),
                        "copy_us": copy["median_us"],
                        "percent_of_copy_bandwidth": round(100 * copy["median_us"] / columns["median_us"], 1),
                    }


def _calls(
    run: Callable[..., Tensor], mode: str, inputs: list[Tensor], bias: Tensor, gradients: list[Tensor]
) -> list[Callable[[], object]]:
    calls: list[Callable[[], object]] = []
    for x, gradient in zip(inputs, gradients, strict=True):
        if mode == "inference":
            frozen, plain = x.detach(), bias.detach()
            calls.append(lambda x=frozen, b=plain: run(x, b))  # type: ignore[misc]
        elif mode == "forward":
            calls.append(lambda x=x: run(x, bias))  # type: ignore[misc]
        elif mode == "forward_backward":
            calls.append(lambda x=x, g=gradient: torch.autograd.grad(run(x, bias), (x, bias), g))  # type: ignore[misc]
        else:
            output = run(x, bias)
            calls.append(
                lambda o=output, x=x, g=gradient: torch.autograd.grad(o, (x, bias), g, retain_graph=True)  # type: ignore[misc]
            )
    return calls


def training(batch: int) -> Rows:
    """An update of the paper's network, and of the LRN-free one, in bfloat16."""
    cases = [
        ("paper", "triton", "reduce-overhead"),
        ("paper", "aten", "reduce-overhead"),
        ("paper", "triton", "default"),
        ("paper", "triton", "eager"),
        ("paper", "aten", "eager"),
        ("one_weird_trick", "aten", "reduce-overhead"),
    ]
    device = torch.device("cuda")
    for variant, implementation, mode in cases:
        torch._dynamo.reset()
        torch.manual_seed(0)
        set_precision("bf16", device)
        size = VARIANTS[variant].image_size
        model: nn.Module = alexnet(variant).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        recipe = TrainConfig()
        optimizer = PaperSGD(parameter_groups(model, recipe), recipe.lr, recipe.momentum, recipe.weight_decay)
        Schedule(recipe).apply(optimizer)
        images = (torch.randn(batch, 3, size, size, device=device) * 60).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 1000, (batch,), device=device)
        forward: Callable[[Tensor], Tensor] = model
        if mode != "eager":
            forward = torch.compile(model, mode=mode, dynamic=False)

        def update(
            forward: Callable[[Tensor], Tensor] = forward,
            images: Tensor = images,
            labels: Tensor = labels,
            optimizer: PaperSGD = optimizer,
        ) -> None:
            with autocast("bf16", device):
                loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        with kernels.implementation(implementation):
            begin = time.perf_counter()
            update()
            torch.cuda.synchronize()
            first = time.perf_counter() - begin
            torch.cuda.reset_peak_memory_stats()
            columns = time_columns(wall_seconds(update, 30, 10))
        yield {
            "case": f"update of {variant}",
            "implementation": f"{implementation}, {mode}",
            "mode": "train_step",
            "shape": f"{batch}x3x{size}x{size}",
            "dtype": "bfloat16",
            "memory_format": "channels_last",
            **columns,
            "images_per_s": round(batch / columns["median_us"] * 1e6),
            "peak_mib": round(torch.cuda.max_memory_allocated() / 2**20),
            "first_call_s": round(first, 1),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.device_suite", description=__doc__)
    parser.add_argument("--budget-s", type=float, default=540, help="begin no part after so many seconds")
    parser.add_argument("--output", type=Path, default=DATA, help="folder for the record")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--parts", nargs="+", help="only these")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; python -m pytest --benchmark-only measures a CPU")
    # Graphs cannot be captured on the default stream.
    torch.cuda.set_stream(torch.cuda.Stream())
    parts: dict[str, Callable[[], Rows]] = {
        "gate": gate,
        "ceilings": ceilings,
        "stages": lambda: stages(options.batch_size),
        "training": lambda: training(options.batch_size),
    }
    begin = time.perf_counter()
    for name, part in parts.items():
        if options.parts and name not in options.parts:
            continue
        print(f"--- {name}", flush=True)
        rows = part()
        while time.perf_counter() - begin < options.budget_s:
            row = next(rows, None)
            if row is None:
                break
            print({k: v for k, v in row.items() if k not in ("p20_us", "p80_us", "memory_format")}, flush=True)
            write([row], options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
