"""The names of the built-in data sets, and the flags of ``python -m net.data.shapes``."""

from dataclasses import dataclass

from ..common.fields import MOST_ROWS, MOST_WORKERS, at_least, at_most, flag, flag_name

#: The ``--data-path`` of random images, optionally with a count: ``synthetic:2048``.
SYNTHETIC = "synthetic"
#: The classes of the synthetic shapes (net.data.shapes), in the order of their folders. Each has three words, and each
#: word is needed to distinguish them.
SHAPES = tuple(
    f"{colour}_{texture}_{shape}"
    for colour in ("blue", "green", "red")
    for texture in ("chequered", "striped")
    for shape in ("disc", "triangle")
)

#: At this quality, JPEG images of ImageNet take a tenth of the space of their pixels, measured on one image per class.
JPEG_QUALITY = 80


@dataclass(frozen=True)
class ShapesConfig:
    """The flags of ``python -m net.data.shapes``."""

    folder: str = flag("", "folder to render into; new or empty", positional=True)
    train: int = flag(400, "training images of each class")
    val: int = flag(100, "validation images of each class")
    size: int = flag(64, "rows and columns of an image")
    seed: int = flag(0, "the same seed gives the same images")
    workers: int | None = flag(None, "processes; one a core by default", short="j")

    def __post_init__(self) -> None:
        at_least(self, 1, "train", "val", "workers", called=flag_name)
        at_most(self, MOST_WORKERS, "workers", called=flag_name)
        at_most(self, MOST_ROWS, "size", called=flag_name)
        at_least(self, 8, "size", called=flag_name)
        at_least(self, 0, "seed", called=flag_name)
