"""Run folders in, one page out: which output layer wins at what, with the evidence.

``python -m experiments.report outputs/sotu/* --output outputs/report`` writes

- ``report.html``: one self-contained page that works from a file, offline;
- ``results.csv``: one line per run, unrounded;
- ``perplexity.svg``: validation perplexity against training time, for documents.

The same folders give the same bytes. Nothing here imports torch.
"""

import argparse
import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

from experiments import wording
from experiments.comparison import Bands, Comparison, Row, compare, conditions, differing
from experiments.drawing import band_figure, curve_figure, still_figure

TEMPLATES = Path(__file__).parent / "templates"


def winners(comparison: Comparison) -> dict[str, Row]:
    """Return the best finished row of the columns that the answer names."""
    best = {}
    for name in ("test", "speed", "memory"):
        pick = comparison.columns[name].best
        ranked = {row.cells[name].mean: row for row in reversed(comparison.finished) if row.cells[name]}
        if ranked:
            best[name] = ranked[pick(ranked)]
    return best


def answer(comparison: Comparison) -> str:
    """Say in one plain sentence which layer wins at what."""
    finished = comparison.finished
    if not finished:
        return "No run has finished, so there is nothing to compare."
    if len(finished) == 1:
        number = wording.perplexity(finished[0].cells["test"].mean)
        return (
            f"Only {finished[0].inline} has finished, with a test perplexity of {number}; one layer is no comparison."
        )
    clauses: dict[str, list[str]] = {}
    for name, row in winners(comparison).items():
        number = comparison.columns[name].show(row.cells[name].mean)
        speed_up = row.cells["speed_up"] if row is not comparison.reference else None
        how_fast = f"{wording.times(speed_up.mean)} full softmax's speed" if speed_up else f"{number} tokens/s"
        clause = {
            "test": f"predicts best (test perplexity {number})",
            "speed": f"trains fastest ({how_fast})",
            "memory": f"needs the least memory ({number} at its peak)",
        }[name]
        clauses.setdefault(row.inline, []).append(clause)
    sentence = "; ".join(f"{layer} {wording.listing(parts)}" for layer, parts in clauses.items())
    return sentence[0].upper() + sentence[1:] + "."


def caveats(comparison: Comparison) -> list[str]:
    """Say what the answer does not say."""
    notes = []
    stopped = [row for row in comparison.finished if row.cells["at_stop"]] if comparison.stop else []
    if len(stopped) > 1:
        best = min(stopped, key=lambda row: row.cells["at_stop"].mean)
        equal = "training time" if comparison.stop.axis == "seconds" else "training text"
        notes.append(
            f"After equal {equal} ({comparison.stop}, when the first run ended) {best.inline} has the lowest "
            f"validation perplexity, {wording.perplexity(best.cells['at_stop'].mean)}."
        )
    if comparison.seeds == 1:
        notes.append("One seed per layer: differences as small as those between two seeds of one layer mean nothing.")
    elif comparison.seeds > 1:
        notes.append(f"Means over up to {comparison.seeds} seeds; no test of significance has been made.")
    if len(comparison.rows) > 1 and comparison.reference is None:
        notes.append("No run of full softmax has finished: differences to it and speed-ups are missing.")
    notes += [f"{row.label}: {row.note}." for row in comparison.rows if row.note]
    if lacking := [row for row in comparison.finished if any(run.lacks_words for run in row.runs)]:
        layers = wording.listing([f"{row.inline} ({wording.most(1 - row.cells['coverage'].mean)})" for row in lacking])
        notes.append(
            f"Some of the test tokens have the probability zero in {layers}: an infinite perplexity, to be compared "
            "by the smoothed one. Infinite losses are not drawn."
        )
    if names := [name for name in differing(comparison.runs) if name != "optim.output_learning_rate"]:
        notes.append(f"The runs differ in more than layer and seed: {', '.join(names)}.")
    return notes


