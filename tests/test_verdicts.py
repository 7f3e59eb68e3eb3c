"""Statistics against numbers worked out by hand, or taken from printed tables of Student's t."""

import math

import pytest

from experiments.statistics import Difference, Interval, Power, holm, judged

T_2 = 4.302653  # two-sided 5 % points of Student's t with 2 and 3 degrees of freedom
T_3 = 3.182446


def test_interval_of_three_by_hand():
    found = Interval.of([1.0, 2.0, 3.0])  # variance 1, standard error 1 / sqrt(3)
    assert found.mean == 2 and found.number == 3
    assert found.high - found.mean == pytest.approx(T_2 / math.sqrt(3), rel=1e-6)
    assert found.mean - found.low == pytest.approx(T_2 / math.sqrt(3), rel=1e-6)


def test_interval_of_two_by_hand():
    found = Interval.of([0.0, 2.0])  # t of one degree of freedom: tan(0.475 pi) = 12.7062
    assert found.high == pytest.approx(1 + math.tan(0.475 * math.pi), rel=1e-9)


def test_one_value_and_infinite_ones_have_no_interval():
    assert Interval.of([5.0]) == Interval(5.0, None, None, 1)
    assert Interval.of([math.inf, 1.0]) == Interval(math.inf, None, None, 2)
    with pytest.raises(ValueError, match="values is empty"):
        Interval.of([])


def test_differences_are_paired_by_seed_and_not_by_place():
    # Seeds move both by far more than the layers differ: unpaired, nothing could be said.
    reference = {1: 5.0, 2: 6.0, 3: 7.0, 4: 8.0}
    own = {4: 8.11, 3: 7.09, 2: 6.11, 1: 5.09, 9: 100.0}
    found = judged({"own": Difference.paired(own, reference)})["own"]
    # gaps .09 .11 .09 .11: mean .1, variance 4 * .01**2 / 3, standard error .02 / sqrt(3) / 2
    error = 0.01 / math.sqrt(3)
    assert found.interval.mean == pytest.approx(0.1) and found.interval.number == 4
    assert found.interval.high == pytest.approx(0.1 + T_3 * error, rel=1e-6)
    assert found.verdict == "worse"
    turned = judged({"own": Difference.paired(reference, own)})["own"]
    assert turned.verdict == "better" and turned.interval.mean == pytest.approx(-0.1)


def test_p_value_by_hand():
    # Gaps 1, 2, 3: t = 2 sqrt(3); with two degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t^2).
    found = Difference.paired({1: 1.0, 2: 2.0, 3: 3.0}, dict.fromkeys((1, 2, 3), 0.0))
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)


@pytest.mark.parametrize("seeds", [1, 2])
def test_no_verdict_below_three_pairs_however_large_the_difference(seeds):
    own = {seed: 9.0 + seed / 1000 for seed in range(seeds)}
    found = judged({"own": Difference.paired(own, dict.fromkeys(range(9), 1.0))})["own"]
    assert found.verdict is None and found.p is None and found.interval.number == seeds


def test_nothing_to_pair():
    assert Difference.paired({1: 1.0}, {2: 1.0}) is None
    assert judged({"a": None}) == {"a": None}


def test_equal_losses_are_not_distinguishable_and_equal_gaps_are():
    reference = {1: 1.0, 2: 2.0, 3: 3.0}
    found = judged({
        "same": Difference.paired(reference, reference),
        "shifted": Difference.paired({1: 1.5, 2: 2.5, 3: 3.5}, reference),
        "infinite": Difference.paired(dict.fromkeys(reference, math.inf), reference),
    })  # fmt: skip
    assert found["same"].verdict == "not distinguishable" and found["shifted"].verdict == "worse"
    assert found["infinite"].verdict is None and found["infinite"].interval.mean == math.inf
    both = Difference.paired(dict.fromkeys(reference, math.inf), dict.fromkeys(reference, math.inf))
    assert both.interval.mean == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_verdict_is_corrected_for_the_number_of_layers():
    reference = dict.fromkeys((1, 2, 3), 0.0)
    one = Difference.paired({1: 0.9, 2: 1.0, 3: 1.5}, reference)
    assert 0.02 < one.p < 0.03
    assert judged({"a": one})["a"].verdict == "worse"
    many = judged({"a": one} | {f"b{index}": Difference.paired({1: -1.0, 2: 0.1, 3: 1.0}, reference) for index in "12"})
    assert many["a"].corrected == pytest.approx(3 * one.p) and many["a"].verdict == "not distinguishable"


def test_false_verdicts_are_as_rare_as_promised():
    import numpy as np

    random = np.random.default_rng(1)
    trials, wrong = 400, 0
    for _ in range(trials):
        loss = random.normal(size=(6, 4))
        reference = dict(enumerate(loss[0]))
        found = judged({str(row): Difference.paired(dict(enumerate(loss[row])), reference) for row in range(1, 6)})
        wrong += any(one.verdict != "not distinguishable" for one in found.values())
    assert wrong / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_power_law_is_recovered_with_its_margin():
    sizes = [10.0, 100.0, 1000.0]
    exact = Power.fitted(sizes, [3 * size**0.5 for size in sizes])
    assert exact.exponent == pytest.approx(0.5) and exact.factor == pytest.approx(3) and exact.margin < 1e-6
    # log10 values 0, 1.3, 2: slope 1, residuals -.1, .2, -.1; stderr sqrt(.06 / 1 / 2); t of one degree 12.7062
    bent = Power.fitted(sizes, [1.0, 10**1.3, 100.0])
    assert bent.exponent == pytest.approx(1)
    assert bent.margin == pytest.approx(math.tan(0.475 * math.pi) * math.sqrt(0.03))
    assert Power.fitted(sizes[:2], [1.0, 10.0]).margin is None
    assert Power.fitted([10.0, 10.0], [1.0, 2.0]) is None and Power.fitted(sizes, [0.0, 1.0, 2.0]) is None
