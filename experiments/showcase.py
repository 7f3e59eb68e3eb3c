"""The README's results, made from the runs that ship: ``python -m experiments.showcase``, or ``make results-table``.

Reads ``runs/<text>/<run>``, ``studies/<study>/study.json`` and ``benchmark/<study>/results.csv`` of
``experiments/results``. Writes, between two marks in the README, a table of all layers in all settings that have
verdicts and, folded away, a table and a figure for each setting; and the report, beside the runs.
"""

from pathlib import Path

from experiments import report, stills, wording
from experiments.cli import CONFIGS
from experiments.comparison import REFERENCE, Comparison, Row, Survey, survey
from experiments.glance import Glance
from experiments.scaling import Scaling
from experiments.sentences import sentence

README = CONFIGS.parent / "README.md"
BEGIN, END = "<!-- the results: make results-table -->\n", "<!-- end of the results -->\n"
NOTHING = "No runs ship yet: `make compare` makes some.\n"
MOST = 20
"""Rows of a table that people read; what has more is told in a sentence, and shown on the page."""
HEADER = (
    "| output layer | test perplexity | against full softmax | verdict | speed-up | peak memory | FLOPs per token "
    "| seeds |\n| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |\n"
)


def section(found: Survey, figures: dict[str, str], growth: str = "") -> str:
    """Return what stands between the marks.

    Args:
        found: the runs that ship.
        figures: the address of a comparison's figure, by its slug.
        growth: what is said of step times.
    """
    compared = [comparison for comparison in found.comparisons if len(comparison.finished) > 1]
    if not compared:
        return NOTHING
    parts = []
    if glance := Glance.of(compared):
        parts += [overall(glance), _picture(glance.comparisons[-1], figures)]
    for comparison in compared:
        if len(comparison.rows) > MOST:
            told, rest = f" All {len(comparison.rows)}: in the report.", ""
        else:
            drawn = glance is None or comparison is not glance.comparisons[-1]
            told, rest = "", _folded(table(comparison), _picture(comparison, figures) if drawn else "")
        parts += [f"**{_title(comparison)}**: {sentence(comparison)}{told}\n", rest]
    note = (
        "Perplexities are exact; in brackets 95 % intervals over seeds, each for its layer alone. Verdicts are paired "
        "by seed and corrected for the number of layers (Holm), so that *not distinguishable* may stand beside an "
        "interval without zero; it does not mean equal. Without three seeds there is no verdict.\n"
    )
    return "\n".join(filter(None, [*parts, note, growth]))


def overall(glance: Glance) -> str:
    """Return the table of all layers in all settings as Markdown."""
    lines = []
    for label, rows in glance.rows:
        cells = [_outcome(row, comparison) for row, comparison in zip(rows, glance.comparisons, strict=True)]
        lines.append(f"| {' | '.join([label[0].lower() + label[1:], *cells])} |\n")
    header = ["output layer", *map(_title, glance.comparisons)]
    elsewhere = any(comparison.elsewhere for comparison in glance.comparisons)
    or_not = " or, where no speed is said, was trained on another machine" if elsewhere else ""
    return (
        "Test perplexity, and how many times as fast as with the full softmax a model trains: **in bold** what is "
        "better than the full softmax, *in italics* what is worse; the rest cannot be told apart from "
        f"it{or_not}.\n\n"
        f"| {' | '.join(header)} |\n| --- |{' ---: |' * len(glance.comparisons)}\n{''.join(lines)}"
    )


def _outcome(row: Row | None, comparison: Comparison) -> str:
    if row is None:
        return ""
    if not row.finished:
        return row.note
    mark = {"better": "**", "worse": "*"}.get(row.verdict, "")
    text = f"{mark}{wording.perplexity(row.perplexity)}{mark}"
    return f"{text}, {_shown(comparison, row, 'speed_up')}" if row.cells["speed_up"] else text


def _picture(comparison: Comparison, figures: dict[str, str]) -> str:
    place = figures.get(comparison.setting.slug)
    return f"![Test perplexity against training time, {comparison.setting}]({place})\n" if place else ""


def _folded(*parts: str) -> str:
    """Hide what is for a second look behind a line to click on."""
    body = "\n".join(filter(None, parts))
    return f"<details><summary>All numbers</summary>\n\n{body}\n</details>\n"


def _title(comparison: Comparison) -> str:
    return f"{comparison.setting}, {comparison.vocabulary:,} words"


