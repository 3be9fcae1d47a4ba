"""Untrusted names on the terminal: control characters are escaped."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from net.common import cli
from net.common.errors import DataError
from net.common.printing import Escaping, printable
from net.data.prepare import prepare
from net.data.store import open_store
from net.model.alexnet import alexnet
from net.training import checkpoint
from tests.commands import ROOT, environment, one_line, run_here
from tests.pictures import picture

#: Clears the screen, starts a new line, hides text, reverses the writing direction; not valid UTF-8.
HOSTILE = "cat\x1b[2J\x1b[H\nerror: forged\x7f\x9b\u202egpj.\udcff"


def test_names_on_one_line() -> None:
    assert printable("cat é 猫 n02123045") == "cat é 猫 n02123045"
    assert printable(HOSTILE) == "cat\\x1b[2J\\x1b[H\\nerror: forged\\x7f\\x9b\\u202egpj.\\udcff"
    assert printable(Path("a/b\tc")) == "a/b\\tc"


def test_a_stream_that_escapes() -> None:
    inner = io.StringIO()
    stream = Escaping(inner)
    assert stream.write("a\tb\r\n") == 5
    print(f"{HOSTILE}\u2028", file=stream)
    assert inner.getvalue() == ("a\tb\r\ncat\\x1b[2J\\x1b[H\nerror: forged\\x7f\\x9b\\u202egpj.\\udcff\\u2028\n")
    assert not stream.isatty()


def test_a_terminal_that_is_gone_is_no_error(tmp_path: Path) -> None:
    """After a hang-up every write fails; a run must still be able to save."""
    with open(tmp_path / "terminal", "w") as file:

        class Gone(io.TextIOWrapper):
            def write(self, text: str) -> int:
                raise OSError(errno.EIO, "Input/output error")

        gone = Gone(file.buffer)
        gone.detach, before = gone.detach, os.fstat(file.fileno()).st_ino  # type: ignore[method-assign]
        print("lost", file=Escaping(gone))
        assert os.fstat(file.fileno()).st_ino != before, "later output goes nowhere, and fails no more"


def test_a_refusal_is_one_line_whatever_it_names(tmp_path: Path) -> None:
    name = HOSTILE.replace("\udcff", "")
    one_line(run_here("net.evaluate", tmp_path / name), 1, "cat\\x1b[2J\\x1b[H\\nerror: forged\\x7f")
    one_line(run_here("net.train", f"--{name}"), 2, "unrecognized arguments: --cat\\x1b[2J")


def test_names_of_files_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = HOSTILE.replace("\udcff", "")
    for split in ("train", "val"):
        folder = tmp_path / "images" / split / kind
        folder.mkdir(parents=True)
        picture(0, 0, 20, 20).save(folder / "1.png")
        (folder / f"{HOSTILE}2.png").write_bytes(b"junk")
        (tmp_path / "images" / split / "b").mkdir()
        (tmp_path / "images" / split / "b" / "1.png").write_bytes(b"junk")
    prepare(tmp_path / "images", tmp_path / "store", size=16, workers=1)
    printed = capsys.readouterr().out
    assert "left out 4 files" in printed
    assert not {"\x1b", "\x7f", "\x9b", "\u202e"} & set(printed)
    assert not any(line.startswith("error") for line in printed.splitlines())
    lines = (tmp_path / "store" / "skipped.txt").read_bytes().splitlines()
    assert len(lines) == 4
    assert not any(b"\x1b" in line or line.startswith(b"error") for line in lines)
    assert open_store(tmp_path / "store").classes == ("b", kind)


def test_class_names_of_somebody_else_s_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = alexnet("digits", image_size=28)
    metadata = {"network": model.config.to_dict(), "classes": [HOSTILE] * 10, "data_path": f"/nowhere/{HOSTILE}"}
    content = {"model": dict(model.state_dict()), "metadata": metadata, "mean_image": torch.zeros(32, 32, 3)}
    checkpoint.save(tmp_path / "a.pt", content)
    picture(0, 0, 40, 40).save(tmp_path / "a.png")
    done = run_here("net.predict", tmp_path / "a.pt", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    assert "\x1b" not in done.stdout
    done = run_here("net.predict", tmp_path / "a.pt", tmp_path / "a.png", "--json")
    assert json.loads(done.stdout)["predictions"][0]["top"][0]["class"] == HOSTILE
    one_line(run_here("net.evaluate", tmp_path / "a.pt"), 1, "which is not here: give --data-path")


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    """The command ends as usual, and no file that it opens gets a standard stream's descriptor."""
    code = (
        "import sys; from net.common import cli; from net.common.progress import Progress\n"
        "def command():\n"
        "    with open(sys.argv[1], 'w') as file, Progress('images', 2) as progress:\n"
        "        assert file.fileno() > 2\n"
        "        progress.update(1); print('out'); print('err', file=sys.stderr); file.write('done')\n"
        "    return 7\n"
        "cli.run(command)"
    )
    line = f'"{sys.executable}" -c "$1" "$2" {closed}'
    done = subprocess.run(["sh", "-c", line, "sh", code, tmp_path / "file"], cwd=ROOT, env=environment())
    assert done.returncode == 7
    assert (tmp_path / "file").read_text() == "done"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "error: out of memory"),
        (MemoryError("Unable to allocate 8 TiB"), "error: out of memory: Unable to allocate 8 TiB"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"),
            "error: out of memory: CUDA",
        ),
    ],
    ids=["plain", "numpy", "cuda"],
)
def test_out_of_memory_is_one_line(capsys: pytest.CaptureFixture[str], error: Exception, says: str) -> None:
    def command() -> int:
        raise error

    with pytest.raises(SystemExit) as left:
        cli.run(command)
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(says)


def test_out_of_memory_as_pytorch_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    for shape in ((2**44,), (2**40, 2**40)):
        with pytest.raises(SystemExit) as left:
            cli.run(lambda shape=shape: len(torch.empty(shape)))  # type: ignore[misc]
        assert left.value.code == 1
        assert capsys.readouterr().err.startswith("error: out of memory: ")

    def other() -> int:
        raise RuntimeError("a fault of this program")

    with pytest.raises(RuntimeError, match="a fault"):
        cli.run(other)


def test_other_errors_stay(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise DataError(f"{HOSTILE} is damaged")

    with pytest.raises(SystemExit):
        cli.run(command)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cat\\x1b")
