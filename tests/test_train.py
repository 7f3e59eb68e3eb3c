"""Training runs: what they leave, what a layer gets of texts and of other runs, the same masks and batches for all."""

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import ENVIRONMENT, command, config, metrics

from experiments import train as training
from experiments.cli import compose_config
from experiments.evaluate import evaluate_run
from experiments.reading import read
from experiments.train import train
from lvsoftmax import runs, strict_json
from lvsoftmax.data.batches import ContiguousBatches
from lvsoftmax.data.statistics import bigrams, word_vectors
from lvsoftmax.evaluate import evaluate, temperature_of
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.layers.hierarchical_softmax import HierarchicalSoftmax
from lvsoftmax.ops.backends import CppLibrary


def test_a_run_leaves_what_was_promised(overrides):
    result = train(config(overrides))
    folder = next(Path(overrides[5].removeprefix("run.root=")).glob("text/full_softmax-lstm-seed1-????????"))
    assert json.loads((folder / "result.json").read_text()) == result
    assert runs.load_config(folder)["model"]["backbone"]["hidden_size"] == 16
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert result["train"]["epochs"] == pytest.approx(2)
    assert result["train"]["tokens"] == 2 * (len(np.load(cached_train(folder, overrides))) // 160) * 160
    assert result["test"]["tokens"] == 30 * 13
    assert result["test"]["perplexity"] < result["test"]["unigram_perplexity"]
    assert 0 < result["train"]["output_share"] < 1
    assert result["train"]["output_flops_per_token"] == 6 * 16 * result["vocabulary"]
    assert result["parameters"]["total"] == sum(p.numel() for p in runs.load(folder).parameters())


def cached_train(folder, overrides):
    """The encoded training text that the run read."""
    return next(Path(overrides[4].removeprefix("data.cache=")).glob("*/train.npy"))


def test_a_loaded_model_evaluates_to_the_result(overrides):
    result = train(config(overrides, "output=full_softmax"))
    folder = next(Path(overrides[5].removeprefix("run.root=")).glob("text/*"))
    corpus = runs.build(runs.load_config(folder)["data"])
    model = runs.load(folder)
    batches = ContiguousBatches(corpus.test, 16, 64, start=corpus.vocabulary.eos, complete=True)
    again = evaluate(model, batches, counts=torch.from_numpy(corpus.vocabulary.counts))
    assert again["nll"] == result["test"]["nll"]
    assert runs.load_vocabulary(folder).words == corpus.vocabulary.words


def test_a_layer_gets_what_it_asks_of_the_text_and_the_run_keeps_it(overrides, tmp_path):
    words = ["output=hierarchical_softmax", "output.tree=clustered", "output.embeddings=text", "budget.epochs=1"]
    result = train(config(overrides, *words, f"run.dir={tmp_path}/run"))
    corpus = runs.build(runs.load_config(tmp_path / "run")["data"])
    counts = torch.from_numpy(corpus.vocabulary.counts)
    vectors = np.load(tmp_path / "run" / "statistics" / "embeddings.npy")
    np.testing.assert_array_equal(vectors, word_vectors(bigrams(corpus.train, len(counts)), len(counts)))
    given = HierarchicalSoftmax(16, counts, tree="clustered", embeddings=torch.from_numpy(vectors))
    loaded = runs.load(tmp_path / "run")
    assert torch.equal(loaded.output.word_branch, given.word_branch)
    batches = ContiguousBatches(corpus.test, 16, 64, start=corpus.vocabulary.eos, complete=True)
    assert evaluate(loaded, batches, counts=counts)["nll"] == result["test"]["nll"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_layer_gets_the_word_vectors_of_another_run(overrides, tmp_path):
    words = ["output=hierarchical_softmax", "budget.epochs=1"]
    for name, seed in (("first", 1), ("second", 2)):
        train(config(overrides, "output=full_softmax", "budget.epochs=1", f"seed={seed}", f"run.dir={tmp_path}/{name}"))
        tree = [*words, f"output.embeddings={tmp_path}/{name}"]
        train(config(overrides, *tree, f"run.dir={tmp_path}/tree of {name}"))
        table = runs.load(tmp_path / name).output.weight.detach()
        kept = np.load(tmp_path / f"tree of {name}" / "statistics" / "embeddings.npy")
        np.testing.assert_array_equal(kept, table.numpy())

    def identity_with(folder):
        named = config(overrides, *words, f"output.embeddings={folder}")
        return runs.identity(named, "", follows_budget=False)

    identities = {identity_with(tmp_path / name) for name in ("first", "second")}
    assert len(identities) == 2
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    assert identity_with(moved) in identities
    assert isinstance(runs.load(tmp_path / "tree of first").output, HierarchicalSoftmax)  # without the other run


def test_a_layer_gets_an_array_from_a_file_and_the_run_keeps_it(overrides, tmp_path):
    words = ["output=hierarchical_softmax", "budget.epochs=0.2", f"run.dir={tmp_path}/run"]
    asked = config(overrides, *words, f"output.embeddings={tmp_path}/vectors.npy")
    moved = config(overrides, *words, f"output.embeddings={tmp_path}/moved.npy")
    corpus = runs.build(asked["data"])
    counts = torch.from_numpy(corpus.vocabulary.counts)
    vectors = np.random.default_rng(0).normal(size=(len(counts), 4))
    file = tmp_path / "vectors.npy"
    np.save(file, vectors)
    from_file = HierarchicalSoftmax(16, counts, embeddings=str(file))
    train(asked)
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "statistics" / "embeddings.npy"), vectors)
    before = runs.identity(asked, corpus.digest, follows_budget=False)
    file.rename(tmp_path / "moved.npy")
    assert torch.equal(runs.load(tmp_path / "run").output.word_branch, from_file.word_branch)
    assert train(moved) is not None  # the same run
    assert runs.identity(moved, corpus.digest, follows_budget=False) == before
    np.save(tmp_path / "moved.npy", vectors[::-1])
    assert runs.identity(moved, corpus.digest, follows_budget=False) != before


