"use strict";
// Sorting, folding all at once, and unfolding for print. The page is complete and readable without it.

function value(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value === "" ? null : Number(cell.dataset.value);
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function sort(head) {
  const table = head.closest("table");
  const column = head.cellIndex;
  const first = head.dataset.first || "ascending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  for (const each of table.querySelectorAll("th[aria-sort]")) each.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", order);
  const body = table.tBodies[table.tBodies.length - 1];
  const sign = order === "ascending" ? 1 : -1;
  const rows = Array.from(body.rows, (row) => [value(row, column), row]);
  // What has no value comes last, whichever way the rest is sorted.
  rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
  body.append(...rows.map(([, row]) => row));
  const said = table.parentElement.querySelector("[role=status]");
  if (said) said.textContent = `Sorted by ${head.textContent.trim()}, ${order}`;
}

for (const head of document.querySelectorAll("th.sorts")) {
  head.querySelector("button").addEventListener("click", () => sort(head));
}

for (const tools of document.querySelectorAll(".tools")) {
  tools.hidden = false;
  const folds = tools.parentElement.querySelectorAll("details");
  for (const button of tools.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      for (const each of folds) each.open = button.dataset.open === "true";
    });
  }
}

// On paper nothing unfolds. Graphs stay as the reader left them: they are long.
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = Array.from(document.querySelectorAll("main section:not(#graphs) details:not([open])"));
  for (const each of unfolded) each.open = true;
});
addEventListener("afterprint", () => {
  for (const each of unfolded) each.open = false;
});
