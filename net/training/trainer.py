"""The training loop of ``python -m net.train``: build, resume, train, evaluate, save, report."""

import math
import shlex
import signal
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..common import extras, seeds
from ..common.allocator import keep_freed_memory
from ..common.device import (
    is_gpu,
    peak_memory_mib,
    repeat_bits,
    resolve_precision,
    set_precision,
)
from ..common.errors import DataError, UsageError
from ..common.printing import first_line
from ..common.progress import duration
from ..data.augmentation import TrainingInput, VariationTable, centre_crop
from ..data.images import hold_out
from ..data.loader import Batch, Loader, cache_that_fits
from ..model.alexnet import AlexNet
from ..model.forms import Forms, use
from ..parallel.process_group import World
from ..parallel.strategies import parallelize
from . import checkpoint, runs, summary
from .config import TrainConfig
from .evaluation import Errors, accuracies, evaluate
from .meter import Interval
from .recipe import PaperSGD, Schedule, parameter_groups
from .setup import compile_wanted, forms_wanted, identity, open_run_data, record_wanted, start_from
from .signals import REPEATED_SIGNAL, StopSignal
from .state import restore, take, whole_parameters
from .step import TrainingStep
from .tuning import try_forms

#: Writing checkpoints at the ends of epochs takes at most one CHECKPOINT_SHARE-th of the time.
CHECKPOINT_SHARE = 10


class DivergedError(DataError):
    """A loss or a weight became infinite or NaN."""


