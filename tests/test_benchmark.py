"""The benchmark's program from end to end: what is written, how it goes on, which mistakes are told."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from benchmarked import TINY, program, rows

from experiments.bench import grid
from experiments.cli import CONFIGS


@pytest.mark.usefixtures("without_type_checks")
def test_a_tiny_grid_from_end_to_end(monkeypatch, capsys, tmp_path):
    line = ["study.layers=[full_softmax,sampled_softmax]", "study.peers=['PyTorch, eager',Liger-Kernel,tf*]", *TINY]
    status, out, err = program(monkeypatch, capsys, tmp_path, *line)
    assert status == 0, err
    folder = tmp_path / "benchmark" / "quick"
    found = rows(folder)
    assert list(found)[:2] == ["three products", "copy of 256 MiB"]
    for name in ("full_softmax", "sampled_softmax", "PyTorch, eager"):
        row = found[name]
        assert row["status"] == "timed" and row["clock"] == "CPU time" and row["threads"] == "1"
        for mode in ("forward", "train", "step"):
            times = [
                float(row[f"{mode}_{part}"]) for part in ("fastest", "first_quartile", "seconds", "third_quartile")
            ]
            assert 0 < times[0] and times == sorted(times)
        assert float(row["train_over_eager"]) > 0 and float(row["train_over_products"]) > 0
        assert int(row["train_peak_bytes"]) >= 0 and int(row["gradient_bytes"]) > 0
    assert int(found["full_softmax"]["flops"]) == 6 * 8 * 16 * 200
    assert int(found["full_softmax"]["parameters"]) == 200 * 17
    assert float(found["PyTorch, eager"]["train_over_eager"]) == 1
    assert found["Liger-Kernel"]["reason"] == "runs on CUDA only"
    if "tensorflow" not in sys.modules:
        assert found["tf.nn.sampled_softmax_loss, K 1024"]["status"] == "not timed"
        assert "not timed: tf.nn.sampled_softmax_loss, K 1024: not installed: pip install tensorflow-cpu" in out
    assert (folder / "results.md").read_text() in out
    assert "sampled_softmax" in (folder / "benchmark.html").read_text()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["peers"]["torch"] == torch.__version__ and environment["peers"]["liger-kernel"] is None
    assert environment["config"]["study"]["vocab"] == [200]
    assert out.rstrip().endswith(f"in all; {folder}")


@pytest.mark.usefixtures("without_type_checks")
def test_a_grid_that_was_cut_short_goes_on_cell_by_cell(monkeypatch, capsys, tmp_path):
    line = ["study.layers=[full_softmax]", "study.peers=['PyTorch, eager']", *TINY, "study.vocab=[200,300]"]
    line += ["study.tokens=[8]", "memory=false"]
    heat = grid._heat

    def stopped(heat_, cell, *rest):
        if cell.vocab == 300:
            raise ValueError("the power went out")
        return heat(heat_, cell, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(grid, "_heat", stopped)
        status, _, err = program(monkeypatch, capsys, tmp_path, *line)
    assert status == 2 and "the power went out" in err
    folder = tmp_path / "benchmark" / "quick"
    before = (folder / "results.csv").read_text()
    assert {row["vocab"] for row in csv.DictReader(before.splitlines())} == {"200"}

    # What is measured otherwise is measured anew.
    status, out, _ = program(monkeypatch, capsys, tmp_path, *line, "study.modes=[train]", "study.vocab=[400]")
    assert status == 0 and "measured before" not in out
    status, out, _ = program(monkeypatch, capsys, tmp_path, *line)
    assert status == 0 and "1 of 2 cells were measured before" in out
    assert (folder / "results.csv").read_text().startswith(before) and "300" in rows(folder)["full_softmax"]["vocab"]
    # Once all are done, the same command measures again.
    status, out, _ = program(monkeypatch, capsys, tmp_path, *line)
    assert status == 0 and "measured before" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study=gaols"], "study=gaols: no such choice; did you mean goals?"),
        (["study.vocabs=[3]"], "study.vocabs: no such field; did you mean study.vocab?"),
        (["study.vocab=3"], "study.vocab=3: must be a list; write study.vocab=[3]"),
        (["study.vocab=[1]"], "study.vocab=1: must be whole numbers of at least 2"),
        (["study.precision=[fp16]"], "study.precision=fp16: choose from fp32, bf16, bf16_parameters"),
        (["study.modes=[backward]"], "study.modes=backward: choose from forward, train, per_token, step"),
        (["study.layers=[ful_softmax]"], "study.layers=ful_softmax: no such output layer; did you mean full_softmax?"),
        (["study.peers=[Liger]"], "study.peers=Liger: no such peer; did you mean Liger-Kernel?"),
        (["study.layers=[]", "study.peers=[]"], "study quick is empty"),
        (["optim=adagrat"], "optim=adagrat: no such choice; did you mean adagrad?"),
        (["study=goals", "study.threads=2"], "study.threads=2: must be a list; write study.threads=[2]"),
        (["study=profile", "study.threads=[1,2]"], "study.threads=[1, 2]: must be one number of threads"),
        (["rounds=0"], "rounds=0: must be a positive number"),
        (["device=tpu"], "device=tpu is not there"),
    ],
)
def test_mistakes_end_in_one_line(words, message, monkeypatch, capsys, tmp_path):
    status, out, err = program(monkeypatch, capsys, tmp_path, *words)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and message in err
    assert not (tmp_path / "benchmark").exists()


def test_it_imports_neither_wandb_nor_what_draws():
    code = "import sys, experiments.benchmark as b; sys.exit(str({'wandb', 'plotly', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"
