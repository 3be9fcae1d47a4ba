"""Everything worth knowing of a device, in order of value: ``python -m bench.device_suite``.

For a GPU that may be had for minutes. Each part writes its rows to the record as soon as they are measured, and nothing
begins after ``--budget-s`` seconds. On a CPU the same parts run at sizes that say nothing, to see that they run.
"""

import contextlib
import gzip
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from net.cli import Parser, spin_briefly

# As the commands do, before torch is imported.
spin_briefly()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import kernels  # noqa: E402
from kernels import triton_stage  # noqa: E402
from net.config import VARIANTS  # noqa: E402
from net.data.images import Split  # noqa: E402
from net.data.loader import Loader  # noqa: E402

from . import ceilings as ceilings_module  # noqa: E402
from .cases import (  # noqa: E402
    CASES,
    DTYPES,
    MODES,
    Prepared,
    check,
    describe,
    failure,
    formats,
    implementations,
    inputs,
    kept,
    prepare,
    sampled,
)
from .ceilings import Ceilings  # noqa: E402
from .environment import ROOT  # noqa: E402
from .environment import describe as describe_machine  # noqa: E402
from .network import (  # noqa: E402
    STORED,
    build,
    describe_step,
    images_and_labels,
    inference_step,
    layer_steps,
    update_step,
    whole_work,
)
from .one_rank import ALONE_CASE, alone, usable  # noqa: E402
from .records import DATA, time_columns, write  # noqa: E402
from .roofline import Work  # noqa: E402
from .timing import copies, kernels_launched, seconds, wall_seconds  # noqa: E402

Rows = Iterator[dict[str, Any]]
#: In order of value; those that are compared with what the machine can do at best have that measured first.
PARTS = (
    "gate", "ceilings", "kernels", "steps", "layers", "inference", "trace", "input", "parallel", "choices", "autotune",
)  # fmt: skip
LIMITED = {"kernels", "steps", "layers", "inference", "autotune"}
#: Runs that must give the same bits.
REPEATS = 250
#: The tests that a GPU is for, and those of them that a memory checker, which is slow, looks at for so many seconds.
TESTS = ("tests/test_triton_stage.py", "tests/test_fuse.py")
CHECKED, CHECKER_SECONDS = "half_types or every_dtype", 120
#: Caps on registers, and rows of a segment, that are tried beside today's.
CAPS = (None, 64, 72, 80, 96, 112, 128)
SEGMENTS = (3, 4, 5, 6, 8, 12, 27)


@contextlib.contextmanager
def chosen(registers: dict[Any, Any], rows: int) -> Iterator[None]:
    """The Triton kernels' caps on registers, where they have one, and the rows of their segments."""
    before = triton_stage.REGISTERS, triton_stage.SEGMENT_ROWS
    triton_stage.REGISTERS, triton_stage.SEGMENT_ROWS = registers, rows
    try:
        yield
    finally:
        triton_stage.REGISTERS, triton_stage.SEGMENT_ROWS = before