def subtitle(comparison: Comparison) -> str:
    """Name the text and the budget."""
    runs = [run for run in comparison.runs if run.result]
    if not runs:
        return ""
    parts = [f"{runs[0].config['name']['data']}, {runs[0].result['vocabulary']:,} words in the vocabulary"]
    for axis, show in (("tokens", wording.count), ("seconds", wording.duration)):
        low, high = (pick(run.result["train"][axis] for run in runs) for pick in (min, max))
        unit = "tokens of training" if axis == "tokens" else "of training"
        parts.append(f"{show(low)} {unit} each" if show(low) == show(high) else f"{show(low)} to {show(high)} {unit}")
    return "; ".join([*parts, f"{runs[0].result['test']['tokens']:,} test tokens"])


def results_csv(comparison: Comparison) -> str:
    """Return one line per run, in the order of the table."""
    lines = [run.record() for run in comparison.runs]
    stream = io.StringIO()
    header = list(lines[0]) if lines else ["layer", "seed", "status", "test_perplexity", "folder"]
    writer = csv.DictWriter(stream, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def text_table(comparison: Comparison) -> str:
    """Return the main table for a terminal."""
    names = [name for name in comparison.columns if name not in ("valid", "at_stop")]
    lines = [["Output layer", *(comparison.columns[name].heading for name in names)]]
    for row in comparison.rows:
        cells = [comparison.columns[name].show(row.cells[name].mean) if row.cells[name] else "–" for name in names]
        lines.append([row.label + (f" ({row.note})" if row.note else ""), *cells])
    if comparison.unigram:
        lines.append(["Unigram frequencies", wording.perplexity(comparison.unigram["test"]), *[""] * (len(names) - 1)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])


def html(comparison: Comparison) -> str:
    """Return the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    bands = Bands.of(comparison)
    figures = {}
    if any(run.curve for run in comparison.runs):
        figures |= {f"curve-{axis}": curve_figure(comparison, axis) for axis in ("seconds", "tokens")}
    if bands:
        figures["bands"] = band_figure(bands)
    unlike = differing(comparison.runs)
    shared = conditions(comparison.runs[0]) if comparison.runs else {}
    context = {
        "comparison": comparison,
        "subtitle": subtitle(comparison),
        "answer": answer(comparison),
        "caveats": caveats(comparison),
        "winners": winners(comparison) if len(comparison.finished) > 1 else {},
        "bands": bands,
        "figures": {name: _script(figure) for name, figure in figures.items()},
        "differing": unlike,
        "shared": {key: value for key, value in sorted(shared.items()) if key not in unlike},
        "conditions": conditions,
        "wording": wording,
        "plotly": Markup(plotly.offline.get_plotlyjs()) if figures else "",
        "style": Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "script": Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
    }
    return environment.get_template("report.html.j2").render(context)


def _script(figure: dict[str, Any]) -> Markup:
    """Return a figure as JSON that cannot end the script element around it."""
    return Markup(json.dumps(figure, allow_nan=False).replace("</", "<\\/"))


def write(folders: Iterable[Path], output: Path, title: str) -> Comparison:
    """Write ``report.html``, ``results.csv`` and ``perplexity.svg`` about the run folders into ``output``."""
    comparison = compare(folders, title)
    output.mkdir(parents=True, exist_ok=True)
    files = {
        "report.html": html(comparison),
        "results.csv": results_csv(comparison),
        "perplexity.svg": still_figure(comparison),
    }
    for name, text in files.items():
        (output / name).write_text(text, encoding="utf-8")
    return comparison


def main() -> None:
    """Write the report of the folders named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, default=Path("outputs/report"), help="where to write (%(default)s)")
    parser.add_argument("--title", default="Output layers compared", help="the page's title")
    arguments = parser.parse_args()
    comparison = write(arguments.folders, arguments.output, arguments.title)
    print(text_table(comparison))
    for name, reason in comparison.left_out:
        print(f"left out: {name}: {reason}")
    print(arguments.output / "report.html")


if __name__ == "__main__":
    main()
