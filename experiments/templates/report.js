"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const plots = all(".plot");
  // What a key hides it hides in all figures of its scope: those of the settings together, or those of a section.
  const named = (element, label) => `${element.closest("[data-scope]")?.dataset.scope ?? ""} ${label}`;
  const hidden = new Set(all('.key button[aria-pressed="false"]').map((button) => named(button, button.dataset.label)));
  const seen = new Set();  // figures that have come near the window: the others are not drawn before they do

  // A figure's data stands in a script element beside it; of several, the one that its switch chooses.
  const data = (plot) => {
    const choice = document.querySelector(`input[name="${plot.id}"]:checked`);
    return document.getElementById(choice ? `${plot.id}-${choice.value}-data` : `${plot.id}-data`).textContent;
  };

  // The drawing library is most of the page's size, and is not run before the first figure comes near.
  const ready = () => {
    if (window.Plotly) return;
    const library = document.createElement("script");
    library.textContent = document.getElementById("plotly").textContent;
    document.head.append(library);
  };

  // A colour "@name" in a figure stands for the style sheet's variable --name.
  const draw = (plot) => {
    ready();
    const style = getComputedStyle(document.documentElement);
    const figure = JSON.parse(data(plot), (_, value) =>
      typeof value === "string" && value.startsWith("@") ? style.getPropertyValue(`--${value.slice(1)}`).trim() : value);
    figure.layout.font.family = getComputedStyle(document.body).fontFamily;
    figure.layout.hoverlabel.font.family = figure.layout.font.family;
    for (const trace of figure.data) trace.visible = !hidden.has(named(plot, trace.meta));
    if ("print" in document.documentElement.dataset) figure.layout.width = Math.min(plot.clientWidth || 680, 680);  // A4
    Plotly.react(plot, figure.data, figure.layout, { responsive: true, displayModeBar: false });
  };
  const redraw = () => seen.forEach(draw);

  if (plots.length) {
    const watch = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting || seen.has(target)) continue;
        seen.add(target);
        watch.unobserve(target);
        draw(target);
      }
    }, { rootMargin: "400px" });
    plots.forEach((plot) => watch.observe(plot));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    addEventListener("beforeprint", () => {
      document.documentElement.dataset.print = "";
      plots.forEach((plot) => seen.add(plot));
      redraw();
    });
    addEventListener("afterprint", () => { delete document.documentElement.dataset.print; redraw(); });
    for (const plot of plots) {
      for (const input of all(`input[name="${plot.id}"]`)) input.addEventListener("change", () => draw(plot));
    }
  }

  for (const button of all(".key button")) {
    button.addEventListener("click", () => {
      const name = named(button, button.dataset.label);
      hidden.has(name) ? hidden.delete(name) : hidden.add(name);
      for (const twin of all(".key button")) {
        if (named(twin, twin.dataset.label) === name) twin.setAttribute("aria-pressed", String(!hidden.has(name)));
      }
      redraw();
    });
  }

  // One setting at a time; a link to anything in another one chooses that.
  const choices = all('input[name="setting"]');
  const settings = all(".setting");
  const choose = (slug) => {
    for (const setting of settings) setting.classList.toggle("away", setting.id !== slug);
    for (const choice of choices) choice.checked = choice.value === slug;
  };
  const place = () => {
    const written = location.hash.slice(1);
    try {
      return decodeURIComponent(written);
    } catch {
      return written;  // a % that is none of an encoding
    }
  };
  const follow = () => {
    const target = document.getElementById(place());
    if (!target) return;
    const setting = target.closest(".setting");
    if (setting && choices.length) choose(setting.id);
    for (let box = target.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
    target.scrollIntoView();
  };
  if (choices.length) {
    choose(choices[0].value);
    for (const choice of choices) choice.addEventListener("change", () => choose(choice.value));
  }
  addEventListener("hashchange", follow);
  follow();

  for (const form of all(".filter")) {
    const rows = [...form.parentElement.querySelector("table.layers").tBodies[0].rows];
    const field = (name) => form.elements.namedItem(name);
    const filter = () => {
      const words = field("text").value.toLowerCase().split(/\s+/).filter(Boolean);
      const verdict = field("verdict")?.value ?? "";
      for (const row of rows) {
        const { label, exact, frontier } = row.dataset;
        row.hidden = !(words.every((word) => label.toLowerCase().includes(word)) &&
          (!verdict || row.dataset.verdict === verdict) &&
          (!field("exact").checked || exact === "yes") && (!field("frontier").checked || frontier === "yes"));
      }
      const left = rows.filter((row) => !row.hidden).length;
      form.querySelector("output").textContent = left === rows.length ? `${left} layers` : `${left} of ${rows.length} layers`;
    };
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    filter();  // a browser may have kept what was typed
  }

  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };

  for (const button of all("thead button")) {
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
