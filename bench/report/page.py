"""Everything on one page, ``reports/index.html``: tables that sort, filter and unfold; nothing is fetched."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import count
from pathlib import Path

from .tables import SHOWN, Cell, Column, Page, Table, more_columns

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


def _table(table: Table, title: str, words: str, numbers: Iterable[int], headed: bool = False) -> Iterable[str]:
    """A table; its caption is for screen readers alone where it repeats a heading."""
    name = f"table{next(iter(numbers))}"
    if table.folded:
        yield f'<details class="folded"><summary>{escape(table.title)}: {len(table.rows)} rows</summary>'
    yield f'<div class="block" data-words="{escape(words)}">'
    label = escape(f"{table.title or title}, {words}".removesuffix(", "))
    yield f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table id="{name}">'
    facts = f'<span class="facts">{inline(table.facts)}</span>' if table.facts else ""
    quiet = ' class="heard"' if headed else ""
    yield f"<caption{quiet}><div>{escape(table.title or title)}{facts}</div></caption><thead><tr>"
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
    if len(table.columns) > SHOWN:
        more = more_columns(table)
        yield f'<button type="button" class="more" aria-expanded="false" aria-controls="{name}" data-label="{more}">'
        yield f"{more}</button>"
    for note in table.notes:
        yield f'<p class="notes">{inline(note)}</p>'
    if table.sources:
        lines = "".join(f"<li>{inline(line)}</li>" for line in table.sources)
        yield _records(f"<ul>{lines}</ul>", len(table.sources))
    yield "</div>" + "</details>" * table.folded


def _records(listed: str, count: int) -> str:
    return f'<details class="sources"><summary>Record{"s" if count > 1 else ""}</summary>{listed}</details>'


def _from_markdown(text: str, title: str, images: Mapping[str, str], numbers: Iterable[int]) -> Iterable[str]:
    """A page that another command writes as Markdown: headings, paragraphs, lists, tables, pictures."""
    heading = title
    # The first heading is the section's own.
    for block in re.split(r"\n\s*\n", text.partition("\n")[2].strip()):
        lines = block.splitlines()
        if block.startswith("#"):
            heading = lines[0].lstrip("# ")
            level = 4 if block.startswith("###") else 3
            yield f"<h{level}>{inline(heading)}</h{level}>"
            lines = lines[1:]
        if not lines:
            continue
        if lines[0].startswith("|"):
            yield from _table(_table_of(lines, heading), title, "", numbers, headed=True)
        elif lines[0].startswith("!["):
            found = re.match(r"!\[(.*?)\]\((.*?)\)", " ".join(lines))
            assert found is not None
            picture = f'<img src="{found[2]}" alt="{escape(found[1])}">'
            yield f"<figure>{images.get(found[2], picture)}</figure>"
        elif lines[0].startswith("- "):
            items = re.split(r"\n?- ", "\n".join(lines))[1:]
            listed = "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>"
            records = all(item.startswith("`reports/data/") for item in items)
            yield _records(listed, len(items)) if records else listed
        else:
            yield f"<p>{inline(' '.join(lines))}</p>"


def _table_of(lines: Sequence[str], title: str) -> Table:
    """A table of Markdown; a column whose cells are numbers is sorted by them."""
    titles, _, *rows = ([part.strip() for part in line.strip().strip("|").split("|")] for line in lines)
    cells = [
        [
            Cell(part or "-", _number(part), "" if part.strip("-") else "not recorded, or without meaning here")
            for part in row
        ]
        for row in rows
    ]
    columns = []
    for place, title_ in enumerate(titles):
        values = [row[place].value is not None for row in cells if row[place].text != "-"]
        columns.append(Column(title_, "", "number" if values and all(values) else "text"))
    return Table(title, columns, cells)


def _number(text: str) -> float | None:
    found = re.match(r"[+-]?[\d,]*\.?\d+(?![\d.]* (?:to|/))", text)
    return float(found[0].replace(",", "")) if found else None


def html(
    pages: Sequence[Page],
    drawings: Mapping[str, Sequence[str]],
    found: Sequence[str],
    others: Sequence[tuple[str, str, str]],
) -> str:
    """The page.

    Args:
        pages: their tables.
        drawings: SVG elements by page and machine, ``found`` for what was found, or by a picture's file name.
        found: what was found, sentences in Markdown.
        others: name, title and text of pages that are written as Markdown.
    """
    numbers = count(1)
    images = {name: shown[0] for name, shown in drawings.items() if shown}
    names = [(page.file.removesuffix(".md"), page.title) for page in pages]
    names += [(name, title) for name, title, _ in others]
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{TITLE}: measurements</title><style>",
        (HERE / "page.css").read_text(),
        f"</style></head><body><header><h1>{TITLE}</h1>",
        '<p class="faint">Measurements, made from the records by <code>python -m bench.report</code>.</p>',
        '<nav aria-label="Sections"><ul>',
        *(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in names),
        "</ul></nav></header><main>",
    ]
    if found:
        lines.append('<section id="found"><h2>What was found</h2><div><ul>')
        lines += [f"<li>{inline(sentence)}</li>" for sentence in found]
        lines += [
            "</ul>",
            *(f"<figure>{drawing}</figure>" for drawing in drawings.get("found", ())),
            "</div></section>",
        ]
    lines += [
        '<form role="search"><label for="filter">Rows with all of</label>',
        '<input id="filter" type="search" placeholder="stage1 bfloat16 backward" autocomplete="off">',
        '<output for="filter" aria-live="polite"></output></form>',
    ]
    for page in pages:
        name = page.file.removesuffix(".md")
        lines.append(f'<section id="{name}"><h2>{escape(page.title)}</h2><p>{inline(page.about)}</p>')
        seen: set[bool] = set()
        for section in page.sections:
            machine = section.machine
            # Of GPUs and of CPUs the one that was measured last.
            state = "" if machine.cpu in seen else " open"
            seen.add(machine.cpu)
            lines.append(f'<details class="machine"{state}><summary><h3>{escape(str(machine))}</h3></summary>')
            figures = drawings.get(f"{page.file} {machine}", ())
            if figures:
                lines += ['<div class="figures">', *(f"<figure>{figure}</figure>" for figure in figures), "</div>"]
            for table in section.tables:
                lines.extend(_table(table, page.title, str(machine), numbers))
            lines.append("</details>")
        lines.append("</section>")
    for name, title, text in others:
        lines.append(f'<section id="{name}"><h2>{escape(title)}</h2>')
        lines += [*_from_markdown(text, title, images, numbers), "</section>"]
    return "\n".join([*lines, "</main><script>", (HERE / "page.js").read_text(), "</script></body></html>"]) + "\n"
