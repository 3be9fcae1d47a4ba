"""Signals to a training run: the first one stops it after the current update, with a checkpoint."""

import signal
import time
from types import FrameType

#: Seconds within which repeated signals to one of several processes count as one: the terminal's and torchrun's.
REPEATED_SIGNAL = 3.0


class StopSignal:
    """Context manager that records the first SIGTERM, SIGINT or SIGHUP; a second one has its default effect at once.

    Signals that the process inherited as ignored stay ignored: SIGHUP under nohup, SIGINT in the background.

    Args:
        repeats: seconds after the first signal in which further ones are dropped as duplicates.
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
