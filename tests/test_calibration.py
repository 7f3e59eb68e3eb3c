import math

import numpy as np
import pytest
import torch

import lvsoftmax.calibration
from lvsoftmax.calibration import calibration_error, fit_temperature, log_power_sum
from lvsoftmax.layer import OutputLayer
from lvsoftmax.layers.full_softmax import FullSoftmax

V, D = 37, 6
COUNTS = torch.arange(V, 0, -1)


class Table(OutputLayer):
    """Log-probabilities by row: hidden vectors are row numbers."""

    def __init__(self, log_p: torch.Tensor) -> None:
        super().__init__(1, torch.arange(log_p.shape[1], 0, -1))
        self.log_p = log_p

    def log_prob(self, hidden):
        return self.log_p[hidden[:, 0].long()].log_softmax(1)


def rows(number: int) -> torch.Tensor:
    return torch.arange(number, dtype=torch.float32)[:, None]


def nll(layer, hidden, target, temperature) -> float:
    tempered = (layer.log_prob(hidden).double() / temperature).log_softmax(1)
    return -tempered.gather(1, target[:, None]).mean().item()


def test_calibration_error_by_hand():
    # Four bins. (0, 1/4]: 0.25 right; (1/4, 1/2]: 0.5 wrong, 0.375 right; (3/4, 1]: 1.0 right, 0.875 wrong.
    confidence = np.array([0.25, 0.5, 0.375, 1.0, 0.875])
    correct = np.array([True, False, True, True, False])
    # |1 - 0.25| * 1/5 + |0.5 - 0.4375| * 2/5 + |0.5 - 0.9375| * 2/5
    assert calibration_error(confidence, correct, bins=4) == pytest.approx(0.15 + 0.025 + 0.175)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0.0
    assert calibration_error(np.array([1.0 + 1e-12, 0.0]), np.array([True, False])) == pytest.approx(0.0)


@pytest.mark.parametrize("power", [0.25, 1.0, 3.0])
def test_the_sum_of_powers(power):
    log_p = (3 * torch.randn(5, V, dtype=torch.float64)).log_softmax(1)
    torch.testing.assert_close(log_power_sum(log_p, power), (log_p.exp() ** power).sum(1).log())
    log_p[:, 3] = -torch.inf
    torch.testing.assert_close(log_power_sum(log_p, power), (log_p.exp() ** power).sum(1).log())


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0, 30.0])
def test_no_other_temperature_is_better(scale):
    torch.manual_seed(1)
    layer, target = Table(scale * torch.randn(500, V)), torch.randint(V, (500,))
    target[::2] = layer.log_p[::2].argmax(1)
    found = fit_temperature(layer, rows(500), target)
    best = nll(layer, rows(500), target, found)
    assert all(nll(layer, rows(500), target, found * factor) > best for factor in (0.5, 0.95, 1.05, 2.0))
    assert (found > 1) == (scale > 1)


def test_a_temperature_that_was_put_in_comes_out():
    """Targets drawn from a distribution, a layer that is too sure by a factor of 2.5."""
    torch.manual_seed(0)
    scores = 2 * torch.randn(20_000, V)
    target = scores.softmax(1).multinomial(1).squeeze(1)
    assert fit_temperature(Table(2.5 * scores), rows(20_000), target) == pytest.approx(2.5, rel=0.02)
    assert fit_temperature(Table(scores), rows(20_000), target) == pytest.approx(1.0, rel=0.02)


def test_limits():
    scores = torch.eye(V)
    assert fit_temperature(Table(scores), rows(V), torch.arange(V)) < 0.1  # always right
    assert fit_temperature(Table(scores), rows(V), (torch.arange(V) + 1) % V) == pytest.approx(100, rel=1e-2)
    assert fit_temperature(Table(torch.zeros(V, V)), rows(V), torch.arange(V)) in (1.0, pytest.approx(100, rel=1e-2))


def test_targets_of_probability_zero_are_left_out():
    torch.manual_seed(0)
    scores, target = 3 * torch.randn(300, V), torch.randint(V, (300,))
    without = fit_temperature(Table(scores[:200]), rows(200), target[:200])
    scores[200:].scatter_(1, target[200:, None], -torch.inf)
    scores[:200].masked_fill_(torch.arange(V) == V - 1, -torch.inf)
    target[:200].clamp_(max=V - 2)
    assert fit_temperature(Table(scores), rows(300), target) == fit_temperature(
        Table(scores[:200]), rows(200), target[:200]
    )
    assert without != 1 and fit_temperature(Table(scores[200:]), rows(100), target[200:]) == 1.0


def test_blocks_change_nothing(monkeypatch):
    layer = FullSoftmax(D, COUNTS)
    hidden, target = 5 * torch.randn(100, D), torch.randint(V, (100,))
    whole = fit_temperature(layer, hidden, target)
    sizes = []
    log_prob = layer.log_prob
    monkeypatch.setattr(layer, "log_prob", lambda hidden: sizes.append(len(hidden)) or log_prob(hidden))
    monkeypatch.setattr(lvsoftmax.calibration, "_ENTRIES", 7 * V)
    monkeypatch.setattr(lvsoftmax.calibration, "_FEWEST", 1)
    assert fit_temperature(layer, hidden, target) == pytest.approx(whole, rel=1e-4)
    assert max(sizes) == 7
    assert not any(parameter.grad is not None for parameter in layer.parameters())


def test_it_takes_few_passes(monkeypatch):
    torch.manual_seed(0)
    layer, target = Table(2 * torch.randn(100, V)), torch.randint(V, (100,))
    target[::2] = layer.log_p[::2].argmax(1)
    passes = []
    derivatives = lvsoftmax.calibration._derivatives
    monkeypatch.setattr(lvsoftmax.calibration, "_derivatives", lambda *x: passes.append(1) or derivatives(*x))
    assert 0.1 < fit_temperature(layer, rows(100), target) < 10
    assert len(passes) <= 5
    assert math.isfinite(fit_temperature(layer, rows(1), target[:1]))
