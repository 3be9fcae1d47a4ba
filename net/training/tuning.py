"""Autotuning: the fastest forms of a network on this GPU, measured once and cached."""

import contextlib
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

from ..common.device import (
    autocast,
    describe,
    forget_peak_memory,
    free_gpu_memory,
    gpu_milliseconds,
    gpu_model,
    is_gpu,
    runs_triton,
)
from ..common.errors import DataError, MissingError, UsageError
from ..common.fields import from_table, shown
from ..common.files import atomic_write
from ..common.printing import first_line
from ..common.progress import duration
from ..model.alexnet import AlexNet
from ..model.config import AlexNetConfig
from ..model.forms import Forms, forms, untuned, use
from ..readers.files import read
from .config import RecipeConfig
from .recipe import PaperSGD, Schedule, parameter_groups
from .step import UNRECORDED, TrainingStep

#: Maximum size of a cache file in bytes; it takes about a thousand.
_CACHE_LIMIT = 2**16
#: Measuring may take this share of a run. It takes :data:`SECONDS` on an H100 whose kernels are compiled; shorter runs
#: do not measure. After :data:`LIMIT` seconds, or the share, no further form is measured.
SHARE, SECONDS, LIMIT = 0.1, 10.0, 60.0
#: Rough throughput of a GPU in such networks; used only to decide whether to measure.
GPU_FLOP_PER_S = 200e12
#: Minimum relative gain for which another form replaces the current one.
GAIN = 0.02
#: Updates per sample, and number of samples.
UPDATES, SAMPLES = 10, 5
#: Rows of the square matrices whose product measures the GPU's attainable FLOP rate.
MATRIX = 8192
#: Largest difference between two forms' gradients, relative to their norm. A rounding can change which element of a
#: pooling window is the maximum, which moves a gradient; bfloat16 differs from float32 by 0.2 in conv1's.
TOLERANCE = {"fp32": 0.02, "tf32": 0.5, "bf16": 0.5}


@dataclass(frozen=True)
class Measured:
    """What measuring found, as cached.

    Attributes:
        chosen: the fastest forms.
        milliseconds: per update, by form; None for one that is not usable.
        seconds: taken in all.
        product_tflops: TFLOP/s of a large matrix product in the same precision; None if it failed.

    Raises:
        UsageError: a time or rate is not a positive number, or the time of the chosen forms is missing.
    """

    chosen: Forms
    milliseconds: dict[str, Any]
    seconds: float
    product_tflops: float | None = None

    def __post_init__(self) -> None:
        for form, taken in self.milliseconds.items():
            if taken is not None and not (isinstance(taken, float) and 0 < taken < math.inf):
                raise UsageError(f"milliseconds: {form} must be a positive number; got {shown(taken)}")
        if (rate := self.product_tflops) is not None and not 0 < rate < math.inf:
            raise UsageError(f"product_tflops must be a positive number; got {shown(rate)}")
        if self.milliseconds.get(str(self.chosen)) is None:
            raise UsageError(f"milliseconds: {self.chosen} is missing")


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


