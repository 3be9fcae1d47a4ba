"""The page of ablations: the validation error without each part of the network, from results of ``net.ablations``."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from net.analysis import ablation_report

from .tables import Cell, Column, Figure, Page, Section, Table


def page(results: Sequence[Path]) -> Page:
    """A section for each file of results.

    Raises:
        DataError: a file holds no results.
    """
    sections = []
    for path in results:
        found = ablation_report.report(path)
        words = ablation_report.WORDS
        columns = [Column(title, title, "text" if title in words else "number") for title in found.headers]
        cells = [[_cell(text) for text in row] for row in found.rows]
        file = "accuracy.png" if len(results) == 1 else f"accuracy-{path.stem}.png"
        figure = Figure(file, ablation_report.alt(path), functools.partial(ablation_report.draw, path))
        table = Table("", columns, cells, notes=found.notes)
        sections.append(Section(f"{found.title} ({path.stem})", [figure], [table]))
    line = "the validation error without each part of the network"
    about = "Results of `python -m net.ablations`." if results else "Not measured: `python -m net.ablations` trains."
    return Page("accuracy", "Accuracy without each part", line, about, sections)


def _cell(text: str) -> Cell:
    """A cell of figures is sorted by its first number."""
    found = re.match(r"[+-]?[\d,]*\.?\d+", text)
    return Cell(text or "-", float(found[0].replace(",", "")) if found else None, "" if text else "no value")
