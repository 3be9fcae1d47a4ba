"""Errors published in the paper and in the run notes of its 2012 program, for comparison. Does not import torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: Class names of ILSVRC: WordNet IDs.
_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Published:
    """Top-1 and top-5 errors in percent, of one network or of an ensemble.

    ``data`` is the test set, ``source`` the paper's tables or the program's notes; ``variant`` is this project's name
    of the network.
    """

    source: str
    data: str
    networks: int
    crops: int
    top1: float
    top5: float
    variant: str = "paper"

    def __str__(self) -> str:
        return f"{self.source} {self.top1:.1f} / {self.top5:.1f} ({self.data})"


_2010, _2012 = "2010 test", "2012 validation"

#: Tables 1 and 2 of the paper, and nets of the 2012 program. Its notes do not name the test set of the half net; only
#: with that of 2010 does its difference from the whole net agree with section 3.2.
PUBLISHED = (
    Published("paper", _2012, 1, 10, 40.7, 18.2),
    Published("program", _2012, 1, 10, 40.664, 18.210),
    Published("paper", _2010, 1, 10, 37.5, 17.0),
    Published("program", _2010, 1, 10, 37.4727, 16.9987),
    Published("paper", _2010, 1, 1, 39.0, 18.3),
    Published("program", _2010, 1, 1, 39.0247, 18.2953),
    Published("paper", _2012, 5, 10, 38.1, 16.4),
    Published("paper, two of them pre-trained", _2012, 7, 10, 36.7, 15.4),
    Published("paper, pre-trained", _2012, 1, 10, 39.0, 16.6, "sixth_conv"),
    Published("program", _2010, 1, 10, 39.168, 18.2287, "half"),
)


def is_ilsvrc(classes: Sequence[str]) -> bool:
    """Whether a data set's classes look like those of ILSVRC: a thousand WordNet IDs."""
    return len(classes) == 1000 and all(map(_WORDNET.fullmatch, classes))


def published(variants: Sequence[str], crops: int) -> list[Published]:
    """The published errors of a network or ensemble like this one.

    Args:
        variants: the variant of each network. Ensembles are compared only with the paper's.
        crops: 1 or 10.
    """
    alone = {"half": "half", "sixth_conv": "sixth_conv"}
    wanted = alone.get(variants[0], "paper") if len(variants) == 1 else "paper"
    return [row for row in PUBLISHED if row.networks == len(variants) and row.crops == crops and row.variant == wanted]
