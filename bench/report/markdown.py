"""Pages as Markdown. Records are untrusted: their text is escaped, so that none of it becomes HTML."""

import re
import textwrap
from collections.abc import Iterable

import pandas as pd

from .tables import SHOWN, Figure, Page, Table

_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
MADE = "Made from the records by `python -m bench.report`."


def filled(text: str, width: int = 120, indent: str = "") -> str:
    """A paragraph in lines of ``width`` characters."""
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def without_html(text: str) -> str:
    """Markdown on one line, with nothing that a browser would interpret as HTML."""
    return _CONTROL.sub(" ", text).replace("<", "&lt;")


def escaped(text: str) -> str:
    """Text on one line that Markdown shows literally."""
    return without_html(text).replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")


def image(figure: Figure) -> str:
    return without_html(f"![{figure.about}]({figure.file})")


def table(one: Table) -> str:
    """A table, notes on what is missing, and its records; further columns are shown on a click."""
    parts = [without_html(one.facts[:1].upper() + one.facts[1:] + ".")] if one.facts else []
    parts.append(_columns(one, range(min(SHOWN, len(one.columns)))))
    if one.more:
        named = [place for place in range(SHOWN) if not one.columns[place].numeric]
        rest = _columns(one, [*named, *range(SHOWN, len(one.columns))])
        parts.append(f"<details><summary>{one.more}</summary>\n\n{rest}\n\n</details>")
    parts += [filled(escaped(note)) for note in one.notes]
    sources = "\n".join("- " + without_html(line).replace("; ", ";\n  ") for line in one.sources)
    text = "\n\n".join([*parts, *filter(None, [sources])]) + "\n"
    if one.folded:
        summary = f"{without_html(one.title)}: {len(one.rows)} rows"
        return f"<details><summary>{summary}</summary>\n\n{text}\n</details>\n"
    return text


def _columns(one: Table, places: Iterable[int]) -> str:
    places = list(places)
    cells = pd.DataFrame([[escaped(row[place].text) for place in places] for row in one.rows])
    align = ["right" if one.columns[place].numeric else "left" for place in places]
    titles = [escaped(one.columns[place].title) for place in places]
    return str(cells.to_markdown(index=False, headers=titles, colalign=align, disable_numparse=True, tablefmt="github"))


def page(one: Page) -> str:
    """A page of ``reports/``."""
    parts = [f"# {one.title}\n", f"{MADE}\n", f"{filled(one.about)}\n", *(f"{image(each)}\n" for each in one.figures)]
    for section in one.sections:
        parts.append(without_html(f"## {section.title}") + "\n")
        parts += [f"{image(each)}\n" for each in section.figures]
        for each in section.tables:
            parts += [without_html(f"### {each.title}") + "\n"] if each.title and not each.folded else []
            parts += [f"{filled(each.about)}\n"] if each.about else []
            parts.append(table(each))
    return "\n".join(parts)
