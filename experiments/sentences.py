"""What the tables say, in words: which layer wins at what, how sure that is, and what it does not say."""

import math

from experiments import wording
from experiments.comparison import Comparison, Row, Survey
from experiments.reading import differing
from experiments.statistics import SEEDS_FOR_A_VERDICT

RATES = ("optim.learning_rate", "optim.output_learning_rate")


def winners(comparison: Comparison) -> dict[str, Row]:
    """Return the best finished row of the columns that the answer names."""
    best = {}
    for name in ("test", "speed", "memory"):
        pick = comparison.columns[name].best
        ranked = {row.cells[name].mean: row for row in reversed(comparison.finished) if row.cells[name]}
        if ranked:
            best[name] = ranked[pick(ranked)]
    return best


def answer(survey: Survey) -> str:
    """Say which layer wins at what, a sentence for each setting."""
    if not survey.comparisons:
        return "No run has finished, so there is nothing to compare."
    if len(survey.comparisons) == 1:
        return sentence(survey.comparisons[0])
    return "\n".join(f"{comparison.setting}: {sentence(comparison)}" for comparison in survey.comparisons)


def sentence(comparison: Comparison) -> str:
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
    best = winners(comparison)
    for name, row in best.items():
        number = comparison.columns[name].show(row.cells[name].mean)
        speed_up = row.cells["speed_up"] if row is not comparison.reference else None
        how_fast = f"{wording.times(speed_up.mean)} full softmax's speed" if speed_up else f"{number} tokens/s"
        clause = {
            "test": f"predicts best (test perplexity {number}{_how_sure(comparison, row)})",
            "speed": f"trains fastest ({how_fast}{_price(comparison, row)})",
            "memory": f"needs the least memory ({number} at its peak{_beside(comparison, row)})",
        }[name]
        clauses.setdefault(row.inline, []).append(clause)
    text = "; ".join(f"{layer} {wording.listing(parts)}" for layer, parts in clauses.items())
    return text[0].upper() + text[1:] + "."


def _how_sure(comparison: Comparison, best: Row) -> str:
    """Say whether the lowest mean is a difference."""
    if best is comparison.reference:
        alike = [row.inline for row in comparison.finished if row.verdict == "not distinguishable"]
        if not alike:
            return ", better than every other layer" if comparison.has_verdicts and _all_judged(comparison) else ""
        names = wording.listing(alike) if len(alike) <= 3 else f"{len(alike)} other layers"
        return f", not distinguishable from {names}"
    if not best.verdict:
        return ""
    gap = best.cells["difference"]
    return f", {wording.percent(gap.mean)} against full softmax: {best.verdict}"


def _price(comparison: Comparison, fastest: Row) -> str:
    """Say what the fastest layer pays in perplexity."""
    gap = fastest.cells["difference"]
    if not fastest.verdict or fastest.verdict == "better" or not gap:
        return f", {fastest.verdict} in perplexity" if fastest.verdict else ""
    if fastest.verdict == "worse":
        return f", worse by {wording.percent(gap.mean).lstrip('+')} in perplexity"
    return ", not distinguishable in perplexity"


def _beside(comparison: Comparison, least: Row) -> str:
    """Say what the reference's memory is."""
    if comparison.reference in (None, least) or not comparison.reference.cells["memory"]:
        return ""
    return f", full softmax {comparison.columns['memory'].show(comparison.reference.cells['memory'].mean)}"


def _all_judged(comparison: Comparison) -> bool:
    return all(row.verdict == "worse" for row in comparison.finished if row is not comparison.reference)


def subtitle(comparison: Comparison) -> str:
    """Name the text and what was trained."""
    runs = [run for run in comparison.runs if run.result]
    if not runs:
        return ""
    parts = [f"{runs[0].config['name']['data']}, {runs[0].result['vocabulary']:,} words in the vocabulary"]
    for axis, show in (("tokens", wording.count), ("seconds", wording.duration)):
        low, high = (pick(run.result["train"][axis] for run in runs) for pick in (min, max))
        unit = "tokens of training" if axis == "tokens" else "of training"
        parts.append(f"{show(low)} {unit} each" if show(low) == show(high) else f"{show(low)} to {show(high)} {unit}")
    parts.append(f"{runs[0].result['test']['tokens']:,} test tokens")
    if studies := sorted({str(run.config["name"]["study"]) for run in runs if run.config["name"].get("study")}):
        parts.append(f"stud{'ies' if len(studies) > 1 else 'y'} {wording.listing(studies)}")
    return "; ".join(parts)


def caveats(comparison: Comparison) -> list[str]:
    """Say what the answer does not say."""
    return list(filter(None, [
        _verdicts(comparison), _equal_other(comparison), _seeds(comparison), _machines(comparison),
        _no_reference(comparison),
        *(f"{row.label}: {row.note}." for row in comparison.rows if row.note), _lacking(comparison),
        *_conditions(comparison),
    ]))  # fmt: skip


