"""Commands with a time limit that end together with all processes they started."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


class Command:
    """A running command.

    Args:
        arguments: the command line.
        environment: its variables.
        folder: its working directory.
        output: where stdout and stderr go; None for this process's, ``subprocess.PIPE`` for :meth:`echo`.
        part: stay in this process's session, and end with it; otherwise start a new session.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        output: IO[bytes] | int | None = None,
        part: bool = False,
    ) -> None:
        self.begin, self.part = time.monotonic(), part
        self.process = subprocess.Popen(
            arguments,
            cwd=folder,
            env=dict(environment),
            start_new_session=not part,
            process_group=0 if part else None,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
        )

    def wait(self, limit: float) -> int | None:
        """The exit status; None if it was stopped ``limit`` seconds after its start. Its own processes end with it."""
        try:
            return self.process.wait(max(0.0, self.begin + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.stop()

    def echo(self) -> str:
        """Print the output as it comes, until it ends; returns its last line that is not blank."""
        assert self.process.stdout is not None
        last = ""
        for line in self.process.stdout:
            text = line.decode(errors="replace")
            print(text, end="", flush=True)
            last = text.strip() or last
        return last

    def stop(self) -> None:
        """End the command and all processes that it started, which would share the device with the next part."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if not self.part:
            # Its parts have process groups of their own. Processes started meanwhile are found in the next round.
            for _ in range(10):
                if not _end(self.process.pid):
                    break


def _end(session: int) -> int:
    """Kill the processes of a session; returns how many there were."""
    count = 0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(ProcessLookupError, PermissionError, FileNotFoundError):
            if (
                entry.name.isdigit()
                and os.getsid(int(entry.name)) == session
                and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            ):
                os.kill(int(entry.name), signal.SIGKILL)
                count += 1
    return count
