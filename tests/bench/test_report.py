"""Records, and the tables, figures and page made from them."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.measure import records
from bench.measure.environment import ROOT
from bench.report import Report, between, figures, findings, markdown, page, pages, rows, tables
from bench.subjects.parallel_losses import LOSSES_CASE
from tests.commands import one_line, run, run_here

GPU = {"machine": "NVIDIA H200", "threads": 16, "torch": "2.11.0", "triton": "3.6.0", "driver": "580"}
CPU = {"machine": "CPU: Xeon", "threads": 2, "torch": "2.13.0+cpu", "triton": "3.9.0", "driver": ""}
Row = dict[str, Any]


def row(case: str, median: float | None = None, machine: Row = GPU, **columns: Any) -> Row:
    """A row as a benchmark writes it."""
    times = {} if median is None else {"median_us": median, "p20_us": median * 0.99, "p80_us": median * 1.01}
    return {
        "suite": "ceilings",
        "case": case,
        **times,
        **machine,
        "commit": "abc",
        "dirty": False,
        "date": "2026-12-01",
        **columns,
    }


def kernel(implementation: str, median: float | None = None, mode: str = "forward", **columns: Any) -> Row:
    names = {"suite": "kernels", "implementation": implementation, "mode": mode, "shape": "128x96x55x55"}
    return row("stage1", median, **{**names, "dtype": "bfloat16", "memory_format": "channels_last", **columns})


def layer(case: str, median: float, mode: str, gflop: float, mb: float, **columns: Any) -> Row:
    names = {"suite": "layers", "implementation": "triton", "mode": mode, "dtype": "bfloat16", "shape": "128x1"}
    return row(case, median, **{**names, "gflop": gflop, "fewest_mb": mb, **columns})


def step(implementation: str, median: float, case: str = "update of paper", **columns: Any) -> Row:
    names = {"suite": "steps", "implementation": implementation, "mode": "train_step", "dtype": "bfloat16"}
    rates = {"shape": "128x3x224x224", "images_per_s": 128e6 / median, "peak_mib": 900}
    return row(case, median, **{**names, **rates, **columns})


def loss_row(strategy: str, dtype: str, losses: list[float], error: float = 10.0, **columns: Any) -> Row:
    """A short training's row under a strategy."""
    names = {
        "suite": "parallel",
        "implementation": strategy,
        "network": "digits",
        "shape": "32x3x32x32",
    }
    counted = {"ranks": 1 if strategy.startswith("none") else 2, "epochs": 2, "updates": len(losses)}
    ends = {"losses": losses, "validation_images": 200, "validation_loss": 0.5, "top1_error_percent": error}
    more = {"data": "some digits", "cores_per_process": 1, **columns}
    return row(LOSSES_CASE, None, CPU, dtype=dtype, **names, **counted, **ends, **more)


def on_a_cpu() -> list[Row]:
    """A CPU's rows of every suite that has any."""
    found = []
    for case, times in (("stage1", (30.0, 120.0, 290.0)), ("stage2", (20.0, 80.0, 160.0))):
        for name, milliseconds in zip(("reference", "compiled", "aten", "inductor"), (*times, 10.0), strict=True):
            names = {"dtype": "float32", "shape": "16x96x55x55", "machine": CPU}
            found.append(kernel(name, milliseconds * 1e3, "forward_backward", **names) | CPU | {"case": case})
    found.append(kernel("triton", status="needs a GPU") | CPU)
    for name, quiet, busy in (
        ("auto, compiled", 50_000.0, 150_000.0),
        ("auto, eager", 90_000.0, 100_000.0),
        ("aten, compiled", 200_000.0, None),
        ("aten, eager", 450_000.0, 450_000.0),
    ):
        for count, time in ((0, quiet), (2, busy)):
            columns = {"suite": "contention", "mode": "forward_backward", "busy_processes": count, "dtype": "float32"}
            found.append(row("stages 1 + 2", time, CPU, implementation=name, shape="16", **columns))
    for name, time in (("aten, eager", 960_000.0), ("aten, compiled", 700_000.0), ("auto, compiled", 480_000.0)):
        found.append(step(name, time, dtype="float32", shape="16x3", images_per_s=16e6 / time) | CPU)
    for name, time in (("auto, compiled", 600_000.0), ("onnxruntime", 800_000.0), ("aten, compiled", 700_000.0)):
        columns = {"mode": "inference", "dtype": "float32", "shape": "64x3x224x224", "images_per_s": 64e6 / time}
        found.append(step(name, time, "inference of paper", **columns) | CPU)
    for name, time in (("auto, compiled", 31_000.0), ("openvino", 26_000.0), ("aten, compiled", 34_000.0)):
        columns = {"mode": "inference", "dtype": "float32", "shape": "1x3x224x224", "images_per_s": 1e6 / time}
        found.append(step(name, time, "inference of paper", **columns) | CPU)
    found.append(row("loader, 2 reading", 30_000.0, CPU, suite="input", images_per_s=68_266.7))
    return found