def _exit_status(command: Sequence[str], environment: dict[str, str], limit: float) -> int | None:
    """A command's exit status; None if it was stopped, and what it had started, after so many seconds."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # A checker's test may outlive it, and would share the device with what is measured next.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Suite:
    """The parts on one device.

    Args:
        device: where they run.
        images: a batch.
        network: the variant of the network.
        toy: few samples, and no tests: this is to see that it runs.
    """

    def __init__(self, device: torch.device, images: int, network: str, toy: bool) -> None:
        self.device, self.images, self.network, self.toy = device, images, network, toy
        self.samples = 3 if toy else 30
        self.limits: Ceilings | None = None
        self.ours = "triton" if device.type == "cuda" else "reference"

    def gate(self) -> Rows:
        """The kernels' tests, repeats bit for bit, a memory checker where there is one; a failure ends the suite."""
        begin = time.perf_counter()
        if not self.toy:
            yield from self._tests()
        for case in CASES[:2]:
            input, bias = inputs(case, 2, torch.bfloat16, "channels_last", self.device)
            prepared = prepare(case, self.ours)
            results = []
            for _ in range(3 if self.toy else REPEATS):
                output = prepared(input, bias)
                results.append([output, *prepared.gradients(output, input, bias, torch.ones_like(output))])
            if not all(
                torch.equal(one, other) for result in results for one, other in zip(result, results[0], strict=True)
            ):
                raise SystemExit(f"error: {case.name} gives other bits when it is repeated; nothing is timed")
        yield {"case": "the kernels' tests", "median_us": round((time.perf_counter() - begin) * 1e6)}

    def _tests(self) -> Rows:
        environment = {**os.environ, "KERNELS_TEST": "gpu"}
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        # Most of their time goes into compiling, which takes one core.
        cores = min(8, len(os.sched_getaffinity(0)))
        shared = ["-n", str(cores)] if cores > 1 and importlib.util.find_spec("xdist") else []
        if subprocess.run([*tests, *shared, *TESTS], cwd=ROOT, env=environment).returncode:
            raise SystemExit("error: the kernels' tests fail on this device; nothing is timed")
        if checker := shutil.which("compute-sanitizer"):
            # Functions of the driver that are asked for and not there are no errors.
            command = [checker, "--error-exitcode", "9", "--report-api-errors", "no", *tests, TESTS[0], "-k", CHECKED]
            begin = time.perf_counter()
            status = _exit_status(command, environment, CHECKER_SECONDS)
            if status == 9:
                raise SystemExit("error: compute-sanitizer found a wrong access to memory; nothing is timed")
            if status is None:
                said = f"no verdict: stopped after {CHECKER_SECONDS} s"
            else:
                said = f"no verdict: exit status {status}" if status else "nothing found"
            elapsed = round((time.perf_counter() - begin) * 1e6)
            yield {"case": "compute-sanitizer", "status": said, "median_us": elapsed}

    def ceilings(self) -> Rows:
        """Copies and matrix products."""
        measured = list(ceilings_module.rows(self.device, self.samples))
        self.limits = ceilings_module.ceilings(measured)
        yield from measured

    def kernels(self) -> Rows:
        """Every operator at the paper's shapes, its implementations sampled in turns."""
        for dtype in DTYPES if self.toy else ("bfloat16", "float32"):
            for case in CASES[1:2] if self.toy else CASES:
                torch._dynamo.reset()
                checked: list[Prepared] = []
                for name in (self.ours, "aten") if self.toy else implementations(case, self.device):
                    prepared = prepare(case, name)
                    try:
                        check(prepared, self.images, DTYPES[dtype], self.device)
                        checked.append(prepared)
                    except Exception as error:  # Whatever it is becomes the row's status, and the others go on.
                        yield {**self._kernel(prepared, "forward", dtype), "status": failure(error)}
                for mode in MODES if checked else ():
                    yield from self._rivals(checked, mode, dtype)

    def _rivals(self, rivals: list[Prepared], mode: str, dtype: str) -> Rows:
        work = rivals[0].case.work(self.images, DTYPES[dtype])[mode]
        times = sampled(rivals, mode, self.images, DTYPES[dtype], self.device, self.samples)
        for rival, found in zip(rivals, times, strict=True):
            if isinstance(found, str):
                yield {**self._kernel(rival, mode, dtype), "status": found}
                continue
            columns = time_columns(found)
            if mode == "forward":
                columns["saved_mib"] = kept(rival, self.images, DTYPES[dtype], self.device)
            yield {
                **self._kernel(rival, mode, dtype),
                **columns,
                **work.columns(columns["median_us"], dtype, self.limits),
            }

    def _kernel(self, rival: Prepared, mode: str, dtype: str) -> dict[str, Any]:
        format = formats(rival.implementation, self.device)
        return describe(rival.case, rival.implementation, mode, self.images, dtype, format)

    def layers(self) -> Rows:
        """Every layer of the network in bfloat16, and what the whole eager step takes."""
        dtype = "bfloat16"
        total: float | None = 0.0
        for step in layer_steps(self.network, self.images, dtype, self.device):
            described = self._layer(step.name, step.mode, dtype)
            try:
                if self.device.type == "cuda" and step.name == "input preparation":
                    # It sends what was drawn on the host, which no graph holds.
                    times = wall_seconds(step.call, self.samples)
                else:
                    (times,) = seconds([[step.call]], self.device, self.samples)
            except Exception as error:
                total = None
                yield {**described, "status": failure(error)}
                continue
            columns = time_columns(times)
            if total is not None and step.mode == "training" and step.name != "input preparation":
                total += columns["median_us"]
            yield {**described, **self._measured(columns, step.work, dtype, self.images), **step.columns}
        model = build(self.network, self.device)
        batch = images_and_labels(self.network, self.images, self.device)
        columns = time_columns(wall_seconds(update_step(model, model, *batch, dtype), self.samples))
        more = {}
        if total is not None:
            explained = round(100 * total / columns["median_us"], 1)
            more = {"sum_of_layers_us": round(total, 2), "percent_explained": explained}
        work = whole_work(self.network, self.images, dtype, "training")
        yield {
            **self._layer("whole step", "training", dtype),
            **self._measured(columns, work, dtype, self.images),
            **more,
        }

    def _layer(self, name: str, mode: str, dtype: str) -> dict[str, Any]:
        return {
            "suite": "layers",
            "case": name,
            "implementation": "auto, graph" if self.device.type == "cuda" and name != "whole step" else "auto, eager",
            "mode": mode,
            "dtype": dtype,
            "memory_format": "channels_last",
            "images": self.images,
        }

    def _measured(self, times: dict[str, float], work: Work, dtype: str, images: int) -> dict[str, Any]:
        median = times["median_us"]
        rate = round(images / median * 1e6, 1)
        return {**times, "images_per_s": rate, **work.columns(median, dtype, self.limits)}

    def _compiled(self, model: torch.nn.Module, how: str) -> Callable[[Tensor], Tensor]:
        torch._dynamo.reset()
        return model if how == "eager" else torch.compile(model, mode=how, dynamic=False)

    def steps(self) -> Rows:
        """Updates of the network and of the one without normalization."""
        compiled = "eager" if self.toy else "reduce-overhead"
        ours = self.ours
        cells = [
            (self.network, ours, compiled, "bfloat16", self.images),
            (self.network, "aten", compiled, "float32" if self.toy else "bfloat16", self.images),
        ]
        if not self.toy:
            cells += [
                (self.network, ours, "default", "bfloat16", self.images),
                (self.network, ours, "eager", "bfloat16", self.images),
                (self.network, "aten", "eager", "bfloat16", self.images),
                ("one_weird_trick", "aten", compiled, "bfloat16", self.images),
                (self.network, ours, compiled, "bfloat16", 256),
                (self.network, "aten", compiled, "bfloat16", 256),
                (self.network, ours, compiled, "bfloat16", 1024),
                (self.network, "aten", compiled, "bfloat16", 1024),
                (self.network, ours, compiled, "float32", self.images),
                (self.network, "aten", compiled, "float32", self.images),
            ]
        for network, implementation, how, dtype, images in cells:
            yield self._step(network, "update", implementation, how, dtype, images)

    def autotune(self) -> Rows:
        """Updates with every choice of Inductor's measured first, which takes minutes."""
        yield self._step(
            self.network, "update", self.ours, "eager" if self.toy else "max-autotune", "bfloat16", self.images
        )

    def inference(self) -> Rows:
        """Logits of the network, without a gradient."""
        compiled, dtype = "eager" if self.toy else "reduce-overhead", "float32" if self.toy else "bfloat16"
        for implementation in (self.ours, "aten"):
            for images in (self.images,) if self.toy else (1, 128, 1024):
                yield self._step(self.network, "inference", implementation, compiled, dtype, images)

    def _step(self, network: str, what: str, implementation: str, how: str, dtype: str, images: int) -> dict[str, Any]:
        described, work = describe_step(what, network, implementation, how, dtype, images)
        try:
            with kernels.implementation(implementation):
                columns, more = self._step_times(network, what, how, dtype, images)
        except Exception as error:
            return {**described, "status": failure(error)}
        return {**described, **self._measured(columns, work, dtype, images), **more}

    def _step_times(
        self, network: str, what: str, how: str, dtype: str, images: int
    ) -> tuple[dict[str, float], dict[str, Any]]:
        model = build(network, self.device).train(what == "update")
        forward, (batch, labels) = self._compiled(model, how), images_and_labels(network, images, self.device)
        if what == "update":
            call = update_step(model, forward, batch, labels, dtype)
        else:
            call = inference_step(forward, batch, dtype)
        cuda = self.device.type == "cuda"
        begin = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        more: dict[str, Any] = {"first_call_s": round(time.perf_counter() - begin, 1)}
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        columns = time_columns(wall_seconds(call, self.samples, 1 if self.toy else 10))
        if cuda:
            more["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
            try:
                more["kernels_launched"] = kernels_launched(call)
            except RuntimeError as error:
                print(f"the profiler {failure(error)}", flush=True)
        return columns, more

    def input(self) -> Rows:
        """Batches in random order from a mapped file in the page cache to the device."""
        count = 4 * self.images if self.toy else 8192
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.npy"
            written = np.lib.format.open_memmap(path, "w+", np.uint8, (count, STORED, STORED, 3))
            written[:] = np.arange(count, dtype=np.uint8)[:, None, None, None]
            del written
            split = Split(np.load(path, mmap_mode="r"), np.arange(count, dtype=np.int64))
            batches = iter(Loader(split, self.images, self.device, shuffle=True, threads=2))
            times = wall_seconds(lambda: next(batches), 5 * self.samples)
            batches.close()
        columns = time_columns(times)
        yield {
            "suite": "input",
            "case": "loader, 2 reading",
            "shape": f"{self.images}x{STORED}x{STORED}x3",
            "dtype": "uint8",
            **columns,
            "images_per_s": round(self.images / columns["median_us"] * 1e6, 1),
        }

    def parallel(self) -> Rows:
        """One rank's update in a run of two, as long as it computes: messages are left out."""
        for strategy in usable(self.network, 2):
            torch._dynamo.reset()
            dtype, how = ("float32", "eager") if self.toy else ("bfloat16", "reduce-overhead")
            try:
                with kernels.implementation(self.ours):
                    row = alone(strategy, self.network, self.images, 2, dtype, how, self.device, self.samples)
            except Exception as error:
                row = {
                    "case": ALONE_CASE,
                    "implementation": strategy,
                    "network": self.network,
                    "status": failure(error),
                }
            yield row

    def choices(self) -> Rows:
        """The stages with other caps on registers and other segments than today's, in turns; for no table."""
        today, rows_today = triton_stage.REGISTERS, triton_stage.SEGMENT_ROWS
        tried: dict[str, tuple[dict[Any, Any], int]] = {
            f"{cap or 'any'} registers": (dict.fromkeys(today, cap), rows_today) for cap in CAPS
        }
        tried |= {f"{rows} rows": (today, rows) for rows in SEGMENTS}

        def under(choice: str, call: Callable[[], object]) -> Callable[[], object]:
            def run() -> object:
                with chosen(*tried[choice]):
                    return call()

            return run

        for case in CASES[1:2] if self.toy else CASES[:2]:
            prepared = prepare(case, self.ours)
            right = []
            for choice in tried:
                try:
                    with chosen(*tried[choice]):
                        check(prepared, self.images, torch.bfloat16, self.device)
                    right.append(choice)
                except Exception as error:
                    yield {"case": f"choice: {case.name}", "implementation": choice, "status": failure(error)}
            for mode in MODES[:3]:
                count = copies(case.work(self.images, torch.bfloat16)[mode].bytes)
                sets = [
                    inputs(case, self.images, torch.bfloat16, "channels_last", self.device, n) for n in range(count)
                ]
                calls = prepared.calls(mode, sets)
                rivals = [[under(choice, call) for call in calls] for choice in right]
                for choice, times in zip(right, seconds(rivals, self.device, self.samples), strict=True):
                    columns = {"mode": mode, "dtype": "bfloat16", "images": self.images}
                    yield {"case": f"choice: {case.name}", "implementation": choice, **columns, **time_columns(times)}

    def trace(self, folder: Path) -> Rows:
        """A profiler's trace of an update, for Perfetto or chrome://tracing."""
        model = build(self.network, self.device)
        forward = self._compiled(model, "eager" if self.toy else "reduce-overhead")
        update = update_step(model, forward, *images_and_labels(self.network, self.images, self.device), "bfloat16")
        begin = time.perf_counter()
        for _ in range(1 if self.toy else 4):
            update()
        with torch.profiler.profile() as profile:
            update()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as temporary:
            plain = Path(temporary) / "trace.json"
            profile.export_chrome_trace(str(plain))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "trace.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
        yield {"case": "trace", "median_us": round((time.perf_counter() - begin) * 1e6)}


def summary(rows: list[dict[str, Any]]) -> str:
    """The short table that is printed last."""
    lines = [
        f"{'case':28} {'implementation':24} {'mode':17} {'dtype':9} {'median us':>12} {'images/s':>10} {'% limit':>8}"
    ]
    for row in rows:
        if "median_us" in row:
            lines.append(
                f"{row['case'][:28]:28} {row.get('implementation', '')[:24]:24} {row.get('mode', ''):17} "
                f"{row.get('dtype', ''):9} {row['median_us']:>12,.1f} {row.get('images_per_s', 0):>10,.0f} "
                f"{row.get('percent_of_limit', 0):>8.1f}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts as the command line says; returns the exit status."""
    parser = Parser(prog="python -m bench.device_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--budget-s", type=float, default=540, help="begin nothing after so many seconds")
    parser.add_argument("--output", type=Path, default=DATA, help="folder for the record")
    parser.add_argument("--batch-size", type=int, help="images; 128 on a GPU, else 2")
    parser.add_argument("--network", choices=VARIANTS, help="paper on a GPU, else digits")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    options = parser.parse_args(arguments)
    if not describe_machine()["commit"]:
        parser.error("a record names the commit it measures: run this in a git checkout, or set SOURCE_COMMIT")
    cuda = torch.cuda.is_available()
    if cuda:
        # Graphs cannot be captured on the default stream.
        torch.cuda.set_stream(torch.cuda.Stream())
    else:
        print("no GPU here: toy sizes, to see that everything runs; python -m pytest --benchmark-only measures a CPU")
    device = torch.device("cuda" if cuda else "cpu")
    images, network = options.batch_size or (128 if cuda else 2), options.network or ("paper" if cuda else "digits")
    suite = Suite(device, images, network, toy=not cuda)
    begin, done, failed = time.perf_counter(), [], []
    for name in PARTS:
        if name not in options.parts and not (name == "ceilings" and LIMITED & set(options.parts)):
            continue
        spent = time.perf_counter() - begin
        print(f"--- {name} ({spent:.0f} of {options.budget_s:.0f} s spent)", flush=True)
        rows = suite.trace(options.output) if name == "trace" else getattr(suite, name)()
        try:
            while time.perf_counter() - begin < options.budget_s:
                row = next(rows, None)
                if row is None:
                    break
                print(
                    {key: value for key, value in row.items() if key not in ("p20_us", "p80_us", "memory_format")},
                    flush=True,
                )
                path = write([row], options.output)
                done.append(row)
        except Exception:  # One part's failure costs the others nothing.
            traceback.print_exc()
            failed.append(name)
    print(summary(done))
    if done:
        print(f"recorded {len(done)} rows in {path}")
    if failed:
        print(f"error: failed, see above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
