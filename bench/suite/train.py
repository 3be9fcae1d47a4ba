"""``python -m net.train`` itself, end to end from a packed store, compared with the step alone."""

import io
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from net.data.prepare import prepare
from net.data.store import is_store
from net.training import runs

from ..measure.environment import ROOT
from ..measure.records import Row
from ..subjects.network import PRECISIONS, STORED, plan_of
from ..subjects.steps import Step
from . import steps
from .processes import Command
from .run import Job, Rows, Run, cores

#: Training and validation images, and updates; at toy sizes images, updates, and updates between lines of progress.
IMAGES, VALIDATION, UPDATES = 8192, 128, 600
TOY_IMAGES, TOY_UPDATES, TOY_LOG_EVERY = 16, 6, 2
#: Different pictures; their files are written repeatedly, because only the store's size matters.
PICTURES = 256
#: The step alone is not measured if fewer seconds are left.
LEAST = 10.0
#: The folders of an absolute path, which a record must not contain.
FOLDER = re.compile(r"(?<![\w.])/([^\s/:'\"]+/)+")
DTYPES = {precision: dtype for dtype, precision in PRECISIONS.items()}


def ahead(run: Run) -> Iterator[Job]:
    yield "packed store", partial(store, run)


def rows(run: Run) -> Rows:
    """A row for training at the defaults, and one in the other precision."""
    packed = store(run)
    row = trained(run, packed)
    yield row
    if not run.scale.toy:
        yield trained(run, packed, "--precision", "fp32" if row.get("dtype") == "bfloat16" else "bf16")


def store(run: Run) -> Path:
    """A packed store of random images, written once per run."""
    packed, source = run.folder / "store", run.folder / "images"
    if is_store(packed):
        return packed
    count, validation, size = (TOY_IMAGES, 2, 40) if run.scale.toy else (IMAGES, VALIDATION, STORED)
    classes = plan_of(run.scale.network).classes
    generator = np.random.default_rng(0)
    files = []
    for _ in range(min(count, PICTURES)):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    for split, number in (("train", count), ("val", validation)):
        for image in range(number):
            path = source / split / f"{image % classes:04}" / f"{image:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[image % len(files)])
    prepare(source, packed, size=size, workers=min(8, cores()))
    return packed


def trained(run: Run, packed: Path, *flags: str) -> Row:
    """Train for some steps: images/s after warm-up as a user sees them, and the overhead over the step alone."""
    folder = run.folder / f"run-{len(list(run.folder.glob('run-*')))}"
    updates = TOY_UPDATES if run.scale.toy else UPDATES
    command = [sys.executable, "-m", "net.train", "--preset", "imagenet", "--network", run.scale.network]
    command += ["--data-path", str(packed), "--batch-size", str(run.scale.images), "--max-steps", str(updates)]
    command += ["--output-dir", str(folder), "--device", run.device.type, *flags]
    if run.scale.toy:
        command += ["--log-every", str(TOY_LOG_EVERY)]
    run.say(f"python {' '.join(command[1:])}")
    training = Command(command, os.environ, ROOT, subprocess.PIPE, part=True)
    with ThreadPoolExecutor() as pool:
        echoed = pool.submit(training.echo)
        status = training.wait(run.left)
    plan = plan_of(run.scale.network)
    row: Row = {
        "suite": "train",
        "case": f"net.train of {run.scale.network}",
        "implementation": "auto",
        "mode": "train",
        "shape": f"{run.scale.images}x3x{plan.image_size}x{plan.image_size}",
        "memory_format": "channels_last",
        "images": run.scale.images,
        "images_stored": len(np.load(packed / "train_labels.npy")),
    }
    if (folder / runs.CONFIG).exists():
        row["dtype"] = DTYPES.get(runs.read_config(folder)["precision"], "float32")
    logged = [line for line in runs.read_metrics(folder) if line["kind"] == "train"] if folder.exists() else []
    # Compiling and cold caches affect the first two lines.
    rates = [line["images_per_s"] for line in logged[2:]]
    if not rates:
        return {**row, "status": f"failed: {_ended(status, logged, echoed.result())}"}
    rate = statistics.median(rates)
    row |= {"updates": logged[-1]["step"], "images_per_s": rate, "median_us": round(run.scale.images / rate * 1e6, 2)}
    if status != 0:
        row["note"] = _ended(status, logged, echoed.result())
    if run.left < LEAST:
        return row
    step = alone(run, row["dtype"])
    if "median_us" in step:
        row["step_us"] = step["median_us"]
        row["lost_us"] = round(row["median_us"] - step["median_us"], 2)
        row["percent_of_step"] = round(100 * step["median_us"] / row["median_us"], 1)
    return row


def _ended(status: int | None, logged: Sequence[Row], said: str) -> str:
    ended = "was stopped" if status is None else f"ended with {status}"
    after = f"after {logged[-1]['step'] if logged else 0} updates"
    said = FOLDER.sub("", said)
    return f"net.train {ended} {after}" + (f"; its last line: {said}" if said else "")


def alone(run: Run, dtype: str) -> Row:
    """The fastest step alone in the same dtype, from this run or measured now."""
    step = Step("update", run.scale.network, run.scale.ours, run.scale.best, dtype, run.scale.images)
    wanted = step.describe()[0]
    for row in run.rows():
        if "median_us" in row and all(row.get(key) == value for key, value in wanted.items()):
            return row
    return steps.measured(run, step)
