"""Readers of input files: what each format's reader accepts, and what it rejects before it allocates memory."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from net.common.errors import DataError, MissingError, UsageError
from net.data import cifar10
from net.data.sources import open_data
from net.data.store import open_store
from net.readers import archive, files, metrics, pickles
from net.readers import checkpoint as checkpoint_reader
from net.readers.toml import read_toml
from net.training import checkpoint, runs
from net.training.config import TrainConfig
from tests.stores import small_store

READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": checkpoint_reader.load,
    "state dict": checkpoint_reader.load_weights,
    "archive": lambda path: archive.read_members(path, ("data_batch_1",)),
    "metrics": metrics.read_metrics,
    "config": lambda path: read_toml(str(path), TrainConfig),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket name"])
@pytest.mark.timeout(60)
def test_only_regular_files_are_opened(tmp_path: Path, reader: str, kind: str) -> None:
    path = tmp_path / "given"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/dev/fd/0/nothing")
    with pytest.raises((DataError, UsageError), match="given"):
        READERS[reader](path)


def test_sizes_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert files.read(tmp_path / "a", "file", 5) == b"12345"
    with pytest.raises(DataError, match="a has 5 bytes; at most 4 are read"):
        files.read(tmp_path / "a", "file", 4)
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(DataError, match="sparse has 1,099,511,627,776 bytes"):
        checkpoint_reader.load(tmp_path / "sparse")
    with pytest.raises(MissingError, match="nowhere does not exist"):
        files.read(tmp_path / "nowhere", "file")


# Checkpoints


def state() -> dict[str, Any]:
    """A small, complete checkpoint."""
    return {
        "metadata": {"network": {}, "classes": ["a", "b"], "data_path": None},
        "parallel": {"strategy": "none", "ranks": 1},
        "mean_image": torch.full((2, 2, 3), 99.5),
        "model": {"conv1.weight": torch.ones(2, 3, 1, 1)},
        "optimizer": {"state": {0: {"velocity": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "schedule": {"best": float("inf"), "stalled": 0, "reductions": 0, "finished": False},
        "loader": {"epoch": 0, "batch": 3},
        "interval": {"losses": [torch.tensor(0.5)], "correct": torch.tensor(1), "images": 2, "seconds": 0.5},
        "step": 3,
        "epochs_closed": 0,
        "evaluated_step": -1,
        "errors": None,
        "elapsed": 1.5,
        "random": {"cpu": torch.get_rng_state(), "cuda": None, "others": []},
    }


def damaged_states() -> dict[str, tuple[tuple[str, ...], Any]]:
    """Checkpoints with a wrong member and a correct checksum, by the expected message."""
    nan = torch.full((2, 2, 3), 99.5)
    nan[1, 1, 1] = float("nan")
    return {
        "mean_image holds values outside of 0..255": (("mean_image",), nan),
        "mean_image has shape [2, 3, 3], not [size, size, 3]": (("mean_image",), torch.zeros(2, 3, 3)),
        "mean_image is not a float32 tensor": (("mean_image",), torch.zeros(2, 2, 3, dtype=torch.float64)),
        "model: conv1.weight is not a floating-point tensor": (
            ("model", "conv1.weight"),
            torch.ones(2, dtype=torch.int64),
        ),
        "model is a list, not a dictionary": (("model",), []),
        "metadata: classes[0] must be of type str; got 5": (("metadata", "classes"), [5]),
        "metadata: network must be of type dict": (("metadata", "network"), None),
        "step must be of type int; got '3'": (("step",), "3"),
        "step is -1": (("step",), -1),
        "loader: batch is -4": (("loader", "batch"), -4),
        "schedule: finished must be of type bool": (("schedule", "finished"), 1.5),
        "interval: losses[0] must be of type Tensor": (("interval", "losses"), [0.5]),
        "random: cpu is not a 1-d uint8 tensor": (("random", "cpu"), torch.zeros(3)),
        "random: others[0]: cpu is missing": (("random", "others"), [{}]),
        "errors: loss is missing": (("errors",), {"images": 3}),
    }


@pytest.mark.parametrize("says", list(damaged_states()))
def test_members_of_a_checkpoint(tmp_path: Path, says: str) -> None:
    """A correct checksum does not make the content valid."""
    place, value = damaged_states()[says]
    content: Any = state()
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    checkpoint.save(tmp_path / "a.pt", content)
    with pytest.raises(DataError) as refused:
        checkpoint_reader.load(tmp_path / "a.pt", checkpoint_reader.RESUMED)
    assert says in str(refused.value)
    assert "a.pt cannot be used" in str(refused.value)


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    for name in checkpoint_reader.RESUMED:
        content = state()
        del content[name]
        checkpoint.save(tmp_path / "a.pt", content)
        with pytest.raises(DataError, match=f"a.pt cannot be used: {name} is missing"):
            checkpoint_reader.load(tmp_path / "a.pt", checkpoint_reader.RESUMED)
    whole = state()
    # As written before there were multi-process runs.
    del whole["random"]["others"], whole["parallel"]
    for content in (state(), whole):
        checkpoint.save(tmp_path / "a.pt", content)
        checkpoint_reader.load(tmp_path / "a.pt", checkpoint_reader.RESUMED)


def rezipped(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Rewrite the members of a ``torch.save`` archive with ``change``."""
    with zipfile.ZipFile(path) as archive:
        members = [(item.filename, archive.read(item)) for item in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, change(name, content))