def _verdicts(comparison: Comparison) -> str:
    if not comparison.has_verdicts:
        return ""
    judged = [row for row in comparison.rows if row.verdict]
    counts = {verdict: sum(row.verdict == verdict for row in judged)
              for verdict in ("better", "worse", "not distinguishable")}  # fmt: skip
    parts = [f"{count} {'is' if count == 1 else 'are'} {verdict}" for verdict, count in counts.items() if count]
    among = f"Of {len(judged)} layers compared with" if len(judged) > 1 else "Of one layer compared with"
    return (
        f"{among} full softmax, {wording.listing(parts)}: paired t-tests of the test loss over seeds, at 5 % for all "
        "of them together (Holm)."
    )


def _equal_other(comparison: Comparison) -> str:
    """Compare on the axis that the budget left free, and say why the orders differ."""
    stopped = [row for row in comparison.finished if row.cells.get("at_stop")]
    if len(stopped) < 2:
        return ""
    best = min(stopped, key=lambda row: row.cells["at_stop"].mean)
    equal = "training time" if comparison.stop.axis == "seconds" else "training text"
    text = (
        f"After equal {equal} ({comparison.stop}, when the first run ended) {best.inline} has the lowest validation "
        f"perplexity, {wording.perplexity(best.cells['at_stop'].mean)}."
    )
    axis, value = comparison.stop.axis, comparison.stop.value
    late = [row.inline for row in comparison.finished if any(run.curve and run.curve[0][axis] > value
                                                             for run in row.finished)]  # fmt: skip
    if late:
        text += f" No validation of {wording.listing(late)} is that early."
    full, winner = comparison.reference, winners(comparison)["test"]
    if (
        comparison.setting.in_time and full and winner is not full and full in stopped and winner in stopped
        and winner not in comparison.elsewhere
    ):  # fmt: skip
        read = winner.mean("speed") / full.mean("speed")
        own, other = (wording.perplexity(row.cells["at_stop"].mean) for row in (winner, full))
        text += (
            f" At equal time {winner.inline} read {wording.times(read)} as much text as full softmax; after equal text "
            f"its validation perplexity is {own}, full softmax's {other}."
        )
    return text


def _seeds(comparison: Comparison) -> str:
    if not comparison.runs:
        return ""
    if comparison.seeds == 1:
        return "One seed per layer: differences as small as those between two seeds of one layer mean nothing."
    told = [comparison.reference, *(comparison.elsewhere if comparison.setting.in_time else [])]
    few = [row.inline for row in comparison.finished if row not in told and not row.verdict]
    if not few:
        return ""
    which = wording.listing(few) if len(few) <= 4 else f"{len(few)} layers"
    several = comparison.setting.in_time and len({run.machine for run in comparison.runs}) > 1
    where = ", on the same machine" if several else ""
    return f"No verdict on {which}: that takes {SEEDS_FOR_A_VERDICT} seeds that full softmax has, too{where}."


def _machines(comparison: Comparison) -> str:
    """Say what runs of several machines cannot tell."""
    if not comparison.elsewhere:
        return ""
    layers = wording.listing([row.inline for row in comparison.elsewhere])
    lost = "in equal time no verdict, and no speed-up" if comparison.setting.in_time else "no speed-up"
    return f"{layers[0].upper()}{layers[1:]} trained on other machines than full softmax's runs: {lost}."


def _no_reference(comparison: Comparison) -> str:
    if len(comparison.rows) > 1 and comparison.reference is None:
        return "No run of full softmax has finished: differences to it and speed-ups are missing."
    return ""


def _lacking(comparison: Comparison) -> str:
    lacking = [row for row in comparison.finished if any(run.lacks_words for run in row.runs)]
    if not lacking:
        return ""
    layers = wording.listing([f"{row.inline} ({wording.most(1 - row.cells['coverage'].mean)})" for row in lacking])
    return (
        f"Some of the test tokens have the probability zero in {layers}: an infinite perplexity, to be compared "
        "by the smoothed one. Infinite losses are not drawn."
    )


def _conditions(comparison: Comparison) -> list[str]:
    unlike = differing(comparison.runs)
    notes = []
    if any(name in unlike for name in RATES):
        notes.append("Learning rates differ between layers; they stand beside the runs.")
    if names := [name for name in unlike if name not in RATES]:
        notes.append(f"The runs differ in more than layer and seed: {', '.join(names)}.")
    return notes


def overview(survey: Survey) -> str:
    """Say what the page is about, in a line."""
    runs = survey.runs
    if not runs:
        return ""
    texts = list(dict.fromkeys(comparison.setting.data for comparison in survey.comparisons))
    seeds = max(comparison.seeds for comparison in survey.comparisons)
    parts = [wording.listing(texts), f"{len(survey.rows)} output layers", f"{len(runs)} runs"]
    parts.append(f"up to {seeds} seeds" if seeds > 1 else "one seed")
    return "; ".join(parts)


def growth_sentence(exponents: dict[str, float]) -> str:
    """Say which layers' step times grow least and most with V."""
    if not exponents:
        return ""
    low, high = min(exponents, key=exponents.__getitem__), max(exponents, key=exponents.__getitem__)
    if low == high or not all(map(math.isfinite, exponents.values())):
        return ""
    least, most = (f"{name[0].lower()}{name[1:]}" for name in (low, high))
    return (
        f"The time of {least} grows least, as V to the power of {wording.power(exponents[low])}; that of {most} most, "
        f"with {wording.power(exponents[high])}."
    )
