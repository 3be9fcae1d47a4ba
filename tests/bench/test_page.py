"""The page of measurements in a browser: sorting, filtering, unfolding, darkness, and a phone's width."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.measure import records
from tests.bench.test_report import everything, kernel, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium"),
]
#: What the scripts below share.
COMMON = """
const table = [...document.querySelectorAll("#kernels table")]
  .find(one => one.caption.textContent.startsWith("Every measurement"));
const press = (name, where = table) => [...where.querySelectorAll("thead button")]
  .find(button => button.textContent === name).click();
const seen = element => element.checkVisibility({checkVisibilityCSS: true});
const column = name => [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === name);
const texts = name => [...table.tBodies[0].rows].map(row => row.cells[column(name)].textContent);
const type = text => {
  const input = document.querySelector("input");
  input.value = text;
  input.dispatchEvent(new Event("input"));
};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    # Numbers that are in another order as words.
    close = [kernel("inductor", 46.5), kernel("compiled reference", 46.25)]
    write(folder / "data", "a.jsonl", [*everything(), *close])
    made = report.Report(records.read(folder / "data"), list((records.DATA / "ablations").glob("*.jsonl")))
    (folder / "index.html").write_text(made.texts()["index.html"])
    return folder


def browse(folder: Path, script: str, *flags: str, width: int = 1400) -> dict[str, Any]:
    """What ``script`` leaves in ``result``, run at the end of the page, in a frame of so many pixels."""
    text = (folder / "index.html").read_text()
    inside = (
        f"<script>{COMMON} const result = {{}}; {script}; parent.postMessage(JSON.stringify(result), '*');</script>"
    )
    listen = "addEventListener('message', event => { document.body.dataset.result = event.data; })"
    frame = html.escape(text.replace("</body>", f"{inside}</body>"))
    outside = f'<body><script>{listen}</script><iframe width="{width}" height="900" srcdoc="{frame}"></iframe></body>'
    file = folder / "frame.html"
    file.write_text(f"<!doctype html><html>{outside}</html>")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", *flags]
    command += [
        "--disable-background-networking",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=200)
    found = re.search('data-result="([^"]*)"', done.stdout)
    assert found is not None, done.stderr
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


def test_sorting_unfolding_and_filtering(page: Path) -> None:
    script = """
    press("median us"); result.up = texts("median us");
    press("median us"); result.down = texts("median us");
    press("implementation"); result.names = texts("implementation");
    result.sorts = [...table.tHead.rows[0].cells].map(cell => cell.ariaSort).filter(sort => sort !== "none");
    const fold = table.closest("details");
    result.folded = [fold.open, seen(table)];
    fold.querySelector("summary").click();
    result.unfolded = [fold.open, seen(table)];
    const more = table.closest(".block").querySelector(".more");
    const hidden = () => [...table.tHead.rows[0].cells].filter(cell => !seen(cell)).length;
    result.columns = [hidden(), more.ariaExpanded];
    more.focus(); more.click();
    result.all = [hidden(), more.ariaExpanded, document.activeElement === more];
    fold.open = false;
    type("H200  FORWARD_BACKWARD triton");
    result.left = [...table.tBodies[0].rows].filter(seen).map(row => row.cells[0].textContent);
    result.opened = fold.open;
    result.sections = [...document.querySelectorAll("main > section")].filter(seen).map(one => one.id);
    result.count = document.querySelector("output").textContent;
    type("no such row");
    result.none = document.querySelector("output").textContent.split(" ")[0];
    type("");
    result.back = [fold.open, [...table.tBodies[0].rows].every(row => !row.hidden)];
    """
    found = browse(page, script)
    numbers = [float(text.replace(",", "")) for text in found["up"] if text != "–"]  # noqa: RUF001
    assert len(numbers) == 18
    assert numbers == sorted(numbers)
    # What failed is last in both directions.
    assert found["up"][-1] == found["down"][-1] == "–"  # noqa: RUF001
    assert found["down"][:-1] == found["up"][-2::-1]
    assert found["names"] == sorted(found["names"])
    assert found["sorts"] == ["ascending"]
    assert (found["folded"], found["unfolded"]) == ([False, False], [True, True])
    assert found["columns"][0] > 0
    assert found["columns"][1] == "false"
    assert found["all"] == [0, "true", True]
    assert found["left"] == ["stage1"]
    assert found["opened"]
    assert found["sections"] == ["kernels", "memory"]
    assert found["count"].startswith("2 of ")
    assert found["none"] == "0"
    assert found["back"] == [False, True]


def test_a_phone_scrolls_tables_and_not_the_page(page: Path) -> None:
    script = """
    for (const fold of document.querySelectorAll("details")) fold.open = true;
    for (const more of document.querySelectorAll(".more")) more.click();
    result.width = [innerWidth, document.documentElement.scrollWidth];
    const box = table.closest(".scroll");
    result.box = [box.scrollWidth > box.clientWidth, box.getBoundingClientRect().right];
    result.charts = [...document.querySelectorAll("svg")].map(one => one.getBoundingClientRect().width);
    """
    found = browse(page, script, width=400)
    assert found["width"] == [400, 400]
    assert found["box"][0]
    assert found["box"][1] <= 400
    assert min(found["charts"]) > 300


def test_the_dark_page_has_dark_charts(page: Path) -> None:
    script = """
    const light = color => { const [r, g, b] = color.match(/[\\d.]+/g); return (0.3 * r + 0.6 * g + 0.1 * b) / 255; };
    result.page = light(getComputedStyle(document.body).backgroundColor);
    result.ink = light(getComputedStyle(document.body).color);
    result.texts = [...document.querySelectorAll("svg text")].map(one => light(getComputedStyle(one).fill));
    result.link = light(getComputedStyle(document.querySelector("nav a")).color);
    """
    # Blink's names for dark and light are 0 and 1.
    dark, bright = (browse(page, script, f"--blink-settings=preferredColorScheme={scheme}") for scheme in (0, 1))
    assert dark["page"] < 0.2 < 0.5 < min(dark["ink"], dark["link"], *dark["texts"])
    assert bright["page"] > 0.9 > 0.6 > max(bright["ink"], bright["link"], *bright["texts"])