def everything() -> list[Row]:
    """Rows of every suite, of a GPU and of a CPU."""
    found = [
        row("copy", 33.0, suite="ceilings", shape="64 MiB", gb_per_s=4000.0),
        row("matrix product", 1400.0, suite="ceilings", shape="8192", dtype="bfloat16", gflop_per_s=780_000.0),
        row("two stages, forward and backward", 33.0, suite="gate", status="passed"),
        row("memory checker", suite="gate", status="stopped after 60 s"),
    ]
    for mode, limit in (("inference", 21.5), ("forward", 23.0), ("backward", 40.0), ("forward_backward", 63.0)):
        for factor, name in ((40, "aten"), (12, "compiled"), (5, "traced"), (2, "triton")):
            percent = {"limit_us": limit, "percent_of_limit": 100 / factor}
            found.append(kernel(name, limit * factor, mode, saved_mib=70.9, **percent))
    found.append(kernel("reference", status="failed: RuntimeError: out of memory"))
    for name, parameters, saved, gflop, mb in (
        ("conv1", 34_944, 37.0, 27.0, 114.0),
        ("stage1", 0, 76.0, 0.9, 101.0),
        ("conv2", 307_456, 18.0, 57.3, 66.3),
        ("fc6", 37_752_832, 2.0, 9.7, 79.0),
    ):
        columns = {"parameters": parameters, "saved_mib": saved, "output_mib": saved, "percent_of_limit": 50.0}
        for mode, part in (("forward", 1.0), ("input_gradient", 1.0), ("weight_gradient", 1.2)):
            found.append(layer(name, part * (2.0 * gflop + mb), mode, gflop, mb, **columns))
    found.append(layer("whole step", 5000.0, "training", 500.0, 3000.0, parameters=60_965_224))
    for name, time in (
        ("aten, eager", 15_000.0),
        ("aten, reduce-overhead", 7200.0),
        ("triton, reduce-overhead", 4800.0),
    ):
        found.append(step(name, time, synchronized_us=time + 100))
    profile = {"suite": "profile", "implementation": "triton, reduce-overhead", "mode": "train_step", "shape": "128x3"}
    for name, of, time in (
        ("sm90_gemm<128, 256>", "fc6", 600.0),
        ("wgrad", "conv1", 1500.0),
        ("dgrad", "conv1", 300.0),
    ):
        columns = {"kernel": name, "layer": of, "launches_per_step": 2, "percent_of_step": time / 48}
        found.append(row("update of paper", **profile, dtype="bfloat16", us_per_step=time, **columns))
    total = {"kernel": "sum", "us_per_step": 2400.0, "wall_us": 4800.0, "gaps_us": 2400.0}
    found.append(row("update of paper", **profile, dtype="bfloat16", **total))
    train = {"suite": "train", "shape": "128x3", "images_per_s": 24_000.0, "percent_of_step": 90.0}
    found.append(row("net.train of paper", 5300.0, implementation="auto", **train))
    return [*found, *on_a_cpu()]