def test_a_backend_is_passed_on_logged_and_no_part_of_what_a_run_is(overrides, tmp_path, monkeypatch):
    whole = ["budget.epochs=1", f"run.dir={tmp_path}/run"]
    train(config(overrides, *whole, "output=full_softmax", "backend=eager"))
    folder = tmp_path / "run"
    assert json.loads((folder / "environment.json").read_text())["backend"] == "eager"
    assert train(config(overrides, *whole, "output=full_softmax", "output.backend=eager")) is not None  # the same run
    built = runs.output_config(config(overrides, "output=full_softmax", "backend=eager"))
    assert built["backend"] == "eager"
    with pytest.raises(ValueError, match="SampledSoftmax has no choice of backends; leave backend=auto"):
        runs.output_config(config(overrides, "output=sampled_softmax", "backend=cpp"))
    plain = config(overrides, "output=sampled_softmax", "backend=eager")
    assert runs.output_config(plain) == plain["output"]  # plain PyTorch is what it has
    # a machine that lacks the backend of a run loads it all the same
    stored = runs.load_config(folder) | {"backend": "elsewhere"}
    monkeypatch.setattr(runs, "load_config", lambda folder: stored)
    assert runs.load(folder).output.backend == "auto"


def test_what_a_run_computes_with_is_compiled_before_its_first_step(overrides, tmp_path, monkeypatch):
    """Layer, draws of each token and optimiser: none of their libraries comes later."""
    asked = []
    monkeypatch.setattr(training, "compile_all", lambda device: asked.append((device.type, set(CppLibrary.made))))
    words = ["output=sampled_softmax", "output.noise=bigram", "output.bigrams=text", "budget.epochs=0.2"]
    train(config(overrides, *words, f"run.dir={tmp_path}/run"))
    assert asked == [("cpu", set(CppLibrary.made))]
    assert {"gather_dot", "row_update"} <= {library.source.parent.name for _, made in asked for library in made}


