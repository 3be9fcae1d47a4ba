"""Scanning image folders, and the errors for unusable ones."""

import os
from pathlib import Path

import pytest

from net.common.errors import DataError
from net.data.folder import is_image_folder, scan


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
