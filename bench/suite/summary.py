"""The tables at the end of a run. Needs no torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .rows import Row

#: Number of kernels of a step to name.
KERNELS = 5


def summary(rows: Sequence[Row]) -> str:
    """The results of a run, most important last: steps, their most expensive kernels, and training throughput."""
    measured = [row for row in rows if "median_us" in row]
    by_suite = {suite: [row for row in measured if row.get("suite") == suite] for suite in ("steps", "train")}
    rest = [row for row in measured if row.get("suite") not in ("steps", "train", "gate")]
    parts = [
        _times("parts and operators", rest),
        _statuses(rows),
        _times("steps and inference", by_suite["steps"]),
        *_kernels(rows),
        _training(by_suite["train"]),
    ]
    return "\n\n".join(part for part in parts if part) or "nothing was measured"


def _name(row: Row) -> str:
    words = [str(row[key]) for key in ("case", "implementation", "mode", "shape", "dtype") if row.get(key)]
    return ", ".join(words)


def _mark(row: Row) -> str:
    return f"  {row['unverified']}" if "unverified" in row else ""


def _times(title: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [f"{title:84} {'ms':>9} {'images/s':>9} {'% limit':>7}"]
    for row in rows:
        rate, share = row.get("images_per_s"), row.get("percent_of_limit")
        lines.append(
            f"  {_name(row):82.82} {row['median_us'] / 1e3:>9,.3f} {'-' if rate is None else f'{rate:,.0f}':>9} "
            f"{'-' if share is None else f'{share:.0f}':>7}{_mark(row)}"
        )
    return "\n".join(lines)


def _kernels(rows: Sequence[Row]) -> Iterable[str]:
    steps: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.get("suite") == "profile" and "us_per_step" in row:
            steps.setdefault((row["case"], row["implementation"], row["dtype"]), []).append(row)
    for key, found in steps.items():
        lines = [f"most expensive in the {', '.join(map(str, key))}"]
        kernels = sorted((row for row in found if row["kernel"] != "sum"), key=lambda row: -row["us_per_step"])
        lines += [
            f"  {row['us_per_step'] / 1e3:>9,.3f} ms {row['percent_of_step']:>5.1f} %  {row['layer']:9} {row['kernel']}"
            for row in kernels[:KERNELS]
        ]
        lines += [
            f"  {row['us_per_step'] / 1e3:>9,.3f} ms in kernels of {row['wall_us'] / 1e3:,.3f} ms; {between(row)}"
            for row in found
            if row["kernel"] == "sum"
        ]
        yield "\n".join(lines)


def _training(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        line = f"{row['case']}, {row['dtype']}: {row['images_per_s']:,.0f} images/s, {row['median_us'] / 1e3:,.3f} ms"
        if "percent_of_step" in row:
            line += (
                f" an update: {row['percent_of_step']:.0f} % of the step alone, which takes "
                f"{row['step_us'] / 1e3:,.3f} ms"
            )
        lines.append(line + _mark(row))
    return "\n".join(lines)


def _statuses(rows: Sequence[Row]) -> str:
    return "\n".join(f"{_name(row)}: {row['status']}" for row in rows if "status" in row)


def between(columns: Mapping[str, Any]) -> str:
    """The time between kernels, in words."""
    if "gaps_us" not in columns:
        return "kernels overlap"
    return f"{columns['gaps_us']:,.0f} us between them"
