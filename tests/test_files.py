"""Atomic writing, run folders, metrics and progress."""

from pathlib import Path

import pytest

from net import progress, runs
from net.config import TrainConfig
from net.errors import DataError, UsageError
from net.files import atomic_write


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"


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


def test_run_folders_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs.newest_folder("digits") is None
    assert runs.new_folder("digits") == Path("runs/digits-001")
    for name in ("digits-002", "digits-010", "digits-old", "imagenet-500"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert runs.newest_folder("digits") == Path("runs/digits-010")
    assert runs.new_folder("digits") == Path("runs/digits-011")


def test_the_run_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    for inside in ("", "checkpoints", "checkpoints/step_00000001.pt", "model.safetensors"):
        assert runs.folder_of(tmp_path / inside) == tmp_path


def test_a_run_is_not_started_over_another(tmp_path: Path) -> None:
    runs.check_new(tmp_path / "new")
    runs.check_new(tmp_path)
    runs.write_config(tmp_path, TrainConfig())
    with pytest.raises(UsageError, match="holds a run already"):
        runs.check_new(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        runs.check_new(tmp_path / runs.CONFIG)
    with pytest.raises(DataError, match="holds no run"):
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
    # Stopped at update 40, before it was evaluated.
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
