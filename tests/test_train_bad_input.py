"""Mistakes in what a run is told are named; those of a command line in one line, before anything is written."""

import sys

import pytest
from small_runs import config

from experiments.cli import compose_config, guarded
from experiments.train import main, train


def test_word_vectors_of_an_unfit_run_are_an_error(overrides, tmp_path):
    train(config(overrides, "output=hierarchical_softmax", "budget.epochs=1", f"run.dir={tmp_path}/tree"))
    with pytest.raises(ValueError, match="HierarchicalSoftmax has no table"):
        train(config(overrides, "output=hierarchical_softmax", f"output.embeddings={tmp_path}/tree"))
    train(config(overrides, "output=full_softmax", "data.max_size=20", "budget.epochs=1", f"run.dir={tmp_path}/few"))
    with pytest.raises(ValueError, match="few is a run over another vocabulary"):
        train(config(overrides, "output=hierarchical_softmax", f"output.embeddings={tmp_path}/few"))


@pytest.mark.parametrize("content", [None, b"", b"the of and"])
def test_a_file_that_holds_no_array_is_an_error(overrides, tmp_path, content):
    if content is not None:
        (tmp_path / "vectors.npy").write_bytes(content)
    words = ["output=hierarchical_softmax", f"output.embeddings={tmp_path}/vectors.npy", f"run.dir={tmp_path}/run"]
    with pytest.raises(ValueError, match=r"^output\.embeddings=.*/vectors\.npy: cannot be read; give the path of an"):
        train(config(overrides, *words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output=sampled_sotfmax"], "output=sampled_sotfmax: no such choice; did you mean sampled_softmax?"),
        (["data=ptbb"], "data=ptbb: no such choice; did you mean ptb?"),
        (["model=gru"], "model=gru: no such choice; choose one of"),
        (["budgets.epochs=3"], "budgets.epochs: no such field; did you mean budget.epochs?"),
        (["seed=x=,"], "error"),
        (["nonsense"], "nonsense"),
        (["output=null"], "output=None: no such choice; choose one of"),
        (["study=quick", "study=null"], "study=None: no such choice; choose one of"),
        (["output=sampled_sotfmax", "--cfg", "job"], "output=sampled_sotfmax: no such choice"),
        (["precision=fp16"], "precision=fp16: choose fp32 or bf16"),
        (["output.bias=text"], "output.bias=text: a text can give bigrams and embeddings, nothing else"),
        (["backend=gpu"], "backend='gpu': choose one of auto, "),
        (["device=cuda:7"], "device=cuda:7 is not there; choose one of auto, cpu"),
        (["device=meta"], "device=meta is not there; choose one of auto, cpu"),
        (["batch.size=100000"], "does not fill one batch"),
        (["batch.length=0"], "batch.length=0: must be a positive number"),
        (["budget.epochs=null"], "set budget.epochs, budget.tokens or budget.seconds"),
        (["+budget.steps=5"], "budget.steps=5: no such limit; choose one of epochs, tokens, seconds"),
        (["evaluate.length=null"], "evaluate.length=None: must be a positive number"),
        (["evaluate.size=null"], "evaluate.size=None: must be a positive number"),
        (["log_every=null"], "log_every=None: must be a positive number"),
        (["batch.stretch=null"], "batch.stretch=None: must be a positive number"),
        (["optim.accumulate=null"], "optim.accumulate=None: must be a positive number"),
        (["optim.learning_rate=null"], "optim.learning_rate=None: must be a positive number"),
        (["checkpoint_every=null"], "checkpoint_every=None: must be a number of seconds, 0 for one at every step"),
        (["checkpoint_every=-1"], "checkpoint_every=-1: must be a number of seconds"),
        (["evaluate.final_tokens=2e1"], "evaluate.final_tokens=20.0: must be a whole number; write 20"),
        (["batch.size=4.0"], "batch.size=4.0: must be a whole number; write 4"),
        (["wandb.mode=on"], "wandb.mode=on: choose offline, online or disabled"),
        (["model.backbone.hidden_size=0"], "hidden_size=0"),
        (["data.train=/nowhere.txt"], "/nowhere.txt"),
        (["data.train=???"], "data.train is not set and has no default; add data.train=..."),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("without_type_checks")
def test_mistakes_end_in_one_line(overrides, tmp_path, words, message, capsys, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["train", *overrides, *words])
    with pytest.raises(SystemExit) as stop:
        guarded(main, "train")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("options", [["--cfg", "job"], ["-c", "all"], ["--info", "defaults"], ["--config-dir", "mine"]])
def test_the_values_of_hydra_s_own_options_are_no_overrides(overrides, options, monkeypatch):
    ran = []
    for words in ([*overrides, *options], [*options, *overrides]):
        monkeypatch.setattr(sys, "argv", ["train", *words])
        guarded(lambda: ran.append(sys.argv[1:]), "train")
        assert ran[-1] == words


def test_a_choice_that_is_empty_by_default_may_be_said(overrides, monkeypatch):
    ran = []
    for words in (["study=null", *overrides], ["study=smoke", *overrides]):
        monkeypatch.setattr(sys, "argv", ["train", *words])
        guarded(lambda: ran.append(compose_config("train", sys.argv[1:])["name"]["study"]), "train")
    assert ran == [None, "smoke"]


def test_another_configuration_s_folder_is_refused(overrides, tmp_path):
    train(config(overrides, "budget.epochs=0.2", f"run.dir={tmp_path}/run"))
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        train(config(overrides, "seed=2", f"run.dir={tmp_path}/run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(config(overrides, f"run.dir={tmp_path}/other"))
