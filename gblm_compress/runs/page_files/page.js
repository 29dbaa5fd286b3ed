"use strict";
// Sorts a table by the column whose heading is clicked.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th"), row = heading.parentElement, body = row.closest("table").tBodies[0];
    const column = [...row.cells].indexOf(heading);
    const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of row.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    const key = (line) => line.cells[column].dataset.value;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x !== undefined && y !== undefined) return direction * (Number(x) - Number(y));
      if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;  // unmeasured values come last
      return direction * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
    };
    body.append(...[...body.rows].sort(order));
  });
}
