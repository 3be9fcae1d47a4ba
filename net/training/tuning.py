"""Autotuning: the fastest forms of a network on this GPU, measured once and cached."""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

import kernels

from ..common.fields import from_table
from ..common.files import atomic_write
from ..common.printing import first_line
from ..common.progress import duration
from ..doors.files import read
from ..model.alexnet import AlexNet
from ..model.config import AlexNetConfig
from ..model.forms import Forms, forms, untuned, use
from .config import RecipeConfig
from .recipe import PaperSGD, Schedule, parameter_groups
from .step import UNRECORDED, TrainingStep

#: Maximum size of the cache file in bytes; an entry takes about a thousand.
_CACHE_LIMIT = 2**24
#: Seconds that measuring takes on an H100; a run must be this many times longer to be worth it.
SECONDS, WORTH = 10.0, 10
#: Rough throughput of a GPU in such networks; used only to decide whether to measure.
GPU_FLOP_PER_S = 200e12
#: Minimum relative gain for which another form replaces the current one.
GAIN = 0.02
#: Updates per sample, and number of samples.
UPDATES, SAMPLES = 10, 5


def slot_by_slot(available: Iterable[Forms], start: Forms, seconds: Callable[[Forms], float]) -> Forms:
    """The fastest forms, by coordinate descent: one field at a time.

    Args:
        available: the forms to choose from.
        start: the initial best; another replaces it if faster by more than :data:`GAIN`.
        seconds: measures a form; called once for each that differs in one field from the best so far.
    """
    candidates = list(available)
    best, least = start, seconds(start)
    tried = {start}
    for slot in fields(Forms):
        for form in candidates:
            if form not in tried and form == replace(best, **{slot.name: getattr(form, slot.name)}):
                tried.add(form)
                if (taken := seconds(form)) < least * (1 - GAIN):
                    best, least = form, taken
    return best


def cache_file() -> Path:
    """The cache file: ``$XDG_CACHE_HOME/alexnet-fused/forms.json``; ``~/.cache`` by default."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "alexnet-fused" / "forms.json"


def key(plan: AlexNetConfig, batch: int, precision: str, device: torch.device) -> str:
    """Cache key: a hash of GPU, versions, code, network, batch size and precision."""
    import triton

    code = hashlib.sha256()
    folder = Path(__file__).parents[1]
    names = ("model/alexnet.py", "model/blocks.py", "model/forms.py", "training/recipe.py", "training/step.py")
    sources = [folder / name for name in names]
    for path in (*sources, *sorted(Path(kernels.__file__).parent.rglob("*.py"))):
        code.update(path.read_bytes())
    properties = torch.cuda.get_device_properties(device)
    parts: Mapping[str, Any] = {
        "gpu": [properties.name, properties.major, properties.minor, properties.multi_processor_count],
        "versions": [torch.__version__, triton.__version__, torch.version.cuda, torch.backends.cudnn.version()],
        "network": plan.to_dict(),
        "batch": batch,
        "precision": precision,
        "code": code.hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def remembered(name: str) -> dict[str, Any] | None:
    """The cached entry of a key; None if there is none or the file cannot be read."""
    try:
        entry = json.loads(read(cache_file(), "forms", _CACHE_LIMIT))[name]
        from_table(Forms, entry["chosen"], "chosen")
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return dict(entry)


def remember(name: str, entry: dict[str, Any]) -> None:
    """Cache an entry; if the file cannot be written, the next run measures again."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            entries = json.loads(read(path, "forms", _CACHE_LIMIT))
            assert isinstance(entries, dict)
        except (ValueError, RecursionError, AssertionError):
            entries = {}
        with atomic_write(path) as file:
            file.write(json.dumps({**entries, name: entry}, indent=1).encode())
    except OSError as error:
        print(f"note: the chosen forms cannot be cached in {path} ({error.strerror}); the next run measures again")


