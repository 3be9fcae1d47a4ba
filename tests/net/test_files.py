"""Atomic writes, run folders, metrics and progress."""

import contextlib
import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from net.common import files, progress
from net.common.errors import DataError, UsageError
from net.common.files import atomic_write, locked
from net.training import runs
from net.training.config import TrainConfig
from tests.commands import environment


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"


def test_the_name_is_taken_over_and_put_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of the old file keeps reading it; the file is synced before the folder."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    synced: list[str] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with open(path, "rb") as reader:
        with atomic_write(path) as file:
            file.write(b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert len(synced) == 2
    assert re.fullmatch(r"a\.[0-9a-f]{12}\.partial", synced[0])
    assert synced[1] == tmp_path.name


def test_a_folder_is_for_one_process(tmp_path: Path) -> None:
    script = "import sys\nfrom pathlib import Path\nfrom net.common.files import locked\n"
    script += "with locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(DataError, match="is in use by another process"), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"ne")
            raise OSError(28, "full")

    with pytest.raises(OSError, match="full") as refused:
        fail()
    assert refused.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_two_writers_do_not_meet_and_no_planted_link_is_followed(tmp_path: Path) -> None:
    path, victim = tmp_path / "a", tmp_path / "victim"
    victim.write_bytes(b"untouched")
    (tmp_path / "a.partial").symlink_to(victim)
    with atomic_write(path) as one:
        with atomic_write(path) as other:
            other.write(b"other")
        one.write(b"one")
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"one"
    assert victim.read_bytes() == b"untouched"


def test_a_name_that_is_planted_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "00")
    (tmp_path / "a.00.partial").symlink_to(victim)
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "a"):
        pass
    assert victim.read_bytes() == b"untouched"


def test_whoever_holds_a_folder_removes_what_killed_writers_left(tmp_path: Path) -> None:
    (tmp_path / "a.0123.partial").write_bytes(b"half")
    (tmp_path / "victim").write_bytes(b"")
    (tmp_path / "b.0123.partial").symlink_to(tmp_path / "victim")
    os.mkfifo(tmp_path / "c.0123.partial")
    with atomic_write(tmp_path / "d") as file:
        file.write(b"d")
        with locked(tmp_path):
            names = {path.name for path in tmp_path.iterdir()}
        assert {name for name in names if name[0] in "avbc"} == {"victim", "b.0123.partial", "c.0123.partial"}
    assert (tmp_path / "d").read_bytes() == b"d", "a writer that lives keeps its file"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system that does not support it is ignored; an I/O error is raised and names the file."""
    sync = os.fsync

    def refused(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refused)
    expected = pytest.raises(OSError, match="Input/output") if number == errno.EIO else contextlib.nullcontext()
    with expected as failed, atomic_write(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert failed is None or failed.value.filename == str(tmp_path / "a")


def test_a_run_that_is_refused_removes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs with the same new folder: the second must not remove it while it is still empty."""
    folder = tmp_path / "new"
    with runs.claimed(folder, "digits"):
        monkeypatch.setattr(Path, "exists", lambda path: path != folder)
        with pytest.raises(DataError, match="in use"), runs.claimed(folder, "digits"):
            pass
        monkeypatch.undo()
        assert folder.is_dir()
    assert not folder.exists()


def test_a_folder_that_was_removed_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lock = tmp_path / "new", fcntl.flock
    removed = []

    def late(handle: int, how: int) -> None:
        if not removed:
            removed.append(folder)
            folder.rmdir()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with runs.claimed(folder, "digits"):
        (folder / "config.toml").write_text("")
    assert removed
    assert (folder / "config.toml").exists()


def test_run_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs.newest_folder("digits") is None
    with runs.claimed(None, "digits") as first, runs.claimed(None, "digits") as second:
        assert (first, second) == (Path("runs/digits-001"), Path("runs/digits-002"))
        (second / "config.toml").write_text("")
    assert runs.newest_folder("digits") == second, "the empty folder is gone"
    for name in ("digits-010", "digits-old", "imagenet-500"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert runs.newest_folder("digits") == Path("runs/digits-010")
    with runs.claimed(None, "digits") as folder:
        assert folder == Path("runs/digits-011")


def test_a_given_folder_is_made_and_kept_if_it_was_there(tmp_path: Path) -> None:
    with runs.claimed(tmp_path / "a" / "b", "digits") as folder:
        assert folder.is_dir()
    assert not folder.exists()
    (tmp_path / "c").mkdir()
    with runs.claimed(tmp_path / "c", "digits"):
        pass
    assert (tmp_path / "c").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--output-dir .*file is a file"), runs.claimed(tmp_path / "file", "digits"):
        pass


def test_the_run_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    for inside in ("", "checkpoints", "checkpoints/step_00000001.pt", "model.safetensors"):
        assert runs.folder_of(tmp_path / inside) == tmp_path


def test_a_run_is_not_started_over_another(tmp_path: Path) -> None:
    runs.check_new(tmp_path / "new")
    runs.check_new(tmp_path)
    runs.write_config(tmp_path, TrainConfig())
    with pytest.raises(UsageError, match="already holds a run"):
        runs.check_new(tmp_path)
    with pytest.raises(DataError, match="is not a run folder"):
        runs.read_config(tmp_path / "new")


def row(step: int, kind: str = "train") -> dict[str, object]:
    return {"step": step, "epoch": step / 10, "kind": kind, "loss": 0.5 / step, "top1_error_percent": 3.25}


def test_metrics_are_cut_back_to_where_a_run_goes_on(tmp_path: Path) -> None:
    metrics = runs.Metrics(tmp_path, 0, -1)
    for item in (row(10), row(20), row(20, "eval"), row(30), row(40), row(40, "eval")):
        metrics.write(item)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "ki')
    assert len(runs.read_metrics(tmp_path)) == 6
    # Interrupted at update 40, before its evaluation.
    metrics = runs.Metrics(tmp_path, 40, 20)
    assert runs.read_metrics(tmp_path) == [row(10), row(20), row(20, "eval"), row(30), row(40)]
    metrics.write(row(40, "eval"))
    assert runs.read_metrics(tmp_path)[-1] == row(40, "eval")
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,epoch,kind,loss,top1_error_percent,top5_error_percent")
    assert lines[3] == "20,2.0,eval,0.025,3.25,,,,,"
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (90000, "1 d 1:00:00"), (-5, "0:00:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_progress_prints_lines_with_an_eta_into_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress("images", 1000, 400) as watched:
        for _ in range(4):
            now[0] += 4
            watched.update(100)
    assert capsys.readouterr().out == "700/1,000 images, 25/s, ETA 0:00:12\n"
