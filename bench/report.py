"""Tables, figures and a page from records: ``python -m bench.report``; ``--help`` lists the flags."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from net.common import cli
from net.common.errors import DataError, UsageError
from net.common.fields import flag
from net.common.files import atomic_write

from .environment import HOME

if TYPE_CHECKING:
    from .records import Row

ROOT = HOME
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
FOUND_BEGIN, FOUND_END = "<!-- found: begin -->", "<!-- found: end -->"
PAGES_BEGIN, PAGES_END = "<!-- pages: begin -->", "<!-- pages: end -->"
MADE = "Made from the records by `python -m bench.report`."
DESCRIPTION = (
    "Make reports/*.md, reports/index.html, reports/figures and the tables on README's first screen from the records "
    "in reports/data, or compare two records."
)
#: Pages of :mod:`bench.parallelism_report` and :mod:`net.analysis.ablation_report`: name, title, a line for the list.
OTHERS = (
    ("parallelism", "Parallelism", "two processes against one, and what a cost model says of many devices"),
    ("accuracy", "Accuracy without each part", "the validation error without each part of the network"),
)


@dataclass(frozen=True)
class ReportConfig:
    """What ``python -m bench.report`` is asked to do."""

    compare: tuple[str, ...] = flag(
        (),
        "two records, the older first: what got slower or faster by more than noise; exits with 1 if anything slowed",
        metavar="RECORD",
    )

    def __post_init__(self) -> None:
        if len(self.compare) not in (0, 2):
            raise UsageError(f"--compare takes two records; got {len(self.compare)}")


def _between(text: str, begin: str, end: str, made: str) -> str:
    """The text with ``made`` between its marks; as it is where it has none."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    return f"{before}{begin}\n{made}\n{end}{after}" if found and closed else text


def texts(rows: "Sequence[Row]") -> dict[str, str]:
    """The text of each page of tables, by its name below ``reports/``; rows are those of ``tables.measured``."""
    from . import figures, pages, tables

    drawn = figures.figures(rows)
    result = {}
    for page in pages.pages(rows):
        about = textwrap.fill(page.about, 120, break_long_words=False, break_on_hyphens=False)
        parts = [f"# {page.title}\n", MADE + "\n", about + "\n"]
        for section in page.sections:
            parts.append(tables.without_html(f"## {section.machine}") + "\n")
            parts += [
                tables.without_html(f"![{figure.about}]({figure.file})") + "\n"
                for figure in drawn
                if (figure.page, figure.machine) == (page.file, section.machine)
            ]
            for table in section.tables:
                parts += [tables.without_html(f"### {table.title}") + "\n"] if table.title and not table.folded else []
                parts.append(tables.markdown(table))
        result[page.file] = "\n".join(parts)
    return result


def first_screen(rows: "Sequence[Row]") -> str:
    """README's tables."""
    from . import pages, tables

    found = [tables.markdown(table) for section in pages.headline(rows) for table in section.tables]
    return "\n".join(found).rstrip() or "Not measured."


def found(rows: "Sequence[Row]") -> str:
    """What ``reports/README.md`` begins with: sentences, and the chart."""
    from . import figures, findings, tables

    lines = [
        textwrap.fill(
            tables.without_html(f"- {text}"),
            140,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for text in findings.sentences(rows)
    ]
    lines += [
        "\n" + tables.without_html(f"![{one.about}]({one.file})")
        for one in figures.figures(rows)
        if one.machine is None
    ]
    return "\n".join(lines) or "Nothing is measured yet."


def contents(rows: "Sequence[Row]") -> str:
    """The list of pages in ``reports/README.md``."""
    from . import pages

    lines = [f"- [{page.file}]({page.file}): {pages.PAGES[page.file].line}" for page in pages.pages(rows)]
    return "\n".join([*lines, *(f"- [{name}.md]({name}.md): {line}" for name, _, line in OTHERS)])


def page(rows: "Sequence[Row]", others: Mapping[str, str]) -> str:
    """The text of ``index.html``; ``others`` are the pages that are written as Markdown, by name."""
    from . import figures, findings, pages
    from .page import html

    drawings: dict[str, list[str]] = {}
    for figure in figures.figures(rows):
        name = f"{figure.page} {figure.machine}" if figure.machine else "found"
        drawings.setdefault(name, []).append(figures.svg(figure))
    written = [(name, title, others[name]) for name, title, _ in OTHERS if name in others]
    return html(pages.pages(rows), drawings, findings.sentences(rows), written)


def write(root: Path, rows: "Sequence[Row]") -> list[Path]:
    """Write every page, table and figure below ``root``, remove what is no more, and return the files.

    Args:
        root: holds ``README.md`` and ``reports/``, in whose ``data/ablations`` are results of ``net.ablations``.
        rows: as :func:`bench.records.read` returns them.
    """

    from net.analysis import ablation_report

    from . import figures, pages, parallelism_report, tables

    reports, readme = root / "reports", root / "README.md"
    (reports / "figures").mkdir(parents=True, exist_ok=True)
    written = parallelism_report.write(reports, readme, rows)
    written += ablation_report.write(sorted((reports / "data" / "ablations").glob("*.jsonl")), reports)
    rows = tables.measured(rows)
    files: dict[Path, bytes] = {reports / one.file: figures.png(one) for one in figures.figures(rows)}
    stale = [path for kind in figures.KINDS for path in (reports / "figures").glob(f"{kind}-*.png")]
    stale += [reports / name for name in pages.PAGES]
    made = texts(rows)
    others = {name: (reports / f"{name}.md").read_text() for name, *_ in OTHERS}
    made["index.html"] = page(rows, others)
    files |= {reports / name: text.encode() for name, text in made.items()}
    for path, blocks in (
        (readme, ((BEGIN, END, first_screen(rows)),)),
        (
            reports / "README.md",
            ((FOUND_BEGIN, FOUND_END, found(rows)), (PAGES_BEGIN, PAGES_END, contents(rows))),
        ),
    ):
        if path.is_file():
            text = path.read_text()
            for begin, end, block in blocks:
                text = _between(text, begin, end, block)
            files[path] = text.encode()
    for path, content in files.items():
        with atomic_write(path) as file:
            file.write(content)
    for path in set(stale) - set(files):
        path.unlink(missing_ok=True)
    return [*written, *files]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report as the command line says; returns the exit status."""
    config = cli.resolve(cli.given(ReportConfig, "bench.report", DESCRIPTION, arguments), ReportConfig)
    if config.compare:
        from .compare import compare

        return compare(*map(Path, config.compare))
    from .records import DATA, read

    if not DATA.is_dir():
        raise DataError(f"{DATA} does not exist: benchmarks write records there, and this command reads them")
    for path in dict.fromkeys(write(ROOT, read(DATA))):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    cli.run(main)
