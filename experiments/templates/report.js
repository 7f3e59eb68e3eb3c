"use strict";
(() => {
  const plots = [...document.querySelectorAll(".plot")];
  const hidden = new Set();

  // A colour "@name" in a figure stands for the style sheet's variable --name.
  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const plot of plots) {
      const text = document.getElementById(`${plot.id}-data`).textContent;
      const figure = JSON.parse(text, (_, value) =>
        typeof value === "string" && value.startsWith("@") ? style.getPropertyValue(`--${value.slice(1)}`).trim() : value);
      figure.layout.font.family = getComputedStyle(document.body).fontFamily;
      figure.layout.hoverlabel.font.family = figure.layout.font.family;
      for (const trace of figure.data) trace.visible = !hidden.has(trace.meta);
      if ("print" in document.documentElement.dataset) figure.layout.width = Math.min(plot.clientWidth, 680);  // A4
      Plotly.react(plot, figure.data, figure.layout, { responsive: true, displayModeBar: false });
    }
  };

  if (plots.length) {
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    addEventListener("beforeprint", () => { document.documentElement.dataset.print = ""; draw(); });
    addEventListener("afterprint", () => { delete document.documentElement.dataset.print; draw(); });
  }

  for (const button of document.querySelectorAll(".key button")) {
    button.addEventListener("click", () => {
      const label = button.dataset.label;
      hidden.has(label) ? hidden.delete(label) : hidden.add(label);
      for (const twin of document.querySelectorAll(".key button")) {
        if (twin.dataset.label === label) twin.setAttribute("aria-pressed", String(!hidden.has(label)));
      }
      draw();
    });
  }

  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };

  for (const button of document.querySelectorAll("thead button")) {
    const header = button.closest("th");
    header.closest("table").classList.add("sortable");
    button.addEventListener("click", () => {
      const up = header.getAttribute("aria-sort") !== "ascending";
      for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = header.closest("table").tBodies[0];
      const value = (row) => row.children[header.cellIndex].dataset.value ?? "";
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");  // missing numbers stay last in both directions
        return up ? compare(x, y) : compare(y, x);
      });
      body.append(...rows);
    });
  }
})();
