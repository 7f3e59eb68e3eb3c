"""Training runs: the same numbers after a kill, the same masks and batches for every layer, the mirror in wandb."""

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from wandb.proto import wandb_internal_pb2

from experiments import train as runs_of_train
from experiments.cli import compose_config, guarded
from experiments.evaluate import evaluate_run
from experiments.reading import RunError, read
from experiments.tracking import Tracker
from experiments.train import main, spent, train
from lvsoftmax import runs, strict_json
from lvsoftmax.data.batches import ContiguousBatches
from lvsoftmax.data.statistics import bigrams, word_vectors
from lvsoftmax.evaluate import evaluate, temperature_of
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.layers.hierarchical_softmax import HierarchicalSoftmax
from lvsoftmax.ops.linear_cross_entropy.cost_model import CostModel

TIME_FIELDS = ("seconds", "tokens_per_second", "output_share", "peak_bytes")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of a few thousand words in which the next word depends on the last."""
    folder = tmp_path_factory.mktemp("text")
    words = [f"w{index}" for index in range(40)]
    chance = random.Random(0)
    for split, lines in {"train": 400, "valid": 30, "test": 30}.items():
        with (folder / f"{split}.txt").open("w") as file:
            for _ in range(lines):
                first = chance.randrange(20)
                file.write(" ".join(words[min(first + chance.randrange(3), 39)] for _ in range(12)) + "\n")
            file.write("hapax\n" * (split == "train"))  # seen once, so cut: the vocabulary has an <unk>
    return folder


@pytest.fixture
def overrides(text, tmp_path):
    """The overrides of a small run: two epochs of 32 steps with dropout, 4 x 40 tokens a step."""
    return [
        "data=text",
        *(f"data.{split}={text}/{split}.txt" for split in ("train", "valid", "test")),
        f"data.cache={text}/cache",
        f"run.root={tmp_path}",
        "model.backbone.hidden_size=16",
        "model.backbone.layers=2",
        "model.backbone.dropout=0.3",
        "model.dropout=0.3",
        "batch.size=4",
        "batch.length=40",
        "budget.epochs=2",
        "log_every=5",
        "evaluate.every_tokens=1500",
        "progress=false",
        "wandb.mode=disabled",
        "checkpoint_every=0.0001",
        "device=cpu",
    ]


def config(overrides, *more):
    return compose_config("train", [*overrides, *more])


def metrics(folder):
    """The lines of ``metrics.jsonl`` without what the clock decides."""
    lines = [strict_json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIME_FIELDS} for line in lines]


def command(overrides, prelude=""):
    """The command line of a training, in a process of its own."""
    program = (
        f"{prelude}\nfrom experiments.train import main\nfrom experiments.cli import guarded\nguarded(main, 'train')"
    )
    return [sys.executable, "-c", program, *overrides]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


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


def test_word_vectors_of_an_unfit_run_are_an_error(overrides, tmp_path):
    train(config(overrides, "output=hierarchical_softmax", "budget.epochs=1", f"run.dir={tmp_path}/tree"))
    with pytest.raises(ValueError, match="HierarchicalSoftmax has no table"):
        train(config(overrides, "output=hierarchical_softmax", f"output.embeddings={tmp_path}/tree"))
    train(config(overrides, "output=full_softmax", "data.max_size=20", "budget.epochs=1", f"run.dir={tmp_path}/few"))
    with pytest.raises(ValueError, match="few is a run over another vocabulary"):
        train(config(overrides, "output=hierarchical_softmax", f"output.embeddings={tmp_path}/few"))


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
    # A line ends where it ends in a text that is trained on.
    shuffled.write_text((text / "test.txt").read_text().replace("w9 ", "w9\x0c\u2028 ") + "\n")
    again = evaluate_run(compose_config("evaluate", [f"run={tmp_path}/run", "device=cpu", f"text={shuffled}"]))
    assert again["tokens"] == result["test"]["tokens"] + 1


def test_a_finished_run_is_not_repeated_and_a_larger_budget_continues_it(overrides, capsys):
    result = train(config(overrides, "budget.epochs=1"))
    folder = next(Path(overrides[5].removeprefix("run.root=")).glob("text/*"))
    before = (folder / "metrics.jsonl").stat()
    assert train(config(overrides, "budget.epochs=1")) == result
    assert "is finished" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").stat() == before
    train(config(overrides, "budget.epochs=2"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    train(config(overrides, "budget.epochs=2", f"run.dir={folder.parent}/at_once"))
    assert metrics(folder) == metrics(folder.parent / "at_once")


def test_a_run_that_has_read_more_than_the_budget_is_none_of_that_budget(overrides, tmp_path):
    folder = tmp_path / "run"
    assert train(config(overrides, f"run.dir={folder}"))
    with pytest.raises(ValueError, match=r"2 epochs, beyond this budget; ask for more, or set run.root"):
        train(config(overrides, "budget.epochs=1", f"run.dir={folder}"))
    assert (folder / "result.json").exists()
    (folder / "result.json").unlink()  # as if it had been killed there
    with pytest.raises(ValueError, match="beyond this budget"):
        train(config(overrides, "budget.epochs=1", f"run.dir={folder}"))
    assert train(config(overrides, f"run.dir={folder}"))["train"]["epochs"] == 2


@pytest.fixture
def power_cut(monkeypatch):
    """Call it with a number of steps, after which the training ends without warning, once."""

    def after(steps):
        clip, taken = runs_of_train.clip_gradient_norm, []

        def failing(*arguments):
            taken.append(1)
            if len(taken) == steps:
                monkeypatch.setattr(runs_of_train, "clip_gradient_norm", clip)
                raise OSError("the power went out")
            return clip(*arguments)

        monkeypatch.setattr(runs_of_train, "clip_gradient_norm", failing)

    return after


def test_while_a_larger_budget_is_used_up_the_run_is_not_finished(overrides, tmp_path, power_cut):
    words = [*overrides, f"run.dir={tmp_path}/run"]
    assert train(config(words, "budget.epochs=1"))
    power_cut(3)
    with pytest.raises(OSError, match="power"):
        train(config(words))
    with pytest.raises(RunError, match="not finished"):
        read(tmp_path / "run")
    assert train(config(words)) and read(tmp_path / "run").result["train"]["epochs"] == 2


def test_time_in_the_output_layer_is_not_lost_with_the_process(overrides, tmp_path, power_cut, monkeypatch):
    class Seconds:
        """Each step spends one in the output layer."""

        def __init__(self, device):
            self.spent = 0

        def mark(self):
            return 0.0

        def add(self, start):
            self.spent += 1

        def drain(self):
            spent, self.spent = self.spent, 0
            return spent

    monkeypatch.setattr(runs_of_train, "DeviceClock", Seconds)
    words = [*overrides, f"run.dir={tmp_path}/run", "log_every=1000", "evaluate.every_tokens=null"]
    power_cut(20)
    with pytest.raises(OSError, match="power"):
        train(config(words))
    found = train(config(words))["train"]
    assert found["output_share"] * found["seconds"] == pytest.approx(found["steps"])


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


def test_where_a_budget_ends_is_nothing_that_a_schedule_sees(overrides, tmp_path):
    """Each validation that it sees divides the rate here: one more would show."""
    words = [*overrides, "schedule=plateau", "schedule.threshold=10.0", "budget.epochs=null"]
    for tokens in (2100, 7000):
        train(config(words, f"budget.tokens={tokens}", f"run.dir={tmp_path}/twice"))
    train(config(words, "budget.tokens=7000", f"run.dir={tmp_path}/once"))
    last = [metrics(tmp_path / name)[-2:] for name in ("once", "twice")]
    assert last[0] == last[1] and last[0][0]["learning_rate"] < 0.1


def test_a_schedule_that_follows_the_budget_makes_it_part_of_the_run(overrides):
    for epochs in (1, 2):
        train(config(overrides, "schedule=cosine", f"budget.epochs={epochs}"))
    assert len(list(Path(overrides[5].removeprefix("run.root=")).glob("text/*"))) == 2


@pytest.mark.parametrize("layer", ["full_softmax", "sampled_softmax"])
def test_killed_twice_a_run_gives_the_numbers_of_an_uninterrupted_one(overrides, tmp_path, layer):
    whole = tmp_path / "whole"
    assert train(config(overrides, f"output={layer}", f"run.dir={whole}"))

    killed = tmp_path / "killed"
    words = [*overrides, f"output={layer}", f"run.dir={killed}"]
    # First while its seventh checkpoint is being written: half of the bytes are there, under the temporary name.
    prelude = (
        "import os, signal, torch\n"
        "save, calls = torch.save, []\n"
        "def interrupted(state, file):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 7:\n"
        "        file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(state, file)\n"
        "torch.save = interrupted\n"
    )
    assert subprocess.run(command(words, prelude), env=ENVIRONMENT).returncode == -signal.SIGKILL
    assert (killed / "checkpoints" / "last.pt.part").exists()
    assert len(metrics(killed)) >= 1
    # Then in the middle of the second epoch, from outside.
    process = subprocess.Popen(command(words), env=ENVIRONMENT)
    while process.poll() is None and not any(line["epoch"] > 1.2 for line in metrics(killed)):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()

    assert train(config(overrides, f"output={layer}", f"run.dir={killed}"))
    assert metrics(killed) == metrics(whole)
    results = [json.loads((folder / "result.json").read_text()) for folder in (killed, whole)]
    assert results[0]["test"] == results[1]["test"]
    assert not list(killed.rglob("*.part"))


def test_a_run_keeps_the_cutoffs_it_chose(overrides, tmp_path, monkeypatch):
    """Gone on with where costs are others, rebuilt where nothing is known of them."""
    exponentials, calls = np.array([0, 1.0, 0, 0, 0, 0]), np.array([0, 0, 0, 0, 0, 1.0])
    folder, patched = tmp_path / "run", "lvsoftmax.layers.adaptive_softmax.cost_model"
    words = [*overrides, "output=adaptive_softmax", "output.cutoffs=auto", f"run.dir={folder}"]
    monkeypatch.setattr(patched, lambda *_: CostModel(exponentials))
    assert train(config(words, "budget.epochs=1"))
    begun = runs.load_config(folder)["output"]["cutoffs"]
    assert begun
    monkeypatch.setattr(patched, lambda *_: CostModel(calls))
    assert train(config(words))["train"]["epochs"] == 2
    assert runs.load_config(folder)["output"]["cutoffs"] == begun
    monkeypatch.setattr(patched, None)
    assert runs.load(folder).output.bounds[1:-1] == begun


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


def wandb_records(file):
    """Yield the records of an offline run's file, a log in LevelDB's format after a header of seven bytes."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # the end of a block that is too short for a record's header is padding
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            yield record
            parts = []


