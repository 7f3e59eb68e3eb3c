"""Layers by settings: the one table to look at first, where several settings have verdicts. Imports no torch."""

import dataclasses
import statistics
from collections.abc import Sequence

from experiments.comparison import Comparison, Row


@dataclasses.dataclass(frozen=True)
class Glance:
    """What became of each layer in each setting.

    Attributes:
        comparisons: the columns, settings with verdicts against full softmax.
        rows: a layer's label and its row in each of the settings, None where it was not run. Full softmax is first;
            then come layers in many settings before those in few, and among these the lowest mean difference to full
            softmax.
    """

    comparisons: list[Comparison]
    rows: list[tuple[str, list[Row | None]]]

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> "Glance | None":
        """Lay the settings side by side; None where there are not two to do that with."""
        judged = [comparison for comparison in comparisons if comparison.has_verdicts]
        if len(judged) < 2:
            return None
        found: dict[str, list[Row | None]] = {row.label: [None] * len(judged) for one in judged for row in one.rows}
        for place, comparison in enumerate(judged):
            for row in comparison.rows:
                found[row.label][place] = row
        references = {comparison.reference.label for comparison in judged}

        def order(labelled: tuple[str, list[Row | None]]) -> tuple[bool, int, float, str]:
            label, rows = labelled
            differences = [row.difference.interval.mean for row in rows if row and row.difference]
            return label not in references, -len(differences), statistics.fmean(differences or [0.0]), label

        return cls(judged, sorted(found.items(), key=order))