def test_evaluating_a_run_on_its_test_text_however_given(overrides, text, tmp_path):
    result = train(config(overrides, "budget.epochs=1", f"run.dir={tmp_path}/run"))
    shuffled = tmp_path / "longer.txt"  # ranks of its own: another order of frequencies, and a word never seen
    shuffled.write_text((text / "test.txt").read_text() + "never w3 w39 w39 w39 w39\n" * 50)
    ways = {
        "own": [],
        "file": [f"text={text}/test.txt"],
        "corpus": ["data=text", *(f"data.{split}={shuffled}" for split in ("train", "valid", "test"))],
        "file, longer": [f"text={shuffled}"],
    }
    figures = {
        name: evaluate_run(compose_config("evaluate", [f"run={tmp_path}/run", "device=cpu", *words]))
        for name, words in ways.items()
    }
    assert figures["own"]["nll"] == result["test"]["nll"]
    assert figures["file"]["nll"] == result["test"]["nll"]
    assert figures["corpus"]["nll"] == figures["file, longer"]["nll"]
    assert figures["corpus"]["tokens"] == result["test"]["tokens"] + 50 * 7
    for words, message in (
        (["data=zipf_small"], r"text=.* and data=zipf_small: one text is evaluated; leave one out"),
        (["split=valid"], r"text=.* and split=valid: a file has no splits; leave one out"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_run(compose_config("evaluate", [f"run={tmp_path}/run", *ways["file"], *words]))
    # A line ends where it ends in a text that is trained on.
    shuffled.write_text((text / "test.txt").read_text().replace("w9 ", "w9\x0c\u2028 ") + "\n")
    again = evaluate_run(compose_config("evaluate", [f"run={tmp_path}/run", "device=cpu", f"text={shuffled}"]))
    assert again["tokens"] == result["test"]["tokens"] + 1


def test_every_target_is_announced_in_the_epoch_in_which_it_comes(overrides, tmp_path, monkeypatch):
    announced, seen = [], []
    monkeypatch.setattr(FullSoftmax, "observe", lambda self, target: announced.append(target))
    loss = FullSoftmax.loss

    def noting(self, hidden, target, *rest):
        seen.append(target)
        return loss(self, hidden, target, *rest)

    monkeypatch.setattr(FullSoftmax, "loss", noting)
    result = train(config(overrides, "batch.stretch=5", f"run.dir={tmp_path}/run"))
    steps = result["train"]["steps"]
    assert steps // 2 % 5, "no stretch is cut short"
    assert torch.equal(torch.cat(announced), torch.cat(seen[:steps]))  # what comes after is the count of operations


def test_runs_that_differ_in_the_output_layer_share_backbone_batches_and_masks(overrides, tmp_path, monkeypatch):
    """Record what the backbone is given and what leaves the dropout, before the layers' updates can matter."""
    seen = {}
    for layer in ("full_softmax", "sampled_softmax", "hierarchical_softmax"):
        record = seen[layer] = {"batches": [], "masks": []}
        original = torch.nn.Dropout.forward

        def forward(self, input, record=record, original=original):
            output = original(self, input)
            if self.training:
                record["masks"].append((output == 0) & (input != 0))
            return output

        get = ContiguousBatches.__getitem__

        def getitem(self, step, record=record, get=get):
            batch = get(self, step)
            record["batches"].append(batch.input)
            return batch

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Dropout, "forward", forward)
            patch.setattr(ContiguousBatches, "__getitem__", getitem)
            train(config(overrides, f"output={layer}", "budget.epochs=1", f"run.dir={tmp_path}/{layer}"))
    initial = [
        runs.build_model(config(overrides, f"output={layer}"), torch.arange(41, 0, -1)).backbone.state_dict()
        for layer in seen
    ]
    reference = seen["full_softmax"]
    assert len(reference["masks"]) > 50
    assert any(mask.any() for mask in reference["masks"])
    for layer, state in zip(seen, initial, strict=True):
        assert all(torch.equal(value, initial[0][name]) for name, value in state.items())
        for kind in ("batches", "masks"):
            assert len(seen[layer][kind]) == len(reference[kind])
            assert all(map(torch.equal, seen[layer][kind], reference[kind])), (layer, kind)


def test_accumulation_averages_over_all_its_tokens(overrides, tmp_path):
    """With a rate too small to move anything, two stretches a step and one a step see the same mean loss."""
    still = [
        "model.dropout=0.0",
        "model.backbone.dropout=0.0",
        "optim.learning_rate=1e-12",
        "evaluate.every_tokens=null",
    ]
    losses = []
    for accumulate in (1, 2):
        words = [f"optim.accumulate={accumulate}", f"log_every={8 // accumulate}", f"run.dir={tmp_path}/{accumulate}"]
        train(config(overrides, *still, *words))
        losses.append([line["loss"] for line in metrics(tmp_path / str(accumulate)) if line["kind"] == "train"])
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_divergence_stops_early_and_says_so(overrides, tmp_path, capsys):
    with np.errstate(all="ignore"):
        words = ("optim=sgd", "optim.learning_rate=1e38", "optim.clip=null", "budget.epochs=50")
        assert train(config(overrides, *words, f"run.dir={tmp_path}/run")) is None
    last = metrics(tmp_path / "run")[-1]
    assert last["kind"] == "diverged"
    assert last["epoch"] < 1
    assert not (tmp_path / "run" / "result.json").exists()
    assert "lower optim.learning_rate=1e+38" in capsys.readouterr().err


def refuse(name):
    raise AssertionError(f"{name} without quotes is no JSON")


def test_an_infinite_validation_is_written_as_json_and_does_not_slow_the_schedule(overrides, tmp_path, capsys):
    """A sparsemax gives some words of the text no probability; a plateau of infinities would divide the rate by 4 at
    every validation."""
    words = ["output=sparsemax_output", "schedule=plateau", f"run.dir={tmp_path}/run"]
    result = train(config(overrides, *words))
    assert result["valid"]["perplexity"] == math.inf and 0.5 < result["valid"]["coverage"] < 1
    assert "perplexity infinite (smoothed" in capsys.readouterr().out
    folder = tmp_path / "run"
    assert strict_json.loads((folder / "result.json").read_text()) == result
    texts = [(folder / "result.json").read_text(), *(folder / "metrics.jsonl").read_text().splitlines()]
    documents = [json.loads(text, parse_constant=refuse) for text in texts]
    assert documents[0]["valid"]["nll"] == "Infinity"
    valid = [document for document in documents[1:] if document["kind"] == "valid"]
    assert sum(line["nll"] == "Infinity" for line in valid) > 2
    smoothed = [line["epsilon_perplexity"] for line in valid]
    assert smoothed[-1] < smoothed[0]
    rates = [document["learning_rate"] for document in documents[1:] if document["kind"] == "train"]
    worse = sum(later >= min(smoothed[:n]) for n, later in enumerate(smoothed) if n)
    assert rates[-1] >= rates[0] / 4**worse > rates[0] / 4 ** (len(valid) - 1)
    run = read(folder)
    assert run.result and run.lacks_words and run.diverged is None


def test_the_temperature_comes_from_the_validation_text_and_goes_with_the_run(overrides, tmp_path):
    result = train(config(overrides, f"run.dir={tmp_path}/run"))
    temperature = result["test"]["calibrated"]["temperature"]
    assert temperature == result["valid"]["calibrated"]["temperature"] != 1
    assert result["valid"]["calibrated"]["nll"] <= result["valid"]["nll"]
    corpus = runs.build(runs.load_config(tmp_path / "run")["data"])
    batches = ContiguousBatches(corpus.valid, 16, 64, start=corpus.vocabulary.eos, complete=True)
    assert temperature_of(runs.load(tmp_path / "run"), batches) == temperature
    again = evaluate_run(compose_config("evaluate", [f"run={tmp_path}/run", "device=cpu"]))
    assert again["calibrated"] == result["test"]["calibrated"]
    (tmp_path / "run" / "result.json").unlink()
    assert evaluate_run(compose_config("evaluate", [f"run={tmp_path}/run", "device=cpu"]))["calibrated"] is None


def test_sweeps_do_not_collide(overrides, tmp_path):
    words = ["-m", *overrides, "output=full_softmax,sampled_softmax", "seed=1,2", "budget.epochs=0.2"]
    subprocess.run(command(words), env=ENVIRONMENT, check=True)
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "text").iterdir())
    assert names == [f"{layer}-lstm-seed{seed}" for layer in ("full_softmax", "sampled_softmax") for seed in (1, 2)]


def test_the_final_evaluation_reads_as_much_as_it_is_told(overrides, tmp_path):
    """Such a run is another than one that reads everything; one that reads everything is what it was before."""
    short = config(overrides, "budget.epochs=0.2", "evaluate.final_tokens=150")
    result = train(short)
    assert result["valid"]["tokens"] == result["test"]["tokens"] == 150
    whole = config(overrides, "budget.epochs=0.2")
    older = whole | {"evaluate": {key: value for key, value in whole["evaluate"].items() if key != "final_tokens"}}
    same = [runs.identity(each, "corpus", follows_budget=False) for each in (whole, older, short)]
    assert same[0] == same[1] != same[2]
