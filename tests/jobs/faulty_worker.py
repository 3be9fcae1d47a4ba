"""``net.train`` with a fault: rank 1 dies (``die``), stops (``stop``) or hangs (``hang``) once in update 5, or rank 0
hangs while it writes a checkpoint (``save``)."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from net import train
from net.common import cli
from net.data.loader import Batch
from net.training import checkpoint
from net.training.trainer import Trainer

KIND = sys.argv[1]
update = Trainer._update


def faulty(self: Trainer, batch: Batch) -> None:
    if self.step == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if KIND == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        (Path(self.folder) / "hung").write_text(str(time.monotonic()))
        if KIND == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(300)
    update(self, batch)


def hanging(path: Path, state: Any) -> None:
    (path.parents[1] / "hung").write_text(str(time.monotonic()))
    time.sleep(300)


if KIND == "save":
    checkpoint.save = hanging
else:
    Trainer._update = faulty  # type: ignore[method-assign]
cli.run(lambda: train.main(sys.argv[2:]))
