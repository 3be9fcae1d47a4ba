"""Damaged and hostile input files: read, or rejected with an error that names the file; no traceback, no endless loop.

``make test`` tries some of each; ``make test-all`` ten thousand, half of them single bits and truncations, and checks
memory.
"""

import contextlib
import gzip
import hashlib
import io
import json
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from net.analysis.trained import open_trained
from net.common.device import peak_memory_mib
from net.common.errors import DataError, UsageError
from net.data.decode import decode
from net.data.store import checksum, open_store
from net.model import weights
from net.model.alexnet import alexnet
from net.readers import archive, labels, members, metrics, store
from net.readers import checkpoint as checkpoint_reader
from net.readers.image import UnreadableImageError
from net.readers.toml import read_toml
from net.training import checkpoint
from net.training.config import TrainConfig
from tests.net.test_interchange import caffe_graph, onnx_installed
from tests.net.test_readers import state
from tests.pictures import picture
from tests.stores import small_store

#: Memory that a damaged file may take beyond that for an intact one; an image's pixels take the most.
MEMORY_MIB = 1024
CPU = torch.device("cpu")
#: Extreme integers, brackets, digits, line ends.
FRAGMENTS = (b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\x80" + b"\0" * 7, b"[" * 40, b"{" * 40, b"9" * 40)
FRAGMENTS += (b"-1", b"NaN", b"1e999", b'"', b"\n", b"\t,", b"\\u0000", b"..", b"q\x00h\x00", b"\x86", b"}", b"None")


@dataclass(frozen=True)
class Reader:
    """A format: an intact file's content, how to write a damaged one, and how to read it.

    ``same``, for formats with a checksum, tells whether the result is that of the intact file.
    """

    content: bytes
    write: Callable[[Path, bytes], None]
    read: Callable[[Path], Any]
    same: Callable[[Any], bool] = lambda result: True
    name: str = "given"


def mutated(content: bytes, random: np.random.Generator, simple: bool) -> bytes:
    """``content`` with one bit flipped or truncated (``simple``), or with one to three other changes."""
    data = bytearray(content)

    def place() -> int:
        """A random position, half of the time near the beginning or end, where headers are."""
        at = int(random.integers(len(data) + 1))
        near = int(random.integers(min(len(data), 200) + 1))
        return (at, at, near, len(data) - near)[random.integers(4)]

    if simple:
        if random.integers(4) == 0:
            del data[place() :]
        elif data:
            data[place() % len(data)] ^= 1 << int(random.integers(8))
        return bytes(data)
    for _ in range(random.integers(1, 4)):
        at, length = place(), int(random.integers(1, 40))
        part = data[place() :][:length]
        fragment = FRAGMENTS[random.integers(len(FRAGMENTS))]
        kind = random.integers(6)
        if kind == 0:
            data[at : at + len(fragment)] = fragment
        elif kind == 1:
            data[at:at] = fragment
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = part
        elif kind == 4:
            data[at : at + length] = random.bytes(length)
        else:
            data[at : at + length] = part
    return bytes(data)


def plain(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def rezipped(whole: bytes, member: str, path: Path, content: bytes) -> None:
    """An archive with one member changed and correct checksums."""
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(path, "w") as target:
        for item in source.infolist():
            target.writestr(item.filename, content if item.filename.endswith(member) else source.read(item))


def in_store(whole: Path, member: str, path: Path, content: bytes) -> None:
    """A store with one file changed and, except for meta.json itself, the correct checksum."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    (path / member).write_bytes(content)
    meta = json.loads((whole / "meta.json").read_text())
    if member in meta["sha256"]:
        meta["sha256"][member] = hashlib.sha256(content).hexdigest()
        (path / "meta.json").write_text(json.dumps(meta))


def in_jpeg_store(whole: Path, path: Path, content: bytes) -> None:
    """A store of JPEG images with the first one changed, and index and checksums right."""
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    index = np.load(path / "train_index.npy")
    files = [content, (whole / "train_images.jpegs").read_bytes()[index[1, 0] :]]
    index[:] = (0, len(files[0])), (len(files[0]), len(files[1]))
    (path / "train_images.jpegs").write_bytes(b"".join(files))
    meta = json.loads((whole / "meta.json").read_text())
    for name, array in (("index", index), ("checksums", np.array([checksum(files)], np.uint64))):
        np.save(path / f"train_{name}.npy", array)
        meta["sha256"][f"train_{name}.npy"] = hashlib.sha256((path / f"train_{name}.npy").read_bytes()).hexdigest()
    (path / "meta.json").write_text(json.dumps(meta))


def decoded_store(path: Path) -> bytes:
    """Every image of a store."""
    data = open_store(path)
    return b"".join(split.images[number].tobytes() for split in (data.train, data.val) for number in range(len(split)))


def read_members(path: Path) -> None:
    """Every file of an archive, but for what cannot be read."""
    files, _ = members.members(path)
    with open(path, "rb") as file:
        for member in files.values():
            with contextlib.suppress(UnreadableImageError):
                members.read_member(file, member)


def with_header(tensors: bytes, path: Path, content: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(content)) + content + tensors)


def tarred_folder(folder: Path) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.add(folder, "images")
    return content.getvalue()


def zipped_folder(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(folder.parent))
    return content.getvalue()


def png(**options: Any) -> bytes:
    content = io.BytesIO()
    picture(1, 2, 40, 30).save(content, **options)
    return content.getvalue()


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    root = tmp_path_factory.mktemp("fuzz")
    result: dict[str, Reader] = {}

    checkpoint.save(root / "a.pt", state())
    whole = (root / "a.pt").read_bytes()
    digest = checkpoint_reader.load(root / "a.pt")["digest"]
    load = partial(checkpoint_reader.load, needed=checkpoint_reader.RESUMED)
    same = lambda found: checkpoint_reader.digest(found) == digest  # noqa: E731
    result["checkpoint"] = Reader(whole, plain, load, same)
    with zipfile.ZipFile(root / "a.pt") as members:
        (pickled,) = [members.read(item) for item in members.infolist() if item.filename.endswith("data.pkl")]
    result["checkpoint's pickle"] = Reader(pickled, partial(rezipped, whole, "data.pkl"), load, same)

    tensors = {name: torch.ones(shape) for name, shape in (("conv1.weight", (2, 3, 2, 2)), ("fc8.bias", (3,)))}
    for legacy in (False, True):
        torch.save({"state_dict": tensors}, root / "b.pt", _use_new_zipfile_serialization=not legacy)
        reader = Reader((root / "b.pt").read_bytes(), plain, checkpoint_reader.load_weights)
        result["legacy state dict" if legacy else "state dict"] = reader

    model = alexnet("digits", image_size=28, hidden=[])
    metadata = {"network": model.config.to_dict(), "classes": None, "data_path": None}
    weights.save(root / "a.safetensors", model.state_dict(), metadata)
    whole = (root / "a.safetensors").read_bytes()
    read = lambda path: open_trained(str(path), CPU)  # noqa: E731
    result["safetensors"] = Reader(whole, plain, read, name="a.safetensors")
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    result["safetensors' header"] = Reader(whole[8:end], partial(with_header, whole[end:]), read, name="a.safetensors")

    content = io.BytesIO()
    rng = np.random.default_rng(0)
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            batch = {b"labels": [1, 2], b"data": rng.integers(0, 256, (2, 3072), np.uint8)}
            packed = pickle.dumps(batch, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(packed)
            tar.addfile(info, io.BytesIO(packed))
    wanted = ("data_batch_1", "test_batch")
    tarred, unpack = content.getvalue(), partial(archive.read_members, wanted=wanted)
    plain(root / "a.tar", tarred)
    members_ = unpack(root / "a.tar")
    result["archive"] = Reader(gzip.compress(tarred, mtime=0), plain, unpack, lambda found: found == members_)
    result["tar"] = Reader(tarred, lambda path, content: plain(path, gzip.compress(content, 1)), unpack)
    read_batch = lambda path: archive.batch(path, "test_batch", path.read_bytes())  # noqa: E731
    result["batch"] = Reader(members_["test_batch"], plain, read_batch)

    small_store(root)
    for member in ("meta.json", "train_labels.npy", "val_checksums.npy", "mean_image.npy", "val_images.npy"):
        place = partial(in_store, root / "store", member)
        result[f"store's {member}"] = Reader((root / "store" / member).read_bytes(), place, open_store)
    (root / "jpeg").mkdir()
    jpegs = small_store(root / "jpeg", quality=80)
    for member in ("meta.json", "train_index.npy", "val_images.jpegs"):
        place = partial(in_store, jpegs, member)
        result[f"JPEG store's {member}"] = Reader((jpegs / member).read_bytes(), place, decoded_store)
    first = np.load(jpegs / "train_index.npy")[0]
    content_ = (jpegs / "train_images.jpegs").read_bytes()[first[0] : first.sum()]
    result["JPEG store's image"] = Reader(content_, partial(in_jpeg_store, jpegs), decoded_store)
    for ending, pack in (("tar", tarred_folder), ("zip", zipped_folder)):
        result[f"images in a {ending}"] = Reader(pack(root / "images"), plain, read_members)
    content = io.BytesIO()
    np.savez(content, key=np.arange(3, dtype=np.uint8), done=np.ones(2, bool))
    expected: dict[str, Any] = {"key": (np.uint8, None), "done": (np.bool_, (2,))}
    result["progress"] = Reader(content.getvalue(), plain, partial(store.read_arrays, expected=expected))

    names, classes = [f"val_{number}.JPEG" for number in range(3)], ("cat", "dog")
    read_labels = lambda path: labels.read(path, Path("val"), names, classes)  # noqa: E731
    for form, text in (
        ("spaces", "val_0.JPEG cat\nval_1.JPEG dog\nval_2.JPEG cat\n"),
        ("table", 'file,class\n"val_0.JPEG","cat"\n"val_1.JPEG","dog"\n"val_2.JPEG","cat"\n'),
        ("Kaggle's", "ImageId,PredictionString\nval_0,cat 1 2\nval_1,dog 1 2\nval_2,cat 1 2\n"),
        ("in order", "cat\ndog\ncat\n"),
    ):
        result[f"labels, {form}"] = Reader(text.encode(), plain, read_labels)
    text = 'network = "digits"\nlr = 0.01\nlr_milestones = [1, 2]\narchitecture = { lrn = false }\ncrop = true\n'
    result["configuration"] = Reader(text.encode(), plain, lambda path: read_toml(str(path), TrainConfig))
    row = {"step": 10, "epoch": 0.5, "kind": "train", "loss": 0.5, "top1_error_percent": 3.5}
    result["metrics"] = Reader((json.dumps(row) + "\n").encode() * 3, plain, metrics.read_metrics)

    for form, options in (
        ("PNG", {"format": "PNG", "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}),
        ("JPEG", {"format": "JPEG"}),
        ("GIF", {"format": "GIF"}),
        ("TIFF", {"format": "TIFF", "compression": "tiff_lzw"}),
        ("WebP", {"format": "WEBP"}),
        ("BMP", {"format": "BMP"}),
    ):
        result[f"image, {form}"] = Reader(png(**options), plain, partial(decode, size=16))
    return result


@pytest.fixture(scope="module")
def onnx_reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    caffe_graph(path)
    return Reader(path.read_bytes(), plain, weights.read, name="a.onnx")


def accepted(reader: Reader, path: Path, content: bytes) -> bool:
    """Whether the reader accepts it; exceptions other than its two error classes fail the test."""
    reader.write(path, content)
    try:
        result = reader.read(path)
    except (DataError, UsageError):
        return False
    assert reader.same(result) or content == reader.content, "another content passed for the whole file's"
    return True


NAMES = (
    "checkpoint", "checkpoint's pickle", "state dict", "legacy state dict", "safetensors", "safetensors' header",
    "archive", "tar", "batch", "store's meta.json", "store's train_labels.npy", "store's val_checksums.npy",
    "store's mean_image.npy", "store's val_images.npy", "progress", "labels, spaces", "labels, table",
    "labels, Kaggle's", "labels, in order", "configuration", "metrics", "image, PNG", "image, JPEG", "image, GIF",
    "image, TIFF", "image, WebP", "image, BMP", "JPEG store's meta.json", "JPEG store's train_index.npy",
    "JPEG store's val_images.jpegs", "JPEG store's image", "images in a tar", "images in a zip",
)  # fmt: skip
cheaply = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("name", NAMES)
@cheaply
@given(seed=st.integers(0, 2**32), simple=st.booleans())
def test_a_reader(readers: dict[str, Reader], tmp_path: Path, name: str, seed: int, simple: bool) -> None:
    reader = readers[name]
    accepted(reader, tmp_path / reader.name, mutated(reader.content, np.random.default_rng(seed), simple))


@onnx_installed
@cheaply
@given(seed=st.integers(0, 2**32), simple=st.booleans())
def test_the_reader_for_onnx(onnx_reader: Reader, tmp_path: Path, seed: int, simple: bool) -> None:
    accepted(
        onnx_reader, tmp_path / onnx_reader.name, mutated(onnx_reader.content, np.random.default_rng(seed), simple)
    )


def test_whole_files_pass(readers: dict[str, Reader], tmp_path: Path) -> None:
    assert set(readers) == set(NAMES)
    for name, reader in readers.items():
        assert accepted(reader, tmp_path / reader.name, reader.content), name
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


#: Arbitrary JSON values for any place of a file's metadata.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(cheaply, max_examples=25)
@given(value=JSON, place=st.integers(0, 10**6))
def test_what_weights_say_of_their_network(tmp_path: Path, value: object, place: int) -> None:
    """Any value at any place of the metadata."""
    model = alexnet("digits", image_size=28, hidden=[])
    metadata: Any = {"network": model.config.to_dict(), "classes": ["a"] * 10, "data_path": None}
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [metadata]
    while waiting:
        inner = waiting.pop()
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                waiting.append(inner[key])
    inner, key = places[place % len(places)]
    inner[key] = value
    weights.save(tmp_path / "a.safetensors", dict(model.state_dict()), metadata)
    with contextlib.suppress(DataError):
        open_trained(str(tmp_path / "a.safetensors"), CPU)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_inputs(readers: dict[str, Reader], onnx_reader: Reader, tmp_path: Path) -> None:
    every = {**readers, "ONNX": onnx_reader}
    before, accepted_count = peak_memory_mib(CPU), 0
    for number in range(10_000):
        name, reader = list(every.items())[number % len(every)]
        content = mutated(reader.content, np.random.default_rng([number, 7]), simple=number // len(every) % 2 == 0)
        try:
            accepted_count += accepted(reader, tmp_path / f"{number % len(every)}{reader.name}", content)
        except BaseException:
            print(f"{name}, input {number}: {content!r:.2000}")
            raise
    assert accepted_count > 100, "some changes mean nothing"
    assert peak_memory_mib(CPU) < before + MEMORY_MIB
