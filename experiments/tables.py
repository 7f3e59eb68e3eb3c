"""The numbers as text: CSV files, unrounded, and the main table for a terminal."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from experiments import wording
from experiments.breakdown import Bands, Sweep
from experiments.comparison import Comparison, Survey


def to_csv(lines: Sequence[dict[str, Any]], header: Sequence[str] = ()) -> str:
    """Return lines under the header that the first one says, or the one given where there is none."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(lines[0]) if lines else list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def results_csv(survey: Survey) -> str:
    """Return one line per run, in the order of the tables."""
    lines = [
        {"text": comparison.setting.data, "budget": comparison.setting.budget_in_words.replace("\u00a0", " ")}
        | run.record()
        | {"learning_rate": run.config.get("optim", {}).get("learning_rate"), "revision": run.revision,
           "machine": run.machine}
        for comparison in survey.comparisons for run in comparison.runs
    ]  # fmt: skip
    return to_csv(lines, ["layer", "seed", "status", "test_perplexity", "folder"])


def layers_csv(survey: Survey) -> str:
    """Return one line per layer and setting: means, intervals, differences, verdicts."""
    return to_csv([line for comparison in survey.comparisons for line in _layers(comparison)], ["layer"])


def _layers(comparison: Comparison) -> Iterable[dict[str, Any]]:
    for row in comparison.rows:
        line: dict[str, Any] = {
            "text": comparison.setting.data,
            "budget": comparison.setting.budget_in_words.replace("\u00a0", " "),
            "layer": row.label,
            "seeds": len(row.finished),
            "note": row.note,
        }
        for name in ("test", "smoothed", "difference", "at_stop"):
            cell = row.cells.get(name)
            line |= {name: cell and cell.mean, f"{name}_low": cell and cell.low, f"{name}_high": cell and cell.high}
        line |= {"verdict": row.verdict, "p": row.difference and row.difference.p,
                 "p_corrected": row.difference and row.difference.corrected}  # fmt: skip
        for name in ("speed", "speed_up", "output_share", "memory", "parameters", "flops"):
            cell = row.cells[name]
            line[name] = cell and cell.mean
        yield line


def bands_csv(survey: Survey) -> str:
    """Return the loss of each layer by frequency band."""
    lines = [
        {"text": comparison.setting.data, "budget": comparison.setting.budget_in_words.replace("\u00a0", " "),
         "layer": row.label, "words": label.replace("–", "-"), "share": share,
         "relative": bands.relative, "nats": loss}
        for comparison in survey.comparisons if (bands := Bands.of(comparison))
        for row, losses in bands.rows
        for label, share, loss in zip(bands.labels, bands.shares, losses, strict=True)
    ]  # fmt: skip
    return to_csv(lines, ["layer"])


def sweeps_csv(sweeps: Sequence[Sweep]) -> str:
    """Return perplexity by the number of drawn words."""
    lines = [
        {"text": sweep.comparison.setting.data, "layer": line.label, "samples": number,
         "perplexity": row.cells["test"].mean, "low": row.cells["test"].low, "high": row.cells["test"].high,
         "seeds": len(row.finished)}
        for sweep in sweeps for line in sweep.lines for number, row in line.points
    ]  # fmt: skip
    return to_csv(lines, ["layer"])


def search_csv(survey: Survey) -> str:
    """Return every learning rate tried."""
    lines = [
        {"study": record.name, "layer": search.layer, "learning_rate": trial.rate, "valid_nll": trial.loss,
         "seconds": trial.seconds, "chosen": trial.rate == search.chosen, "run": trial.run}
        for record in survey.studies for search in record.searches for trial in search.trials
    ]  # fmt: skip
    return to_csv(lines, ["layer"])


def text_table(survey: Survey) -> str:
    """Return the main tables for a terminal."""
    tables = []
    for comparison in survey.comparisons:
        title = f"{comparison.setting}\n" if len(survey.comparisons) > 1 else ""
        tables.append(title + _text_table(comparison))
    return "\n\n".join(tables) or "Output layer: none"


def _text_table(comparison: Comparison) -> str:
    names = [name for name in comparison.columns if name not in ("at_stop", "flops")]
    verdict = comparison.has_verdicts
    lines = [["Output layer", *(comparison.columns[name].heading for name in names), *["Verdict"] * verdict]]
    for row in comparison.rows:
        cells = [comparison.columns[name].show(row.cells[name].mean) if row.cells[name] else "–" for name in names]
        lines.append([row.label + (f" ({row.note})" if row.note else ""), *cells, *[row.verdict or "–"] * verdict])
    if comparison.unigram:
        rest = [""] * (len(lines[0]) - 2)
        lines.append(["Unigram frequencies", wording.perplexity(comparison.unigram["test"]), *rest])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([texts[0], "-" * max(map(len, texts)), *texts[1:]])