@pytest.mark.parametrize("layer", ["full_softmax", "sparsemax_output"])
def test_wandb_holds_the_named_metrics(overrides, tmp_path, layer):
    """Read the offline run's own file back: what wandb would show is what the run logged, infinities included."""
    words = [*overrides, f"output={layer}", "wandb.mode=offline", f"run.dir={tmp_path}/run", "budget.epochs=1"]
    (tmp_path / "home").mkdir()
    environment = {key: value for key, value in ENVIRONMENT.items() if not key.startswith("WANDB")}
    subprocess.run(command(words), env=environment | {"HOME": str(tmp_path / "home")}, check=True)
    files = list((tmp_path / "run").rglob("*.wandb"))
    assert len(files) == 1
    logged: dict[str, list] = {}
    for record in wandb_records(files[0]):
        for item in record.history.item:
            logged.setdefault("/".join(item.nested_key) or item.key, []).append(json.loads(item.value_json))
    lines = metrics(tmp_path / "run")
    assert logged["train/loss"] == [line["loss"] for line in lines if line["kind"] == "train"]
    assert logged["valid/perplexity"] == [line["perplexity"] for line in lines if line["kind"] == "valid"]
    assert logged["valid/epsilon_perplexity"] == [
        line["epsilon_perplexity"] for line in lines if line["kind"] == "valid"
    ]
    assert any(name.startswith("valid/band/") for name in logged)
    for name in ("tokens_per_second", "output_share", "peak_bytes", "learning_rate", "gradient_norm"):
        assert len(logged[f"train/{name}"]) == len(logged["train/loss"])
    left = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert all(path.parent == tmp_path / "home" / ".cache" / "lvsoftmax" for path in left)  # compiled operations


