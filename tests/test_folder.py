"""What an image folder holds, and what is said of one that cannot be used."""

from pathlib import Path

import pytest

from net.data.folder import scan
from net.errors import DataError


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
    "mark and line ends of Windows": "\ufeffx2.JPEG dog\r\nx1.JPEG cat\r\n",
}


@pytest.mark.parametrize("content", LABEL_FILES.values(), ids=list(LABEL_FILES))
def test_flat_validation_folder(tmp_path: Path, content: str) -> None:
    tree(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/x1.JPEG", "val/x2.JPEG")
    labels = tmp_path / "labels.txt"
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
        (("train/a/1.jpg", "val/1.jpg"), "1.jpg b", "'b' is no class of"),
        (("train/a/1.jpg", "val/1.jpg"), "490", "write the names of the train folders, not numbers"),
        (("train/a/1.jpg", "val/1.jpg"), "2.jpg a", "says nothing of"),
        (("train/a/1.jpg", "val/1.jpg"), "a\na\na", "it has 3 lines"),
        (("train/a/1.jpg", "val/1.jpg"), "", "is empty"),
        (("train/a/1.jpg", "val/a/1.jpg"), "a", "val holds no files"),
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
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read"):
        scan(tmp_path, tmp_path / "nowhere.txt")