def cache_file(name: str) -> Path:
    """The cache file of a key: ``$XDG_CACHE_HOME/alexnet-fused/forms-KEY.json``; ``~/.cache`` by default."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "alexnet-fused" / f"forms-{name}.json"


def key(plan: AlexNetConfig, batch: int, precision: str, device: torch.device) -> str:
    """Cache key: a hash of GPU, driver, versions, code, network, batch size and precision.

    The number of classes is left out: the last layer has one form, so net.tune need not know the data.
    """
    import triton

    code = hashlib.sha256()
    folder = Path(__file__).parents[1]
    names = ("common/device", "model/alexnet", "model/blocks", "model/forms", "training/recipe", "training/step")
    sources = [folder / f"{name}.py" for name in names]
    for path in (*sources, *sorted(Path(kernels.__file__).parent.rglob("*.py"))):
        code.update(path.read_bytes())
    driver = b""
    with contextlib.suppress(DataError):
        driver = read(Path("/proc/driver/nvidia/version"), "driver version", 2**12)
    parts: Mapping[str, Any] = {
        **gpu_model(device),
        "versions": [torch.__version__, triton.__version__],
        "driver": driver.decode(errors="replace"),
        "network": {name: value for name, value in plan.to_dict().items() if name != "classes"},
        "batch": batch,
        "precision": precision,
        "code": code.hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def remembered(name: str) -> Measured | None:
    """The cached result of a key; None if there is none or, with a note, if its file is broken."""
    path = cache_file(name)
    try:
        return from_table(Measured, json.loads(read(path, "measured forms", _CACHE_LIMIT)), "measured forms")
    except MissingError:
        return None
    except (ValueError, RecursionError, OverflowError) as error:
        print(f"note: ignoring {path}: {first_line(error)}")
        return None


def remember(name: str, found: Measured) -> None:
    """Cache a result; if the file cannot be written, a note says that the next run measures again."""
    path = cache_file(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(asdict(found), indent=1).encode())
    except OSError as error:
        print(f"note: the chosen forms cannot be cached in {path} ({error.strerror}); the next run measures again")


def check(model: AlexNet, form: Forms, images: Tensor, labels: Tensor, precision: str) -> None:
    """Compare a form with the plain one: logits and gradients of a batch, without dropout.

    Args:
        model: a network in training mode; afterwards it uses ``form``.
        form: the form to check.
        images: pixels, ``[N, 3, image_size, image_size]``.
        labels: int64 ``[N]``.
        precision: of the forward pass.

    Raises:
        ArithmeticError: they differ by more than :data:`TOLERANCE`.
    """
    from kernels.gpu import runtime

    names, parameters = zip(*model.named_parameters(), strict=True)

    def results() -> list[Tensor]:
        with autocast(precision, images.device):
            logits: Tensor = model(images)
        gradients = torch.autograd.grad(F.cross_entropy(logits.float(), labels), parameters)
        return [logits.detach().float(), *gradients]

    model.eval()
    found = []
    for each in (Forms(), form):
        use(model, each)
        # Compiles the kernels, several at once.
        with runtime.compile_only():
            results()
        found.append(results())
    model.train()
    for name, plain, other in zip(("logits", *names), *found, strict=True):
        error, norm = float((other - plain).norm()), float(plain.norm())
        if not error <= TOLERANCE[precision] * norm:
            what = name if name == "logits" else f"gradient of {name}"
            raise ArithmeticError(f"wrong results: {what} off by {error:.2g}, with a norm of {norm:.2g}")


def milliseconds(plan: AlexNetConfig, batch: int, precision: str, device: torch.device, form: Forms) -> float:
    """Median time of a captured update, with random weights and images, after a check of its results.

    Raises:
        ArithmeticError: the form computes something else. RuntimeError: its update cannot be captured. Any other
            exception: it is not supported here.
    """
    with torch.random.fork_rng([device]), torch.device(device):
        model = AlexNet(plan).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        labels = torch.randint(0, plan.classes, (batch,))
        pixels = torch.randn(batch, plan.image_channels, plan.image_size, plan.image_size) * 60
        check(model, form, pixels.contiguous(memory_format=torch.channels_last), labels, precision)
        recipe = RecipeConfig()
        optimizer = PaperSGD(parameter_groups(model, recipe))
        Schedule(recipe).apply(optimizer)
        half = precision == "bf16"
        step = TrainingStep(model, model, optimizer, precision, record=True, copies=half)
        images = _random_images(model, batch, precision)
        for _ in range(UNRECORDED + 3):
            step(images if step.images is None else step.images, labels)
        if step.graph is None or step.images is None:
            raise RuntimeError("its update cannot be captured")
        return _timed(partial(step, step.images, labels), UPDATES)


def _forget_memory(device: torch.device) -> None:
    """Free what measuring used and reset the peak, so that neither counts as the run's memory."""
    free_gpu_memory()
    forget_peak_memory(device)


def _random_images(model: AlexNet, batch: int, precision: str) -> Tensor:
    """Images as the input kernel writes them for ``model``, on the default device."""
    block, count, _ = model.input_layout
    images = torch.randn(batch, model.config.image_channels * block**2, count, count) * 60
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return images.to(dtype, memory_format=torch.channels_last)


def try_forms(model: AlexNet, batch: int, precision: str, channels_last: bool = True) -> str | None:
    """Run one forward and backward pass of ``model``, in training mode, with random images, uncompiled, without an
    update.

    Ranks call this before their first update: once that has begun, a rank whose forms fail would leave the others
    waiting for its gradients.

    Args:
        model: a whole network, in its forms.
        batch: number of images.
        precision: of the forward pass.
        channels_last: whether the network reads what the input kernel writes for it, or contiguous pixels.

    Returns:
        The first line of the exception, or None.
    """
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def passes() -> None:
        with autocast(precision, device):
            logits: Tensor = model(images)
        gradient, *_ = torch.autograd.grad(logits.float().sum(), parameters)
        # Waits for the device.
        gradient.sum().item()

    error = None
    try:
        with torch.random.fork_rng([device] if is_gpu(device) else []), torch.device(device):
            if channels_last:
                images = _random_images(model, batch, precision)
            else:
                plan = model.config
                images = torch.randn(batch, plan.image_channels, plan.image_size, plan.image_size) * 60
            if runs_triton(device):
                from kernels.gpu import runtime

                # Compiles the kernels, several at once.
                with runtime.compile_only():
                    passes()
            passes()
    except Exception as raised:  # Compilers and drivers raise anything.
        error = first_line(raised)
    if is_gpu(device):
        # A GPU that the pass has broken raises again.
        with contextlib.suppress(RuntimeError):
            _forget_memory(device)
    return error