def test_disabled_wandb_is_not_imported_and_a_failing_one_does_not_end_the_run(overrides, tmp_path):
    check = "import atexit, sys\natexit.register(lambda: print('wandb' in sys.modules))"
    words = [*overrides, f"run.dir={tmp_path}/disabled", "budget.epochs=1"]
    done = subprocess.run(command(words, check), env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    broken = "import sys, types\nbroken = sys.modules['wandb'] = types.ModuleType('wandb')\n"
    words = [*overrides, f"run.dir={tmp_path}/broken", "budget.epochs=1", "wandb.mode=offline"]
    done = subprocess.run(command(words, broken), env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert done.stderr.count("wandb failed") == 1
    assert (tmp_path / "broken" / "result.json").exists()


@pytest.mark.parametrize(("mode", "own"), [("offline", True), ("online", False)])
def test_online_the_user_s_own_settings_say_where(mode, own, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None, Settings=SimpleNamespace))
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", "mine")
    Tracker(tmp_path, {"wandb": {"mode": mode, "project": "p", "group": None}}, "id")
    assert (os.environ["WANDB_CONFIG_DIR"] == str(tmp_path)) == own
    assert os.environ["WANDB_CACHE_DIR"] == str(tmp_path)


def test_sweeps_do_not_collide(overrides, tmp_path):
    words = ["-m", *overrides, "output=full_softmax,sampled_softmax", "seed=1,2", "budget.epochs=0.2"]
    subprocess.run(command(words), env=ENVIRONMENT, check=True)
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "text").iterdir())
    assert names == [f"{layer}-lstm-seed{seed}" for layer in ("full_softmax", "sampled_softmax") for seed in (1, 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["output=sampled_sotfmax"], "output=sampled_sotfmax: no such choice; did you mean sampled_softmax?"),
        (["data=ptbb"], "data=ptbb: no such choice; did you mean ptb?"),
        (["model=gru"], "model=gru: no such choice; choose one of"),
        (["budgets.epochs=3"], "budgets.epochs: no such field; did you mean budget.epochs?"),
        (["seed=x=,"], "error"),
        (["precision=fp16"], "precision=fp16: choose fp32 or bf16"),
        (["output.bias=text"], "output.bias=text: a text can give bigrams and embeddings, nothing else"),
        (["backend=gpu"], "backend='gpu': choose one of auto, "),
        (["device=cuda:7"], "device=cuda:7 is not there; choose one of auto, cpu"),
        (["batch.size=100000"], "does not fill one batch"),
        (["batch.length=0"], "batch.length=0: must be a positive number"),
        (["budget.epochs=null"], "set budget.epochs, budget.tokens or budget.seconds"),
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


def test_another_configuration_s_folder_is_refused(overrides, tmp_path):
    train(config(overrides, "budget.epochs=0.2", f"run.dir={tmp_path}/run"))
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        train(config(overrides, "seed=2", f"run.dir={tmp_path}/run"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        train(config(overrides, f"run.dir={tmp_path}/other"))


def test_the_first_budget_reached_ends_the_run():
    budget = {"epochs": 10, "tokens": 1000, "seconds": None}
    assert spent(budget, tokens=500, epochs=1, seconds=1e9) == 0.5
    assert spent(budget, tokens=10, epochs=9, seconds=0) == 0.9


def test_the_final_evaluation_reads_as_much_as_it_is_told(overrides, tmp_path):
    """Such a run is another than one that reads everything; one that reads everything is what it was before."""
    short = config(overrides, "budget.epochs=0.2", "evaluate.final_tokens=150")
    result = train(short)
    assert result["valid"]["tokens"] == result["test"]["tokens"] == 150
    whole = config(overrides, "budget.epochs=0.2")
    older = whole | {"evaluate": {key: value for key, value in whole["evaluate"].items() if key != "final_tokens"}}
    same = [runs.identity(each, "corpus", follows_budget=False) for each in (whole, older, short)]
    assert same[0] == same[1] != same[2]


def test_seconds_are_those_of_training_and_go_on_after_a_kill(overrides, tmp_path, monkeypatch):
    """Evaluations take no part of a budget in seconds, and what a killed process had used is used."""
    original, clock = runs_of_train.evaluate, SimpleNamespace(now=0.0)

    def slow(*args, **options):
        clock.now += 1000.0
        return original(*args, **options)

    def tick():
        clock.now += 0.5  # read at both ends of a step, which so takes half a second
        return clock.now

    monkeypatch.setattr(runs_of_train, "evaluate", slow)
    monkeypatch.setattr(runs_of_train, "perf_counter", tick)
    words = ["budget.epochs=null", "evaluate.every_tokens=null", "evaluate.every_seconds=4", f"run.dir={tmp_path}/run"]
    first = train(config(overrides, *words, "budget.seconds=10"))
    assert first["train"]["seconds"] == 10 and first["train"]["steps"] == 20
    (tmp_path / "run" / "result.json").unlink()
    second = train(config(overrides, *words, "budget.seconds=25"))
    assert second["train"]["seconds"] == 25 and second["train"]["steps"] == 50
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    valid = [line for line in lines if line["kind"] == "valid"]
    # Every 4 seconds, and at the end of each budget; the epoch's end comes at 16 seconds.
    assert [line["seconds"] for line in valid] == [4, 8, 10, 12, 16, 20, 24, 25]
