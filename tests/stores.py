"""A small packed store, made in this process to avoid starting workers that import PyTorch."""

from pathlib import Path

from net.data import prepare
from net.data.folder import scan
from net.data.packing import Packing
from tests.pictures import picture


def small_store(root: Path, *, train: int = 1, val: int = 1, size: int = 16, quality: int | None = None) -> Path:
    """Pack ``root/images``, with ``train`` and ``val`` images of each of two classes, into ``root/store``."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate("ab"):
            (root / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                picture(label, number, size, size).save(root / "images" / split / name / f"{number}.png")
    return packed_here(root / "images", root / "store", Packing(size, quality))


def packed_here(source: Path, target: Path, packing: Packing) -> Path:
    """The store ``target`` of the image folder or archive ``source``."""
    listing = scan(source)
    target.mkdir()
    state = prepare._State.start(listing, packing)
    offsets = prepare._lay_out(listing, state, target, packing)
    for task in prepare._tasks(listing, state, target, offsets, packing):
        done = prepare.pack(task)
        with open(task.path, "ab") as file:
            file.write(b"".join(done.encoded))
        state.take(done, task.files)
    prepare._finish(listing, state, target, offsets, packing)
    return target
