document.documentElement.classList.add("js");

// Columns that a table does not show at first.
for (const button of document.querySelectorAll(".more")) {
  button.addEventListener("click", () => {
    const all = document.getElementById(button.getAttribute("aria-controls")).classList.toggle("all");
    button.setAttribute("aria-expanded", all);
    button.textContent = all ? "Fewer columns" : button.dataset.label;
  });
}

// What has no value comes last, upwards and downwards.
function order(a, b, numeric, sign) {
  const [x, y] = [a, b].map(cell => cell.dataset.value);
  if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
  return sign * (numeric ? x - y : x.localeCompare(y, "en", {numeric: true}));
}
for (const header of document.querySelectorAll("thead th")) {
  header.querySelector("button").addEventListener("click", () => {
    const sign = header.ariaSort === "ascending" ? -1 : 1;
    const body = header.closest("table").tBodies[0];
    const numeric = header.classList.contains("number");
    body.append(...[...body.rows].sort(
      (a, b) => order(a.cells[header.cellIndex], b.cells[header.cellIndex], numeric, sign)));
    for (const other of header.parentNode.cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  });
}

// Rows that hold every word; what is folded opens where there are any, and is as it was once the words are gone.
const words = document.querySelector("input");
const folds = [...document.querySelectorAll("main details:not(.sources)")];
const open = folds.map(fold => fold.open);
function filter() {
  const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0, all = 0;
  for (const block of document.querySelectorAll(".block")) {
    let left = 0;
    for (const row of block.querySelectorAll("tbody tr")) {
      const text = (block.dataset.words + " " + row.textContent).toLowerCase();
      row.hidden = !wanted.every(word => text.includes(word));
      left += !row.hidden;
      all += 1;
    }
    block.hidden = wanted.length > 0 && left === 0;
    shown += left;
  }
  const empty = part => wanted.length > 0 && !part.querySelector(".block:not([hidden])");
  for (const part of document.querySelectorAll("main > section, main details:not(.sources)")) part.hidden = empty(part);
  folds.forEach((fold, place) => { fold.open = wanted.length > 0 || open[place]; });
  document.querySelector("output").textContent = wanted.length ? `${shown} of ${all} rows` : `${all} rows`;
}
words.addEventListener("input", filter);
words.form.addEventListener("submit", event => event.preventDefault());
filter();
