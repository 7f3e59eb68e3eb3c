"""Where the time of a training step goes."""

import contextlib
import csv
import dataclasses

import pytest
import torch
from benchmarked import program

from experiments.bench import step
from experiments.bench.step import Step
from experiments.cli import compose_config
from experiments.train import train
from lvsoftmax.runs import load

SMALL = ("data=zipf_small", "model.backbone.hidden_size=16", "model.dropout=0.3", "batch.size=4", "batch.length=8",
         "batch.stretch=3", "device=cpu", "wandb.mode=disabled")  # fmt: skip


@pytest.mark.parametrize("layer", ["full_softmax", "sampled_softmax"])
@pytest.mark.usefixtures("without_type_checks")
def test_the_step_taken_to_pieces_is_that_of_training(layer, tmp_path):
    steps = 7
    small = [*SMALL, f"data.cache={tmp_path}/cache", f"output={layer}", "budget.epochs=null"]
    small += [f"budget.tokens={steps * 32}", f"run.dir={tmp_path}/run", "progress=false"]
    config = compose_config("train", small)
    assert train(config)
    taken = Step(config)
    for _ in range(steps):
        taken.run(lambda part: contextlib.nullcontext())
    trained = load(tmp_path / "run").state_dict()
    for name, value in taken.model.state_dict().items():
        assert torch.equal(value, trained[name]), name


@pytest.mark.usefixtures("without_type_checks")
def test_a_profile_of_every_part(monkeypatch, capsys, tmp_path):
    settings = [f"'{each}'" for each in (*SMALL, f"data.cache={tmp_path}/cache") if not each.startswith("device")]
    words = ["study=profile", "study.layers=[hierarchical_softmax]", "study.steps=3", "device=cpu", "progress=false",
             f"study.settings=[{','.join(settings)}]"]  # fmt: skip
    status, out, err = program(monkeypatch, capsys, tmp_path, *words)
    assert status == 0, err
    (row,) = csv.DictReader((tmp_path / "benchmark" / "profile" / "results.csv").read_text().splitlines())
    shares = [float(row[part]) for part in (*step.PARTS, "rest")]
    assert row["layer"] == "hierarchical_softmax" and sum(shares) == pytest.approx(1) and min(shares) > 0
    assert "| hierarchical_softmax |" in out
    for part in step.PARTS:
        if part not in step.MODEL and float(row[part]) > step.LIMIT:
            assert f"- hierarchical_softmax: {part} takes" in out


def test_a_part_that_takes_more_than_it_may_is_named_with_its_operations():
    shares = dict.fromkeys((*step.PARTS, "rest"), 0.05) | {"backbone": 0.3, "output": 0.2, "optimiser": 0.2}
    found = step.Profile("a", 0.01, shares, {"optimiser": [("aten::sqrt_", 0.15), ("aten::add_", 0.03)]})
    assert found.beyond == ["optimiser"]
    assert "- a: optimiser takes 20 % of the step: aten::sqrt_ 15 % and aten::add_ 3 %" in step.table([found])
    fine = dataclasses.replace(found, shares=shares | {"optimiser": 0.1}, blame={})
    assert "No part but backbone and output takes more than 10 % of any step." in step.table([fine])


@pytest.mark.usefixtures("without_type_checks")
def test_the_operations_to_blame_are_those_of_the_part(monkeypatch, tmp_path):
    taken = Step(compose_config("train", [*SMALL, f"data.cache={tmp_path}/cache"]))
    wait = taken.optimiser.step
    monkeypatch.setattr(taken.optimiser, "step", lambda: (torch.rand(300_000).sort(), wait()))
    (name, share), *_ = step._blame(taken, ["optimiser"])["optimiser"]
    assert name == "aten::sort" and 0.1 < share < 1
