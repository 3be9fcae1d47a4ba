"""Safe printing: control characters in file and class names cannot move the cursor, hide a line or forge one."""

import contextlib
import errno
import os
import re
import sys
from typing import Any, TextIO

#: Control characters and bidirectional overrides; ``\n``, and ``\r`` for progress bars, are allowed.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def printable(text: object) -> str:
    """``text`` with every non-printable character escaped as in Python, newlines included."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Escaping:
    """A text stream that escapes all control characters except tab, newline and carriage return.

    If the terminal disappears, output is discarded instead of raising, so that a training run can still save.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with self._terminal():
            self.stream.write(_UNSEEN.sub(_escape, text))
        return len(text)

    def flush(self) -> None:
        with self._terminal():
            self.stream.flush()

    @contextlib.contextmanager
    def _terminal(self) -> Any:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def on_one_line(text: str) -> str:
    """``text`` with its control characters escaped; characters beyond ASCII stay."""
    return "".join(printable(one) if ord(one) < 128 else one for one in text)


def size_text(count: float) -> str:
    """A number of bytes, in GB or MB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def prepare_streams() -> None:
    """Reopen standard streams closed by the parent, so that no file gets their descriptors; escape what is printed."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            # open() returns the lowest free descriptor: this one.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        if not isinstance(stream, Escaping):
            setattr(sys, name, Escaping(stream))
