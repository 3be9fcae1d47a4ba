"""Tables, figures and a page from records: ``python -m bench.report``; ``--help`` lists the flags."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from net import cli
from net.errors import UsageError
from net.fields import flag
from net.files import atomic_write

if TYPE_CHECKING:
    from .records import Row

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
MADE = "Made from the records by `python -m bench.report`."
DESCRIPTION = (
    "Make reports/*.md, reports/index.html, reports/figures and the tables on README's first screen from the records "
    "in reports/data, or compare two records."
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


def texts(rows: "Sequence[Row]", readme: str) -> dict[str, str]:
    """The text of each file below ``reports/``, and of ``README.md`` with ``readme`` around its tables.

    Args:
        rows: as :func:`bench.records.read` returns them.
        readme: what README.md says now.
    """
    from . import figures, page, tables

    rows = tables.measured(rows)
    pages, drawn = tables.pages(rows), figures.figures(rows)
    result = {}
    for one in pages:
        parts = [
            f"# {one.title}\n",
            MADE + "\n",
            textwrap.fill(one.about, 120, break_long_words=False, break_on_hyphens=False) + "\n",
        ]
        for section in one.sections:
            parts.append(f"## {section.machine}\n")
            parts += [
                f"![{figure.about}]({figure.file})\n"
                for figure in drawn
                if (figure.page, figure.machine) == (one.file, section.machine)
            ]
            for table in section.tables:
                parts += [f"### {table.title}\n"] if table.title else []
                parts.append(tables.markdown(table))
            if not section.tables:
                parts.append("Not measured.\n")
        result[one.file] = "\n".join(parts if one.sections else [*parts, "Not measured.\n"])
    result["index.html"] = page.html(pages, drawn)
    headline = "\n".join(tables.markdown(table) for section in tables.headline(rows) for table in section.tables)
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    result["README.md"] = "".join((before, BEGIN, "\n", headline or "Not measured.\n", END, after))
    return result


def write(reports: Path, readme: Path, rows: "Sequence[Row]") -> list[Path]:
    """Write every table and figure and remove the figures that are no more; returns the files."""
    from . import figures, tables

    written = []
    folder = reports / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures.figures(tables.measured(rows)):
        with atomic_write(reports / figure.file) as file:
            file.write(figures.png(figure))
        written.append(reports / figure.file)
    for kind in figures.KINDS:
        for path in folder.glob(f"{kind[0]}-*.png"):
            if path not in written:
                path.unlink()
    for name, text in texts(rows, readme.read_text()).items():
        path = readme if name == "README.md" else reports / name
        with atomic_write(path) as file:
            file.write(text.encode())
        written.append(path)
    return written


def write_accuracy(reports: Path, data: Path) -> list[Path]:
    """Write the tables and pictures of the results of ``net.ablations`` in ``data/ablations``; returns the files."""
    from net import ablation_report

    return ablation_report.write(sorted((data / "ablations").glob("*.jsonl")), reports)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report as the command line says; returns the exit status."""
    config = cli.resolve(cli.given(ReportConfig, "bench.report", DESCRIPTION, arguments), ReportConfig)
    if config.compare:
        from .compare import compare

        return compare(*map(Path, config.compare))
    from . import parallelism_report
    from .records import DATA, read

    reports, readme, rows = ROOT / "reports", ROOT / "README.md", read(DATA)
    written = [*write(reports, readme, rows), *parallelism_report.write(reports, readme, rows)]
    for path in dict.fromkeys([*written, *write_accuracy(reports, DATA)]):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    cli.run(main)
