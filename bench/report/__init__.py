"""Tables, figures and a page from records: ``python -m bench.report``; ``--help`` lists the flags.

Every page is a :class:`bench.report.tables.Page`; ``markdown`` and ``page`` write it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from net.common import cli
from net.common.errors import DataError, UsageError
from net.common.fields import flag
from net.common.files import atomic_write

from ..measure.environment import HOME

if TYPE_CHECKING:
    from ..measure.records import Row
    from .tables import Figure, Page, Section, Table

ROOT = HOME
DESCRIPTION = (
    "Generate reports/*.md, reports/index.html, reports/figures and the tables in README.md from the records in "
    "reports/data, or compare two records."
)


@dataclass(frozen=True)
class ReportConfig:
    """The flags of ``python -m bench.report``."""

    compare: tuple[str, ...] = flag(
        (),
        "print what changed by more than noise between two records, the older first; exit with 1 if anything slowed",
        metavar="RECORD",
    )

    def __post_init__(self) -> None:
        if len(self.compare) not in (0, 2):
            raise UsageError(f"--compare takes two records; got {len(self.compare)}")


def between(text: str, name: str, made: str) -> str:
    """The text with ``made`` between the comments ``<!-- name: begin -->`` and ``<!-- name: end -->``, if any."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    return f"{before}{begin}\n{made}\n{end}{after}" if found and closed else text


class Report:
    """Everything that is generated from a set of records.

    Args:
        rows: as :func:`bench.measure.records.read` returns them.
        results: files of ``net.ablations``; their names begin with a date, and the newest is shown first.
    """

    def __init__(self, rows: "Sequence[Row]", results: Sequence[Path] = ()) -> None:
        from . import accuracy, figures, findings, pages, parallelism
        from .rows import measured

        shown = measured(rows)
        newest = sorted(results, key=lambda path: path.name, reverse=True)
        self.pages: list[Page] = [*pages.pages(shown), parallelism.page(rows), accuracy.page(newest)]
        self.headline: list[Table] = pages.headline(shown)
        #: The main findings: sentences in Markdown, and the chart.
        self.sentences: list[str] = findings.sentences(shown)
        self.charts: list[Figure] = figures.found(shown)

    def texts(self) -> dict[str, str]:
        """The text of each page, by its name below ``reports/``."""
        from . import markdown, page

        made = {f"{each.name}.md": markdown.page(each) for each in self.pages}
        return {**made, "index.html": page.html(self.pages, self.sentences, self.charts)}

    def figures(self) -> "list[Figure]":
        """The figures of the pages and of the main findings."""
        parts: list[Page | Section] = [*self.pages, *(section for page in self.pages for section in page.sections)]
        return [*self.charts, *(figure for part in parts for figure in part.figures)]

    def parts(self) -> dict[str, str]:
        """The text between the marks in README.md and ``reports/README.md``, by mark."""
        from . import markdown

        found = [markdown.filled(markdown.without_html(f"- {text}"), 140, "  ") for text in self.sentences]
        found += [f"\n{markdown.image(figure)}" for figure in self.charts]
        return {
            "figures": "\n".join(map(markdown.table, self.headline)).rstrip() or "Not measured.",
            "found": "\n".join(found) or "Nothing is measured yet.",
            "pages": "\n".join(f"- [{page.name}.md]({page.name}.md): {page.line}" for page in self.pages),
        }

    def write(self, root: Path) -> list[Path]:
        """Write every page and figure below ``root``, remove stale ones, and return the files.

        Args:
            root: holds ``README.md`` and ``reports/``.
        """
        from . import figures, pages

        reports = root / "reports"
        (reports / "figures").mkdir(parents=True, exist_ok=True)
        files = {reports / name: text.encode() for name, text in self.texts().items()}
        files |= {reports / figure.file: figures.png(figure) for figure in self.figures()}
        for path in (root / "README.md", reports / "README.md"):
            if path.is_file():
                text = path.read_text()
                for name, part in self.parts().items():
                    text = between(text, name, part)
                files[path] = text.encode()
        stale = {reports / f"{name}.md" for name in pages.PAGES}
        for kind in filter(None, (kind.figure for kind in pages.PAGES.values())):
            stale |= set(reports.glob(f"figures/{kind}-*.png"))
        for path, content in files.items():
            with atomic_write(path) as file:
                file.write(content)
        for path in stale - set(files):
            path.unlink(missing_ok=True)
        return list(files)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    config = cli.resolve(cli.given(ReportConfig, "bench.report", DESCRIPTION, arguments), ReportConfig)
    if config.compare:
        from .compare import compare

        return compare(*map(Path, config.compare))
    from ..measure.records import DATA, read

    if not DATA.is_dir():
        raise DataError(f"{DATA} does not exist: benchmarks write records there, and this command reads them")
    for path in Report(read(DATA), list((DATA / "ablations").glob("*.jsonl"))).write(ROOT):
        print(path.relative_to(ROOT))
    return 0
