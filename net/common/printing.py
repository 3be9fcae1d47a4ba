"""What is printed: names that others gave cannot move the cursor, hide a line or forge one."""

import contextlib
import errno
import os
import re
import sys
from typing import Any, TextIO

#: Control characters, and those that turn the direction of writing; a line may end, and a bar starts its line again.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def printable(text: object) -> str:
    """A name on one line: what is no printable character is escaped as in Python."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))


class Escaping:
    """A text stream to which no control character is written but tabs, line ends and returns.

    A terminal that is gone is no error: whoever trains saves before the process ends.
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


def prepare_streams() -> None:
    """Open what whoever started the process has closed, so that no file takes its place; escape what is printed."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            # The lowest that is free: this one.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
        if not isinstance(stream, Escaping):
            setattr(sys, name, Escaping(stream))
