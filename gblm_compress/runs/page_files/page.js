"use strict";
// Draws the charts, and sorts a table by the column whose heading is pressed.
const ink = { color: "var(--ink)", soft: "var(--soft)", line: "var(--line)" };
const text = { labelColor: ink.color, titleColor: ink.color };
const look = {
  background: "transparent",
  font: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif',
  axis: { ...text, labelFontSize: 12, titleFontSize: 12, labelLimit: 190, gridColor: ink.line, domainColor: ink.soft,
    tickColor: ink.soft },
  legend: { ...text, labelFontSize: 12, titleFontSize: 12 },
  text: { color: ink.color, fontSize: 12 },
  view: { stroke: "transparent" },
};
const charts = JSON.parse(document.getElementById("charts-data").textContent);
Promise.all(Object.entries(charts).map(([name, spec]) =>
  vegaEmbed(`#chart-${name}`, { ...spec, width: "container", autosize: { type: "fit-x", contains: "padding" } },
    { actions: false, renderer: "svg", config: look })
)).then(() => { document.documentElement.dataset.charts = "drawn"; });

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
      if (x !== undefined || y !== undefined) return x === undefined ? 1 : -1;  // what was not measured comes last
      return direction * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
    };
    body.append(...[...body.rows].sort(order));
  });
}
