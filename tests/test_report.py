"""Records, and the tables, figures and page made from them."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench import figures, records, report, tables
from bench.environment import ROOT, describe
from net.errors import DataError
from tests.commands import one_line, run, run_here

GPU = {"machine": "NVIDIA H200", "threads": 16, "torch": "2.11.0", "triton": "3.6.0", "driver": "580"}
CPU = {"machine": "CPU: Xeon", "threads": 2, "torch": "2.13.0+cpu", "triton": "3.9.0", "driver": ""}
Row = dict[str, Any]


def row(case: str, median: float | None = None, machine: Row = GPU, **columns: Any) -> Row:
    """A row as a benchmark writes it."""
    times = {} if median is None else {"median_us": median, "p20_us": median * 0.99, "p80_us": median * 1.01}
    return {"case": case, **times, **machine, "commit": "abc", "dirty": False, "date": "2026-12-01", **columns}


def kernel(implementation: str, median: float | None = None, mode: str = "forward", **columns: Any) -> Row:
    names = {"suite": "kernels", "implementation": implementation, "mode": mode, "shape": "128x96x55x55"}
    return row("stage1", median, **{**names, "dtype": "bfloat16", "memory_format": "channels_last", **columns})


def layer(case: str, median: float, mode: str, gflop: float, mb: float, **columns: Any) -> Row:
    names = {"suite": "layers", "implementation": "triton", "mode": mode, "dtype": "bfloat16", "shape": "128x1"}
    return row(case, median, **{**names, "gflop": gflop, "fewest_mb": mb, **columns})


def step(implementation: str, median: float, **columns: Any) -> Row:
    names = {"suite": "steps", "implementation": implementation, "mode": "train_step", "dtype": "bfloat16"}
    return row("update of paper", median, **{**names, "images_per_s": 128e6 / median, "peak_mib": 900, **columns})


def everything() -> list[Row]:
    """Rows of every suite of a GPU, a few of a CPU."""
    found = [
        row("copy", 33.0, suite="ceilings", shape="64 MiB", gb_per_s=4000.0),
        row("matrix product", 1400.0, suite="ceilings", shape="8192", dtype="bfloat16", gflop_per_s=780_000.0),
        row("convolution", 30.0, suite="ceilings", shape="conv2", dtype="bfloat16", gflop_per_s=500_000.0),
    ]
    for mode, limit in (("inference", 21.5), ("forward", 23.0), ("backward", 40.0), ("forward_backward", 63.0)):
        for factor, name in ((40, "aten"), (12, "compiled"), (5, "traced"), (2, "triton")):
            percent = {"limit_us": limit, "percent_of_limit": 100 / factor}
            found.append(kernel(name, limit * factor, mode, saved_mib=70.9, **percent))
    found.append(kernel("reference", status="failed: RuntimeError: out of memory"))
    model = {**GPU, "machine": "modelled: NVIDIA H200", "suite": "model", "memory_format": "channels_last"}
    for mode, time in (("forward", 50.6), ("backward", 60.0)):
        found.append(row("stage1", machine=model, mode=mode, dtype="bfloat16", modelled_us=time))
    found.append(row("stage2", machine=model, mode="forward", dtype="bfloat16", modelled_us=29.0))
    for name, parameters, saved, gflop, mb in (
        ("conv1", 34_944, 37.0, 27.0, 114.0),
        ("stage1", 0, 76.0, 0.9, 101.0),
        ("conv2", 307_456, 18.0, 57.3, 66.3),
        ("conv3", 885_120, 11.0, 38.3, 29.0),
        ("conv4", 663_936, 16.0, 28.7, 34.0),
        ("fc6", 37_752_832, 2.0, 9.7, 79.0),
        ("fc7", 16_781_312, 1.0, 4.3, 36.0),
    ):
        columns = {"parameters": parameters, "saved_mib": saved, "output_mib": saved}
        found.append(layer(name, 2.0 * gflop + mb, "training", 3 * gflop, 2.5 * mb, **columns))
        found.append(layer(name, 1.5 * gflop + mb / 2, "inference", gflop, mb))
    found.append(layer("whole step", 5000.0, "training", 500.0, 3000.0, parameters=60_965_224))
    for name, time in (
        ("aten, eager", 15_000.0),
        ("aten, reduce-overhead", 7200.0),
        ("triton, reduce-overhead", 4800.0),
    ):
        found.append(step(name, time))
    found.append(row("loader, 2 reading", 30_000.0, CPU, suite="input", images_per_s=68_266.7))
    found.append(row("stage1", machine=CPU, suite="kernels", implementation="triton", status="needs a GPU"))
    return found


def write(folder: Path, name: str, rows: Sequence[Row]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def texts(folder: Path) -> dict[str, str]:
    """The report's files made from the records in ``folder``."""
    return report.texts(records.read(folder), f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")


def cells(text: str, *words: str) -> dict[str, str]:
    """The cells, by column, of the only line of a Markdown text's tables that has all ``words`` as cells."""
    found, titles = [], []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")[1:-1]]
        if not parts or set(line) <= set("|-: "):
            continue
        if parts[0] in ("case", "layer"):
            titles = parts
        elif set(words) <= set(parts):
            found.append(dict(zip(titles, parts, strict=True)))
    assert len(found) == 1, (words, found)
    return found[0]


def everything_measured(text: str) -> str:
    return text.split("### Everything measured")[1]


def test_rows_carry_the_machine(tmp_path: Path) -> None:
    rows = [{"case": "copy", "median_us": 1.5}, {"case": "prepare, one process", "median_us": 2.5}]
    path = records.write(rows, tmp_path)
    assert records.write(rows[:1], tmp_path) == path
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert {"machine", "torch", "triton", "commit", "dirty", "date", "threads"} <= set(line)
    read = records.read(tmp_path)
    assert [one["suite"] for one in read] == ["ceilings", "input", "ceilings"]
    assert {one["record"] for one in read} == {path.name}
    assert str(read[0]["torch"]) == describe()["torch"]


def test_rows_are_in_the_order_of_time(tmp_path: Path) -> None:
    """The names of one day's records end in commits, which are in no order."""
    for name, columns in (
        ("2026-01-02-cpu-b", {"date": "2026-01-02", "time": "09:00:00"}),
        ("2026-01-02-cpu-a", {"date": "2026-01-02", "time": "11:00:00"}),
        ("2026-01-02-cpu-c", {"date": "2026-01-02"}),
        ("2026-01-01-cpu-z", {"date": "2026-01-01", "time": "23:00:00"}),
    ):
        write(tmp_path, f"{name}.jsonl", [row("copy", shape=name[-1], **columns)])
    assert [one["shape"] for one in records.read(tmp_path)] == ["z", "c", "b", "a"]


def test_percentiles() -> None:
    assert records.time_columns([2e-3]) == {"median_us": 2000.0}
    assert records.time_columns([1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3]) == {
        "median_us": 3500.0,
        "p20_us": 2000.0,
        "p80_us": 5000.0,
    }


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "is not JSON"),
        ("[1]", "must be an object"),
        (json.dumps({"case": "copy", "date": "2026-12-01"}), "a row must say its machine"),
        (json.dumps(row("copy", suite="what")), "must be one of ceilings, kernels, layers, steps, input, model"),
        (json.dumps(row("nobody knows")), "must be one of ceilings, kernels"),
        (json.dumps(row("copy", median_us="fast")), "median_us must be a positive number; got 'fast'"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path, "r.jsonl", [row("copy", 1.0)])
    with open(path, "a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(DataError) as refusal:
        records.read(tmp_path)
    assert str(refusal.value).startswith(f"{path}, line 3")
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    # Of a comparison 1 means that something got slower.
    one_line(run_here("bench.report", "--compare", path, path), 2, f"{path}, line 3", says)


def test_tables_show_the_newest_row_and_say_where_it_is_from(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", [step("aten, eager", 20_000.0), step("aten, eager", 16_000.0)])
    write(tmp_path, "b.jsonl", [step("aten, eager", 10_000.0, date="2026-11-30", dirty=True)])
    made = texts(tmp_path)
    line = cells(made["steps.md"], "aten, eager")
    assert (line["median ms"], line["p20 to p80 ms"], line["images/s"]) == ("16.00", "15.84 to 16.16", "8,000")
    source = "- `reports/data/a.jsonl`: 2026-12-01, commit abc;\n  NVIDIA H200, 16 threads, torch 2.11.0, triton 3.6.0"
    assert source in made["steps.md"]
    assert "b.jsonl" not in made["steps.md"]
    write(tmp_path, "c.jsonl", [step("aten, eager", 9000.0, date="2026-12-02", dirty=True)])
    assert "`reports/data/c.jsonl`: 2026-12-02, commit abc with changes;" in texts(tmp_path)["steps.md"]


def test_ratios_are_against_rivals_of_the_same_record_and_machine(tmp_path: Path) -> None:
    rows = [
        kernel("aten", 600.0, memory_format="contiguous"),
        kernel("aten", 800.0),
        kernel("compiled", 90.0),
        kernel("triton", 30.0),
        kernel("triton", 45.0, dtype="float32"),
    ]
    write(tmp_path, "a.jsonl", rows)
    write(tmp_path, "b.jsonl", [kernel("traced", 60.0), {**kernel("aten", 1000.0), **CPU, "dtype": "float32"}])
    text = everything_measured(texts(tmp_path)["kernels.md"])
    # 600 / 30: the rival's faster memory format.
    ours = cells(text, "triton", "bfloat16")
    assert (ours["x aten"], ours["x compiled"]) == ("20.00", "3.00")
    assert cells(text, "aten", "contiguous")["x aten"] == "1.00"
    for words in (("traced", "bfloat16"), ("triton", "float32")):
        line = cells(text, *words)
        assert (line["x aten"], line["x compiled"]) == ("-", "-"), words
    steps = [step("aten, eager", 12_000.0), step("aten, default", 9000.0), step("aten, reduce-overhead", 6000.0)]
    write(tmp_path, "c.jsonl", [*steps, step("triton, eager", 3000.0)])
    line = cells(texts(tmp_path)["steps.md"], "triton, eager")
    assert (line["x aten"], line["x compiled"]) == ("4.00", "2.00")


def test_modelled_figures_have_a_column_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", everything())
    text = everything_measured(texts(tmp_path)["kernels.md"])
    forward = cells(text, "triton", "forward", "stage1")
    assert (forward["median us"], forward["modelled us"], forward["model's error %"]) == ("46.00", "50.60", "+10")
    assert cells(text, "aten", "forward")["modelled us"] == "-"
    alone = cells(text, "stage2", "forward")
    assert (alone["median us"], alone["modelled us"], alone["model's error %"]) == ("not measured", "29.00", "-")
    # Kernels that have changed since they were measured are another row; those measured keep their own model's figure.
    model = {**GPU, "machine": "modelled: NVIDIA H200", "suite": "model", "memory_format": "channels_last"}
    changed = row("stage1", machine=model, mode="forward", dtype="bfloat16", modelled_us=30.0, kernels_code="new")
    write(tmp_path, "a.jsonl", [*everything(), changed])
    text = everything_measured(texts(tmp_path)["kernels.md"])
    before, after = (cells(text, name, "forward", "stage1") for name in ("triton", "triton, changed since"))
    assert (before["modelled us"], before["model's error %"]) == ("50.60", "+10")
    assert (after["median us"], after["modelled us"], after["model's error %"]) == ("not measured", "30.00", "-")
    # What is modelled for a GPU that nothing was measured on is not lost, and no ratio comes of it.
    write(tmp_path, "a.jsonl", [row("stage1", suite="model", machine={"machine": "modelled: A100"}, modelled_us=9.0)])
    text = texts(tmp_path)["kernels.md"]
    assert "## modelled: A100" in text
    assert cells(everything_measured(text), "stage1")["modelled us"] == "9.000"


def test_what_is_missing_says_so(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", everything())
    made = texts(tmp_path)
    assert "failed: RuntimeError: out of memory" in cells(everything_measured(made["kernels.md"]), "reference").values()
    gpu, cpu = made["kernels.md"].split("## CPU: Xeon, 2 threads, torch 2.13.0+cpu")
    assert "needs a GPU" in cpu
    assert "needs a GPU" not in gpu
    side = cells(gpu.split("### Everything")[0], "backward")
    assert (side["triton us"], side["reference us"], side["limit us"]) == ("80.00", "not measured", "40.00")
    assert made["layers.md"].endswith("## CPU: Xeon, 2 threads, torch 2.13.0+cpu\n\nNot measured.\n")


def test_memory_is_computed_from_the_parameters(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", everything())
    text = texts(tmp_path)["memory.md"]
    line = cells(text, "fc6")
    mib = f"{37_752_832 * 4 / 2**20:.1f}"
    assert [line[f"{name} MiB (computed)"] for name in ("parameters", "gradients", "momentum")] == [mib] * 3
    total = cells(text, "sum")
    assert (total["parameters"], total["saved MiB"]) == ("56,425,600", "161.0")
    assert "whole step" not in text


def test_machines_are_never_mixed(tmp_path: Path) -> None:
    others = [{**GPU, "threads": 8}, {**GPU, "torch": "2.12.0"}, CPU]
    write(
        tmp_path,
        "a.jsonl",
        [step("aten, eager", 9000.0), *({**step("triton, eager", 3000.0), **one} for one in others)],
    )
    headings = [line for line in texts(tmp_path)["steps.md"].splitlines() if line.startswith("## ")]
    assert len(headings) == 4
    assert headings[-1].startswith("## CPU")
    assert [one.get("x_aten") for one in tables.measured(records.read(tmp_path))] == [1.0, None, None, None]


def test_the_first_screen_shows_the_headline(tmp_path: Path) -> None:
    # A slower way of ours, and one whose rivals were not measured.
    others = [step("triton, default", 4900.0), step("triton, eager", 10.0, dtype="float16")]
    write(tmp_path, "a.jsonl", [*everything(), *others])
    readme = texts(tmp_path)["README.md"]
    assert readme.startswith(f"before\n{report.BEGIN}\n|")
    assert readme.endswith(f"{report.END}\nafter\n")
    assert "old" not in readme
    assert cells(readme, "triton, reduce-overhead")["images/s"] == "26,667"
    assert cells(readme, "loader, 2 reading")["images/s"] == "68,267"
    assert cells(readme, "aten, eager")["x aten"] == "1.00"
    assert "triton, default" not in readme
    assert "triton, eager" not in readme
    assert "Not measured." in texts(tmp_path / "none")["README.md"]


class Page(HTMLParser):
    """The tables of a page by label, what it fetches, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.headers: list[dict[str, str | None]] = []
        self.fetched: list[str] = []
        self.hidden: list[str] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        self._label = ""
        self.output = ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag not in ("meta", "link", "input", "img"):
            self._open.append(tag)
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        self.ids += [value or "" for name, value in attributes if name == "id"]
        if values.get("role") == "region":
            self._label = values["aria-label"] or ""
            self.tables[self._label] = []
        if tag == "tr":
            self.tables[self._label].append([])
            if "hidden" in values:
                self.hidden.append(f"{self._label} {len(self.tables[self._label])}")
        if tag == "th":
            self.headers.append(values)
        if tag in ("th", "td"):
            self.tables[self._label][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self._open or "th" in self._open:
            self.tables[self._label][-1][-1] += data
        if "output" in self._open:
            self.output += data


def test_the_page_holds_every_table_and_fetches_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", everything())
    made = texts(tmp_path)
    page = Page(made["index.html"])
    gpu = "NVIDIA H200, 16 threads, torch 2.11.0"
    table = page.tables[f"Everything measured, {gpu}"]
    assert len(table) == 1 + 16 + 1 + 1
    assert all(len(line) == len(table[0]) for line in table)
    for title, texts_of_page in (("Training step", "steps.md"), ("Everything measured", "kernels.md")):
        for line in page.tables[f"{title}, {gpu}"][1:]:
            assert cells(made[texts_of_page].split(f"### {title}")[1], *line)
    for values in page.headers:
        assert values["scope"] in ("col", "row")
        assert ("aria-sort" in values) == (values["scope"] == "col")
    local = [f"figures/{kind[0]}-nvidia-h200-16-threads-torch-2.11.0.png" for kind in figures.KINDS]
    anchors = [name for name in page.fetched if name.startswith("#")]
    assert sorted(set(page.fetched) - set(anchors)) == sorted(["data:,", *local])
    assert {anchor[1:] for anchor in anchors} <= set(page.ids)
    assert "://" not in made["index.html"]
    assert "url(" not in made["index.html"]


def test_the_page_shows_names_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", [kernel("aten", 1.0, shape="<script>x</script> & |")])
    made = texts(tmp_path)
    assert "<script>x" not in made["index.html"]
    shown = Page(made["index.html"]).tables["Everything measured, NVIDIA H200, 16 threads, torch 2.11.0"]
    assert "<script>x</script> & |" in shown[1]
    assert r"<script>x</script> & \|" in made["kernels.md"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_sorts_and_filters(tmp_path: Path) -> None:
    write(tmp_path / "data", "a.jsonl", everything())
    steps = """
    const blocks = document.querySelectorAll("#kernels .block");
    const click = (block, title) => [...blocks[block].querySelectorAll("thead button")]
      .find(button => button.textContent === title).click();
    click(0, "modelled us"); click(1, "implementation"); click(1, "median us"); click(1, "median us");
    const input = document.querySelector("input");
    input.value = "H200  BACKWARD triton"; input.dispatchEvent(new Event("input"));
    """
    page = tmp_path / "page.html"
    page.write_text(texts(tmp_path / "data")["index.html"].replace("</body>", f"<script>{steps}</script></body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    shown = Page(done.stdout.replace("<!DOCTYPE html>", ""))
    label = "Everything measured, NVIDIA H200, 16 threads, torch 2.11.0"
    titles, *lines = shown.tables[label]
    medians = [line[titles.index("median us")].replace(",", "") for line in lines]
    numbers = [float(text) for text in medians if text[0].isdigit()]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) == 16
    assert all(not text[0].isdigit() for text in medians[16:])
    side = shown.tables["Medians side by side, NVIDIA H200, 16 threads, torch 2.11.0"]
    assert [line[-1] for line in side[1:]] == ["29.00", "50.60", "60.00", "-", "-"]
    sorts = [values.get("aria-sort") for values in shown.headers]
    assert (sorts.count("ascending"), sorts.count("descending")) == (1, 1)
    left = [line for number, line in enumerate(lines, 2) if f"{label} {number}" not in shown.hidden]
    assert [(line[1], line[2]) for line in left] == [("triton", "forward_backward"), ("triton", "backward")]
    rows = sum(len(table) - 1 for table in shown.tables.values())
    assert shown.output == f"{rows - len(shown.hidden)} of {rows} rows"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the whole report of :func:`everything`."""
    folder = tmp_path_factory.mktemp("reports")
    (folder / "README.md").write_text(f"{report.BEGIN}{report.END}")
    write(folder / "data", "a.jsonl", everything())
    (folder / "figures").mkdir()
    (folder / "figures" / "kernels-of-long-ago.png").touch()
    (folder / "figures" / "of-another-command.png").touch()
    report.write(folder, folder / "README.md", records.read(folder / "data"))
    return folder


def test_figures_are_small_and_readable(drawn: Path) -> None:
    made = sorted(path for path in (drawn / "figures").iterdir() if path.stat().st_size)
    assert [path.name.split("-")[0] for path in made] == ["kernels", "memory", "roofline", "steps"]
    for path in made:
        assert path.stat().st_size < 120_000
        with Image.open(path) as image:
            assert 400 < image.width < 1400
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    assert not (drawn / "figures" / "kernels-of-long-ago.png").exists()
    assert (drawn / "figures" / "of-another-command.png").exists()


def test_the_same_records_make_the_same_bytes(drawn: Path) -> None:
    rows = records.read(drawn / "data")
    for name, text in report.texts(rows, (drawn / "README.md").read_text()).items():
        assert text.encode() == (drawn / name).read_bytes(), name
    for figure in figures.figures(tables.measured(rows))[1:3]:
        assert figures.png(figure) == (drawn / figure.file).read_bytes(), figure.file


def test_a_roofline_needs_a_machines_ceilings() -> None:
    rows = [{"record": "a", "suite": None, **one} for one in everything() if one.get("suite") != "ceilings"]
    kinds = {figure.file.split("-")[0] for figure in figures.figures(tables.measured(rows))}
    assert kinds == {"figures/kernels", "figures/memory", "figures/steps"}


def test_committed_files_are_those_of_the_records() -> None:
    rows = records.read()
    made = report.texts(rows, (ROOT / "README.md").read_text())
    for name, text in made.items():
        path = ROOT / name if name == "README.md" else ROOT / "reports" / name
        assert text == path.read_text(), f"{name} is not what python -m bench.report makes of the records"
    folder = ROOT / "reports" / "figures"
    wanted = {figure.file.removeprefix("figures/") for figure in figures.figures(tables.measured(rows))}
    assert wanted == {path.name for kind in figures.KINDS for path in folder.glob(f"{kind[0]}-*.png")}


def test_everything_recorded_is_in_a_table() -> None:
    rows = [one for one in tables.measured(records.read()) if one["suite"]]
    shown = sum(
        len(table.rows)
        for page in tables.pages(rows)
        if page.file != "memory.md"
        for section in page.sections
        for table in section.tables
        if table.title != "Medians side by side"
    )
    assert shown == len(rows) > 30


def test_help_needs_nothing_heavy() -> None:
    done = run("bench.report", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert "--compare RECORD" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "net.cli" in imported
    assert not imported & {"torch", "numpy", "matplotlib"}


def test_committed_accuracy_is_that_of_the_results(tmp_path: Path) -> None:
    written = report.write_accuracy(tmp_path, records.DATA)
    assert len(written) > 1
    assert (tmp_path / "accuracy.md").read_text() == (ROOT / "reports" / "accuracy.md").read_text()
    for path in written[1:]:
        assert (ROOT / "reports" / path.name).is_file()
