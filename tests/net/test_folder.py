"""Scanning image folders, and the errors for unusable ones."""

import copy
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from net.common.errors import DataError
from net.data.folder import is_image_folder, scan
from net.readers.image import UnreadableImageError
from net.readers.members import members, read_member


def tree(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("")
    return root


def test_classes_and_labels_in_order(tmp_path: Path) -> None:
    listing = scan(tree(tmp_path, "train/b/1.jpg", "train/a/2.jpg", "train/a/1.jpg", "val/b/9.jpg"))
    assert listing.classes == ("a", "b")
    assert listing.files == {"train": ["train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg"], "val": ["val/b/9.jpg"]}
    assert listing.labels == {"train": [0, 0, 1], "val": [1]}


def test_folders_in_classes_and_hidden_files(tmp_path: Path) -> None:
    listing = scan(tree(tmp_path, "train/a/images/1.jpg", "train/a/.DS_Store", "train/.x/1.jpg", "val/a/1.jpg"))
    assert listing.files["train"] == ["train/a/images/1.jpg"]
    assert listing.classes == ("a",)


def test_digest_sees_names_and_labels(tmp_path: Path) -> None:
    first = scan(tree(tmp_path / "one", "train/a/1.jpg", "train/b/2.jpg", "val/a/1.jpg")).digest
    assert scan(tree(tmp_path / "two", "train/a/1.jpg", "train/b/2.jpg", "val/a/1.jpg")).digest == first
    assert scan(tree(tmp_path / "three", "train/a/1.jpg", "train/b/3.jpg", "val/a/1.jpg")).digest != first
    assert scan(tree(tmp_path / "four", "train/a/1.jpg", "train/b/2.jpg", "val/b/1.jpg")).digest != first


LABEL_FILES = {
    "pairs": "x2.JPEG dog\nx1.JPEG cat\n",
    "comma": "x1.JPEG,cat\nx2.JPEG,dog\n",
    "kaggle": "ImageId,PredictionString\nx2,dog 1 2 3 4 dog 5 6 7 8\nx1,cat 1 2 3 4\n",
    "in order": "cat\ndog\n",
    "one class a line under a header": "label\ncat\ndog\n",
    "header": "file class\nx2.JPEG dog\nx1.JPEG cat\n",
    "quoted table with a header": '"image","label"\r\n"x2.JPEG","dog"\r\n"x1.JPEG","cat"\r\n',
    "numbered table": "id,file,size,species\n0,x1.JPEG,10,cat\n1,x2.JPEG,10,dog\n",
    "class first": "cat x1.JPEG\ndog x2.JPEG\n",
    "Tiny ImageNet": "x2.JPEG\tdog\t0\t32\t44\t62\nx1.JPEG\tcat\t52\t55\t57\t59\n",
    "paths": "val/x1.JPEG cat\n./val/x2.JPEG dog\n",
    "twice the same": "x1.JPEG cat\nx2.JPEG dog\nx1.JPEG cat\n",
    "mark and line ends of Windows": "\ufeffx2.JPEG dog\r\nx1.JPEG cat\r\n",
}


@pytest.mark.parametrize("content", LABEL_FILES.values(), ids=list(LABEL_FILES))
def test_flat_validation_folder(tmp_path: Path, content: str) -> None:
    tree(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/x1.JPEG", "val/x2.JPEG")
    # Files that such folders often contain: neither is an image.
    tree(tmp_path, "val/Thumbs.db")
    labels = tmp_path / "val" / "labels"
    labels.write_text(content)
    listing = scan(tmp_path, labels)
    assert dict(zip(listing.files["val"], listing.labels["val"], strict=True)) == {"val/x1.JPEG": 0, "val/x2.JPEG": 1}


@pytest.mark.parametrize("content", ["red fox\ngray wolf\n", "x 1.jpg\tred fox\nx2.jpg\tgray wolf\n"])
def test_names_with_spaces(tmp_path: Path, content: str) -> None:
    tree(tmp_path, "train/red fox/1.jpg", "train/gray wolf/1.jpg", "val/x 1.jpg", "val/x2.jpg")
    (tmp_path / "labels.txt").write_text(content)
    listing = scan(tmp_path, tmp_path / "labels.txt")
    assert [listing.classes[label] for label in listing.labels["val"]] == ["red fox", "gray wolf"]


@pytest.mark.parametrize(
    ("files", "labels", "says"),
    [
        ((), None, "has no folder train"),
        (("train/a/1.jpg",), None, "has no folder val"),
        (("train/1.jpg", "val/a/1.jpg"), None, "train has no class folders"),
        (("train/a/.hidden", "val/a/1.jpg"), None, "train/a holds no files"),
        (("train/a/1.jpg", "val/a/1.jpg", "val/b/1.jpg"), None, "class 'b' is in"),
        (("train/a/1.jpg", "val/1.jpg"), None, "a flat folder needs --val-labels FILE"),
        (("train/a/1.jpg", "val/1.jpg"), "1.jpg b", "'b' is not a class in"),
        (("train/a/1.jpg", "val/1.jpg"), "490", "use the names of the folders in train, not numbers"),
        (("train/a/1.jpg", "val/1.jpg"), "2.jpg a", "has no label for"),
        (("train/a/1.jpg", "val/1.jpg"), "a\na\na", "it has 3 lines"),
        (("train/a/1.jpg", "val/1.jpg"), "", "is empty"),
        (("train/a/1.jpg", "val/a/1.jpg"), "a", "val has class folders (a/1.jpg)"),
        (("train/a/1.jpg", "val/labels.txt"), "a", "val holds no files"),
        (("train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"), None, "the folders val and valid; keep one"),
        (("train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"), "1.jpg a\n1.jpg b", "has both 'a' and 'b' for"),
        (("train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"), "1.jpg a\n1 b", "has both 'a' and 'b' for"),
        (("train/a/1.jpg", "val/1.jpg", "val/2.jpg", "val/10.jpg"), "a\na\na", "write lines of 'FILE CLASS'"),
        (("train/a/1.jpg", "val/B.jpg", "val/a.jpg"), "a\na", "write lines of 'FILE CLASS'"),
        (("train/a/1.jpg", "val/1.jpg"), '1.jpg,"a\n', "labels.txt cannot be read: unexpected end of data"),
        (("train/a/1.jpg", "val/1.jpg"), "1.jpg," + 70_000 * "a", "a line of more than 65,536 characters"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, files: tuple[str, ...], labels: str | None, says: str) -> None:
    root = tree(tmp_path / "images", *files)
    root.mkdir(exist_ok=True)
    label_file = None
    if labels is not None:
        label_file = tmp_path / "labels.txt"
        label_file.write_text(labels)
    with pytest.raises(DataError) as refused:
        scan(root, label_file)
    assert says in str(refused.value)


def test_missing_folder_and_label_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        scan(tmp_path / "nowhere")
    tree(tmp_path, "train/a/1.jpg", "val/1.jpg")
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        scan(tmp_path, tmp_path / "nowhere.txt")


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_other_names_of_the_validation_folder(tmp_path: Path, name: str) -> None:
    tree(tmp_path, "train/a/1.jpg", f"{name}/a/1.jpg")
    assert is_image_folder(tmp_path)
    assert scan(tmp_path).files["val"] == [f"{name}/a/1.jpg"]
    tree(tmp_path, "val/a/2.jpg")
    if name == "test":
        assert scan(tmp_path).files["val"] == ["val/a/2.jpg"]


def test_images_in_a_folder_of_a_flat_validation_folder(tmp_path: Path) -> None:
    """As in Tiny ImageNet."""
    tree(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/images/val_2.JPEG", "val/images/val_10.JPEG")
    labels = tmp_path / "val" / "val_annotations.txt"
    labels.write_text("val_2.JPEG\tb\t0\t0\t1\t1\nval_10.JPEG\ta\t0\t0\t1\t1\n")
    listing = scan(tmp_path, labels)
    assert dict(zip(listing.files["val"], listing.labels["val"], strict=True)) == {
        "val/images/val_2.JPEG": 1,
        "val/images/val_10.JPEG": 0,
    }


def test_twelve_numbered_files(tmp_path: Path) -> None:
    """Sorted as text 10.png, 11.png and 12.png come before 2.png: six of twelve labels would be wrong."""
    tree(tmp_path, "train/a/1.png", "train/b/1.png", *(f"val/{number}.png" for number in range(1, 13)))
    labels = tmp_path / "labels.txt"
    labels.write_text("a\na\na\n" * 2 + "b\nb\nb\n" * 2)
    with pytest.raises(DataError, match=r"10\.png sorts before .*2\.png as text"):
        scan(tmp_path, labels)
    for number in range(1, 13):
        (tmp_path / "val" / f"{number}.png").rename(tmp_path / "val" / f"{number:02d}.png")
    assert scan(tmp_path, labels).labels["val"] == [0] * 6 + [1] * 6


@pytest.mark.timeout(60)
def test_links_that_go_round(tmp_path: Path) -> None:
    """Twenty-two folders with two links each to the next one: four million paths to one file."""
    tree(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "deep/22/2.jpg")
    for level in range(22):
        folder = tmp_path / "deep" / str(level)
        folder.mkdir()
        for name in ("x", "y"):
            (folder / name).symlink_to(tmp_path / "deep" / str(level + 1))
    (tmp_path / "train/a/deep").symlink_to(tmp_path / "deep" / "0")
    (tmp_path / "train/a/round").symlink_to(tmp_path / "train")
    files = scan(tmp_path).files["train"]
    assert files[0] == "train/a/1.jpg"
    assert len(files) == 2
    assert files[1].endswith("2.jpg")


def test_many_nested_folders(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    levels = [str(tmp_path / "train" / "a" / "/".join("d" * depth)) for depth in range(1, 1201)]
    for level in levels:
        os.mkdir(level)
    assert scan(tmp_path).files["train"] == ["train/a/1.jpg"]
    # pytest would recurse.
    for level in reversed(levels):
        os.rmdir(level)


def test_a_class_whose_name_is_no_text(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    os.makedirs(os.fsencode(tmp_path / "train") + b"/\xff")
    with pytest.raises(DataError, match="a class's name must be UTF-8"):
        scan(tmp_path)


def packed(root: Path, files: dict[str, bytes], kind: str = "zip", mode: str = "w") -> Path:
    """An archive of files; names that end in a slash are folders."""
    path = root / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read_all(path: Path) -> dict[str, bytes]:
    files, _ = members(path)
    with open(path, "rb") as file:
        return {name: read_member(file, member) for name, member in files.items()}


PICTURES = {
    f"{split}/{name}/{number}.jpg": os.urandom(9) for split in ("train", "val") for name in "ab" for number in "01"
}
KINDS = ("tar", "zip")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("above", ["", "./", "cifar/", "./ILSVRC/Data/CLS-LOC/"])
def test_an_archive_is_as_the_folder_in_it(tmp_path: Path, kind: str, above: str) -> None:
    beside = {f"{above}README.md": b"", f"{above}train/a/.DS_Store": b"", "__MACOSX/train/a/._1.jpg": b""}
    path = packed(tmp_path, {**beside, **{above + name: content for name, content in PICTURES.items()}}, kind)
    tree(tmp_path / "folder", *PICTURES)
    listing, same = scan(path), scan(tmp_path / "folder")
    assert (listing.files, listing.labels, listing.classes) == (same.files, same.labels, same.classes)
    assert listing.members is not None
    with open(path, "rb") as file:
        for name, content in PICTURES.items():
            assert read_member(file, listing.members[name]) == content


@pytest.mark.parametrize("kind", KINDS)
def test_digest_of_an_archive_sees_its_content(tmp_path: Path, kind: str) -> None:
    """Of a tar the sizes: it has no checksums of its files."""
    first = scan(packed(tmp_path, PICTURES, kind)).digest
    assert scan(packed(tmp_path, PICTURES, kind)).digest == first
    for content, differs in ((bytes(10), True), (bytes(9), kind == "zip")):
        again = scan(packed(tmp_path, {**PICTURES, "train/b/1.jpg": content}, kind)).digest
        assert (again != first) == differs


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_in_an_archive_is_a_folder_s(tmp_path: Path, kind: str) -> None:
    """Which is by the parts of a name: "a-b" comes before "a/b" as text."""
    names = ["train/a/2.jpg", "train/a/1/x.jpg", "train/a/1-2.jpg", "train/a-b/1.jpg", "val/a/1.jpg", "val/a-b/9.jpg"]
    path = packed(tmp_path, dict.fromkeys(names, b"x"), kind)
    tree(tmp_path / "folder", *names)
    assert scan(path).files == scan(tmp_path / "folder").files


def test_annotations_are_no_images(tmp_path: Path) -> None:
    """Kaggle's archive of ImageNet has both in folders of the same names."""
    path = packed(
        tmp_path,
        {
            "ILSVRC/Annotations/CLS-LOC/train/n01/n01_1.xml": b"",
            "ILSVRC/Data/CLS-LOC/train/n01/n01_1.JPEG": b"1",
            "ILSVRC/Data/CLS-LOC/train/n02/n02_1.JPEG": b"2",
            "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": b"3",
            "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG": b"4",
        },
    )
    (tmp_path / "solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n02 1 2 3 4\n")
    listing = scan(path, tmp_path / "solution.csv")
    assert listing.files["train"] == ["train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG"]
    assert (listing.files["val"], listing.labels["val"]) == (["val/ILSVRC2012_val_00000001.JPEG"], [1])


def test_a_stored_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, content in PICTURES.items():
            archive.writestr(name, content)
    assert read_all(tmp_path / "a.zip") == PICTURES


def test_links_in_a_tar(tmp_path: Path) -> None:
    """Two names of one file are one file; what points elsewhere is left out and says so."""
    path = packed(tmp_path, PICTURES, "tar")
    with tarfile.open(path, "a") as tar:
        for name, target, kind in (
            ("train/a/hard.jpg", "train/b/0.jpg", tarfile.LNKTYPE),
            ("train/a/soft.jpg", "/etc/passwd", tarfile.SYMTYPE),
            ("train/a/lost.jpg", "../../etc/passwd.jpg", tarfile.SYMTYPE),
            ("train/a/none.jpg", "train/z/0.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    files, _ = members(path)
    with open(path, "rb") as file:
        assert read_member(file, files["train/a/hard.jpg"]) == PICTURES["train/b/0.jpg"]
        for name, says in (("soft", "not followed"), ("lost", "not followed"), ("none", "does not come first")):
            with pytest.raises(UnreadableImageError, match=says):
                read_member(file, files[f"train/a/{name}.jpg"])


def test_many_links_to_one_file_in_a_tar(tmp_path: Path) -> None:
    """Every one would be decoded: a small archive could keep a machine busy for days."""
    path = packed(tmp_path, {"train/a/0.jpg": bytes(5000)}, "tar")
    with tarfile.open(path, "a") as tar:
        for number in range(1, 10):
            info = tarfile.TarInfo(f"train/a/{number}.jpg")
            info.type, info.linkname = tarfile.LNKTYPE, "train/a/0.jpg"
            tar.addfile(info)
    with pytest.raises(DataError, match="its files and the hard links to them take more bytes than it has"):
        members(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["../train/a/1.jpg"], "holds the name '../train/a/1.jpg', which leads out of its folder"),
        (["train/a/../../../1.jpg"], "leads out of its folder"),
        (["/train/a/1.jpg"], "holds the name '/train/a/1.jpg', which leads out of its folder"),
        (["train/a/1.jpg", "./train/a/1.jpg"], "holds 'train/a/1.jpg' twice"),
        (["1.jpg"], "holds no image folder"),
        (["train/1.jpg"], "holds no image folder"),
        (["x/train/a/1.jpg", "y/train/a/1.jpg"], "holds the folders x/train and y/train; make an archive of one"),
        (["train/a/1.jpg"], "has no folder val"),
        (["train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"], "has the folders val and valid; keep one of them"),
        (["train/a/1.jpg", "val/a/1.jpg", "val/b/1.jpg"], "class 'b' is in"),
        (["train/a/1.jpg", "val/1.jpg"], "a flat folder needs --val-labels FILE"),
        (["train/a/1.jpg", "train/b/", "val/a/1.jpg"], "train/b holds no files"),
    ],
)
def test_archives_that_cannot_be_used(tmp_path: Path, kind: str, names: list[str], says: str) -> None:
    path = tmp_path / f"images.{kind}"
    if len(set(names)) == len(names):
        packed(tmp_path, dict.fromkeys(names, b"x"), kind)
    with pytest.raises(DataError) as refused:
        scan(path)
    assert str(path) in str(refused.value)
    assert says in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_archive(tmp_path: Path, kind: str) -> None:
    path = packed(tmp_path, dict.fromkeys(PICTURES, b"x" * 2000), kind)
    whole = path.read_bytes()
    # In a tar: in a file, in a header, and between two files, where nothing is missed but the archive's end.
    for content in (whole[:9000], whole[:10300], whole[: 4 * 2560], b"no archive"):
        path.write_bytes(content if kind == "tar" else content[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"images\.{kind} is not a complete \.tar or \.zip archive: "):
            scan(path)


def test_a_damaged_header_in_the_middle_of_a_tar(tmp_path: Path) -> None:
    """tarfile takes it for the archive's end. A file of nine bytes has two blocks, its header and itself."""
    path = packed(tmp_path, PICTURES, "tar")
    whole = path.read_bytes()
    for damage in (b"\xff", bytes(512)):
        path.write_bytes(whole[: 3 * 1024] + damage + whole[3 * 1024 + len(damage) :])
        with pytest.raises(DataError, match="what follows at byte 3,072 is neither a file nor the archive's end"):
            scan(path)
    # One block of zeros or two end an archive; what comes after two is none of it.
    for ending in (bytes(512), bytes(1024) + b"x"):
        path.write_bytes(whole[: 1024 * len(PICTURES)] + ending)
        assert len(members(path)[0]) == len(PICTURES)


def test_a_file_whose_bytes_changed_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", b"wholesome")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"wholesome", b"wholesale"))
    with pytest.raises(UnreadableImageError, match="does not unpack to what the archive says"):
        read_all(tmp_path / "a.zip")


def changed_entry(path: Path, at: int, value: bytes) -> Path:
    """A zip with bytes of its first central entry replaced."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + at : entry + at + len(value)] = value
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (8, b"\1", "it is encrypted"),
        (10, b"\x0c", "compressed with a zip archive's method 12; only 0 and 8 are read"),
        (24, struct.pack("<I", 2**28 + 1), "has 268,435,457 bytes; at most 268,435,456 are read from an archive"),
        (24, struct.pack("<I", 2**20), "does not unpack to what the archive says"),
        (42, struct.pack("<I", 30), "has no such file at its place"),
    ],
    ids=["encrypted", "method", "bomb", "length", "place"],
)
def test_files_of_a_zip_that_cannot_be_read(tmp_path: Path, at: int, value: bytes, says: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", b"x" * 100)
    with pytest.raises(UnreadableImageError, match=says):
        read_all(changed_entry(tmp_path / "a.zip", at, value))


def test_a_small_file_does_not_unpack_without_end(tmp_path: Path) -> None:
    """A kilobyte is said to unpack to a hundred bytes and would to a megabyte: nothing more than said is unpacked."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(2**26))
    changed_entry(tmp_path / "a.zip", 24, struct.pack("<I", 100))
    tracemalloc.start()
    with pytest.raises(UnreadableImageError, match="does not unpack"):
        read_all(tmp_path / "a.zip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_files_that_share_their_bytes_in_a_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.jpg", os.urandom(1000))
        for name in "bcd":
            same = copy.copy(archive.infolist()[0])
            same.filename = f"{name}.jpg"
            archive.filelist.append(same)
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="its files take more bytes than it has"):
        members(tmp_path / "a.zip")


@pytest.mark.parametrize(("mode", "program"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_tar_is_refused(tmp_path: Path, mode: str, program: str) -> None:
    """Its files cannot be read in place."""
    with pytest.raises(DataError, match=f"is compressed with {program}, and images are read in place"):
        scan(packed(tmp_path, PICTURES, "tar", mode))


@pytest.mark.parametrize("magic", ["BZ", "BZh", "\xfd7zXZ", "(\xb5/\xfd"])
def test_a_tar_whose_first_file_is_named_like_a_compressed_one(tmp_path: Path, magic: str) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(magic))
    assert len(members(path)[0]) == 1


def test_a_tar_with_holes(tmp_path: Path) -> None:
    """Half a kilobyte that says it unpacks to six gigabytes."""
    info = tarfile.TarInfo("train/a/1.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "train/a/1.jpg"}
    info.pax_headers["GNU.sparse.realsize"] = str(6 * 2**30)
    table = b"0\n".ljust(512, b"\0")
    info.size = len(table)
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(table))
    with pytest.raises(UnreadableImageError, match="it has holes"):
        read_all(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("files", "notes"),
    [
        (("train/a/1.jpg", "val/a/1.jpg"), []),
        (("train/a/1.jpg", "test/a/1.jpg"), ["has no folder val, validation or valid: test is used"]),
        (("train/a/1.jpg", "valid/a/1.jpg", "test/a/1.jpg"), ["has valid and test: valid is used"]),
        (
            (*(f"train/{name}/1.jpg" for name in "abcdefgh"), "val/c/1.jpg"),
            ["7 of 8 classes have no image in {root}/val: a, b, d, e, f and 2 more"],
        ),
        (
            ("train/a/1.jpg", "train/\x1b[31m/1.jpg", "val/a/1.jpg"),
            ["1 of 2 classes have no image in {root}/val: \\x1b[31m"],
        ),
    ],
)
def test_what_is_said_of_a_folder(tmp_path: Path, files: tuple[str, ...], notes: list[str]) -> None:
    found = scan(tree(tmp_path, *files)).notes
    assert len(found) == len(notes)
    for note, said in zip(found, notes, strict=True):
        assert said.format(root=tmp_path) in note


def test_a_link_to_nowhere_beside_the_labels(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.jpg", "val/1.jpg")
    (tmp_path / "val" / "2.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "val" / "labels").write_text("1.jpg a\n2.jpg a\n")
    assert scan(tmp_path, tmp_path / "val" / "labels").files["val"] == ["val/1.jpg", "val/2.jpg"]
