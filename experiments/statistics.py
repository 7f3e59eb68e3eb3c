"""What a few seeds can tell: intervals of means, differences paired by seed, and verdicts.

Everything is on the scale it is given; for perplexities that is the loss in nats, the logarithm of perplexity, where
differences between layers are alike at any level. SciPy has the distributions.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
SEEDS_FOR_A_VERDICT = 3
"""Two differences have an interval, but one that says nothing (Student's t has one degree of freedom)."""

Verdict = Literal["better", "worse", "not distinguishable"]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds, and the interval that covers it in 95 % of cases; none from one seed."""

    mean: float
    low: float | None
    high: float | None
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Return mean and Student's t-interval; of values that are not all finite, the mean alone.

        Raises:
            ValueError: there are no values.
        """
        if not len(values):
            raise ValueError("values is empty: a mean needs at least one")
        array = np.asarray(values, np.float64)
        mean = math.fsum(array) / len(array)
        if len(array) < 2 or not np.isfinite(array).all():
            return cls(mean, None, None, len(array))
        half = stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1) * stats.sem(array)
        return cls(mean, mean - half, mean + half, len(array))

    def transformed(self, function: Callable[[float], float]) -> "Interval":
        """Return the interval on another scale, to which a rising function leads."""
        low, high = (None if end is None else _finite(function, end) for end in (self.low, self.high))
        return Interval(_finite(function, self.mean), low, high, self.number)


def _finite(function: Callable[[float], float], value: float) -> float:
    """Apply a function whose values may be too large for a float, as the end of a wide interval's may."""
    try:
        return function(value)
    except OverflowError:
        return math.inf


@dataclasses.dataclass(frozen=True)
class Difference:
    """Own minus reference, paired by seed.

    Attributes:
        interval: of the mean difference, by itself: not corrected for the number of layers.
        p: probability of a mean difference as large if there were none, by the paired t-test; None without a test.
        corrected: the same after :func:`holm`; None without a test.
    """

    interval: Interval
    p: float | None
    corrected: float | None = None

    @classmethod
    def paired(cls, own: Mapping[int, float], reference: Mapping[int, float]) -> "Difference | None":
        """Compare values by seed, over the seeds that both have; None where there is none."""
        seeds = sorted(own.keys() & reference.keys())
        if not seeds:
            return None
        gaps = [0.0 if own[seed] == reference[seed] else own[seed] - reference[seed] for seed in seeds]
        interval = Interval.of(gaps)
        if len(gaps) < SEEDS_FOR_A_VERDICT or interval.low is None:
            return cls(interval, None)
        if interval.low == interval.high:  # a t of 0 / 0, or of a number by 0
            return cls(interval, 0.0 if interval.mean else 1.0)
        return cls(interval, float(stats.ttest_1samp(gaps, 0.0).pvalue))

    @property
    def verdict(self) -> Verdict | None:
        """Whether the layer's loss is lower or higher than the reference's; None without a test."""
        if self.corrected is None:
            return None
        if self.corrected >= 1 - CONFIDENCE:
            return "not distinguishable"
        return "better" if self.interval.mean < 0 else "worse"


def judged(differences: Mapping[str, Difference | None]) -> dict[str, Difference | None]:
    """Return differences to one reference with their p-values corrected for how many there are."""
    tested = {name: one.p for name, one in differences.items() if one is not None and one.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        name: dataclasses.replace(one, corrected=corrected[name]) if one is not None and name in corrected else one
        for name, one in differences.items()
    }


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected so that the chance of any false verdict among them stays below the level.

    Holm 1979: the k-th smallest of m is multiplied by m - k + 1, and none falls below the one before it.
    """
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1))
    return np.minimum(corrected, 1.0).tolist()


@dataclasses.dataclass(frozen=True)
class Power:
    """A power law ``value = factor * size ** exponent`` through measured points.

    Attributes:
        exponent: slope on logarithmic axes, by least squares.
        margin: half the width of its 95 % interval; None from two points.
        factor: the value at size 1.
    """

    exponent: float
    margin: float | None
    factor: float

    @classmethod
    def fitted(cls, sizes: Sequence[float], values: Sequence[float]) -> "Power | None":
        """Fit positive values; None with fewer than two different sizes."""
        if len(set(sizes)) < 2 or min(values) <= 0:
            return None
        line = stats.linregress(np.log(sizes), np.log(values))
        degrees = len(sizes) - 2
        margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * line.stderr) if degrees else None
        return cls(float(line.slope), margin, float(np.exp(line.intercept)))