def table(comparison: Comparison) -> str:
    """Return the main table as Markdown."""
    lines = []
    for row in comparison.rows:
        cells = [_shown(comparison, row, name) for name in ("test", "difference")]
        cells.append("reference" if row is comparison.reference else row.verdict or "none")
        cells += [_shown(comparison, row, name) for name in ("speed_up", "memory", "flops")]
        note = f" ({row.note})" if row.note else ""
        lines.append(f"| {' | '.join([row.inline + note, *cells, str(len(row.finished))])} |\n")
    if comparison.unigram:
        lines.append(f"| unigram frequencies | {wording.perplexity(comparison.unigram['test'])} | | | | | | |\n")
    return HEADER + "".join(lines)


def _shown(comparison: Comparison, row: Row, name: str) -> str:
    cell, column = row.cells[name], comparison.columns[name]
    if cell is None or (name == "difference" and row is comparison.reference):
        return ""
    ends = f" ({column.show(cell.low)} to {column.show(cell.high)})" if column.spread and cell.low is not None else ""
    return column.show(cell.mean) + ends


def growth(scaling: Scaling, figure: str) -> str:
    """Return, for each layer, how many times faster than the full softmax it is at each size of vocabulary.

    Layers are raced in groups, at different moments: the ratios are those to the full softmax of the same rounds.

    Args:
        scaling: measured step times.
        figure: the address of their picture.
    """
    paces = {
        one.contestant: {point.vocab: 1 / point.over_full for point in one.points if point.over_full}
        for one in scaling.growths
    }
    sizes = [vocab for vocab in scaling.vocabs if vocab in paces.get(REFERENCE, {})]
    if not sizes:
        return ""
    lines = []
    for one in sorted(scaling.growths, key=lambda one: -paces[one.contestant].get(sizes[-1], 0.0)):
        own = paces[one.contestant]
        cells = [wording.times(own[vocab]) if vocab in own else "" for vocab in sizes]
        power = one.power("seconds")
        label = one.label[0].lower() + one.label[1:]
        exponent = wording.power(power.exponent) if power else ""
        lines.append(f"| {' | '.join([label, *cells, exponent])} |\n")
    header = ["output layer", *(f"V {vocab:,}" for vocab in sizes), "power of V"]
    known = [scaling.conditions[key] for key in ("processor", "precision") if key in scaling.conditions]
    threads = scaling.conditions["threads"]
    known += [f"{threads} thread" + ("" if threads == "1" else "s")]
    if rounds := scaling.conditions.get("rounds"):
        known.append(f"medians of {rounds} rounds")
    where = ", ".join([f"{scaling.tokens:,} tokens of width {scaling.hidden:,}", *known])
    table = f"| {' | '.join(header)} |\n| --- |{' ---: |' * (len(header) - 1)}\n{''.join(lines)}"
    return (
        "**How much faster than the full softmax, by the size of the vocabulary**: loss and all gradients of a step of "
        f"the output layer alone; {where}.\n\n{_folded(table)}\n"
        f"![Time of a step against the size of the vocabulary]({figure})\n"
    )


def write(readme: Path, results: Path) -> str:
    """Write figures and report into ``results``, and the section into the README; return the section.

    Raises:
        ValueError: the README has no place for it.
    """
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found_end:
        raise ValueError(f"{readme} lacks the lines {BEGIN.strip()} and {END.strip()}; put them back")
    folders, studies, benchmarks = report.shipped_files(results)
    figures = {}
    found = survey(folders, "Results that ship", studies)
    if found.comparisons:
        report.write(folders, results / "report", "Results that ship", studies, benchmarks, results)
        for comparison in found.comparisons:
            shown = report.Shown.of(comparison)
            if "frontier-seconds" in shown.charts and 1 < len(comparison.finished) and len(comparison.rows) <= MOST:
                path = results / f"{shown.slug}.svg"
                path.write_bytes(stills.to_files(shown.charts["frontier-seconds"])["svg"])
                figures[shown.slug] = path.relative_to(readme.parent).as_posix()
    scaling, _ = Scaling.read_all(benchmarks)
    picture = (results / "report" / "figures" / "scaling-seconds.svg").relative_to(readme.parent).as_posix()
    text = section(found, figures, growth(scaling, picture) if scaling else "")
    readme.write_text(before + BEGIN + text + END + after, "utf-8")
    return text


def main() -> None:
    """Write the README's results and say what is in them."""
    try:
        print(write(README, report.SHIPPED))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
