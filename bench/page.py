"""All tables on one page, ``reports/index.html``: sorted by a click on a header, filtered by words, nothing fetched."""

from collections.abc import Iterable, Sequence
from html import escape

from .figures import Figure
from .tables import Page, Table

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #59636e; --paper: #ffffff; --band: #f4f6f8; --line: #d5dae0;
  --accent: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --faint: #9aa5b1; --paper: #12161b; --band: #1b2128; --line: #343c46; --accent: #7ab8ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 100rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.5rem; }
h2 { margin: 2.5rem 0 0; font-size: 1.25rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.5rem 0 0.25rem; font-size: 1rem; }
p { margin: 0.5rem 0; max-width: 60rem; }
a { color: var(--accent); }
code { font-size: 0.9em; }
nav ul { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0.5rem 0; padding: 0; list-style: none; }
form { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 0.5rem; align-items: center;
  padding: 0.5rem 0; background: var(--paper); border-bottom: 1px solid var(--line); }
input { flex: 0 1 24rem; min-width: 0; padding: 0.35rem 0.6rem; font: inherit; color: inherit;
  background: var(--band); border: 1px solid var(--line); border-radius: 4px; }
output, .sources { color: var(--faint); font-size: 0.85rem; }
.sources { margin: 0.25rem 0 1rem; padding-left: 1.2rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px; }
table { width: 100%; border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
caption { padding: 0.4rem 0.6rem; text-align: left; font-weight: 600; }
th, td { padding: 0.2rem 0.6rem; text-align: left; white-space: nowrap; border-top: 1px solid var(--line); }
.number { text-align: right; }
td.number:not([data-value]) { min-width: 6.5rem; white-space: normal; }
thead th { background: var(--band); }
tbody th { position: sticky; left: 0; font-weight: 600; background: var(--paper); }
tbody tr:nth-child(even) > * { background: var(--band); }
thead button { padding: 0; font: inherit; font-weight: 600; color: inherit; background: none; border: 0;
  cursor: pointer; }
thead button::after { content: " \\2195"; color: var(--faint); }
[aria-sort=ascending] button::after { content: " \\2191"; color: var(--accent); }
[aria-sort=descending] button::after { content: " \\2193"; color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
figure { margin: 0.75rem 0; }
img { max-width: 100%; height: auto; padding: 0.5rem; background: #ffffff; border: 1px solid var(--line);
  border-radius: 4px; }
main > section { scroll-margin-top: 4rem; }
@media (max-width: 40rem) { tbody th { position: static; } }
[hidden] { display: none !important; }
"""

SCRIPT = """
const number = cell => cell.dataset.value === undefined ? NaN : Number(cell.dataset.value);
function order(a, b, numeric, sign) {
  if (!numeric) return sign * a.textContent.localeCompare(b.textContent, "en", {numeric: true});
  const [x, y] = [number(a), number(b)];
  // What was not measured comes last either way.
  if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
  return sign * (x - y);
}
for (const header of document.querySelectorAll("thead th")) {
  header.querySelector("button").addEventListener("click", () => {
    const sign = header.ariaSort === "ascending" ? -1 : 1;
    const body = header.closest("table").tBodies[0];
    const rows = [...body.rows];
    const numeric = header.classList.contains("number");
    rows.sort((a, b) => order(a.cells[header.cellIndex], b.cells[header.cellIndex], numeric, sign));
    body.append(...rows);
    for (const other of header.parentNode.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  });
}
const words = document.querySelector("input");
function filter() {
  const wanted = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0, all = 0;
  for (const block of document.querySelectorAll(".block")) {
    const machine = block.dataset.machine.toLowerCase();
    let left = 0;
    for (const row of block.querySelectorAll("tbody tr")) {
      const text = machine + " " + [...row.cells].map(cell => cell.textContent.toLowerCase()).join(" ");
      row.hidden = !wanted.every(word => text.includes(word));
      left += !row.hidden;
      all += 1;
    }
    block.hidden = wanted.length > 0 && left === 0;
    shown += left;
  }
  for (const part of document.querySelectorAll(".machine, main > section"))
    part.hidden = wanted.length > 0 && !part.querySelector(".block:not([hidden])");
  document.querySelector("output").textContent = wanted.length ? `${shown} of ${all} rows` : `${all} rows`;
}
words.addEventListener("input", filter);
words.form.addEventListener("submit", event => event.preventDefault());
filter();
"""


def _table(table: Table, page: str, machine: str) -> Iterable[str]:
    yield f'<div class="block" data-machine="{escape(machine)}">'
    label = escape(f"{table.title or page}, {machine}")
    yield f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>'
    yield f"<caption>{escape(table.title or page)}</caption>"
    yield "<thead><tr>"
    for title, numeric in table.columns:
        kind = ' class="number"' if numeric else ""
        yield f'<th scope="col" aria-sort="none"{kind}><button type="button">{escape(title)}</button></th>'
    yield "</tr></thead><tbody>"
    for row in table.rows:
        cells = []
        for index, (cell, (_, numeric)) in enumerate(zip(row, table.columns, strict=True)):
            tag, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
            kind = ' class="number"' if numeric else ""
            value = f' data-value="{cell.value:.6g}"' if cell.value is not None else ""
            cells.append(f"<{tag}{scope}{kind}{value}>{escape(cell.text)}</{tag}>")
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"
    yield '<ul class="sources">' + "".join(f"<li>{_code(line)}</li>" for line in table.sources) + "</ul></div>"


def _code(text: str) -> str:
    """Text whose parts between backticks are code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def html(pages: Sequence[Page], figures: Sequence[Figure]) -> str:
    """The page; the figures' files are beside it."""
    names = {page.file: page.file.removesuffix(".md") for page in pages}
    lines = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>AlexNet, 2012, on today's hardware: measurements</title><style>{STYLE}</style></head><body>",
        "<header><h1>AlexNet, 2012, on today's hardware: measurements</h1>",
        "<p>Made from the records by <code>python -m bench.report</code>. A click on a header sorts its table.</p>",
        '<nav aria-label="Tables"><ul>',
        *(f'<li><a href="#{names[page.file]}">{escape(page.title)}</a></li>' for page in pages),
        "</ul></nav></header>",
        '<form role="search"><label for="filter">Rows with all these words</label>',
        '<input id="filter" type="search" placeholder="stage1 bfloat16 backward" autocomplete="off">',
        '<output for="filter" aria-live="polite"></output></form><main>',
    ]
    for page in pages:
        lines.append(f'<section id="{names[page.file]}"><h2>{escape(page.title)}</h2><p>{_code(page.about)}</p>')
        for section in page.sections:
            lines.append(f'<div class="machine"><h3>{escape(str(section.machine))}</h3>')
            for figure in figures:
                if (figure.page, figure.machine) == (page.file, section.machine):
                    lines.append(f'<figure><img src="{figure.file}" alt="{escape(figure.about)}"></figure>')
            if not section.tables:
                lines.append("<p>Not measured.</p>")
            for table in section.tables:
                lines.extend(_table(table, page.title, str(section.machine)))
            lines.append("</div>")
        lines.append("</section>")
    return "\n".join([*lines, f"</main><script>{SCRIPT}</script></body></html>"]) + "\n"