def nested(levels: int) -> bytes:
    """A pickle of nested pairs, each of the previous one twice: a level takes two bytes and doubles the value."""
    return b"\x80\x02)" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(levels)) + b"."


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (nested(60), "it describes more than 2,000,000 values"),
        (b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R.", "references __builtin__.bytearray"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "references _codecs.encode"),
        (pickle.dumps({1: os.system}, protocol=2), "references posix.system"),
        (b"\x80\x02}q\x00(h\x01h\x02u.", "damaged or not a checkpoint"),
        (b"\x80\x02r\xff\xff\xff\xff.", "damaged or not a checkpoint"),
        (b"\x80\x02)r\xff\xff\xff\x7f.", "it is damaged"),
        (b"", "damaged or not a checkpoint"),
    ],
    ids=["nested", "bytearray", "codec", "system", "no memo", "empty stack", "memo", "empty"],
)
@pytest.mark.timeout(60)
def test_what_a_small_pickle_can_do(tmp_path: Path, content: bytes, says: str) -> None:
    torch.save({"a": 1}, tmp_path / "a.pt")
    rezipped(tmp_path / "a.pt", lambda name, old: content if name.endswith("data.pkl") else old)
    with pytest.raises(DataError) as refused:
        checkpoint_reader.load(tmp_path / "a.pt")
    assert says in str(refused.value)
    assert "a.pt is damaged or not a checkpoint" in str(refused.value)


def test_values_are_counted_as_often_as_they_are_named() -> None:
    def count(value: object) -> int:
        return pickles.values(io.BytesIO(pickle.dumps(value, protocol=2)), checkpoint_reader._ALLOWED)

    assert count(None) == 1
    assert count((1, 2)) == 3
    pair = (1, 2)
    assert count((pair, pair)) == 7
    assert count({"a": [1, 2, 3]}) > 5


@pytest.mark.timeout(60)
def test_lists_that_hold_themselves(tmp_path: Path) -> None:
    """Lists that are memoized before they are filled."""
    shared: Any = [0] * 1000
    for _ in range(8):
        shared = [shared] * 10
    torch.save({"format": 1, "digest": "", "x": shared}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="larger than its pickle"):
        checkpoint_reader.load(tmp_path / "a.pt")


