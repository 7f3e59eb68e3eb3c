"use strict";
(() => {
  const form = document.querySelector("form.advice");
  if (!form) return;
  const evidence = JSON.parse(document.getElementById("advice-data").textContent);
  const place = document.getElementById("recommendation");
  const field = (name) => form.elements.namedItem(name);
  const number = (value) => value.toLocaleString("en-US");
  const figures = (value) => Number(value.toPrecision(3)).toLocaleString("en-US", { maximumFractionDigits: 6 });
  const time = (seconds) => seconds < 1 ? `${figures(1000 * seconds)}\u00a0ms` : `${figures(seconds)}\u00a0s`;
  const memory = (bytes) => bytes < 1e9 ? `${figures(bytes / 1e6)}\u00a0MB` : `${figures(bytes / 1e9)}\u00a0GB`;
  const percent = (part) => `${part < 0 ? "−" : "+"}${Math.abs(100 * part).toFixed(1)}\u00a0%`;

  const element = (tag, parts, attributes = {}) => {
    const made = document.createElement(tag);
    made.append(...[parts].flat());
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };

  // Between measured sizes, and beyond them, a straight line on logarithmic axes; in proportion to D and tokens.
  const at = (points, vocab, index) => {
    const known = points.filter((point) => point[index] > 0);
    if (!known.length) return null;
    if (known.length === 1) return known[0][index] * vocab / known[0][0];
    let right = known.findIndex((point) => point[0] >= vocab);
    if (right < 0) right = known.length - 1;
    const [a, b] = [known[Math.max(right, 1) - 1], known[Math.max(right, 1)]];
    const slope = Math.log(b[index] / a[index]) / Math.log(b[0] / a[0]);
    return a[index] * (vocab / a[0]) ** slope;
  };

  const same = (a, b) => JSON.stringify(Object.entries(a).sort()) === JSON.stringify(Object.entries(b).sort());

  // The nearest vocabulary, on a logarithmic scale, at which a layer was compared that may fit, and a nearer one at which
  // none was, or null; verdicts are worth a factor of two.
  const nearest = ({ vocab, exact }) => {
    const distance = ({ vocab: other, rows }) =>
      Math.abs(Math.log(vocab / other)) + (rows.some((row) => row.verdict) ? 0 : Math.log(2));
    const settings = [...evidence.settings].sort((a, b) => distance(a) - distance(b));
    const answers = ({ rows }) => rows.some((row) => !row.reference && (row.exact || !exact));
    const setting = settings.find(answers) ?? settings[0];
    return [setting, setting === settings[0] ? null : settings[0]];
  };

  const candidates = (setting, { vocab, hidden, tokens }) => {
    const scaling = evidence.scaling;
    return setting.rows.map((row) => {
      // Options decide the work: times of a layer with other ones are those of another layer.
      const curve = scaling?.layers.find((layer) => layer.name === row.name && same(layer.options, row.options));
      const seconds = curve ? at(curve.points, vocab, 1) * (hidden / scaling.hidden) * (tokens / scaling.tokens) : null;
      const bytes = curve ? at(curve.points, vocab, 2) : null;
      return { ...row, seconds, bytes: bytes && bytes * hidden / scaling.hidden };
    });
  };

  const pace = (row, full) => row.seconds && full.seconds
    ? `its part of a step takes ${time(row.seconds)}, full softmax's ${time(full.seconds)}`
    : `it trains ${figures(row.speedUp)} times as fast as full softmax there`;

  const advise = () => {
    const asked = { vocab: Number(field("vocab").value), hidden: Number(field("hidden").value),
                    tokens: Number(field("tokens").value), tolerance: Number(field("tolerance").value),
                    exact: field("exact").checked };
    if (!form.checkValidity()) return place.replaceChildren(element("p", "Please give whole numbers: V from 2, D and tokens from 1."));
    if (!evidence.settings.length) {
      return place.replaceChildren(element("p", "There is no evidence: no two layers with a full softmax among them have been compared."));
    }
    const [setting, nearer] = nearest(asked);
    const rows = candidates(setting, asked);
    const full = rows.find((row) => row.reference);
    const speed = (row) => row.seconds && full.seconds ? full.seconds / row.seconds : row === full ? 1 : row.speedUp;
    const allowed = (row) => (row === full || (row.above !== null && row.above <= asked.tolerance)) && (!asked.exact || row.exact);
    const fitting = rows.filter((row) => allowed(row) && speed(row));
    // Equal time has the price of a slow step in its perplexity already; after equal text it has to be weighed. In equal
    // time, too, the faster one is taken of those that are no further apart than what may be given up.
    const price = (row) => row === full ? 0 : row.above ?? Infinity;
    const lowest = Math.min(...fitting.map(price));
    const level = (row) => !setting.inTime || 1 + price(row) <= (1 + lowest) * (1 + asked.tolerance);
    const rank = (a, b) => level(b) - level(a) || (level(a) ? (speed(b) ?? 0) - (speed(a) ?? 0) : price(a) - price(b)) || 0;
    fitting.sort(rank);
    let best = fitting[0] ?? full;
    if (!setting.inTime && speed(best) < 1.2) best = full;

    const evidenceLink = element("a", setting.title, { href: setting.place });
    const because = [];
    if (best === full) {
      because.push("no other layer that fits your answers is measurably faster without costing more perplexity than you would give up.");
    } else if (setting.inTime) {
      const others = fitting.filter(level).length - 1;
      because.push(`of the layers that fit your answers it ${others
        ? `is the fastest of the ${others + 1} within ${100 * asked.tolerance} % of` : "reached"} the lowest perplexity in equal training time (${percent(best.above)} against full softmax`,
        best.verdict ? `: ${best.verdict}` : "", `)${others ? `: ${pace(best, full)}` : ""}.`);
    } else {
      because.push(`it is the fastest of the layers that fit your answers: ${pace(best, full)}, and after equal text its perplexity is ${percent(best.above)} against full softmax's`,
        best.verdict ? ` (${best.verdict})` : "", ".");
    }
    if (best.note) because.push(` But ${best.note}.`);
    const said = [element("p", [element("strong", best.label), ": ", ...because], { class: "answer", id: "recommended" })];
    const notes = [["Perplexity is taken from ", evidenceLink, `, V ${number(setting.vocab)}; this layer's is a mean of ${best.seeds} seed${best.seeds > 1 ? "s" : ""}.`]];
    const factor = Math.max(asked.vocab / setting.vocab, setting.vocab / asked.vocab);
    const differs = `it differs by a factor of ${figures(factor)}, and what a layer costs in perplexity changes with V.`;
    if (nearer) {
      notes.push([element("a", nearer.title, { href: nearer.place }), `, V ${number(nearer.vocab)}, is nearer to yours, but no layer trained on its likelihood was compared with the full softmax there. As for V ${number(setting.vocab)}, ${differs}`]);
    } else if (factor > 2) {
      notes.push(`That vocabulary is not yours: ${differs}`);
    }
    if (!rows.some((row) => row.verdict)) notes.push("Too few seeds for verdicts: the perplexities are means, and small differences mean nothing.");
    if (evidence.scaling) {
      const sizes = evidence.scaling.layers.flatMap((layer) => layer.points.map((point) => point[0]));
      const [low, high] = [Math.min(...sizes), Math.max(...sizes)];
      const { tokens, hidden } = evidence.scaling;
      notes.push([`Times come from `, element("a", "measurements", { href: "#vocabularies" }), ` of the output layer at V ${number(low)} to ${number(high)}, D ${number(hidden)} and ${number(tokens)} tokens on one machine, and are taken to be in proportion to D and tokens; yours will differ, their ratios less so.`]);
      const wholeSteps = rows.filter((row) => row !== full && !(row.seconds && full.seconds) && speed(row)).map((row) => row.label);
      if (wholeSteps.length) notes.push(`Not timed with these options, their speed-ups those of whole training steps in that setting: ${wholeSteps.join(", ")}.`);
      if (asked.vocab < low || asked.vocab > high) notes.push("Your V lies outside of what was timed: the times are extrapolated.");
    } else {
      notes.push("Nothing was timed at your size: the speed-ups are those of whole training steps in that setting.");
    }
    const unknown = rows.filter((row) => !speed(row)).map((row) => row.label);
    if (unknown.length) notes.push(`Not timed: ${unknown.join(", ")}.`);
    if (!asked.exact) notes.push("Every layer can give exact probabilities; the column Likelihood says which were trained on theirs, and not on a surrogate.");
    said.push(element("ul", notes.map((note) => element("li", note)), { class: "caveats" }));

    // [heading, text, class] of each column; one with nothing in it is left away.
    const columns = [
      ["Step", (row) => row.seconds ? time(row.seconds) : ""],
      ["Speed-up", (row) => speed(row) ? `${figures(speed(row))}×` : ""],
      ["Memory", (row) => row.bytes ? memory(row.bytes) : ""],
      ["Perplexity", (row) => row === full ? "reference" : row.above === null ? "" : percent(row.above)],
      ["Verdict", (row) => row.verdict, "words"],
      ["Likelihood", (row) => row.exact ? "yes" : "no"],
      ["Fits", (row) => allowed(row) ? "yes" : "no"],
    ].filter(([, text]) => rows.some((row) => text(row)));
    const lines = [...rows].sort((a, b) => (allowed(b) - allowed(a)) || rank(a, b)).map((row) => element("tr", [
      element("th", row.label, { scope: "row" }),
      ...columns.map(([, text, kind = ""]) => element("td", text(row) || "–", { class: kind })),
    ], row === best ? { class: "chosen" } : {}));
    const head = [element("th", "Output layer", { scope: "col" }),
                  ...columns.map(([heading, , kind = ""]) => element("th", heading, { scope: "col", class: kind }))];
    const caption = "The output layer's part of a step at your size; perplexity against full softmax in the setting named above";
    const table = element("table", [
      element("caption", element("span", caption), { id: "recommendation-caption" }),
      element("thead", element("tr", head)),
      element("tbody", lines)]);
    said.push(element("div", table, { class: "scroll", tabindex: "0", role: "region", "aria-labelledby": "recommendation-caption" }));
    place.replaceChildren(...said);
  };

  form.addEventListener("input", advise);
  form.addEventListener("submit", (event) => event.preventDefault());
  advise();
})();
