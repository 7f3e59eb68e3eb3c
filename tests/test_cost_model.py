"""The model of what a cross-entropy costs: its fit, and when it is measured."""

import json
import logging

import numpy as np
import pytest
import torch

from lvsoftmax.ops.linear_cross_entropy import cost_model as module
from lvsoftmax.ops.linear_cross_entropy.cost_model import FEWEST, SHAPES, CostModel, cost_model, fit

CPU = torch.device("cpu")
TRUE = np.array([2e-11, 8e-10, 6e-9, 4e-10, 1e-8, 2e-4])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, in memory as on disk, and a calibration that takes no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        module, "_measure", lambda *_: dict(zip(SHAPES, CostModel(TRUE)(*np.array(SHAPES).T), strict=True))
    )
    module._cost_model.cache_clear()
    yield tmp_path / "lvsoftmax"
    module._cost_model.cache_clear()


def forget_and_forbid(monkeypatch):
    """Let nothing but the file know the model."""
    module._cost_model.cache_clear()
    monkeypatch.setattr(module, "_measure", None)


def test_seconds_are_the_sum_of_products_of_sizes():
    n, d, v = 100, 8, 1000
    expected = np.array([n * d * v, n * v, n * d, d * v, v, 1]) @ TRUE
    assert CostModel(TRUE)(n, d, v) == pytest.approx(expected)
    padded = CostModel(TRUE)(np.array([[3.0], [FEWEST]]), d, np.array([v, v]))
    assert padded.shape == (2, 2) and np.ptp(padded) == 0 and padded[0, 0] == CostModel(TRUE)(FEWEST, d, v)


def test_the_fit_finds_what_the_measurements_were_made_of():
    sizes = np.array(SHAPES, np.float64)
    assert fit(sizes, CostModel(TRUE)(*sizes.T)) == pytest.approx(TRUE, rel=1e-6)


def test_small_shapes_count_as_much_as_large_ones():
    sizes = np.array(SHAPES, np.float64)
    expected = CostModel(TRUE)(*sizes.T)
    slow = np.where(expected == expected.max(), 1.3, 1.0)  # the largest shape, measured while something else ran
    found = CostModel(fit(sizes, slow * expected))(*sizes.T)
    assert found == pytest.approx(expected, rel=0.2)


def test_no_coefficient_is_negative():
    sizes = np.array(SHAPES, np.float64)
    taken = CostModel(np.array([2e-11, 8e-10, 6e-9, -1e-10, 1e-8, 2e-4]))(*sizes.T)
    found = fit(sizes, taken)
    assert (found >= 0).all() and found[3] == 0
    better = fit(sizes, CostModel(found)(*sizes.T))
    assert better == pytest.approx(found, rel=1e-6)


def test_it_is_measured_once_and_kept(folder, monkeypatch):
    measured = cost_model(CPU).coefficients
    (file,) = folder.glob("cost-model-*.json")
    assert json.loads(file.read_text())["coefficients"] == measured.tolist()
    assert cost_model(CPU) is cost_model(CPU)
    forget_and_forbid(monkeypatch)
    assert np.array_equal(cost_model(CPU).coefficients, measured)


def test_every_backend_and_number_of_threads_has_its_own(folder):
    cost_model(CPU, "eager")
    torch.set_num_threads(2)
    cost_model(CPU, "eager")
    assert len(list(folder.glob("cost-model-cpu-eager-*.json"))) == 2


@pytest.mark.usefixtures("in_double")
def test_measured_is_single_precision_whatever_the_default_type(monkeypatch):
    monkeypatch.setattr(module, "SHAPES", [(32, 8, 64)])
    met = []
    monkeypatch.setattr(module, "_time", lambda operands, _: met.extend(x.dtype for x in operands) or 1.0)
    module._measure(CPU, "eager")
    assert set(met) == {torch.float32}


@pytest.mark.parametrize("content", ["", "{}", '{"coefficients": "none"}', "[]"])
def test_a_broken_file_is_measured_anew(folder, content):
    expected = cost_model(CPU).coefficients
    (file,) = folder.glob("cost-model-*.json")
    file.write_text(content)
    module._cost_model.cache_clear()
    assert np.array_equal(cost_model(CPU).coefficients, expected)
    assert json.loads(file.read_text())["coefficients"] == expected.tolist()


def test_a_folder_that_cannot_be_written_is_told(folder, caplog):
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert cost_model(CPU).coefficients == pytest.approx(TRUE, rel=1e-6)
    assert "set XDG_CACHE_HOME" in caplog.text


def test_measuring_is_no_matter_of_the_default_device(monkeypatch):
    monkeypatch.setattr(module, "ROUNDS", range(1, 2))
    monkeypatch.setattr(module, "SHAPES", [(32, 8, 64)])
    met = []
    monkeypatch.setattr(module, "_time", lambda operands, _: met.extend(x.device for x in operands) or 1.0)
    with torch.device("meta"):
        module._measure(CPU, "eager")
    assert set(met) == {CPU}


def test_measuring_takes_nothing_from_the_global_random_stream(monkeypatch):
    monkeypatch.setattr(module, "ROUNDS", range(1, 2))
    monkeypatch.setattr(module, "SHAPES", [(32, 8, 64), (64, 16, 128)])
    before = torch.get_rng_state()
    with torch.no_grad():
        found = module._measure(CPU, "eager")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(0 < taken < 10 for taken in found.values())
