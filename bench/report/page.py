"""Everything on one page, ``reports/index.html``: tables that sort, filter and unfold; nothing is fetched."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import count
from pathlib import Path

from .figures import svg
from .tables import SHOWN, Cell, Column, Figure, Page, Table

HERE = Path(__file__).parent
TITLE = "AlexNet, 2012, on today's hardware"
SHARES = ("percent_of_limit", "percent_of_step")
#: Texts of more characters are broken into lines.
LONG = 40


def inline(text: str) -> str:
    """Markdown within a line as HTML: code, emphasis and links, those to pages of ``reports/`` to their sections."""
    text = re.sub(r"\[([^\]]*)\]\(([^)]*)\)", _link, escape(text))
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def _link(found: re.Match[str]) -> str:
    target = re.sub(r"^(\w+)\.md$", r"#\1", found[2])
    return f'<a href="{target}">{found[1]}</a>'


def _cell(cell: Cell, column: Column, place: int, best: bool) -> str:
    kinds = ["number"] if column.numeric else ["words"] if len(cell.text) > LONG else []
    kinds += ["best"] * best + ["extra"] * (place >= SHOWN)
    attributes = ""
    if column.key in SHARES and cell.value is not None:
        kinds.append("share")
        attributes = f' style="--of:{cell.value:.0f}"'
    text = escape(cell.text)
    if cell.text == "-":
        why = escape(cell.why or "not measured")
        text = f'<span class="none" role="img" aria-label="{why}" title="{why}">–</span>'  # noqa: RUF001
    else:
        value = f"{cell.value:.6g}" if cell.value is not None else cell.text
        attributes += f' data-value="{escape(value)}"' + (f' title="{escape(cell.why)}"' if cell.why else "")
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f'<th scope="row"{kind}{attributes}>{text}</th>' if place == 0 else f"<td{kind}{attributes}>{text}</td>"


def _table(table: Table, section: str, page: str, numbers: Iterable[int]) -> Iterable[str]:
    """A table with the text above and below it."""
    name = f"table{next(iter(numbers))}"
    if table.folded:
        yield f'<details class="folded"><summary>{escape(table.title)}: {len(table.rows)} rows</summary>'
    if table.about:
        yield f"<h4>{escape(table.title)}</h4><p>{inline(table.about)}</p>"
    yield f'<div class="block" data-words="{escape(section)}">'
    label = escape(f"{table.title or page}, {section}")
    yield f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table id="{name}">'
    facts = f'<span class="facts">{inline(table.facts)}</span>' if table.facts else ""
    # A caption that repeats the heading above is for screen readers alone.
    quiet = ' class="heard"' if table.about and not table.facts else ""
    yield f"<caption{quiet}><div>{escape(table.title or page)}{facts}</div></caption><thead><tr>"
    for place, column in enumerate(table.columns):
        kinds = " ".join(["number"] * column.numeric + ["extra"] * (place >= SHOWN))
        kind = f' class="{kinds}"' if kinds else ""
        yield f'<th scope="col" aria-sort="none"{kind}><button type="button">{escape(column.title)}</button></th>'
    yield "</tr></thead><tbody>"
    medians = [place for place, column in enumerate(table.columns) if column.key == "median_us"]
    for row in table.rows:
        times = [(value, place) for place in medians if (value := row[place].value) is not None]
        best = min(times)[1] if len(medians) > 1 and times else None
        cells = (
            _cell(one, column, place, place == best)
            for place, (one, column) in enumerate(zip(row, table.columns, strict=True))
        )
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    if table.more:
        control = f'aria-expanded="false" aria-controls="{name}" data-label="{table.more}"'
        yield f'<button type="button" class="more" {control}>{table.more}</button>'
    for note in table.notes:
        yield f'<p class="notes">{inline(note)}</p>'
    if table.sources:
        lines = "".join(f"<li>{inline(line)}</li>" for line in table.sources)
        plural = "s" if len(table.sources) > 1 else ""
        yield f'<details class="sources"><summary>Record{plural}</summary><ul>{lines}</ul></details>'
    yield "</div>" + "</details>" * table.folded


def _figures(figures: Iterable[Figure]) -> Iterable[str]:
    drawn = [f"<figure>{svg(figure)}</figure>" for figure in figures]
    if drawn:
        yield f'<div class="figures">{"".join(drawn)}</div>'


def html(pages: Sequence[Page], sentences: Sequence[str], charts: Sequence[Figure]) -> str:
    """The page.

    Args:
        pages: their tables and figures.
        sentences: the main findings in Markdown, with the ``charts`` next to them.
    """
    numbers = count(1)
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{TITLE}: measurements</title><style>",
        (HERE / "page.css").read_text(),
        f"</style></head><body><header><h1>{TITLE}</h1>",
        '<p class="faint">Measurements, made from the records by <code>python -m bench.report</code>.</p>',
        '<nav aria-label="Sections"><ul>',
        *(f'<li><a href="#{page.name}">{escape(page.title)}</a></li>' for page in pages),
        "</ul></nav></header><main>",
    ]
    if sentences:
        lines.append('<section id="found"><h2>What was found</h2><div><ul>')
        lines += [f"<li>{inline(sentence)}</li>" for sentence in sentences]
        lines += ["</ul>", *(f"<figure>{svg(chart)}</figure>" for chart in charts), "</div></section>"]
    lines += [
        '<form role="search"><label for="filter">Rows with all of</label>',
        '<input id="filter" type="search" placeholder="stage1 bfloat16 backward" autocomplete="off">',
        '<output for="filter" aria-live="polite"></output></form>',
    ]
    for page in pages:
        lines.append(f'<section id="{page.name}"><h2>{escape(page.title)}</h2><p>{inline(page.about)}</p>')
        lines += _figures(page.figures)
        seen: set[str] = set()
        for section in page.sections:
            # Open the most recently measured GPU and CPU.
            state = "" if section.group in seen else " open"
            seen.add(section.group)
            lines.append(f'<details class="machine"{state}><summary><h3>{escape(section.title)}</h3></summary>')
            lines += _figures(section.figures)
            for table in section.tables:
                lines.extend(_table(table, section.title, page.title, numbers))
            lines.append("</details>")
        lines.append("</section>")
    return "\n".join([*lines, "</main><script>", (HERE / "page.js").read_text(), "</script></body></html>"]) + "\n"
