"""Tables from records: ``python -m bench.report`` writes ``reports/*.md`` and the figures in README.md."""

from pathlib import Path

import pandas as pd
from tabulate import tabulate

from . import parallelism_report
from .environment import ROOT
from .records import read

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
#: The table's file and title, and the cases in it.
TABLES = {
    "input_pipeline.md": (
        "Input pipeline",
        ("prepare, one process", "loader, 1 reading", "loader, 2 reading", "crop, reflect, colour, mean"),
    ),
    "stages.md": ("Stages", ("stages 1 and 2, forward and backward",)),
    "training.md": ("Training", ("update of the paper's network", "digits, a whole run")),
    "gpu.md": (
        "On a GPU",
        ("update of paper", "update of one_weird_trick", "stage1", "stage2", "copy", "matrix product"),
    ),
}
#: Column of a table, column of a record, and how a value is written.
COLUMNS = (
    ("case", "case", "{}"),
    ("implementation", "implementation", "{}"),
    ("mode", "mode", "{}"),
    ("shape", "shape", "{}"),
    ("dtype", "dtype", "{}"),
    ("memory format", "memory_format", "{}"),
    ("median ms", "median_us", "milliseconds"),
    ("p20 ms", "p20_us", "milliseconds"),
    ("p80 ms", "p80_us", "milliseconds"),
    ("images/s", "images_per_s", "{:,.0f}"),
    ("saved MiB", "saved_mib", "{:,.1f}"),
    ("peak MiB", "peak_mib", "{:,.0f}"),
    ("first call s", "first_call_s", "{:,.1f}"),
    ("GB/s", "gb_per_s", "{:,.0f}"),
    ("TFLOP/s", "tflop_per_s", "{:,.0f}"),
    ("% of a copy", "percent_of_copy_bandwidth", "{:,.0f}"),
    ("top-1 %", "top1_accuracy_percent", "{:.2f}"),
)


#: The columns on README's first screen.
HEADLINE = ("case", "shape", "median ms", "images/s", "top-1 %")
GPU_HEADLINE = ("case", "implementation", "shape", "dtype", "median ms", "images/s", "peak MiB")


def _written(value: object, how: str) -> str:
    if value is None or pd.isna(value):
        return ""
    if how == "milliseconds":
        return f"{float(value) / 1000:,.{2 if float(value) >= 1e4 else 4}f}"  # type: ignore[arg-type]
    return how.format(value)


def newest(rows: pd.DataFrame, cases: tuple[str, ...]) -> pd.DataFrame:
    """The newest row of each thing measured, in the order of ``cases``."""
    if rows.empty:
        return rows
    keys = [
        column for column in ("case", "implementation", "mode", "shape", "dtype", "memory_format") if column in rows
    ]
    latest = rows[rows["case"].isin(cases)].drop_duplicates(keys, keep="last")
    return latest.sort_values("case", key=lambda column: column.map(cases.index), kind="stable")


def table(rows: pd.DataFrame, columns: tuple[tuple[str, str, str], ...] = COLUMNS) -> str:
    """A Markdown table, and the machine and record its figures come from."""
    if rows.empty:
        return "Not measured.\n"
    used = [column for column in columns if column[1] in rows and rows[column[1]].notna().any()]
    cells = [[_written(row[source], how) for _, source, how in used] for _, row in rows.iterrows()]
    lines = [tabulate(cells, [title for title, _, _ in used], "github", disable_numparse=True), ""]
    for (record, machine), group in rows.groupby(["record", "machine"], sort=False):
        first = group.iloc[0]
        lines.append(
            f"{machine}, {first['threads']} threads, torch {first['torch']}, commit {first['commit']}"
            f"{' with changes' if first['dirty'] else ''}, {first['date']}: `reports/data/{record}`"
        )
    return "\n".join(lines) + "\n"


def headline(rows: pd.DataFrame) -> str:
    """The figures on README's first screen: of a GPU, then of a CPU."""
    gpu = newest(rows, ("update of paper", "update of one_weird_trick"))
    cases = ("digits, a whole run", "update of the paper's network", "loader, 2 reading", "prepare, one process")
    chosen = newest(rows, cases)
    if "implementation" in chosen:
        chosen = chosen[chosen["implementation"] != "aten"]
    parts = ((gpu, GPU_HEADLINE), (chosen, HEADLINE))
    return "\n".join(table(part, tuple(column for column in COLUMNS if column[0] in names)) for part, names in parts)


def write(reports: Path, readme: Path, rows: pd.DataFrame) -> list[Path]:
    """Write every table; returns the files."""
    written = []
    for name, (title, cases) in TABLES.items():
        text = f"# {title}\n\nMade from the records by `python -m bench.report`.\n\n{table(newest(rows, cases))}"
        (reports / name).write_text(text)
        written.append(reports / name)
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{headline(rows)}{END}{after}")
    return [*written, *parallelism_report.write(reports, readme, rows), readme]


def main() -> None:
    for path in write(ROOT / "reports", ROOT / "README.md", read()):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
