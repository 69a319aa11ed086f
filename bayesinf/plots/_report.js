
"use strict";
// A header's button sorts its table: first as the column says, then the other way round. Rows
// without a value are last both ways; equal ones keep the order in which the page was made.
const words = new Intl.Collator("en", { numeric: true });
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows];
  heads.forEach((head, k) => {
    const text = head.classList.contains("text");
    const compare = text ? words.compare : (a, b) => Number(a) - Number(b);
    head.querySelector("button").addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const other = now === "ascending" ? "descending" : "ascending";
      const order = now === null ? head.dataset.first : other;
      const sign = order === "ascending" ? 1 : -1;
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const value = (row) => row.cells[k].dataset.value;
      const known = rows.filter((row) => value(row) !== "");
      const unknown = rows.filter((row) => value(row) === "");
      known.sort((a, b) => sign * compare(value(a), value(b)));
      table.tBodies[0].append(...known, ...unknown);
    });
  });
}
document.documentElement.dataset.ready = "";
