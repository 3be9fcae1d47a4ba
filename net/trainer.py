"""The training run behind ``python -m net.train``: build, resume, learn, evaluate, save, say how it went."""

import hashlib
import math
import shlex
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kernels import compiler

from . import checkpoint, extras, pretrained, runs, weights
from .alexnet import AlexNet
from .augmentation import TrainingInput, VariationTable, centre_crop
from .config import AlexNetConfig, TrainConfig, network
from .data.images import ImageData, hold_out
from .data.loader import Batch, Loader, cache_that_fits
from .data.sources import open_data, packed_size
from .device import (
    describe,
    keep_freed_memory,
    peak_memory_mib,
    random_state,
    repeat_bits,
    resolve_precision,
    set_precision,
    set_random_state,
)
from .errors import DataError, UsageError
from .evaluation import Errors, evaluate
from .fields import from_table
from .forms import Forms, forms, untuned, use
from .parallel.process_group import Ranks
from .parallel.strategies import parallelize
from .progress import duration
from .recipe import PaperSGD, Schedule, parameter_groups
from .step import TrainingStep
from .tuning import tuned, worth_measuring

#: Compiling takes about a minute of a CPU's time, half of one for a GPU; it pays in runs that take many times that.
COMPILE_AFTER_SECONDS = {"cpu": 900.0, "cuda": 300.0}
#: A CPU core's rate in such networks, of the order of what is measured; it only decides whether to compile.
CPU_CORE_FLOP_PER_S = 30e9
#: Checkpoints at the end of an epoch may take one part in so many of the time.
CHECKPOINT_SHARE = 10


#: Images of each split by which ranks find that they see the same.
COMPARED_IMAGES = 32
#: Seconds in which signals to one of several processes are the same one: the terminal's and torchrun's.
REPEATED_SIGNAL = 3.0


class DivergedError(DataError):
    """A loss or a weight became infinite or not a number."""