def _timed(call: Callable[[], object], count: int) -> float:
    """Median milliseconds of a call on the GPU, over samples of ``count`` calls."""
    return statistics.median(gpu_milliseconds(call, count) for _ in range(SAMPLES))


def product_tflops(precision: str, device: torch.device) -> float | None:
    """TFLOP/s of the product of two large square matrices; None if it fails, as on a GPU with too little memory."""
    try:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # Its own generator, so that a run draws the same numbers whether its forms were measured or cached. Random
        # values, because a GPU multiplies constants faster.
        generator = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(MATRIX, MATRIX, dtype=dtype, device=device, generator=generator) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        product()
        return round(2 * MATRIX**3 / _timed(product, 1) * 1e-9, 1)
    except RuntimeError as error:
        print(f"  note: the GPU's rate of matrix products is not known: {first_line(error)}", flush=True)
        return None


def measure(
    plan: AlexNetConfig, batch: int, precision: str, device: torch.device, limit: float = LIMIT
) -> Measured | None:
    """Measure the forms of a network on a GPU for ``limit`` seconds at most; None if none of them is usable."""
    with torch.device("meta"):
        model = AlexNet(plan)
    times: dict[str, float | None] = {}
    skipped = 0
    begin = time.monotonic()

    def seconds(form: Forms) -> float:
        nonlocal skipped
        if time.monotonic() - begin > limit:
            skipped += 1
            return math.inf
        try:
            taken = milliseconds(plan, batch, precision, device, form)
        except Exception as error:  # Compilers and drivers raise anything.
            print(f"  {form}: not usable here: {first_line(error)}", flush=True)
            times[str(form)] = None
            return math.inf
        finally:
            free_gpu_memory()
        times[str(form)] = round(taken, 4)
        print(f"  {form}: {taken:.3f} ms per update, {batch / taken * 1e3:,.0f} images/s", flush=True)
        return taken

    chosen = slot_by_slot(forms(model, device), untuned(model, device), seconds)
    if skipped:
        print(f"  stopped after {limit:.0f} s, before {skipped} more; using the fastest so far")
    rate = None if times[str(chosen)] is None else product_tflops(precision, device)
    _forget_memory(device)
    if times[str(chosen)] is None:
        return None
    return Measured(chosen, times, round(time.monotonic() - begin, 1), rate)


def measuring_time(plan: AlexNetConfig, images: int, seconds: float | None) -> float:
    """Seconds that measuring may take before a run of ``images`` images, limited to ``seconds``; 0 for short runs."""
    expected = images * plan.training_flop / GPU_FLOP_PER_S
    allowed = SHARE * min(expected, seconds or expected)
    return 0.0 if allowed < SECONDS else min(allowed, LIMIT)


def tuned(
    plan: AlexNetConfig,
    batch: int,
    precision: str,
    device: torch.device,
    how: str,
    allowed: float = LIMIT,
    *,
    several: bool = False,
) -> Forms:
    """The forms of a run on a GPU: cached, measured or default ones; prints which.

    Args:
        plan, batch, precision, device: the run.
        how: ``auto`` measures once per machine, if ``allowed``; ``again`` always, ``off`` never.
        allowed: seconds that measuring may take; see :func:`measuring_time`.
        several: whether the run has several processes with ``batch`` images each. What is measured is an update of one
            of them without the others, captured; forms that run towers at once are left out.
    """
    name = key(plan, batch, precision, device)
    found = None if how == "again" else remembered(name)
    source = "cached"
    if found is None and (how == "again" or (how == "auto" and allowed)):
        allowed = allowed or LIMIT
        print(
            f"measuring the network's forms on this GPU, once: about {SECONDS:g} s, at most {allowed:.0f}", flush=True
        )
        if (found := measure(plan, batch, precision, device, allowed)) is not None:
            remember(name, found)
            source = f"measured in {duration(found.seconds)}"
    if found is not None:
        # Measured too: the towers are the last part of the forms to be varied.
        chosen = replace(found.chosen, towers="in turn") if several else found.chosen
        taken = found.milliseconds.get(str(chosen))
    if found is None or taken is None:
        with torch.device("meta"):
            model = AlexNet(plan)
        chosen = untuned(model, device)
        print(f"forms: {chosen} (defaults; python -m net.tune measures them)")
        return chosen
    rate = f"{taken:.3f} ms per update without data loading, {batch / taken * 1e3:,.0f} images/s"
    if found.product_tflops is not None:
        # GFLOP per millisecond are TFLOP/s.
        tflops = batch * plan.training_flop / taken * 1e-9
        share = 100 * tflops / found.product_tflops
        rate += f", {tflops:,.0f} TFLOP/s ({share:.0f} % of the rate of large matrix products)"
    if several:
        rate += f"; in one process alone, captured, with {batch} images"
    print(f"forms on {describe(device)} ({source}): {chosen}, {rate}")
    return chosen
