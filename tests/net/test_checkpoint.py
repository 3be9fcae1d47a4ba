"""Checkpoints are written atomically, and damage is detected."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from net.common.errors import DataError
from net.training import checkpoint


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model": {"w": torch.randn(50, 40, generator=generator), "b": torch.zeros(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"velocity": torch.randn(4, generator=generator), "lr": 0.1}}, "param_groups": [{}]},
        "random": torch.get_rng_state(),
        "schedule": {"best": 12.5, "stalled": 1},
        "loader": {"epoch": 1, "batch": 2},
        "interval": {"losses": [torch.tensor(0.5)], "images": 64},
        "mean_image": torch.zeros(2, 2, 3),
        "step": 7,
        "best": float("inf"),
        "none": None,
        "names": ["a", "b"],
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return all(map(equal, one, other))
    return bool(one == other)


def test_reads_what_was_written(tmp_path: Path) -> None:
    path = checkpoint.path_of(tmp_path / "checkpoints", 7)
    checkpoint.save(path, state())
    assert path.name == "step_00000007.pt"
    assert equal(state(), checkpoint.load(path))
    assert equal(state(), torch.load(path, weights_only=True))
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_memory_format_survives(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    checkpoint.save(tmp_path / "a.pt", {"w": weight})
    loaded = checkpoint.load(tmp_path / "a.pt")["w"]
    assert loaded.stride() == weight.stride()
    assert torch.equal(loaded, weight)


def changes() -> list[Any]:
    """The same state with one thing changed."""
    changed = []
    for place, value in (
        (("step",), 8),
        (("best",), 1.0),
        (("none",), 0),
        (("names",), ["b", "a"]),
        (("model", "b"), torch.zeros(3, dtype=torch.float16)),
        (("model", "b"), torch.zeros(1, 3, dtype=torch.bfloat16)),
        (("optimizer", "state", 0, "lr"), 0.2),
    ):
        other = copy.deepcopy(state())
        inner: Any = other
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        changed.append(other)
    for key in state():
        other = copy.deepcopy(state())
        del other[key]
        changed.append(other)
    other = copy.deepcopy(state())
    other["random"][0] ^= 1
    changed.append(other)
    other = state()
    other["model"]["w"].view(torch.int32)[3, 4] ^= 1
    return [*changed, other]


def test_the_digest_sees_every_change() -> None:
    digests = [checkpoint.digest(item) for item in [state(), *changes()]]
    assert len(set(digests)) == len(digests)
    assert checkpoint.digest(state()) == digests[0]


def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, state())
    content = path.read_bytes()
    # Bytes of the tensors and of the archive's directory, but not of the padding.
    start = content.index(state()["model"]["w"].numpy().tobytes())
    for position in (start, start + 4001, start + 7999, len(content) - 30):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged"):
            checkpoint.load(path)


@pytest.mark.parametrize("length", [0, 10, 1000, -1, -100])
def test_a_short_file_is_noticed(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, state())
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    with pytest.raises(DataError, match=r"a\.pt is damaged or not a checkpoint"):
        checkpoint.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        checkpoint.load(tmp_path / "nowhere.pt")
    torch.save({"w": torch.zeros(3)}, tmp_path / "foreign.pt")
    with pytest.raises(DataError, match="was not written by"):
        checkpoint.load(tmp_path / "foreign.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(DataError, match="was not written by"):
        checkpoint.load(tmp_path / "list.pt")
    torch.save({"format": 99, "digest": ""}, tmp_path / "later.pt")
    with pytest.raises(DataError, match="format 99 is not 1"):
        checkpoint.load(tmp_path / "later.pt")


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("echo must not run",)


def test_code_is_not_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"format": 1, "digest": "", "x": Malicious()}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "a.pt")
    assert "must not run" not in capfd.readouterr().out


def test_the_newest_intact_one_is_taken_and_damage_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (3, 20, 100):
        checkpoint.save(checkpoint.path_of(tmp_path, step), {"step": step})
    (tmp_path / "step_00000200.pt").write_bytes(b"junk")
    (tmp_path / "step_99.pt").write_bytes(b"not one of ours")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 100
    assert "step_00000200.pt is damaged" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_a_run_that_prunes_meanwhile_has_newer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The listed checkpoint is gone when it is opened; a newer one is read instead."""
    checkpoint.save(checkpoint.path_of(tmp_path, 3), {"step": 3})
    load, pruned = checkpoint.load, []

    def late(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
        if not pruned:
            pruned.append(path)
            checkpoint.save(checkpoint.path_of(tmp_path, 4), {"step": 4})
            checkpoint.prune(tmp_path, 1)
        return load(path, needed)

    monkeypatch.setattr(checkpoint, "load", late)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 4
    assert capsys.readouterr().out == ""
    # A dangling symlink stays listed, and is skipped.
    (tmp_path / "step_00000009.pt").symlink_to("nowhere")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 4


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 9, 10, 100):
        checkpoint.save(checkpoint.path_of(tmp_path, step), {"step": step})
    (tmp_path / "step_00000007.pt.00.partial").write_bytes(b"")
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010.pt", "step_00000100.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.path_of(tmp_path, 1)
    checkpoint.save(path, {"step": 1, "w": torch.zeros(10)})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"step": 2})
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