def write(folder: Path, name: str, rows: Sequence[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def texts(folder: Path) -> dict[str, str]:
    """The Markdown pages made of a folder's records."""
    return {f"{one.name}.md": markdown.page(one) for one in Report(records.read(folder)).pages}


def measured(folder: Path) -> list[Row]:
    return rows.measured(records.read(folder))


def cells(text: str, *words: str) -> dict[str, str]:
    """The cells, by column, of the first line of a Markdown text's tables that has all ``words`` as cells."""
    titles: list[str] = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")[1:-1]]
        if not parts or set(line) <= set("|-: "):
            continue
        if parts[0] in ("case", "kernel"):
            titles = parts
        elif set(words) <= set(parts):
            return dict(zip(titles, parts, strict=True))
    raise AssertionError(f"no line with {words} in\n{text}")


def test_rows_carry_the_machine_and_come_in_the_order_of_time(tmp_path: Path) -> None:
    rows = [{"suite": suite, "case": "a", "median_us": 1.5} for suite in ("ceilings", "input")]
    path = records.write(rows, tmp_path / "a")
    assert records.write(rows[:1], tmp_path / "a") == path
    read = records.read(tmp_path / "a")
    assert [one["suite"] for one in read] == ["ceilings", "input", "ceilings"]
    for one in read:
        assert {"machine", "torch", "triton", "commit", "dirty", "date", "threads", "kernels_code"} <= set(one)
        assert one["record"] == path.name
    with pytest.raises(AssertionError):
        records.write([{"case": "of no suite"}], tmp_path / "a")
    # The names of one day's records end in commits, which are in no order.
    for name, columns in (
        ("2026-01-02-cpu-b", {"date": "2026-01-02", "time": "09:00:00"}),
        ("2026-01-02-cpu-a", {"date": "2026-01-02", "time": "11:00:00"}),
        ("2026-01-02-cpu-c", {"date": "2026-01-02"}),
        ("2026-01-01-cpu-z", {"date": "2026-01-01", "time": "23:00:00"}),
    ):
        write(tmp_path / "b", f"{name}.jsonl", [row("copy", shape=name[-1], **columns)])
    assert [one["shape"] for one in records.read(tmp_path / "b")] == ["z", "c", "b", "a"]
    # Of six times the middle, the second and the fifth.
    assert records.time_columns([2e-3]) == {"median_us": 2000.0}
    percentiles = {"median_us": 3500.0, "p20_us": 2000.0, "p80_us": 5000.0}
    assert records.time_columns([1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3]) == percentiles


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "is not JSON"),
        ("[1]", "must be an object"),
        (json.dumps({**row("copy"), "machine": ""}), "a row must say its machine"),
        (json.dumps(row("copy", suite="what")), "suite must be one of ceilings, gate, kernels, contention, layers"),
        (json.dumps(row("copy", median_us="fast")), "median_us must be a positive number; got 'fast'"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path, "r.jsonl", [row("copy", 1.0)])
    with open(path, "a") as file:
        file.write(f"\n{line}\n")
    # Of a comparison 1 means that something got slower.
    one_line(run_here("bench.report", "--compare", path, path), 2, f"{path}, line 3", says)


def test_tables_show_the_newest_row_and_say_where_it_is_from(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", [step("aten, eager", 20_000.0), step("aten, eager", 16_000.0)])
    write(tmp_path, "b.jsonl", [step("aten, eager", 10_000.0, date="2026-11-30", dirty=True)])
    made = texts(tmp_path)["steps.md"]
    line = cells(made, "aten, eager")
    assert (line["median ms"], line["images/s"]) == ("16.00", "8,000")
    assert "- `reports/data/a.jsonl`: 2026-12-01, commit abc;\n  NVIDIA H200, 16 threads, torch 2.11.0" in made
    assert "b.jsonl" not in made
    write(tmp_path, "c.jsonl", [step("aten, eager", 9000.0, date="2026-12-02", dirty=True)])
    assert "`reports/data/c.jsonl`: 2026-12-02, commit abc with changes;" in texts(tmp_path)["steps.md"]


def test_ratios_are_against_rivals_of_the_same_record_and_machine(tmp_path: Path) -> None:
    rows = [
        kernel("aten", 600.0, memory_format="contiguous"),
        kernel("aten", 800.0),
        kernel("compiled", 90.0),
        kernel("triton", 30.0),
        kernel("triton", 45.0, dtype="float32"),
        kernel("inductor", 60.0, unverified="gate failed"),
    ]
    write(tmp_path, "a.jsonl", rows)
    write(tmp_path, "b.jsonl", [kernel("traced", 60.0), {**kernel("aten", 1000.0), **CPU, "dtype": "float32"}])
    found = {(one["implementation"], one["dtype"], one["memory_format"]): one for one in measured(tmp_path)}
    ratios = {key: (one.get("x_aten"), one.get("x_compiled")) for key, one in found.items()}
    # 600 / 30: the rival's faster memory format.
    assert ratios["triton", "bfloat16", "channels_last"] == (20.0, 3.0)
    assert ratios["aten", "bfloat16", "contiguous"] == (1.0, 0.15)
    # A rival in another record or dtype, and a row that no check has confirmed.
    for name, dtype in (("traced", "bfloat16"), ("triton", "float32"), ("inductor", "bfloat16")):
        assert ratios[name, dtype, "channels_last"] == (None, None), name
    steps = [step("aten, eager", 12_000.0), step("aten, default", 9000.0), step("aten, reduce-overhead", 6000.0)]
    write(tmp_path, "c.jsonl", [*steps, step("triton, eager", 3000.0)])
    ours = next(one for one in measured(tmp_path) if one["implementation"] == "triton, eager")
    assert (ours["x_aten"], ours["x_compiled"]) == (4.0, 2.0)


def test_machines_are_never_mixed(tmp_path: Path) -> None:
    others = [{**GPU, "threads": 8}, {**GPU, "torch": "2.12.0"}, CPU]
    rows = [step("aten, eager", 9000.0), *({**step("triton, eager", 3000.0), **one} for one in others)]
    write(tmp_path, "a.jsonl", rows)
    headings = [line for line in texts(tmp_path)["steps.md"].splitlines() if line.startswith("## ")]
    assert len(headings) == 4
    assert headings[-1].startswith("## CPU")
    assert [one.get("x_aten") for one in measured(tmp_path)] == [1.0, None, None, None]


def test_rewritten_kernels_are_told_from_todays(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", [kernel("triton", 50.0), kernel("aten", 900.0)])
    write(tmp_path, "b.jsonl", [kernel("triton", 40.0, "backward", kernels_code="old")])
    assert {one.get("kernels_of") for one in measured(tmp_path)} == {"abc, rewritten since", None, "old"}
    # A CPU's record tells that they have changed.
    write(tmp_path, "c.jsonl", [step("auto, eager", 1.0, kernels_code="new", date="2026-12-02") | CPU])
    stale = {"abc, rewritten since", "old, rewritten since", None}
    assert {one.get("kernels_of") for one in measured(tmp_path)} == stale


def test_what_is_missing_says_so_once(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", [*everything(), kernel("inductor", 9.0, unverified="gate not finished")])
    text = texts(tmp_path)["kernels.md"]
    gpu, cpu = text.split("## CPU: Xeon, 2 threads, torch 2.13.0+cpu")
    assert "stage1, reference, forward: failed: RuntimeError: out of memory." in gpu
    assert "9.000 (unverified)" in gpu
    assert "gate not finished" in gpu
    side = cells(gpu, "forward")
    assert (side["aten us"], side["reference us"], side["triton us"]) == ("920.0", "-", "46.00")
    # In the note below each of the two tables, and in no cell.
    assert cpu.count("Not measured without a GPU: triton") == 2
    assert "| triton" not in cpu
    assert "needs a GPU" not in text


def test_memory_is_computed_from_the_parameters(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", everything())
    text = texts(tmp_path)["memory.md"]
    mib = f"{37_752_832 * 4 / 2**20:.1f}"
    line = cells(text, "fc6")
    assert [line[f"{name} MiB"] for name in ("weights", "gradients", "momentum")] == [mib] * 3
    total = cells(text, "sum")
    assert (total["parameters"], total["saved MiB"]) == ("38,095,232", "133.0")


def test_a_profile_is_in_the_order_of_time_and_replaced_as_a_whole(tmp_path: Path) -> None:
    def kernels() -> list[str]:
        lines = [line for line in texts(tmp_path)["profile.md"].splitlines() if line.startswith("| ")]
        return [line.split("|")[1].strip() for line in lines]

    write(tmp_path, "a.jsonl", everything())
    assert kernels()[:5] == ["kernel", "wgrad", "sm90_gemm&lt;128, 256>", "dgrad", "sum"]
    again = [one | {"date": "2026-12-02"} for one in everything() if one["suite"] == "profile"]
    write(tmp_path, "b.jsonl", [*again[1:3], again[3] | {"wall_us": 4000.0}])
    assert kernels()[:4] == ["kernel", "wgrad", "dgrad", "sum"]
    assert [one["wall_us"] for one in measured(tmp_path) if one.get("kernel") == "sum"] == [4000.0]


def test_the_largest_parts_are_those_of_the_newest_profile(tmp_path: Path) -> None:
    newer = {"date": "2026-12-02", "implementation": "triton, recorded"}
    profile = [one | newer for one in everything() if one["suite"] == "profile" and one.get("layer") != "conv1"]
    write(tmp_path, "a.jsonl", [*everything(), *profile])
    (said,) = [text for text in findings.sentences(measured(tmp_path)) if "largest parts" in text]
    assert "fc6 (12 %)" in said
    assert "conv1" not in said


def test_what_was_found_is_computed_from_the_records(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", everything())
    rows = measured(tmp_path)
    step_, time, stages, network = findings.sentences(rows)
    assert "4.80 ms on an NVIDIA H200" in step_
    assert "1.50 times" in step_
    assert "3.12 times" in step_  # 15 / 4.8
    assert "conv1 (38 %), fc6 (12 %)" in time  # (1500 + 300) / 48
    assert "24,000 images/s, 90 %" in time
    assert stages == (
        "[The two stages of normalization and pooling](contention.md), forward and backward, take 50.0 ms on a "
        "Xeon with 2 threads: 4.00 times as fast as compiled PyTorch and 9.00 times as fast as eager PyTorch. "
        "Called eagerly, they take 90.0 ms, 5.00 times as fast as eager PyTorch. With two busy processes "
        "running, they take 100 ms: 4.50 times as fast as eager PyTorch."
    )
    assert "33 images/s" in network
    assert "batches of 64 runs at 107 images/s; compiled PyTorch, the fastest rival measured, reaches 91" in network
    assert network.endswith(" One image takes 31.0 ms, and 26.0 ms in OpenVINO.")
    bars = {group.title: [round(bar.ratio, 2) for bar in group.bars] for group in findings.groups(rows)}
    assert list(bars.values()) == [[3.12, 2.08, 1.0], [2.0, 1.37, 1.0], [9.0, 2.25, 1.0], [4.5, 1.0]]
    # What no check has confirmed is not quoted, and what is not in the records is left out.
    write(tmp_path, "a.jsonl", [one | {"unverified": "gate failed"} for one in everything()])
    assert "times" not in " ".join(findings.sentences(measured(tmp_path)))


def test_the_first_screen_shows_the_headline(tmp_path: Path) -> None:
    # A slower way of ours, one of another dtype, and a whole training.
    others = [step("triton, default", 4900.0), step("triton, eager", 10.0, dtype="float16")]
    # With all of cuDNN's algorithms, which the rivals' steps and net.train do not use.
    others.append(step("triton, nondeterministic, recorded", 10.0))
    training = step("", 33e6, "digits, a whole run", top1_accuracy_percent=98.31)
    write(tmp_path, "a.jsonl", [*everything(), *others, training])
    (faster,) = (one for one in measured(tmp_path) if "nondeterministic" in one.get("implementation", ""))
    assert not {"x_aten", "x_compiled"} & set(faster)
    (table,) = Report(records.read(tmp_path)).headline
    rows = {row[0].text: [cell.text for cell in row[2:5]] for row in table.rows}
    assert rows["training step of the paper's network, 128 images, bfloat16"] == ["4.8 ms", "7.2 ms", "1.5"]
    assert rows["digits, full training run, top-1 on validation images"] == ["98.3 % in 33 s", "-", "-"]
    assert {"figures": "Not measured.", "found": "Nothing is measured yet."}.items() <= Report([]).parts().items()


def test_what_no_gate_verified_is_marked_and_gets_no_ratio(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", [one | {"unverified": "gate failed"} for one in everything()])
    (table,) = Report(records.read(tmp_path)).headline
    assert [cell.text for cell in table.rows[0][2:5]] == ["4.8 ms (unverified)", "7.2 ms", "-"]


class Page(HTMLParser):
    """What a page fetches, its ids and links, the columns that its tables show at once; its tags must close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.shown: list[int] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag not in ("meta", "link", "input"):
            self._open.append(tag)
        names = ("src", "href", "srcset", "action", "xlink:href")
        self.fetched += [value or "" for name, value in attributes if name in names]
        self.ids += [value or "" for name, value in attributes if name == "id"]
        if tag == "thead":
            self.shown.append(0)
        if values.get("scope") == "col":
            assert values["aria-sort"] == "none"
            self.shown[-1] += "extra" not in str(values.get("class"))
        if tag == "svg":
            assert values["role"] == "img"
            assert values["aria-label"]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of a GPU's rows: every chart in the page, one of them as a file."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "reports" / "figures").mkdir(parents=True)
    (folder / "README.md").write_text(
        between("before\n<!-- figures: begin --><!-- figures: end -->\nafter", "figures", "old")
    )
    (folder / "reports" / "figures" / "kernels-of-long-ago.png").touch()
    (folder / "reports" / "figures" / "of-another-command.png").touch()
    data = write(folder / "data", "a.jsonl", [one for one in everything() if one["machine"] == GPU["machine"]])
    losses = [loss_row(name, dtype, [1.0, 0.5]) for dtype in ("float64", "float32") for name in ("none", "data")]
    write(folder / "data", "b.jsonl", [{**one, **GPU} for one in losses])
    png = figures.png
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "png", lambda figure: png(figure) if "memory" in figure.file else b"a chart")
        made = Report(records.read(data.parent), list((records.DATA / "ablations").glob("*.jsonl")))
        assert made.write(folder)
    return folder


def test_files_are_written_and_what_is_no_more_is_removed(drawn: Path) -> None:
    readme = (drawn / "README.md").read_text()
    assert readme.startswith("before\n<!-- figures: begin -->\n")
    assert readme.endswith("<!-- figures: end -->\nafter")
    assert "old" not in readme
    reports = drawn / "reports"
    charts = sorted(path.stem.split("-")[0] for path in reports.rglob("*.png"))
    several = "accuracy", "accuracy", "accuracy", "parallelism", "parallelism"
    assert charts == sorted([*several, "found", "kernels", "memory", "of", "roofline", "steps"])
    assert (reports / "figures" / "of-another-command.png").exists()
    (chart,) = reports.glob("figures/memory-*.png")
    assert chart.stat().st_size < 120_000
    with Image.open(chart) as image:
        assert 400 < image.width < 1400
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    committed = (ROOT / "reports" / "accuracy.md").read_text()
    assert (reports / "accuracy.md").read_text() == committed


@pytest.mark.slow
def test_the_same_records_make_the_same_bytes(drawn: Path) -> None:
    made = Report(records.read(drawn / "data"))
    for figure in made.figures():
        assert figures.png(figure) == figures.png(figure), figure.file
    assert made.texts() == made.texts()


def test_the_page_fetches_nothing_and_shows_nine_columns(drawn: Path) -> None:
    text = (drawn / "reports" / "index.html").read_text()
    page = Page(text.replace("<!doctype html>", ""))
    assert len(page.ids) == len(set(page.ids))
    links = [name.removeprefix("#") for name in page.fetched if name.startswith("#")]
    assert set(page.fetched) == {"data:,", *(f"#{name}" for name in links)}
    assert set(links) <= set(page.ids)
    assert {"found", "kernels", "steps", "profile", "layers", "memory", "gate", "parallelism", "accuracy"} < set(
        page.ids
    )
    assert max(page.shown) <= 9
    assert "url(http" not in text
    assert not re.search(r"(?<!\.w3\.org/)//[a-z]+\.[a-z]", re.sub(r'xmlns(:xlink)?="[^"]*"', "", text))
    # The title behind a dash.
    assert 'title="failed: RuntimeError: out of memory"' in text


def test_colours_of_the_page_are_its_own(drawn: Path) -> None:
    """A chart in which black or a color of a file is left stays as it is in the dark."""
    text = (drawn / "reports" / "index.html").read_text()
    style, _, body = text.partition("</style>")
    charts = re.findall("<svg.*?</svg>", body, re.DOTALL)
    # All eight kinds, one of them for three records.
    assert len(charts) == 10
    used = set(re.findall(r"var\((--\w+)\)", " ".join(charts)))
    assert {"--ink", "--c0"} <= used
    for colours in (style.split("@media")[0], style.split("dark) {")[1]):
        assert used <= set(re.findall(r"(--\w+):", colours))
    for chart in charts:
        assert not re.search("#(000000|ffffff)|(fill|stroke): ?(black|white)", chart)


def test_committed_files_are_those_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    # How matplotlib writes a chart changes with its version.
    monkeypatch.setattr(page, "svg", lambda figure: "")
    made = Report(records.read(), list((records.DATA / "ablations").glob("*.jsonl")))
    for name, text in made.texts().items():
        committed = re.sub("<svg.*?</svg>", "", (ROOT / "reports" / name).read_text(), flags=re.DOTALL)
        assert text == committed, f"{name} is not what python -m bench.report makes of the records"
    assert {name for name in pages.PAGES if (ROOT / "reports" / f"{name}.md").is_file()} <= {
        one.name for one in made.pages
    }
    for name, part in made.parts().items():
        assert any(part in (ROOT / path).read_text() for path in ("README.md", "reports/README.md")), name
    kinds = ["found", *filter(None, (kind.figure for kind in pages.PAGES.values()))]
    there = {f"figures/{path.name}" for kind in kinds for path in (ROOT / "reports" / "figures").glob(f"{kind}*.png")}
    assert {figure.file for figure in made.figures() if "/" in figure.file} == there


def test_everything_recorded_is_in_a_table() -> None:
    suites = {suite for kind in pages.PAGES.values() for suite in kind.suites}
    rows = measured(records.DATA)
    recorded = [one for one in rows if one["suite"] in suites and one.get("status") != tables.NEEDS_GPU]
    shown = sum(
        len(table.rows)
        for page in pages.pages(rows)
        if page.name != "memory"
        for section in page.sections
        for table in section.tables
        if table.title not in ("Medians side by side", "Copies")
    )
    assert shown == len(recorded) > 30


def test_help_needs_nothing_heavy() -> None:
    done = run("bench.report", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "--compare RECORD" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "net.common.cli" in imported
    assert not imported & {"torch", "numpy", "pandas", "matplotlib"}


def test_a_record_cannot_write_html_or_lines_into_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records come from other machines; what they say is shown, not obeyed."""
    hostile = "<script>alert(1)</script>\n\n<img src=x onerror=alert(2)> & |\x1b[2J"
    machine = {**GPU, "machine": f"NVIDIA {hostile}", "driver": hostile, "torch": f"2.11.0{hostile}"}
    rows = [
        kernel("triton", 50.0, machine=machine, kernel=hostile, shape=hostile),
        kernel("aten", 900.0, machine=machine),
        row(f"update of {hostile}", 5.0, machine, suite="steps", implementation=f"auto, {hostile}", dtype=hostile),
        row("conv1", 5.0, machine, suite="layers", implementation="triton", mode="forward", dtype="x", layer=hostile),
        {**loss_row("none", "float32", [1.0]), **machine, "network": hostile},
        {**loss_row("data", "float32", [1.0]), **machine, "network": hostile},
    ]
    write(tmp_path, "a.jsonl", rows)
    monkeypatch.setattr(page, "svg", lambda figure: "")
    report = Report(records.read(tmp_path))
    made = report.texts()
    html = made.pop("index.html")
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "&lt;script" in made["kernels.md"]
    assert "&lt;script" in made["parallelism.md"]
    for name, text in {**made, **report.parts()}.items():
        left = re.sub(r"</?(details|summary)>", "", text)
        assert "<" not in left, name
        assert "\x1b" not in text, name
        assert not any(line.startswith("&lt;img") for line in text.splitlines()), name