def test_tensors_larger_than_their_bytes(tmp_path: Path) -> None:
    torch.save({"format": 1, "digest": "", "x": torch.zeros(1).expand(10**12)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="holds a tensor that is larger than its storage"):
        checkpoint_reader.load(tmp_path / "a.pt")
    torch.save({"format": 1, "digest": "", "x": torch.zeros(4).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(DataError, match="damaged or not a checkpoint"):
        checkpoint_reader.load(tmp_path / "a.pt")
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "a.pt")
    rezipped(tmp_path / "a.pt", lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pt").stat().st_size < 10_000
    with pytest.raises(DataError, match="its members are compressed"):
        checkpoint_reader.load(tmp_path / "a.pt")


# Stores


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readers")
    return small_store(root, train=3, val=2)


def with_array(store: Path, target: Path, name: str, array: np.ndarray) -> Path:
    """A copy of the store with another array and a correct checksum."""
    shutil.copytree(store, target)
    np.save(target / name, array)
    meta = json.loads((target / "meta.json").read_text())
    meta["sha256"][name] = hashlib.sha256((target / name).read_bytes()).hexdigest()
    (target / "meta.json").write_text(json.dumps(meta))
    return target


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("train_labels.npy", np.array([0, 0, -100, 1, 1, 1]), "image 2 has the label -100; there are 2 classes"),
        ("train_labels.npy", np.array([0, 0, 99, 1, 1, 1]), "image 2 has the label 99; there are 2 classes"),
        ("val_labels.npy", np.array([0, 0, 1, 2]), "image 3 has the label 2; there are 2 classes"),
        ("train_labels.npy", np.zeros(6), "holds float64 (6,), and must hold int64 (6,)"),
        ("train_labels.npy", np.zeros((6, 1), np.int64), "holds int64 (6, 1), and must hold int64 (6,)"),
        ("train_checksums.npy", np.zeros(0, np.uint64), "holds uint64 (0,), and must hold uint64 (1,)"),
        ("mean_image.npy", np.full((16, 16, 3), np.nan, np.float32), "holds values that are not in 0..255"),
        ("mean_image.npy", np.zeros((16, 16), np.float32), "holds float32 (16, 16), and must hold float32 (16, 16, 3)"),
        ("mean_image.npy", np.array([None]), "mean_image.npy is damaged"),
    ],
)
def test_arrays_of_a_store(store: Path, tmp_path: Path, name: str, array: np.ndarray, says: str) -> None:
    with pytest.raises(DataError) as refused:
        open_store(with_array(store, tmp_path / "store", name, array))
    assert says in str(refused.value)
    assert name in str(refused.value)


def test_a_header_that_lies(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    meta = json.loads((store / "meta.json").read_text())
    meta["counts"]["train"] = 10**12
    (tmp_path / "store" / "meta.json").write_text(json.dumps(meta))
    with open(tmp_path / "store" / "train_images.npy", "r+b") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**12, 16, 16, 3)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DataError, match=r"train_images\.npy cannot be mapped: it is cut short"):
        open_store(tmp_path / "store")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"counts": {"train": 6, "val": 0}}, "counts of val must be at least 1; got 0"),
        ({"image_size": 0}, "image_size must be 1 to 65,536; got 0"),
        ({"image_size": 10**30}, "image_size must be less than 2**63"),
        ({"classes": ["a", "a"]}, "classes must be names that differ"),
        ({"classes": []}, "classes must be names that differ"),
        ({"colour": {"values": [1, 2, float("nan")], "vectors": np.eye(3).tolist()}}, "all finite"),
        ({"colour": {"values": [1, 2, -3], "vectors": np.eye(3).tolist()}}, "colour's values must be at least 0"),
        ({"colour": {"values": [1, 2, 3], "vectors": [["x"] * 3] * 3}}, "all finite"),
    ],
    ids=str,
)
def test_what_a_store_says_of_itself(store: Path, tmp_path: Path, change: dict[str, object], says: str) -> None:
    shutil.copytree(store, tmp_path / "store")
    meta = json.loads((store / "meta.json").read_text())
    (tmp_path / "store" / "meta.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(DataError) as refused:
        open_store(tmp_path / "store")
    assert says in str(refused.value)
    assert "meta.json is damaged" in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "9" * 5000 + "}", "5", "", "\xff"])