class Trainer:
    """One training run; see :meth:`run`.

    Args:
        config: the flags.
        folder: the run folder.
        resumed: the checkpoint to continue from, and its content.
        device: where this rank computes.
        world: the processes of the run.

    Raises:
        UsageError, DataError: flags or data that do not fit together.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        resumed: tuple[Path, dict[str, Any]] | None,
        device: torch.device,
        world: World,
    ) -> None:
        precision: Any = resolve_precision(config.precision, device)
        config = replace(config, precision=precision)
        self.config, self.folder, self.device, self.world = config, folder, device, world
        self.writer = _summary_writer() if config.tensorboard else None
        self.checkpoints = folder / "checkpoints"
        set_precision(config.precision, self.device)
        keep_freed_memory()
        repeat_bits()
        record = record_wanted(config, self.device)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        step = 0 if resumed is None else resumed[1]["step"]
        self.data, self.plan = world.opened(
            lambda: open_run_data(config, resumed is not None), lambda opened: identity(config, opened[0], step)
        )
        seeds.weights(config.seed)
        model = AlexNet(self.plan)
        if resumed is None:
            start_from(model, config)
        for name in config.freeze:
            model.get_submodule(name).requires_grad_(False)
        model = model.to(self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        kept, held_out = hold_out(self.data.train.labels, config.hold_out)
        # Rank 0 measures the forms, and all ranks use what it chose.
        tuning = config if world.first else replace(config, tune="off")
        chosen = forms_wanted(tuning, model, len(kept), self.device, world.size)
        self.forms = Forms(**world.broadcast(asdict(chosen)))
        use(model, self.forms)
        if config.parallel != "none" and self.forms != Forms():
            self._rehearse(model)
        if is_gpu(self.device) or self.forms != chosen:
            self.config = replace(config, forms=asdict(self.forms))
        self.part = parallelize(model, config.parallel, world.group, config.gradient_compression)
        self.model = self.part.model
        groups = parameter_groups(self.model, config)
        self.optimizer = PaperSGD(groups, config.lr, config.momentum, config.weight_decay)
        self.schedule = Schedule(config)
        cache = cache_that_fits(self.data.train, config.cache, self.device)
        common: dict[str, Any] = {"device": self.device, "threads": config.workers}
        #: Which images the errors refer to, for messages.
        self.judged_by = "held-out" if config.hold_out else "validation"
        self.train_loader = Loader(
            self.data.train,
            config.batch_size,
            shuffle=True,
            seed=config.seed,
            cache=cache,
            rank=self.part.training.rank,
            replicas=self.part.training.replicas,
            only=kept,
            **common,
        )
        self.eval_loader = Loader(
            self.data.train if config.hold_out else self.data.val,
            config.batch_size,
            shuffle=False,
            rank=self.part.evaluation.rank,
            replicas=self.part.evaluation.replicas,
            only=held_out if config.hold_out else None,
            **common,
        )
        self.mean = torch.from_numpy(self.data.mean).to(self.device)
        self.input = TrainingInput(self.data.mean, self.data.colour, self.plan.image_size, config, self.device)
        if config.channels_last:
            self.input.write_for(self.model.input_layout, config.precision)
        self.variations = VariationTable(len(self.data.train), self.input.margin, config, config.seed)
        self.steps_per_epoch = self.train_loader.batches
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.step, self.evaluated_step = 0, -1
        #: Epochs whose end has been handled: evaluation, learning rate, checkpoint.
        self.epochs_closed = 0
        self.errors: Errors | None = None
        self.elapsed = 0.0
        self.interval = Interval(self.device, self.part.weight)
        #: The signal that ends the run, as agreed by all ranks; 0 for none.
        self.signal = 0
        self.votes = world.votes(2)
        if world.rank:
            seeds.weights(seeds.dropout(config.seed, 0, world.rank))
        if resumed is not None:
            restore(self, *resumed)
        self.schedule.apply(self.optimizer)
        self.compiled = compile_wanted(config, self.plan, self.total_steps, self.device)
        forward = torch.compile(self.part.forward) if self.compiled else self.part.forward
        copies = config.precision == "bf16" and forward is self.model and self.optimizer.capturable
        record = record and self.optimizer.capturable
        self.update = TrainingStep(self.model, forward, self.optimizer, config.precision, record=record, copies=copies)

    def _rehearse(self, model: AlexNet) -> None:
        """Have every rank use the plain forms if the chosen ones fail on any."""
        share = max(1, self.config.batch_size // self.world.size)
        error = try_forms(model, share, self.config.precision, self.config.channels_last)
        errors = self.world.gathered(error)
        failed = next(((rank, each) for rank, each in enumerate(errors) if each), None)
        if failed is not None:
            rank, reason = failed
            print(f"note: the forms {self.forms} fail on rank {rank} ({reason}); using {Forms()}")
            self.forms = Forms()
            use(model, self.forms)

    # Training

    def run(self) -> int:
        """Train to the end, or until a signal; returns the exit status."""
        if self.world.first:
            self.metrics = runs.Metrics(self.folder, self.step, self.evaluated_step)
            self.tensorboard = None if self.writer is None else self.writer(str(self.folder))
        summary.announce(self)
        self.model.train()
        batches = iter(self.train_loader)
        terminal = sys.stderr.isatty() and self.world.first
        self.bar = tqdm(total=self.total_steps, initial=self.step, unit=" updates", disable=not terminal)
        self.clock = self.saved_at = time.monotonic()
        self.save_seconds = 0.0
        with StopSignal(REPEATED_SIGNAL if self.world.size > 1 else 0) as self.stop, self.world.watched():
            try:
                if not self.compiled:
                    self.world.enforce_timeout(self.part.groups)
                start_step = self.step
                # Ranks decide by the vote before: without this one, a run resumed after its time budget would train.
                self._agreed()
                while True:
                    if self.step // self.steps_per_epoch > self.epochs_closed:
                        if not self._close_epoch():
                            break
                        due = time.monotonic() - self.saved_at > CHECKPOINT_SHARE * self.save_seconds
                        if self.world.broadcast(due):
                            self._save()
                    late = self._agreed()
                    if self.signal or late or self.step >= self.total_steps or self.schedule.finished:
                        break
                    start = time.monotonic()
                    self._update(next(batches))
                    self.interval.seconds += time.monotonic() - start
                    self.bar.update()
                    if self.compiled and self.step == start_step + 1:
                        self.world.enforce_timeout(self.part.groups)
                    if self.step % self.config.log_every == 0:
                        self._log()
                    if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
                        self._save()
                if not self.signal and self.evaluated_step != self.step:
                    self._evaluate()
                self._save()
                self.votes.cast(self.stop.number or 0, 0)
                self.signal, _ = self.votes.settled()
            finally:
                self.bar.close()
                batches.close()
                if self.world.first and self.tensorboard is not None:
                    self.tensorboard.close()
        if self.signal:
            name = signal.Signals(self.signal).name
            command = "python"
            if self.config.parallel != "none":
                command = f"torchrun --standalone --nproc-per-node={self.world.size}"
            command += f" -m net.train --resume {shlex.quote(str(self.folder))}"
            print(f"{name}: saved update {self.step}; resume with: {command}")
            return 128 + self.signal
        parameters = whole_parameters(self)
        if self.world.first:
            summary.finish(self, parameters)
        return 0

    def _agreed(self) -> bool:
        """Agree on a signal received by any rank; returns whether the time budget is used up."""
        budget = self.config.time_budget
        late = bool(budget and self._now() >= budget)
        self.votes.cast(self.stop.number or 0, int(late))
        self.signal, decided = self.votes.decided()
        return bool(decided)

    def _interrupted(self) -> bool:
        self._agreed()
        return self.signal != 0

    def _now(self) -> float:
        """Seconds of training, including those before an interruption."""
        now = time.monotonic()
        self.elapsed += now - self.clock
        self.clock = now
        return self.elapsed

    def _update(self, batch: Batch) -> None:
        """One forward pass, backward pass and update.

        If a single process's first one fails, it is repeated with the plain forms. Several processes have
        tried it in ``_rehearse``.
        """
        while True:
            try:
                out = self.update.images if self.config.channels_last else None
                images = self.input(batch.images, self.variations.rows(batch.epoch, batch.samples), out)
                loss, correct = self.update(images.contiguous(memory_format=self.memory_format), batch.labels)
                break
            except Exception as error:  # Compilers and drivers raise anything.
                if self.update.updates or self.forms == Forms() or self.config.parallel != "none":
                    raise
                self._say(f"note: the forms {self.forms} fail here ({first_line(error)}); using {Forms()}")
            # Outside the except block, because the exception keeps tensors alive.
            self.forms = Forms()
            use(self.model, self.forms)
            self.input.write_for(self.model.input_layout, self.config.precision)
            self.config = replace(self.config, forms=asdict(self.forms))
            runs.write_config(self.folder, self.config)
        self.interval.add(loss, correct, len(batch.labels))
        self.step += 1

    def _read(self) -> tuple[list[float], int]:
        """The losses since the last log line, and the correctly classified images; a wait for the device.

        Raises:
            DivergedError: one of the losses, or a weight, is infinite or NaN.
        """
        finite = torch.stack([torch.isfinite(parameter).all() for parameter in self.model.parameters()]).all()
        losses, correct, failed = self.interval.read(self.world, ~finite)
        bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            where = f"the loss of update {self.step - len(losses) + bad[0] + 1} is {losses[bad[0]]:f}"
        elif failed:
            where = f"after update {self.step} a weight is infinite or NaN"
        else:
            return losses, correct
        kept = checkpoint.checkpoints(self.checkpoints)
        last = f"the last good checkpoint is {kept[0]}" if kept else "there is no checkpoint yet"
        raise DivergedError(f"{where}; {last}. A lower --lr may help")

    def _log(self) -> None:
        """Write a log line and a row of metrics for the updates since the last one."""
        interval = self.interval
        start = time.monotonic()
        losses, correct = self._read()
        if not self.world.first:
            interval.clear()
            return
        loss = statistics.fmean(losses)
        # On a GPU the updates were only queued; reading waits for them.
        interval.seconds += time.monotonic() - start
        elapsed = self._now()
        left = (self.total_steps - self.step) * elapsed / self.step
        if self.config.time_budget:
            left = min(left, self.config.time_budget - elapsed)
        error = 100 - 100 * correct / interval.images
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
            f"top-1 {100 - error:.1f} %  lr {row['lr']:g}  {row['images_per_s']:,.0f} images/s  "
            f"{row['memory_mib']:,.0f} MiB  ETA {duration(left)}"
        )
        self._record(row)

    def _close_epoch(self) -> bool:
        """At the end of an epoch, evaluate if due, and step the schedule.

        Returns:
            False if a signal interrupted the evaluation.
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
            self._say(f"epoch {epoch}: learning rate: {before:g} -> {self.schedule.lr:g}")
        self.epochs_closed = epoch
        return True

    def _evaluate(self) -> Errors | None:
        """Errors on the validation images; None if a signal interrupted it."""
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
        self._say(f"epoch {epoch:g}: {self.judged_by} loss {errors.loss:.4f}  {accuracies(errors)}")
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

    # Logging and saving

    def _say(self, line: str) -> None:
        """Print a line above the progress bar."""
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _record(self, row: dict[str, Any]) -> None:
        if not self.world.first:
            return
        self.metrics.write(row)
        if self.tensorboard is not None:
            for name, value in row.items():
                if name not in ("step", "kind") and value is not None:
                    self.tensorboard.add_scalar(f"{row['kind']}/{name}", value, row["step"])

    def _save(self) -> None:
        """Write a checkpoint, unless losses or weights are not finite."""
        self._read()
        self._now()
        start = time.monotonic()
        state = take(self)
        if not self.world.first:
            self.world.wait_for_first()
            return
        path = checkpoint.path_of(self.checkpoints, self.step)
        try:
            checkpoint.save(path, state)
        except OSError as error:
            kept = checkpoint.checkpoints(self.checkpoints)
            before = f"the previous one, {kept[0]}, is intact" if kept else "there is no earlier one"
            raise DataError(f"cannot write checkpoint {path}: {error.strerror or error}; {before}") from None
        checkpoint.prune(self.checkpoints, self.config.keep)
        self.world.wait_for_first()
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - start


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(f"--tensorboard needs an extra: {extras.install('tensorboard')}") from None
    return SummaryWriter
