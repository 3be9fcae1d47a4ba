"""``net.train`` in two processes, one of which goes wrong where nobody expects a message for long; each restart brings
the next fault. This process is torchrun's, and forks the ranks, which are spared the imports."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from net import checkpoint, cli, train, trainer
from net.data.loader import Batch
from net.parallel.process_group import ROLL_CALL
from net.trainer import Trainer

#: Notes lie beside the run's folder.
NOTES = Path(sys.argv[sys.argv.index("--output-dir") + 1]).parent
#: In a hang the main thread alone stands still.
FAULTS = (("opening", signal.SIGSTOP), ("opening", signal.SIGKILL), ("compiling", "hang"), ("saving", "hang"))
update, open_run_data, save = Trainer._update, trainer.open_run_data, checkpoint.save


def faulty(place: str, rank: int) -> None:
    """What happens to ``rank`` when it comes to this place."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    where, fault = FAULTS[attempt]
    if where == place and os.environ["RANK"] == str(rank):
        (NOTES / str(attempt)).write_text(f"{os.getpid()} {time.monotonic()}")
        if isinstance(fault, signal.Signals):
            os.kill(os.getpid(), fault)
        time.sleep(300)


def opening(*arguments: Any) -> Any:
    # The other rank waits by then.
    time.sleep(0.5)
    faulty("opening", 0)
    return open_run_data(*arguments)


def first_update(self: Trainer, batch: Batch) -> None:
    """As with a compiler, the second rank takes longer than it may elsewhere, the work being its child's, and the first
    waits at its lock as long."""
    built = NOTES / f"built {os.environ['TORCHELASTIC_RESTART_COUNT']}"
    if os.environ["RANK"] == "1" and not self.step:
        work = f"import time\nwhile time.process_time() < {self.config.timeout + ROLL_CALL + 0.5}: pass"
        subprocess.run([sys.executable, "-c", work], check=True)
        built.touch()
    while not built.exists():
        time.sleep(0.05)
    faulty("compiling", 1)
    update(self, batch)


def saving(*arguments: Any) -> None:
    faulty("saving", 0)
    save(*arguments)


def run() -> None:
    cli.run(lambda: train.main(sys.argv[1:]))


if __name__ == "__main__":
    trainer.open_run_data = opening
    trainer.compile_wanted = lambda *_: True  # type: ignore[assignment]
    trainer.torch.compile = lambda forward: forward  # type: ignore[assignment]
    Trainer._update = first_update  # type: ignore[method-assign]
    checkpoint.save = saving  # type: ignore[assignment]
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="quiet",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=len(FAULTS) - 1,
        start_method="fork",
    )
    elastic_launch(launch, run)()
