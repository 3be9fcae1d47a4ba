"""The embedded digits, CIFAR-10, random images, and how a data path is interpreted."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from net.common import seeds
from net.common.errors import DataError, UsageError
from net.data import cifar10, digits, synthetic
from net.data.folder import scan
from net.data.images import hold_out
from net.data.packing import Packing
from net.data.sampling import all_have_size
from net.data.sources import open_data, packed_size
from net.data.store import open_store
from tests.pictures import image_folder, picture
from tests.stores import packed_here, small_store


def test_digits_are_all_there_and_split_by_class() -> None:
    data = digits.load()
    assert len(data.train) + len(data.val) == 1797
    assert len(data.val) == 355
    assert data.train.images.shape[1:] == (32, 32, 3)
    assert data.classes == tuple("0123456789")
    for split, least, most in ((data.train, 140, 147), (data.val, 34, 37)):
        counts = np.bincount(split.labels)
        assert counts.min() >= least
        assert counts.max() <= most
    assert np.array_equal(digits.load().val.images, data.val.images)


def test_digits_are_enlarged_and_not_changed() -> None:
    with np.load(Path(digits.__file__).with_name("digits.npz")) as archive:
        small, labels = archive["images"], archive["labels"]
    assert small.shape == (1797, 8, 8)
    assert small.max() == 16
    data = digits.load()
    # Enlarging preserves each digit's mean.
    whole = np.concatenate([data.train.images, data.val.images]).mean((1, 2, 3))
    assert sorted(np.round(whole)) == pytest.approx(sorted(np.round(np.minimum(small * 16.0, 255).mean((1, 2)))), abs=2)
    assert sorted(np.concatenate([data.train.labels, data.val.labels])) == sorted(labels)
    # Enlarged together, the digits have the pixels that each has by itself: the first of each split.
    fifth = min(np.flatnonzero(labels == label)[4] for label in range(10))
    for split, number in ((data.train, 0), (data.val, fifth)):
        gray = Image.fromarray(np.minimum(small[number] * 16.0, 255).astype(np.uint8))
        large = np.asarray(gray.resize((32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(split.images[0], np.stack([large] * 3, axis=-1))
        assert not np.array_equal(large, large.T)


def cifar_files(version: str, count: int = 6) -> dict[str, bytes]:
    """The files of CIFAR-10's python or binary archive, with ``count`` images each."""
    files = {}
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [(number + item) % 10 for item in range(count)]
        if version == "python":
            files[name] = pickle.dumps({b"batch_label": b"x", b"labels": labels, b"data": pixels}, protocol=2)
        else:
            rows = [bytes([label]) + row.tobytes() for label, row in zip(labels, pixels, strict=True)]
            files[name + ".bin"] = b"".join(rows)
    return files


def write(files: dict[str, bytes], root: Path, version: str, archive: bool) -> Path:
    folder = "cifar-10-batches-py" if version == "python" else "cifar-10-batches-bin"
    if archive:
        path = root / f"cifar-10-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for name, content in files.items():
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path
    (root / folder).mkdir()
    for name, content in files.items():
        (root / folder / name).write_bytes(content)
    return root / folder


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "folder"])
@pytest.mark.parametrize("parent", [True, False], ids=["parent", "itself"])
def test_cifar10(tmp_path: Path, version: str, archive: bool, parent: bool) -> None:
    path = write(cifar_files(version), tmp_path, version, archive)
    data = open_data(str(tmp_path if parent else path), image_size=32, classes=10)
    assert (len(data.train), len(data.val)) == (30, 6)
    assert data.classes[3] == "cat"
    assert data.train.labels[6:12].tolist() == [1, 2, 3, 4, 5, 6]
    planes = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8).reshape(6, 3, 32, 32)
    assert np.array_equal(data.train.images[:6], planes.transpose(0, 2, 3, 1))


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("this must not run",)