def test_json_that_is_none(store: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_bytes(text.encode("latin1"))
    with pytest.raises(DataError, match=r"meta\.json"):
        open_store(tmp_path)


# CIFAR-10


def cifar(path: Path, change: Callable[[tarfile.TarInfo], None] = lambda info: None) -> Path:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            content = rng.integers(0, 256, (2, 3073), np.uint8)
            content[:, 0] = 7, 0
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = content.size
            change(info)
            tar.addfile(info, io.BytesIO(content.tobytes()))
    return path


def test_a_flipped_bit_anywhere_in_an_archive(tmp_path: Path) -> None:
    """gzip's checksum comes after tar's end-of-archive marker."""
    path = cifar(tmp_path / "cifar-10-binary.tar.gz")
    content = path.read_bytes()
    assert len(cifar10.load(path).train) == 10
    # After gzip's header, whose timestamp and name do not matter.
    for position in np.random.default_rng(0).integers(40, len(content), 60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(position) % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz is not a whole tar archive"):
            cifar10.load(path)
    for length in (0, 1, 100, len(content) - 1, len(content) - 8):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz"):
            cifar10.load(path)


def test_the_checksum_behind_the_end_is_read(tmp_path: Path) -> None:
    """A tar archive may end long before the file does, and only gzip's checksum shows that a member is damaged."""
    path = cifar(tmp_path / "cifar-10-binary.tar")
    whole = gzip.compress(path.read_bytes() + bytes(2**20), mtime=0)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(whole)
    assert len(cifar10.load(path).train) == 10
    damaged = bytearray(whole)
    damaged[-8] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="CRC check failed"):
        cifar10.load(path)


@pytest.mark.timeout(60)
def test_archives_that_unpack_to_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"
    monkeypatch.setattr(archive, "_ARCHIVE_LIMIT", 2**20)
    with gzip.open(path, "wb") as file:
        file.write(bytes(2**21))
    with pytest.raises(DataError, match="it unpacks to more than the published archives"):
        cifar10.load(path)
    # A sparse member: its size is only in the header and takes no bytes.
    size = 6 * 2**30
    sparse = tarfile.TarInfo("data_batch_1.bin")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % size
    header[386:410] = b"%011o\0" % size + b"%011o\0" % 0
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(gzip.compress(bytes(header) + bytes(1024)))
    with pytest.raises(DataError, match=r"data_batch_1\.bin is larger than the published file"):
        cifar10.load(path)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({b"labels": [0], b"data": np.zeros((1, 3072))}, "its data are 'f8' and not bytes"),
        ({b"labels": [0, 1], b"data": np.zeros((1, 3072), np.uint8)}, "its data are not uint8 [2, 3072]"),
        ({b"labels": [0], b"data": np.zeros((1, 3), np.uint8)}, "its data are not uint8 [1, 3072]"),
        ({b"labels": [0.5], b"data": np.zeros((1, 3072), np.uint8)}, "labels are no list of integers"),
        ({b"labels": [-1], b"data": np.zeros((1, 3072), np.uint8)}, "labels are not 0 to 9"),
        ({b"data": 3}, "it holds no data and labels"),
        ([], "it holds no data and labels"),
    ],
)
def test_batches(batch: object, says: str) -> None:
    content = pickle.dumps(batch, protocol=2)
    with pytest.raises(DataError) as refused:
        archive.batch(Path("cifar"), "data_batch_1", content)
    assert str(refused.value) == f"cifar: data_batch_1 is not a batch of CIFAR-10: {says}"


def test_reasons_are_one_line() -> None:
    for error, says in (
        (ValueError("short\nand more"), "short"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 1000), "x" * 200),
        (KeyError("classes"), "'classes' is missing"),
    ):
        assert files.reason(error) == says


def test_nested_pairs_in_a_batch() -> None:
    with pytest.raises(DataError, match="it describes more than"):
        archive.batch(Path("cifar"), "data_batch_1", nested(60))


# Configurations and logs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr = " + "[" * 5000, "is not TOML: its brackets are nested too deeply"),
        ("seed = " + "9" * 5000, "is not TOML: "),
        ("a" + ".a" * 5000 + " = 1", "is not TOML: it has a line of more than 8,192 characters"),
        ("a = 1\n" * 20_000, "has 120,000 bytes; at most 65,536 are read"),
        ("seed = 99999999999999999999", "must be less than 2**63"),
        ("lr = 'x'", "must be of type float; got 'x'"),
        ("epoch = 3", "unknown flag 'epoch'; did you mean epochs?"),
        ("\0", "is not TOML"),
    ],
)
def test_configurations(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(UsageError) as refused:
        read_toml(str(tmp_path / "a.toml"), TrainConfig)
    assert says in str(refused.value)
    assert "a.toml" in str(refused.value)


def row(step: int, kind: str = "train") -> dict[str, object]:
    return {"step": step, "epoch": 0.5, "kind": kind, "loss": 0.25, "top1_error_percent": 12.5}


def test_a_damaged_line_of_the_log_stops_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        json.dumps(row(10)),
        '{"step": 20, "ki',
        "5",
        json.dumps({**row(30), "kind": "other"}),
        json.dumps({**row(30), "step": "30"}),
        json.dumps({**row(30), "loss": None, "epoch": []}),
        "[" * 100_000,
        "\xff",
        json.dumps(row(40, "eval")),
        '{"step": 50',
    ]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode("latin1"))
    log = runs.Metrics(tmp_path, 40, 40)
    assert capsys.readouterr().out == f"{tmp_path / 'metrics.jsonl'}: skipped 7 damaged lines: 2, 3, 4, 5, 6, ...\n"
    log.write(row(50))
    assert runs.read_metrics(tmp_path) == [row(10), row(40, "eval"), row(50)]
    assert capsys.readouterr().out == ""


def test_an_image_folder_named_like_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cifar-10-python.tar.gz")
    with pytest.raises(DataError, match="is no image folder"):
        open_data(str(tmp_path / "cifar-10-python.tar.gz"), image_size=32, classes=10)
