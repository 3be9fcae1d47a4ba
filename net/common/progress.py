"""Progress of long work: a bar on a terminal, an occasional plain line in a log."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

#: Seconds between lines in a log.
LINE_EVERY = 10.0


def duration(seconds: float) -> str:
    """``h:mm:ss``, preceded by the days if there are any."""
    total = max(0, round(seconds))
    days, rest = divmod(total, 86400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {text}" if days else text


class Progress:
    """Count ``total`` units of work, of which ``initial`` are already done."""

    #: Number of updates in this process; :mod:`net.parallel.heartbeat` takes a constant count for a hang.
    reports = 0

    def __init__(self, unit: str, total: int, initial: int = 0) -> None:
        self.unit, self.total, self.initial, self.done = unit, total, initial, initial
        self.start = self.printed = time.monotonic()
        terminal = sys.stderr.isatty()
        # delay: work that takes less than a second shows no bar.
        self.bar = tqdm(
            total=total,
            initial=initial,
            unit=f" {unit}",
            disable=not terminal,
            dynamic_ncols=True,
            delay=1,
            leave=False,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def update(self, count: int) -> None:
        """Report ``count`` more units as done."""
        self.done += count
        Progress.reports += 1
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and now - self.printed >= LINE_EVERY:
            self.printed = now
            rate = (self.done - self.initial) / (now - self.start)
            print(
                f"{self.done:,}/{self.total:,} {self.unit}, {rate:,.0f}/s, "
                f"ETA {duration((self.total - self.done) / max(rate, 1e-9))}",
                flush=True,
            )
