"use strict";
// Tables that sort by a click on a heading: numbers by value, texts by alphabet; cells without a value stay last.
(() => {
  const key = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    return cell.classList.contains("number") ? null : cell.textContent.trim();
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };
  const sort = (table, heading, column) => {
    const before = heading.getAttribute("aria-sort");
    // First click: numbers from the largest down, texts from A on; every further click turns the order around.
    const descending = before === null ? heading.classList.contains("number") : before === "ascending";
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return descending ? compare(b, a) : compare(a, b);
    });
    body.append(...rows.map(([, row]) => row));
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    modiff.announce(`Sorted by ${heading.innerText.trim()}, ${descending ? "descending" : "ascending"}`);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = modiff.make("button", { type: "button", class: "sort" });
      button.append(...heading.childNodes);
      if (!button.textContent.trim()) return;
      heading.append(button);
      button.addEventListener("click", () => sort(table, heading, column));
    });
  }
})();