@pytest.mark.parametrize("protocol", [4, 5])
def test_cifar10_written_anew(tmp_path: Path, protocol: int) -> None:
    """Protocol 5, the default of Python 3.14, asks for another function of numpy."""
    files = cifar_files("python")
    again = {name: pickle.dumps(pickle.loads(content), protocol) for name, content in files.items()}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = (
        open_data(str(write(each, tmp_path / name, "python", False)), image_size=32, classes=10)
        for name, each in (("a", again), ("b", files))
    )
    assert np.array_equal(ours.train.images, theirs.train.images)
    assert np.array_equal(ours.val.labels, theirs.val.labels)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda files: files.pop("data_batch_3"), "data_batch_3 is missing"),
        (lambda files: files.update(test_batch=b"junk"), "test_batch is not a batch of CIFAR-10"),
        (lambda files: files.update(test_batch=pickle.dumps(Malicious())), "builtins.print"),
        (
            lambda files: files.update(
                test_batch=pickle.dumps({b"labels": [11], b"data": np.zeros((1, 3072), np.uint8)})
            ),
            "labels are not 0 to 9",
        ),
    ],
)
def test_damaged_cifar10(tmp_path: Path, change, says: str, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    files = cifar_files("python")
    change(files)
    with pytest.raises(DataError, match=says):
        open_data(str(write(files, tmp_path, "python", False)), image_size=32, classes=10)
    assert "must not run" not in capsys.readouterr().out


def test_cut_off_archives(tmp_path: Path) -> None:
    path = write(cifar_files("python"), tmp_path, "python", True)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz"):
        cifar10.load(path)
    binary = tmp_path / "cifar-10-batches-bin"
    write({**cifar_files("binary"), "data_batch_2.bin": b"x" * 100}, tmp_path, "binary", False)
    with pytest.raises(DataError, match=r"data_batch_2\.bin is not a batch"):
        cifar10.load(binary)


def test_held_out_images_are_of_every_class_and_always_the_same() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [10, 30, 5]))
    stay, held_out = hold_out(labels, 9)
    assert np.bincount(labels[held_out]).tolist() == [2, 6, 1]
    assert sorted([*stay, *held_out]) == list(range(45))
    assert (np.diff(stay) > 0).all()
    assert (hold_out(labels, 9)[1] == held_out).all()
    # Not simply the first of each class.
    assert held_out.tolist() != sorted(np.concatenate([np.flatnonzero(labels == n)[: (2, 6, 1)[n]] for n in range(3)]))
    assert [len(part) for part in hold_out(labels, 0)] == [45, 0]


def test_holding_out_takes_the_images_that_it_always_took() -> None:
    """Published errors are of these. Some classes have no image, one has one, and classes need not be balanced."""
    generator = np.random.default_rng(0)
    for classes, count in ((1, 7), (3, 40), (40, 300)):
        labels = generator.integers(0, classes, count) * 2
        shuffled = seeds.held_out().permutation(count)
        places = np.empty(count)
        for label in np.unique(labels):
            own = shuffled[labels[shuffled] == label]
            places[own] = (np.arange(len(own)) + 0.5) / len(own)
        expected = shuffled[np.argsort(places[shuffled], kind="stable")]
        for held in (0, 1, count // 3, count):
            stay, out = hold_out(labels, held)
            assert (stay.dtype, out.dtype) == (np.int64, np.int64)
            assert np.array_equal(out, np.sort(expected[:held]))
            assert np.array_equal(stay, np.sort(expected[held:]))


def test_random_images() -> None:
    data = open_data("synthetic:40", image_size=28, classes=5)
    assert data.train.images.shape == (40, 32, 32, 3)
    assert data.train.labels.max() == 4
    assert len(data.val) == 5
    assert np.array_equal(data.train.images, open_data("synthetic:40", image_size=28, classes=5).train.images)
    assert abs(data.train.images.mean() - 127.5) < 1
    assert len(open_data("synthetic", image_size=8, classes=5).train) == synthetic.DEFAULT_COUNT


@pytest.mark.parametrize("path", ["synthetic:", "synthetic:0", "synthetic:many"])
def test_random_images_of_no_number(path: str) -> None:
    with pytest.raises(UsageError, match="comes a positive number of images"):
        open_data(path, image_size=28, classes=5)


def test_random_images_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match=r"GiB of memory and .* GiB are free; ask for fewer"):
        open_data("synthetic:100000000", image_size=224, classes=5)


def test_packed_size_keeps_the_paper_s_ratio() -> None:
    assert packed_size(224) == packed_size(227) == 256
    assert packed_size(28) == 32
    assert packed_size(64) == 73


def test_an_image_folder_is_packed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path / "images", train=2, val=1)
    data = open_data(str(root), image_size=14, classes=3, workers=1)
    assert data.size == 16
    assert open_store(tmp_path / "images.16x16.packed").classes == data.classes
    assert "packing 9 images" in capsys.readouterr().out
    again = open_data(str(root), image_size=14, classes=3, workers=1)
    assert "prepared already" in capsys.readouterr().out
    assert np.array_equal(again.train.images, data.train.images)
    assert len(open_data(str(tmp_path / "images.16x16.packed"), image_size=14, classes=3).train) == 6
    open_data(str(root), image_size=14, classes=3, store=str(tmp_path / "elsewhere"), workers=1)
    assert (tmp_path / "elsewhere" / "meta.json").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is empty"),
        (lambda path: (path / "pictures").mkdir(parents=True), "is no image folder"),
        (lambda path: path.write_text("x"), "is no image folder"),
    ],
)
def test_paths_that_mean_nothing(tmp_path: Path, make, says: str) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "data")
    with pytest.raises(DataError, match=says):
        open_data(str(tmp_path / "data"), image_size=28, classes=5)