def milliseconds(plan: AlexNetConfig, batch: int, precision: str, device: torch.device, form: Forms) -> float:
    """Median time of a captured update, with random weights and images.

    Raises:
        RuntimeError: the form is not supported here, or its update cannot be captured.
    """
    with torch.random.fork_rng([device]), torch.device(device):
        model = AlexNet(plan).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        use(model, form)
        recipe = RecipeConfig()
        optimizer = PaperSGD(parameter_groups(model, recipe))
        Schedule(recipe).apply(optimizer)
        half = precision == "bf16"
        step = TrainingStep(model, model, optimizer, precision, record=True, copies=half)
        block, count, _ = model.input_layout
        images = torch.randn(batch, plan.image_channels * block**2, count, count) * 60
        images = images.to(torch.bfloat16 if half else torch.float32, memory_format=torch.channels_last)
        labels = torch.randint(0, plan.classes, (batch,))
        for _ in range(UNRECORDED + 3):
            step(images if step.images is None else step.images, labels)
        if step.graph is None or step.images is None:
            raise RuntimeError("its update cannot be captured")
        times = []
        for _ in range(SAMPLES):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(UPDATES):
                step(step.images, labels)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / UPDATES)
    return float(statistics.median(times))


def measure(plan: AlexNetConfig, batch: int, precision: str, device: torch.device) -> dict[str, Any]:
    """Measure the forms of a network on a GPU: a dictionary of ``chosen``, ``milliseconds`` of each, and ``seconds``
    taken in all."""
    with torch.device("meta"):
        model = AlexNet(plan)
    times: dict[str, float | None] = {}
    begin = time.monotonic()

    def seconds(form: Forms) -> float:
        try:
            taken = milliseconds(plan, batch, precision, device, form)
        except Exception as error:  # Compilers and drivers raise anything.
            print(f"  {form}: not supported here: {first_line(error)}", flush=True)
            times[str(form)] = None
            return float("inf")
        finally:
            torch.cuda.empty_cache()
        times[str(form)] = round(taken, 4)
        print(f"  {form}: {taken:.3f} ms per update, {batch / taken * 1e3:,.0f} images/s", flush=True)
        return taken

    chosen = slot_by_slot(forms(model, device), untuned(model, device), seconds)
    torch.cuda.reset_peak_memory_stats(device)
    return {"chosen": asdict(chosen), "milliseconds": times, "seconds": round(time.monotonic() - begin, 1)}


def worth_measuring(plan: AlexNetConfig, images: int, seconds: float | None) -> bool:
    """Whether a run of ``images`` images, limited to ``seconds``, is long enough to justify measuring first."""
    expected = images * 6 * plan.multiply_adds / GPU_FLOP_PER_S
    return min(expected, seconds or expected) >= WORTH * SECONDS


def tuned(plan: AlexNetConfig, batch: int, precision: str, device: torch.device, how: str, worth: bool) -> Forms:
    """The forms of a run on a GPU; prints which ones.

    Args:
        plan, batch, precision, device: the run.
        how: ``auto`` measures once per machine, if ``worth``; ``again`` always, ``off`` never.
        worth: whether the run is long enough.
    """
    name = key(plan, batch, precision, device)
    entry = None if how in ("again", "off") else remembered(name)
    source = "cached"
    if entry is None and (how == "again" or (how == "auto" and worth)):
        print(f"measuring the network's forms on this GPU, once: about {duration(SECONDS)}", flush=True)
        entry = measure(plan, batch, precision, device)
        remember(name, entry)
        source = f"measured in {duration(entry['seconds'])}"
    if entry is None:
        with torch.device("meta"):
            model = AlexNet(plan)
        chosen = untuned(model, device)
        print(f"forms: {chosen} (defaults; python -m net.tune measures them)")
        return chosen
    chosen = from_table(Forms, entry["chosen"], "chosen")
    taken = entry["milliseconds"].get(str(chosen))
    rate = f", {taken:.3f} ms per update without data loading, {batch / taken * 1e3:,.0f} images/s" if taken else ""
    print(f"forms on {torch.cuda.get_device_name(device)} ({source}): {chosen}{rate}")
    return chosen