class StopSignal:
    """Inside a ``with`` block notes the first SIGTERM, SIGINT or SIGHUP; a second one takes its usual course at once.

    What whoever started the process has it ignore stays ignored: SIGHUP under nohup, SIGINT in the background.

    Args:
        repeats: seconds after the first in which others are the same.
    """

    #: Windows has no SIGHUP.
    NUMBERS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))

    def __init__(self, repeats: float = 0.0) -> None:
        self.number: int | None = None
        self.repeats = repeats

    def __enter__(self) -> "StopSignal":
        heeded = [number for number in self.NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self.noted = number, time.monotonic()
            if self.repeats:
                return
        elif time.monotonic() - self.noted <= self.repeats:
            return
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        if self.repeats:
            signal.raise_signal(number)


def architecture(config: TrainConfig, data: ImageData | None = None) -> AlexNetConfig:
    """The network that a run trains; its classes are the data set's."""
    for name in ("classes", "image_size", "image_channels", "variant"):
        if name in config.architecture:
            raise UsageError(f"--architecture {name}: it comes from the data, from --image-size or from --network")
    fields = dict(config.architecture)
    if config.image_size is not None:
        fields["image_size"] = config.image_size
    if data is not None:
        fields["classes"] = len(data.classes)
    return network(config.network, **fields)


def _check_frozen(config: TrainConfig, plan: AlexNetConfig) -> None:
    """Refuse to freeze what is no layer, the layer that starts anew, or everything."""
    layers = [layer.name for layer in plan.layers() if layer.parameters]
    for name in config.freeze:
        if name not in layers:
            raise UsageError(f"--freeze {name}: {config.network} has the layers {', '.join(layers)}")
        if config.new_head and name == plan.output_name:
            raise UsageError(f"--freeze {name}: --new-head starts it anew, so it has to learn")
    if set(config.freeze) == set(layers):
        raise UsageError("--freeze names every layer; at least one has to learn")


def open_run_data(config: TrainConfig) -> tuple[ImageData, AlexNetConfig]:
    """The data set of a run and the network for it.

    Raises:
        UsageError: no data set is named. DataError: the images do not suit the network.
    """
    if config.data_path is None and config.preset != "digits":
        raise UsageError(f"--preset {config.preset} needs --data-path; synthetic gives random images, for speed")
    plan = architecture(config)
    _check_frozen(config, plan)
    data = open_data(
        config.data_path,
        image_size=plan.image_size,
        classes=plan.classes,
        store=config.store,
        val_labels=config.val_labels,
        workers=None,
    )
    if data.size < plan.image_size:
        raise DataError(
            f"{data.name} holds images of {data.size}x{data.size} and {config.network} reads {plan.image_size}x"
            f"{plan.image_size}; prepare them with --size {packed_size(plan.image_size)} or give a smaller --image-size"
        )
    if len(data.classes) < 2:
        raise DataError(f"{data.name} has {len(data.classes)} class; at least two can be told apart")
    if not config.hold_out <= len(data.train) - len(data.classes):
        raise UsageError(f"--hold-out {config.hold_out}: there are {len(data.train)} training images")
    if (left := len(data.train) - config.hold_out) < config.batch_size:
        raise UsageError(f"--batch-size {config.batch_size} is more than the {left} training images")
    return data, architecture(config, data)


def compile_wanted(config: TrainConfig, plan: AlexNetConfig, steps: int, device: torch.device) -> bool:
    """Whether to compile: as asked, else where a run may take long enough. The same for a resumed run.

    On CUDA that is every run of several processes but those with a budget of a few minutes; of one process the update
    is recorded as it is. On an Apple GPU none is compiled.
    """
    if config.compile is False:
        return False
    if config.compile is None and (device.type not in COMPILE_AFTER_SECONDS or record_wanted(config, device)):
        return False
    if config.compile is None:
        seconds = config.time_budget or math.inf
        if device.type == "cpu":
            # Forward and backward are three times the forward's multiply-additions, two operations each.
            flop = steps * config.batch_size * 6 * plan.multiply_adds
            seconds = min(seconds, flop / (CPU_CORE_FLOP_PER_S * torch.get_num_threads()))
        if seconds < COMPILE_AFTER_SECONDS[device.type]:
            return False
    if (obstacle := compiler.obstacle()) is not None:
        print(f"running eager, because torch.compile finds {obstacle}")
        return False
    return True


def record_wanted(config: TrainConfig, device: torch.device) -> bool:
    """Whether updates are replays of a recorded CUDA graph.

    Raises:
        UsageError: it is asked for and cannot be.
    """
    able = device.type == "cuda" and config.parallel == "none"
    if config.cuda_graph and not able:
        raise UsageError("--cuda-graph needs a GPU and --parallel none; leave it out, or give --no-cuda-graph")
    return able if config.cuda_graph is None else config.cuda_graph


class _Interval:
    """What the updates since the last line of progress gave; sums stay on the device.

    Args:
        device: of the losses.
        weight: of this rank's losses in the mean over the global batch; 0 where another rank sees the same images.
    """

    def __init__(self, device: torch.device, weight: float) -> None:
        self.weight = weight
        self.losses: list[Tensor] = []
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0
        self.seconds = 0.0

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Take in an update: its loss, and how many of its images were classified correctly."""
        self.losses.append(loss if self.weight == 1 else loss * self.weight)
        if not self.weight:
            return
        self.correct += correct
        self.images += images

    def join(self, ranks: Ranks) -> Tensor:
        """The losses of the global batches; the first rank then holds what all of them had, the others nothing."""
        if not self.losses:
            return torch.zeros(1)
        losses = ranks.sum(torch.stack(self.losses))
        if ranks.ranks > 1:
            counts = ranks.sum(torch.stack([self.correct, self.correct.new_tensor(self.images)]))
            self.losses = list(losses if ranks.first else torch.zeros_like(losses))
            self.correct.copy_(counts[0] if ranks.first else torch.zeros_like(counts[0]))
            self.images = int(counts[1]) if ranks.first else 0
        return losses

    def clear(self) -> None:
        self.losses.clear()
        self.correct.zero_()
        self.images = 0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "correct": self.correct,
            "images": self.images,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any], first: bool) -> None:
        """Take in what :meth:`join` left with the first rank."""
        self.losses = [loss.to(self.correct.device) for loss in state["losses"]]
        self.correct.copy_(state["correct"])
        self.images, self.seconds = state["images"], state["seconds"]
        if not first:
            self.losses = [torch.zeros_like(loss) for loss in self.losses]
            self.correct.zero_()
            self.images = 0


def identity(config: TrainConfig, data: ImageData, step: int) -> dict[str, object]:
    """What must be the same on all ranks: flags, images and the update to go on from, in words."""
    places = ("data_path", "store", "val_labels", "init_from", "device")
    flags = {f"--{name}": value for name, value in runs.settings(config).items() if name not in places}
    labels, images = hashlib.sha256(), hashlib.sha256()
    for split in (data.train, data.val):
        labels.update(split.labels.tobytes())
        for image in np.linspace(0, len(split) - 1, COMPARED_IMAGES).astype(int):
            images.update(split.images[image].tobytes())
    return {
        **flags,
        "training images": len(data.train),
        "validation images": len(data.val),
        "pixels of an image": data.size**2,
        "classes": ", ".join(data.classes)[:200],
        "labels with the checksum": labels.hexdigest()[:16],
        "pixels with the checksum": images.hexdigest()[:16],
        "mean image with the checksum": hashlib.sha256(data.mean.tobytes()).hexdigest()[:16],
        "update": step,
    }


def rank_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank's dropout from an update on; the first rank goes on with the run's own."""
    # The fourth number keeps it apart from the loader's permutation and from the images' variations.
    return int(np.random.SeedSequence([seed, step, rank, 2]).generate_state(1, np.uint64)[0])


class Trainer:
    """One training run; see :meth:`run`.

    Args:
        config: the flags.
        folder: the run's folder.
        resumed: the checkpoint to go on from, and its content.
        device: where this rank computes.
        ranks: the processes of the run.

    Raises:
        UsageError, DataError: flags or data that do not go together.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        resumed: tuple[Path, dict[str, Any]] | None,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        precision: Any = resolve_precision(config.precision, device)
        config = replace(config, precision=precision)
        self.config, self.folder, self.device, self.ranks = config, folder, device, ranks
        self.writer = _summary_writer() if config.tensorboard else None
        self.checkpoints = folder / "checkpoints"
        set_precision(config.precision, self.device)
        keep_freed_memory()
        repeat_bits()
        record = record_wanted(config, self.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        step = 0 if resumed is None else resumed[1]["step"]
        self.data, self.plan = ranks.opened(
            lambda: open_run_data(config), lambda opened: identity(config, opened[0], step)
        )
        torch.manual_seed(config.seed)
        model = AlexNet(self.plan)
        if config.init_from is not None and resumed is None:
            head = self.plan.output_name
            source = pretrained.find(config.init_from, "--init-from")
            report = weights.load_weights(model, source, without=[head] if config.new_head else [])
            new = f", {head} anew for {self.plan.classes} classes" if config.new_head else ""
            print(f"starting from {config.init_from}: {len(report.loaded)} tensors{new}")
        for name in config.freeze:
            model.get_submodule(name).requires_grad_(False)
        model = model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        use(model, self._forms(model))
        self.part = parallelize(model, config.parallel, ranks.group, config.gradient_compression)
        self.model = self.part.model
        groups = parameter_groups(self.model, config)
        self.optimizer = PaperSGD(groups, config.lr, config.momentum, config.weight_decay)
        self.schedule = Schedule(config)
        cache = cache_that_fits(self.data.train, config.cache, self.device)
        common: dict[str, Any] = {"device": self.device, "threads": config.workers}
        kept, held_out = hold_out(self.data.train.labels, config.hold_out)
        self.train_loader = Loader(
            self.data.train,
            config.batch_size,
            shuffle=True,
            seed=config.seed,
            cache=cache,
            rank=self.part.training.rank,
            ranks=self.part.training.ranks,
            only=kept,
            **common,
        )
        self.eval_loader = Loader(
            self.data.train if config.hold_out else self.data.val,
            config.batch_size,
            shuffle=False,
            rank=self.part.evaluation.rank,
            ranks=self.part.evaluation.ranks,
            only=held_out if config.hold_out else None,
            **common,
        )
        self.mean = torch.from_numpy(self.data.mean).to(self.device)
        self.input = TrainingInput(self.data.mean, self.data.colour, self.plan.image_size, config, self.device)
        if self.input.kernel and config.channels_last:
            self.input.layout = self.model.input_layout
            self.input.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.variations = VariationTable(len(self.data.train), self.input.margin, config, config.seed)
        self.steps_per_epoch = self.train_loader.batches
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.step = 0
        #: Epochs whose end has been dealt with: evaluation, rate, checkpoint.
        self.epochs_closed = 0
        self.evaluated_step = -1
        self.errors: Errors | None = None
        self.elapsed = 0.0
        self.interval = _Interval(self.device, self.part.weight)
        #: The signal that ends the run, as all ranks have agreed.
        self.signal = 0
        if ranks.rank:
            torch.manual_seed(rank_seed(config.seed, 0, ranks.rank))
        if resumed is not None:
            self._restore(*resumed)
        self.schedule.apply(self.optimizer)
        self.compiled = compile_wanted(config, self.plan, self.total_steps, self.device)
        forward = torch.compile(self.part.forward) if self.compiled else self.part.forward
        copies = config.precision == "bf16" and forward is self.model and self.optimizer.capturable
        record = record and self.optimizer.capturable
        self.update = TrainingStep(self.model, forward, self.optimizer, config.precision, record=record, copies=copies)

    def _forms(self, model: AlexNet) -> Forms:
        """How the network computes: as asked or as the run began, else as measured on this GPU; and kept for later."""
        config, device = self.config, self.device
        available = list(forms(model, device))
        if config.forms:
            chosen = from_table(Forms, config.forms, "--forms")
            if chosen not in available:
                print(
                    f"note: --forms {chosen}: not to be had here; the bits will differ from those of a run that has it"
                )
                chosen = untuned(model, device)
        elif device.type != "cuda" or not config.channels_last:
            chosen = Forms()
        elif config.parallel == "none" and record_wanted(config, device) and not config.compile:
            images = config.epochs * len(self.data.train)
            if config.max_steps is not None:
                images = min(images, config.max_steps * config.batch_size)
            worth = worth_measuring(self.plan, images, config.time_budget)
            chosen = tuned(self.plan, config.batch_size, config.precision, device, config.tune, worth)
        else:
            chosen = untuned(model, device)
        if config.parallel in ("tower", "hybrid"):
            # A rank has its own rows of the weights.
            chosen = replace(chosen, shared="apart", towers="in turn")
        if device.type == "cuda":
            self.config = replace(config, forms=asdict(chosen))
        return chosen

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        theirs = state["metadata"]["network"]
        if theirs != self.plan.to_dict():
            changed = [name for name, value in self.plan.to_dict().items() if theirs.get(name) != value]
            raise DataError(f"checkpoint {path} is of another network: it differs in {', '.join(changed)}")
        # Copied into the parameters, which keep their memory format.
        self.model.load_state_dict({name: self.part.local(name, whole) for name, whole in state["model"].items()})
        parameters = dict(self.model.named_parameters())
        states = {
            index: {
                key: torch.empty_like(parameters[name]).copy_(self.part.local(name, value))
                if isinstance(value, Tensor)
                else value
                for key, value in values.items()
            }
            for (index, values), name in zip(state["optimizer"]["state"].items(), self._names(), strict=True)
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})
        self.schedule.load_state_dict(state["schedule"])
        self.train_loader.load_state_dict(state["loader"])
        self.interval.load_state_dict(state["interval"], self.ranks.first)
        self.step, self.epochs_closed = state["step"], state["epochs_closed"]
        self.evaluated_step, self.elapsed = state["evaluated_step"], state["elapsed"]
        self.errors = None if state["errors"] is None else Errors(**state["errors"])
        before, now = state.get("parallel", {"strategy": "none", "ranks": 1}), self._parallel()
        if before == now:
            random = [state["random"], *state["random"].get("others", ())][self.ranks.rank]
            set_random_state(self.device, random)
        else:
            torch.manual_seed(rank_seed(self.config.seed, self.step, self.ranks.rank))
            was, is_now = (f"--parallel {each['strategy']} on {each['ranks']}" for each in (before, now))
            print(
                f"note: this run went on {was} and goes on {is_now}: the images, their order, crops and colours stay "
                "the same; dropout's masks and the order of sums do not, so the weights will not be bit-equal to those "
                "of a run that never changed"
            )

    def _parallel(self) -> dict[str, Any]:
        return {"strategy": self.config.parallel, "ranks": self.ranks.ranks}

    def _names(self) -> list[str]:
        """The parameters' names in the order of the optimizer's groups."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    def _whole_parameters(self) -> dict[str, Tensor]:
        """The network's parameters in the one-device layout."""
        return {name: self.part.whole(name, tensor) for name, tensor in self.model.state_dict().items()}

    def _state(self) -> dict[str, Any]:
        """A checkpoint in the one-device layout; a collective."""
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {
            index: {
                key: self.part.whole(name, value) if isinstance(value, Tensor) else value
                for key, value in values.items()
            }
            for (index, values), name in zip(optimizer["state"].items(), self._names(), strict=True)
        }
        mine = {kind: None if state is None else state.tolist() for kind, state in random_state(self.device).items()}
        random = [
            {kind: None if state is None else torch.tensor(state, dtype=torch.uint8) for kind, state in each.items()}
            for each in self.ranks.gathered(mine)
        ]
        return {
            "metadata": self.metadata(),
            "parallel": self._parallel(),
            "mean_image": torch.from_numpy(self.data.mean),
            "model": self._whole_parameters(),
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "loader": self.train_loader.state_dict(),
            "interval": self.interval.state_dict(),
            "step": self.step,
            "epochs_closed": self.epochs_closed,
            "evaluated_step": self.evaluated_step,
            "errors": None if self.errors is None else dict(vars(self.errors)),
            "elapsed": self.elapsed,
            "random": {**random[0], "others": random[1:]},
        }

    def metadata(self) -> dict[str, Any]:
        """What is said of the network in checkpoints and weights."""
        return {
            "network": self.plan.to_dict(),
            "classes": list(self.data.classes),
            "data_path": self.data.path,
            "step": self.step,
            "precision": self.config.precision,
            "pixels": "RGB, 0..255, less the training images' mean image",
        }

    # Learning

    def run(self) -> int:
        """Train to the end, or to a signal; returns the exit status."""
        if self.ranks.first:
            self.metrics = runs.Metrics(self.folder, self.step, self.evaluated_step)
            self.tensorboard = None if self.writer is None else self.writer(str(self.folder))
        self._announce()
        self.model.train()
        batches = iter(self.train_loader)
        terminal = sys.stderr.isatty() and self.ranks.first
        self.bar = tqdm(total=self.total_steps, initial=self.step, unit=" updates", disable=not terminal)
        self.clock = self.saved_at = time.monotonic()
        self.save_seconds = 0.0
        with StopSignal(REPEATED_SIGNAL if self.ranks.ranks > 1 else 0) as self.stop, self.ranks.watched():
            try:
                if not self.compiled:
                    self.ranks.hurry(self.part.groups)
                start_step = self.step
                while True:
                    if self.step // self.steps_per_epoch > self.epochs_closed:
                        if not self._close_epoch():
                            break
                        due = time.monotonic() - self.saved_at > CHECKPOINT_SHARE * self.save_seconds
                        if self.ranks.broadcast(due):
                            self._save()
                    late = self._agreed()
                    if self.signal or late or self.step >= self.total_steps or self.schedule.finished:
                        break
                    start = time.monotonic()
                    self._update(next(batches))
                    self.interval.seconds += time.monotonic() - start
                    self.bar.update()
                    if self.compiled and self.step == start_step + 1:
                        self.ranks.hurry(self.part.groups)
                    if self.step % self.config.log_every == 0:
                        self._log()
                    if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
                        self._save()
                if not self.signal and self.evaluated_step != self.step:
                    self._evaluate()
                self._save()
                self._agreed()
            finally:
                self.bar.close()
                batches.close()
                if self.ranks.first and self.tensorboard is not None:
                    self.tensorboard.close()
        if self.signal:
            name = signal.Signals(self.signal).name
            command = "python"
            if self.config.parallel != "none":
                command = f"torchrun --standalone --nproc-per-node={self.ranks.ranks}"
            command += f" -m net.train --resume {shlex.quote(str(self.folder))}"
            print(f"{name}: saved update {self.step}; go on with: {command}")
            return 128 + self.signal
        parameters = self._whole_parameters()
        if self.ranks.first:
            self._finish(parameters)
        return 0

    def _agreed(self) -> bool:
        """Note the signal that any rank has got; returns whether the time budget is used up."""
        budget = self.config.time_budget
        late = bool(budget and self._now() >= budget)
        self.signal, agreed = self.ranks.agree(self.stop.number or 0, int(late))
        return bool(agreed)

    def _interrupted(self) -> bool:
        self._agreed()
        return self.signal != 0

    def _now(self) -> float:
        """Seconds of training, those before an interruption included."""
        now = time.monotonic()
        self.elapsed += now - self.clock
        self.clock = now
        return self.elapsed

    def _update(self, batch: Batch) -> None:
        """One forward pass, backward pass and update."""
        out = self.update.images if self.config.channels_last else None
        images = self.input(batch.images, self.variations.rows(batch.epoch, batch.samples), out)
        loss, correct = self.update(images.contiguous(memory_format=self.memory_format), batch.labels)
        self.interval.add(loss, correct, len(batch.labels))
        self.step += 1

    def _check_finite(self) -> None:
        """Stop when a loss since the last line, or a weight, is not a number any more."""
        losses = self.interval.join(self.ranks)
        finite = torch.stack([torch.isfinite(parameter).all() for parameter in self.model.parameters()]).all()
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            first = self.step - len(losses) + int(bad[0]) + 1
            where = f"the loss of update {first} is {float(losses[bad[0]]):f}"
        elif self.ranks.sum((~finite).float()):
            where = f"after update {self.step} a weight is infinite or not a number"
        else:
            return
        kept = checkpoint.checkpoints(self.checkpoints)
        last = f"the last good checkpoint is {kept[0]}" if kept else "there is no checkpoint yet"
        raise DivergedError(f"{where}; {last}. A lower --lr may help")

    def _log(self) -> None:
        """A line of progress and a row of metrics for the updates since the last one."""
        interval = self.interval
        start = time.monotonic()
        self._check_finite()
        if not self.ranks.first:
            interval.clear()
            return
        loss = float(torch.stack(interval.losses).mean())
        # On a GPU the updates were only queued until here.
        interval.seconds += time.monotonic() - start
        elapsed = self._now()
        left = (self.total_steps - self.step) * elapsed / self.step
        if self.config.time_budget:
            left = min(left, self.config.time_budget - elapsed)
        error = 100 - 100 * int(interval.correct) / interval.images
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "kind": "train",
            "loss": loss,
            "top1_error_percent": error,
            "lr": self.schedule.lr,
            "images_per_s": round(interval.images / interval.seconds, 1),
            "memory_mib": round(peak_memory_mib(self.device), 1),
            "elapsed_s": round(elapsed, 3),
        }
        interval.clear()
        self._say(
            f"step {self.step:,}/{self.total_steps:,}  epoch {row['epoch']:.2f}  loss {loss:.4f}  "
            f"top-1 {100 - error:.1f} %  rate {row['lr']:g}  {row['images_per_s']:,.0f} images/s  "
            f"{row['memory_mib']:,.0f} MiB  ETA {duration(left)}"
        )
        self._record(row)

    def _close_epoch(self) -> bool:
        """At the end of an epoch evaluate when it is time, and let the schedule see the error.

        Returns:
            False when a signal came in between.
        """
        epoch = self.step // self.steps_per_epoch
        errors = None
        if epoch % self.config.eval_every == 0:
            errors = self._evaluate()
            if errors is None:
                return False
        before = self.schedule.lr
        self.schedule.observe(epoch, None if errors is None else errors.top1_error_percent)
        self.schedule.apply(self.optimizer)
        if self.schedule.lr != before:
            self._say(f"epoch {epoch}: the rate falls from {before:g} to {self.schedule.lr:g}")
        self.epochs_closed = epoch
        return True

    def _evaluate(self) -> Errors | None:
        """Errors on the validation images; None when a signal came in between."""
        results = evaluate(
            [self.model],
            self.eval_loader,
            [self.mean],
            [self.plan.image_size],
            centre_crop,
            precision=self.config.precision,
            memory_format=self.memory_format,
            stop=self._interrupted,
            total=self.part.evaluation.total,
        )
        if results is None:
            return None
        (errors,) = results
        self.evaluated_step, self.errors = self.step, errors
        epoch = self.step / self.steps_per_epoch
        self._say(f"epoch {epoch:g}: {'held-out' if self.config.hold_out else 'validation'} loss {errors.loss:.4f}  {accuracies(errors)}")
        self._record(
            {
                "step": self.step,
                "epoch": round(epoch, 4),
                "kind": "eval",
                "loss": errors.loss,
                "top1_error_percent": errors.top1_error_percent,
                "top5_error_percent": errors.top5_error_percent,
                "elapsed_s": round(self._now(), 3),
            }
        )
        return errors

    # Saying and saving

    def _announce(self) -> None:
        plan, config, data = self.plan, self.config, self.data
        print(
            f"{plan.variant}: {plan.parameters:,} parameters, {plan.multiply_adds / 1e6:,.1f} million multiply-adds an "
            f"image; {len(self.train_loader):,} training and {len(self.eval_loader):,} "
            + ("held-out" if config.hold_out else "validation")
            + f" images, {len(data.classes)} classes"
            + (", synthetic" if data.synthetic else "")
        )
        if data.size > 1.5 * plan.image_size:
            print(
                f"note: a crop shows {100 * (plan.image_size / data.size) ** 2:.0f} % of a stored image "
                f"({data.size}x{data.size}); of images prepared with --size {packed_size(plan.image_size)} it would "
                "show 77 %, as in the paper"
            )
        limits = f"{config.epochs} epochs of {self.steps_per_epoch:,} updates"
        if config.max_steps is not None:
            limits += f", at most {config.max_steps:,} updates"
        if config.time_budget:
            limits += f", at most {duration(config.time_budget)} of training"
        mode = "compiled (the first update takes a minute or more)" if self.compiled else "eager"
        mode += ", recorded as a CUDA graph" if self.update.record else ""
        if config.parallel != "none":
            held = sum(parameter.numel() for parameter in self.model.parameters())
            print(
                f"--parallel {config.parallel}: {self.ranks.describe()}; each has {held:,} parameters and sees "
                f"{config.batch_size // self.part.training.ranks} of {config.batch_size} images"
            )
        print(f"{describe(self.device)}, {config.precision}, {mode}; {limits}; run folder {self.folder}", flush=True)

    def _say(self, line: str) -> None:
        """A line that a progress bar does not overwrite."""
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _record(self, row: dict[str, Any]) -> None:
        if not self.ranks.first:
            return
        self.metrics.write(row)
        if self.tensorboard is not None:
            for name, value in row.items():
                if name not in ("step", "kind") and value is not None:
                    self.tensorboard.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def _save(self) -> None:
        """Write a checkpoint, unless the weights went bad."""
        self._check_finite()
        self._now()
        start = time.monotonic()
        state = self._state()
        if not self.ranks.first:
            self.ranks.hold()
            return
        path = checkpoint.path_of(self.checkpoints, self.step)
        try:
            checkpoint.save(path, state)
        except OSError as error:
            kept = checkpoint.checkpoints(self.checkpoints)
            before = f"{kept[0]} is whole" if kept else "there is none before it"
            raise DataError(f"cannot write checkpoint {path}: {error.strerror or error}; {before}") from None
        checkpoint.prune(self.checkpoints, self.config.keep)
        self.ranks.hold()
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start

    def _finish(self, parameters: dict[str, Tensor]) -> None:
        """Write weights and curve, and say how it went."""
        # Here because matplotlib takes a second to import, and longer the first time.
        from . import curve

        weights.save(self.folder / "model.safetensors", parameters, self.metadata())
        curve.draw(self.folder)
        assert self.errors is not None
        if self.step >= self.total_steps:
            why = ""
        else:
            why = " (the schedule ended)" if self.schedule.finished else " (the time budget is used up)"
        print(
            f"\ntrained {self.step:,} updates in {duration(self.elapsed)}{why}: {accuracies(self.errors)} of "
            f"{self.errors.images:,} {'held-out' if self.config.hold_out else 'validation'} images; "
            f"{self.step * self.config.batch_size / self.elapsed:,.0f} images/s, evaluations included"
        )
        for name, value in (
            ("checkpoint", checkpoint.path_of(self.checkpoints, self.step)),
            ("weights", self.folder / "model.safetensors"),
            ("metrics", f"{self.folder / 'metrics.csv'} and metrics.jsonl"),
            ("curve", self.folder / "curve.png"),
            ("next", f"python -m net.evaluate {shlex.quote(str(self.folder))}"),
        ):
            print(f"  {name:<11} {value}")


def accuracies(errors: Errors) -> str:
    """Top-1 and top-5 accuracy in words."""
    text = f"top-1 {100 - errors.top1_error_percent:.2f} %"
    if errors.top5_error_percent is not None:
        text += f"  top-5 {100 - errors.top5_error_percent:.2f} %"
    return text


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(f"--tensorboard needs an extra: {extras.install('tensorboard')}") from None
    return SummaryWriter