@pytest.mark.parametrize("flag", ["store", "val_labels"])
def test_flags_of_packing_where_nothing_is_packed(tmp_path: Path, flag: str) -> None:
    root = image_folder(tmp_path / "images", train=2, val=1)
    store = packed_here(root, tmp_path / "store", Packing(16))
    cifar = write(cifar_files("binary"), tmp_path, "binary", False)
    for path, says in (
        (None, "the embedded digits are none"),
        ("synthetic:8", "synthetic:8 is none"),
        (str(store), "is a packed store already"),
        (str(cifar), "is CIFAR-10"),
    ):
        with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} x goes with an image folder, and .*{says}"):
            open_data(path, image_size=14, classes=3, **{flag: "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [".", "../images", "../images/"])
def test_a_folder_that_is_not_given_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(image_folder(tmp_path / "images", train=2, val=1))
    packed_here(tmp_path / "images", tmp_path / "images.packed", Packing(16))
    assert open_data(path, image_size=14, classes=3).path == str(tmp_path / "images.packed")


def archive_of(folder: Path, path: Path) -> Path:
    """The files of a folder in an archive of the same content, in a folder of its own there."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*.*")):
                archive.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(path, "w") as tar:
            tar.add(folder, folder.name)
    return path


@pytest.mark.parametrize("name", ["images.zip", "images.tar", "cifar-10-jpeg.tar"])
def test_an_archive_is_packed_as_its_folder(tmp_path: Path, name: str) -> None:
    root = image_folder(tmp_path / "images", train=2, val=1)
    expected = open_store(packed_here(root, tmp_path / "store", Packing(16)))
    data = open_data(str(archive_of(root, tmp_path / name)), image_size=14, classes=3, workers=1)
    assert data.path == str(tmp_path / f"{name}.16x16.packed")
    for ours, theirs in ((data.train, expected.train), (data.val, expected.val)):
        assert np.array_equal(ours.images, theirs.images)
        assert np.array_equal(ours.labels, theirs.labels)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match="is compressed with gzip"):
        open_data(str(tmp_path / "images.tar.gz"), image_size=14, classes=3)


def test_a_store_of_jpeg_serves_its_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", train=2, val=1)
    packed_here(root, tmp_path / "images.packed", Packing(16, 80))
    data = open_data(str(root), image_size=14, classes=3)
    assert data.decoder is not None
    assert len(data.train) == 6


@pytest.mark.parametrize("name", ["images", "images.zip"])
def test_images_of_the_network_s_own_size_stay_as_they_are(tmp_path: Path, name: str) -> None:
    """As from CIFAR-10's published archives: neither enlarged nor, in training, cropped."""
    root = small_store(tmp_path, train=3, val=1, size=32).with_name("images")
    path = root if name == "images" else archive_of(root, tmp_path / name)
    data = open_data(str(path), image_size=32, classes=2, workers=1)
    assert data.size == 32
    with Image.open(tmp_path / "images" / "train" / "a" / "0.png") as first:
        assert np.array_equal(data.train.images[0], np.asarray(first))


def test_images_are_of_the_network_s_size_when_all_are(tmp_path: Path) -> None:
    """A JPEG file of twice the size could be decoded at half of it."""
    for number, (width, height) in enumerate(((32, 32), (64, 64), (32, 40))):
        root = tmp_path / str(number)
        for split in ("train", "val"):
            (root / split / "a").mkdir(parents=True)
            picture(0, 0, 32, 32).save(root / split / "a" / "0.jpg")
            picture(0, 0, width, height).save(root / split / "a" / "1.jpg")
            (root / split / "a" / "2.jpg").write_bytes(b"no picture")
        assert all_have_size(scan(root), 32) == (number == 0)


def test_a_folder_has_a_store_of_each_size(tmp_path: Path) -> None:
    """Networks of several sizes use one folder one after the other, and no store is touched by another's."""
    root = image_folder(tmp_path / "images", train=2, val=1)
    for size in (16, 24):
        packed_here(root, tmp_path / f"images.{size}x{size}.packed", Packing(size))
    for image_size, stored, size in ((14, None, 16), (21, None, 24), (14, 24, 24), (21, 16, 16), (14, None, 16)):
        data = open_data(str(root), image_size=image_size, classes=3, stored=stored)
        assert data.path == str(tmp_path / f"images.{size}x{size}.packed")
        assert data.size == size


def test_a_store_of_an_earlier_version_is_used_where_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was at PATH.packed, whatever its size, and images of the network's own size were enlarged."""
    root = small_store(tmp_path, train=3, val=1, size=16).with_name("images")
    old = packed_here(root, tmp_path / "images.packed", Packing(18))
    packed_here(root, tmp_path / "images.16x16.packed", Packing(16))
    data = open_data(str(root), image_size=16, classes=2)
    assert (data.path, data.size) == (str(old), 18)
    assert f"note: {old} holds the 16x16 images enlarged to 18x18, as earlier" in capsys.readouterr().out
    # A network that was trained on images as they are, and one of another size.
    assert open_data(str(root), image_size=16, classes=2, stored=16).size == 16
    assert open_data(str(root), image_size=14, classes=2).path == str(tmp_path / "images.16x16.packed")
    assert "note" not in capsys.readouterr().out
    with pytest.raises(DataError, match=r"holds images of 18x18 as pixels, not .* 16x16 .*another folder to pack into"):
        open_data(str(root), image_size=14, classes=2, store=str(old))
