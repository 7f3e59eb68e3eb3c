"""Learning-rate schedules against their formulas."""

import inspect
import json
import math
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from lvsoftmax.schedule import Constant, Cosine, Plateau, Zaremba

CONFIGS = Path(__file__).parents[1] / "configs" / "schedule"


def test_constant_is_one_and_has_no_memory():
    schedule = Constant()
    schedule.observe(5.0)
    assert schedule.factor(7, 0.9) == 1.0
    assert schedule.state_dict() == {} and not schedule.depends_on_budget


def test_zaremba_halves_after_the_flat_epochs():
    schedule = Zaremba(flat_epochs=4, decay=0.5)
    assert [schedule.factor(epoch, 0.0) for epoch in range(7)] == [1, 1, 1, 1, 0.5, 0.25, 0.125]
    assert not schedule.depends_on_budget


def test_cosine_rises_over_the_warmup_and_falls_to_the_final_share():
    schedule = Cosine(warmup=0.2, final=0.1)
    progress = [0.0, 0.1, 0.2, 0.4, 0.6, 1.0, 1.5]
    falling = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)) for share in (0.0, 0.25, 0.5, 1.0, 1.0)]
    assert [schedule.factor(0, p) for p in progress] == pytest.approx([0.0, 0.5, *falling])
    assert schedule.depends_on_budget
    assert Cosine(warmup=0.0).factor(0, 0.0) == 1.0


def test_plateau_divides_when_validations_stop_improving():
    schedule = Plateau(divisor=2.0, threshold=0.1, patience=2)
    factors = []
    #          best stale stale best stale best stale stale, twice more
    for nll in (5.0, 4.95, 5.0, 4.8, 4.75, 4.6, 4.55, math.nan, 4.7, 4.7):
        schedule.observe(nll)
        factors.append(schedule.factor(0, 0.0))
    assert factors == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert not schedule.depends_on_budget


def test_plateau_continues_from_its_state():
    one, other = Plateau(divisor=2.0, patience=2), Plateau(divisor=2.0, patience=2)
    for nll in (5.0, 5.0, 5.0, 5.1):
        one.observe(nll)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.factor(0, 0.0) == one.factor(0, 0.0) == 0.5
    for schedule in (one, other):
        schedule.observe(5.0)
    assert other.factor(0, 0.0) == one.factor(0, 0.0) == 0.25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plateau(divisor=1.0), "divisor=1.0"),
        (lambda: Plateau(threshold=-1.0), "threshold=-1.0"),
        (lambda: Plateau(patience=0), "patience=0"),
        (lambda: Cosine(warmup=1.0), "warmup=1.0"),
        (lambda: Cosine(final=-0.1), "final=-0.1"),
        (lambda: Zaremba(flat_epochs=-1), "flat_epochs=-1"),
        (lambda: Zaremba(decay=0.0), "decay=0.0"),
        (lambda: Zaremba(decay=math.nan), "decay=nan"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_list_every_parameter(path):
    config = OmegaConf.load(path)
    schedule = hydra.utils.instantiate(config)
    assert set(config) - {"_target_"} == set(inspect.signature(type(schedule)).parameters)
    assert 0 <= schedule.factor(0, 0.5) <= 1
