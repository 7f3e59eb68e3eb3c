"""The benchmark: who is timed, who is not and why, and what is written."""

import contextlib
import csv
import dataclasses
import html.parser
import json
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from experiments import benchmark
from experiments.bench import goals, grid, limits, page, race, step
from experiments.bench.cell import Batch, Cell, TorchInstance, Unavailable, dense_table, problem, zipf_counts
from experiments.bench.contestants import Layer, layers, peers
from experiments.bench.peers import modules
from experiments.bench.promises import promises
from experiments.bench.race import Memory, Runner, Times
from experiments.bench.records import Record, Unfinished, cost_seconds, tables, to_csv
from experiments.bench.step import Step
from experiments.cli import CONFIGS, compose_config, guarded
from experiments.train import train
from lvsoftmax.cost import Work
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.layers.hierarchical_softmax import HierarchicalSoftmax
from lvsoftmax.runs import load

CELL = Cell(tokens=8, hidden=16, vocab=200)
TINY = ("study.tokens=[8]", "study.hidden=[16]", "study.vocab=[200]", "rounds=1", "device=cpu", "progress=false")


def program(monkeypatch, capsys, tmp_path, *words):
    """Run the program with a command line; return its exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", ["benchmark", f"run.root={tmp_path}", *words])
    status = 0
    try:
        guarded(benchmark.main, "benchmark", benchmark.BENCHMARK)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def rows(folder):
    return {line["contestant"]: line for line in csv.DictReader((folder / "results.csv").read_text().splitlines())}


# -- the program ------------------------------------------------------------------------------------------------------


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


def test_kept_records_come_back_as_they_were(tmp_path):
    times = {"train": Times((0.1, 1 / 3))}
    timed = Record(
        CELL, "a", "layer", "", 3, Work(4, 5), times, {"train": Memory(1, 2, 3, 4)}, {"train": {"b": 0.5}}, "CPU"
    )
    found = [timed, Record(CELL, "b", "peer", "lacks a part")]
    kept = Unfinished(tmp_path / "kept", {"rounds": 2})
    assert kept.load(CELL) == []
    kept.save(CELL, found)
    assert kept.load(CELL) == found and to_csv(kept.load(CELL)) == to_csv(found)
    assert kept.load(dataclasses.replace(CELL, vocab=201)) == []
    assert Unfinished(tmp_path / "kept", {"rounds": 3}).load(CELL) == []
    kept.forget([CELL])
    assert kept.load(CELL) == [] and not (tmp_path / "kept").exists()


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


# -- who is timed -----------------------------------------------------------------------------------------------------


def test_every_layer_is_found_by_its_file():
    assert [layer.name for layer in layers(["*"])] == sorted(file.stem for file in (CONFIGS / "output").glob("*.yaml"))


def test_options_are_part_of_a_layer_s_name():
    (layer,) = layers(["sampled_softmax(samples=1024, replacement=true)"])
    assert layer.label == "sampled_softmax(samples=1024, replacement=true)"
    assert layer.config["samples"] == 1024 and layer.config["replacement"] is True
    (bands,) = layers(["differentiated_softmax(bands=[0.5, 0.5], widths=[0.5, 0.5])"])
    assert bands.config["bands"] == [0.5, 0.5] and hash(bands)


def test_a_star_stands_for_every_value_of_an_option():
    trees = [dict(layer.options)["tree"] for layer in layers(["hierarchical_softmax(tree=*)"])]
    assert trees == ["balanced", "random", "clustered"]
    every = layers(["hierarchical_softmax(*)"])
    assert [layer.label for layer in every[:2]] == ["hierarchical_softmax", "hierarchical_softmax(tree=balanced)"]
    assert "hierarchical_softmax(sparse=false)" in [layer.label for layer in every]
    assert all("tree" in layer.config for layer in layers(["*(tree=*)"]))


def test_an_option_or_a_layer_that_is_not_there_is_said():
    with pytest.raises(Unavailable, match="not there: full_softmax has no option colour"):
        Layer("full_softmax", (("colour", 3),)).build(CELL)
    with pytest.raises(Unavailable, match="not there: no such output layer"):
        Layer("no_such_softmax").build(CELL)
    with pytest.raises(Unavailable, match="samples=500"):
        Layer("sampled_softmax", (("samples", 500),)).build(CELL)


def test_vectors_are_given_to_those_only_who_cannot_do_without():
    """A Huffman tree without word vectors is a setting of its own; arranging one by vectors would take minutes."""
    counts = zipf_counts(500)
    plain, given = HierarchicalSoftmax(8, counts), Layer("hierarchical_softmax").make(8, counts)
    assert torch.equal(given.word_branch, plain.word_branch)
    Layer("hierarchical_softmax", (("tree", "clustered"),)).make(8, counts)
    Layer("sampled_softmax", (("noise", "bigram"),)).make(8, counts)
    with pytest.raises(Unavailable, match="samples=501"):
        Layer("sampled_softmax", (("samples", 501),)).make(8, counts)


@pytest.mark.parametrize("peer", peers(["*"]), ids=lambda peer: peer.label)
@pytest.mark.usefixtures("without_type_checks")
def test_a_peer_runs_in_every_mode_or_says_why_not(peer):
    if peer.label == "PyTorch, compiled":
        pytest.skip("compiling takes long; the benchmark itself checks that the loss is right")
    cell = dataclasses.replace(CELL, vocab=10_007)
    try:
        instance = peer.build(cell)
    except Unavailable as reason:
        assert re.match("not installed: pip install|runs on CUDA only", str(reason)), reason
        return
    peer.check(cell)
    batch = problem(cell).batches[0]
    for run in instance.modes.values():
        run(batch)
        instance.forget(batch)
    assert instance.parameters > 0


@pytest.mark.parametrize("layer", layers(["*"]), ids=lambda layer: layer.label)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("without_type_checks")
def test_a_layer_of_this_project_passes_the_gate(layer, precision):
    layer.check(dataclasses.replace(CELL, precision=precision))


# -- who is not -------------------------------------------------------------------------------------------------------

BROKEN = {
    "log_prob is not normalised": ("log_prob", lambda self, hidden: self.logits(hidden)),
    "nll is not minus log_prob": ("nll", lambda self, hidden, target: hidden.sum(1) * 0 + 1),
    "loss is": ("loss", lambda self, hidden, target, weight, *_: self.nll(hidden, target).mean()),
    "a gradient of loss differs": (
        "loss",
        lambda self, hidden, target, weight, *_: (weight * self.nll(hidden.detach(), target)).sum() + 0 * hidden.sum(),
    ),
    "a gradient of loss is not finite": (
        "loss",
        lambda self, hidden, target, weight, *_: (
            (weight * self.nll(hidden, target)).sum() + 0 * (0 * self.weight).sqrt().sum()
        ),
    ),
    "fails: RuntimeError: no kernel": ("forward", lambda *_: raises(RuntimeError("no kernel"))),
}


def raises(error):
    raise error


@pytest.mark.parametrize("reason", BROKEN)
@pytest.mark.usefixtures("without_type_checks")
def test_a_layer_that_breaks_a_law_is_not_timed(reason, monkeypatch):
    method, wrong = BROKEN[reason]
    monkeypatch.setattr(FullSoftmax, method, wrong, raising=False)
    if method == "forward":
        monkeypatch.setattr(FullSoftmax, "nll", wrong)
    settings = grid.Settings(rounds=1, seconds=1, memory=False)
    (found,) = grid.run([CELL], [Layer("full_softmax"), Layer("sampled_softmax")], ["train"], settings)
    record = found[2]
    assert record.label == "full_softmax" and not record.times
    assert record.reason.startswith(reason), record.reason
    assert found[3].times["train"].median > 0
    assert f"- not timed: full_softmax: {record.reason}" in str(tables(found)[0]).splitlines()


@pytest.mark.usefixtures("without_type_checks")
def test_a_loss_that_is_wrong_in_bf16_is_told(monkeypatch):
    loss = FullSoftmax.loss
    monkeypatch.setattr(FullSoftmax, "loss", lambda *x: loss(*x) * (0.85 if torch.is_autocast_enabled("cpu") else 1))
    Layer("full_softmax").check(CELL)
    with pytest.raises(Unavailable, match="in bf16"):
        Layer("full_softmax").check(dataclasses.replace(CELL, precision="bf16"))


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_an_exact_peer_that_is_wrong_is_not_timed(fault, monkeypatch):
    (peer,) = peers(["PyTorch, eager"])

    def build(cell, **_):
        weight, bias = dense_table(cell)
        scale = 1.1 if fault == "loss" else 1.0

        def loss(hidden, target, factor, previous):
            hidden = hidden.detach() + 1e-9 * hidden if fault == "gradient" else hidden
            return scale * nn.functional.cross_entropy(hidden @ weight.T, target)

        return TorchInstance(cell, [weight, bias], None, loss)

    monkeypatch.setattr(peer._module, "build", build)
    with pytest.raises(Unavailable, match={"loss": "its loss is", "gradient": "its gradient"}[fault]):
        peer.check(CELL)


# -- the problem ------------------------------------------------------------------------------------------------------


def test_words_are_zipf_s_and_no_batch_is_like_another():
    task = problem(Cell(tokens=20_000, hidden=1, vocab=1000))
    assert torch.equal(task.counts, zipf_counts(1000)) and task.counts[-1] == 4
    words = torch.cat([batch.target for batch in task.batches])
    share = words.bincount(minlength=1000)[:3] / len(words)
    expected = task.counts[:3] / task.counts.sum()
    assert torch.allclose(share, expected.float(), rtol=0.05)
    assert not torch.equal(task.batches[0].target, task.batches[1].target)
    assert problem(CELL) is problem(dataclasses.replace(CELL))


def test_bf16_is_autocast_or_everything():
    auto, everything = (problem(dataclasses.replace(CELL, precision=p)) for p in ("bf16", "bf16_parameters"))
    assert auto.batches[0].hidden.dtype == everything.batches[0].hidden.dtype == torch.bfloat16
    kinds = []
    for precision in ("fp32", "bf16", "bf16_parameters"):
        instance = Layer("full_softmax").build(dataclasses.replace(CELL, precision=precision))
        kinds.append({parameter.dtype for parameter in instance.trained})
    assert kinds == [{torch.float32}, {torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize("tiling", [(8, 200), (3, 200), (8, 70), (3, 64)])
def test_the_products_are_those_of_a_dense_step(tiling):
    instance = limits.Products().build(CELL)
    batch = problem(CELL).batches[0]
    instance.room = torch.full((8 * 200,), math.nan)
    for gradient in (instance.grad_hidden, instance.grad_weight):
        gradient.fill_(math.nan)
    instance.run(batch, tiling)
    hidden, weight = batch.hidden.detach(), instance.weight
    torch.testing.assert_close(instance.grad_hidden, hidden @ weight.T @ weight)
    torch.testing.assert_close(instance.grad_weight, (hidden @ weight.T).T @ hidden)


# -- time and memory --------------------------------------------------------------------------------------------------


class Counting:
    """An instance that notes when it ran."""

    parameters, counted, scale = 1, False, 2.0

    def __init__(self, name, log):
        self.modes = {"train": lambda batch: log.append(name)}

    def forget(self, batch: Batch) -> None:
        pass

    def gradient_bytes(self, batch: Batch) -> int:
        return 0


def test_a_race_takes_turns_and_the_first_round_does_not_count(monkeypatch):
    log, ticks = [], iter(range(1000))
    monkeypatch.setattr(race, "clock_of", lambda cell: ("ticks", lambda: float(next(ticks))))
    runners = {name: Runner(Counting(name, log), "train", CELL) for name in "abc"}
    times = race.race(runners, rounds=3, budget=100)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert times["a"].rounds == (2.0, 2.0, 2.0)  # a tick, scaled


def test_a_race_ends_when_time_is_up_but_not_before_three_rounds(monkeypatch):
    log = []
    monkeypatch.setattr(race, "SHORTEST", 0.0)
    race.race({"a": Runner(Counting("a", log), "train", CELL)}, rounds=50, budget=0.0)
    assert len(log) == 1 + 3


def test_what_is_fast_runs_more_than_once_in_its_turn():
    log = []
    race.race({"a": Runner(Counting("a", log), "train", CELL)}, rounds=1, budget=100)
    assert len(log) == 1 + race.MOST_RUNS


def test_numbers_of_threads_are_not_mixed():
    runners = {n: Runner(Counting("a", []), "train", dataclasses.replace(CELL, threads=n)) for n in (1, 2)}
    with pytest.raises(ValueError, match="numbers of threads"):
        race.race(runners, rounds=1, budget=1)
    assert race.clock_of(CELL)[0] == "CPU time"
    assert race.clock_of(dataclasses.replace(CELL, threads=2))[0] == "wall-clock time"


def test_ratios_are_taken_round_by_round():
    slow, fast = Times((2.0, 40.0, 9.0)), Times((1.0, 10.0, 9.0))
    assert slow.over(fast) == 2.0 and slow.median == 9.0 and slow.quartiles == (5.5, 24.5)


def test_memory_is_that_of_the_step_alone():
    cell = dataclasses.replace(CELL, tokens=128, vocab=32_768)
    (eager,) = peers(["PyTorch, eager"])
    found = race.memory(eager, cell, ["train", "step", "no such mode"])
    logits, table = 128 * 32_768 * 4, 32_768 * 17 * 4
    assert list(found) == ["train", "step"]
    train = found["train"]
    assert train.gradients == table + 128 * 16 * 4
    assert 2 * logits < train.peak < 4.5 * logits + 2 * table  # logits, their logarithm's softmax, gradients of both
    assert abs(train.resident - table) < 2**20
    assert abs(found["step"].kept - table) < 2**20  # the optimiser's state


def test_what_does_not_fit_or_fails_is_told(monkeypatch):
    cell = dataclasses.replace(CELL, tokens=256, vocab=100_000)
    (eager,) = peers(["PyTorch, eager"])
    monkeypatch.setattr(race, "allowance", lambda device: 100 * 2**20)
    with pytest.raises(Unavailable, match=r"takes more than 0\.1 GiB"):
        race.memory(eager, cell, ["train"])
    with pytest.raises(Unavailable, match="has no option colour"):
        race.memory(Layer("full_softmax", (("colour", 1),)), CELL, ["train"])


def test_heats_fit_into_memory_and_keep_the_references():
    contestants = [limits.Products(), *peers(["PyTorch, eager"]), *layers(["full_softmax"])]
    others = [Layer("sampled_softmax", (("samples", k),)) for k in (1, 2, 3)]
    sizes = {each.label: {"train": Memory(peak=10, kept=0, gradients=0, resident=10)} for each in contestants + others}
    assert grid.heats(contestants + others, sizes, None) == [contestants + others]
    first, second = grid.heats(contestants + others, sizes, 60)
    assert first == contestants + others[:2] and second == contestants + others[2:]
    assert grid.heats(contestants, {}, 60) == [contestants]


def test_who_does_not_fit_beside_the_references_is_left_out():
    limit, eager, ours = limits.Products(), *peers(["PyTorch, eager"]), *layers(["full_softmax"])
    small, large = (Layer("sampled_softmax", (("samples", k),)) for k in (1, 2))
    peaks = {limit.label: 0, eager.label: 80, ours.label: 20, small.label: 5, large.label: 50}
    sizes = {label: {"train": Memory(peak=peak, kept=0, gradients=0, resident=10)} for label, peak in peaks.items()}
    everyone = [limit, eager, ours, small, large]
    assert grid.outsized(everyone, sizes, None) == []
    assert grid.outsized(everyone, sizes, 120) == []  # four times 10, and 80
    assert grid.outsized(everyone, sizes, 119) == [eager]  # without it all fit
    assert grid.outsized(everyone, sizes, 80) == [eager]
    assert grid.outsized(everyone, sizes, 79) == [eager, large]
    assert grid.outsized(everyone, sizes, 49) == [eager, ours, large]
    assert grid.outsized([limit, eager, ours], sizes, 110) == []
    assert grid.outsized([limit, eager, ours], sizes, 109) == [eager]


# -- what is told -----------------------------------------------------------------------------------------------------


def test_a_csv_has_a_column_for_everything_and_a_line_for_everybody():
    record = Record(CELL, "a", "layer", work=Work(10, 20), times={"train": Times((2.0, 1.0))},
                    memory={"train": Memory(100, 7, 60, 50)}, ratios={"train": {"three products": 1.5}})  # fmt: skip
    lines = list(csv.DictReader(to_csv([record, Record.refused(Layer("b"), CELL, "red")]).splitlines()))
    assert lines[0]["train_seconds"] == "1.5" and lines[0]["train_over_products"] == "1.5"
    assert lines[0]["extra_bytes"] == "47" and lines[0]["flops"] == "10" and lines[0]["step_seconds"] == ""
    assert lines[1]["status"] == "not timed" and lines[1]["reason"] == "red" and lines[1]["train_seconds"] == ""
    assert set(lines[0]) == set(Record(CELL, "", "").line())


def test_a_step_is_held_against_the_dearer_of_its_operations_and_its_bytes():
    products = 6 * CELL.tokens * CELL.hidden * CELL.vocab / 1e9  # seconds: 1 GFLOP/s
    pace = {"three products": products, "copy of 256 MiB": limits.Copy.bytes / 2e9}  # 2 GB/s
    assert cost_seconds(Record(CELL, "", "", work=Work(int(3e9), int(1e9))), pace) == pytest.approx(3.0)
    assert cost_seconds(Record(CELL, "", "", work=Work(int(3e9), int(8e9))), pace) == pytest.approx(4.0)
    assert cost_seconds(Record(CELL, "", ""), pace) is None
    assert cost_seconds(Record(CELL, "", "", work=Work(1, 1)), {"three products": 1.0}) is None


def test_a_table_has_the_fastest_first_and_no_empty_columns():
    def record(label, seconds, kind="layer", mode="train"):
        return Record(CELL, label, kind, times={mode: Times((seconds,))}, clock="CPU time",
                      ratios={"train": {"PyTorch, eager": seconds / 4}})  # fmt: skip

    slow, fast, other = record("slow", 2.0), record("fast", 1.0), record("other", 3.0, mode="step")
    red = Record.refused(Layer("red_softmax"), CELL, "log_prob is not normalised")
    (table,) = tables([record("three products", 0.5, "limit"), slow, other, fast, red])
    assert [row.label for row in table.rows] == ["fast", "slow", "other"]
    assert [column.heading for column in table.columns] == ["Loss and gradients, ms", "Whole step, ms", "× eager"]
    assert str(table).splitlines()[2:6] == [
        "|       | Loss and gradients, ms |      Whole step, ms | × eager |",
        "| ----- | ---------------------: | ------------------: | ------: |",
        "| fast  |    1,000 (1,000–1,000) |                     |   0.250 |",
        "| slow  |    2,000 (2,000–2,000) |                     |   0.500 |",
    ]
    assert str(table).endswith("- not timed: red_softmax: log_prob is not normalised\n")


class Requests(html.parser.HTMLParser):
    """Notes what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.wanted = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "srcset", "poster", "data") and not (value or "").startswith(("data:", "#")):
                self.wanted.append((tag, name, value))


def grid_records():
    """Two sizes of vocabulary, a layer, the eager softmax, and a layer that was refused."""
    for vocab in (100, 1000):
        cell = dataclasses.replace(CELL, vocab=vocab)
        for label, kind, seconds in (("PyTorch, eager", "peer", vocab / 1e3), ("<b>tree</b>", "layer", vocab / 1e5)):
            memory, over_eager = Memory(5 * vocab, 0, vocab, 0), seconds / vocab * 1e3
            yield Record(
                cell, label, kind, work=Work(10, 20), times={"train": Times((seconds, seconds))}, clock="CPU time",
                memory={"train": memory}, ratios={"train": {"PyTorch, eager": over_eager}},
            )  # fmt: skip
        yield Record.refused(Layer("red_softmax"), cell, "log_prob is not normalised")


ENVIRONMENT = {"processor": "a processor", "device": "cpu", "versions": {"torch": "2"}, "config": {"rounds": 3}}


def test_the_page_shows_time_and_memory_against_v_and_asks_nobody_for_anything():
    text = page.html("Benchmark", ENVIRONMENT, list(grid_records()))
    reader = Requests()
    reader.feed(text)
    assert reader.wanted == [] and "default-src 'none'" in text
    figures = [json.loads(found) for found in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text)]
    captions = [text.split(", ")[-1] for text in re.findall("<figcaption>(.*?)</figcaption>", text)]
    assert [figure["layout"]["yaxis"]["title"]["text"] for figure in figures] == captions == ["milliseconds", "MiB"]
    for figure in figures:
        assert figure["layout"]["xaxis"]["type"] == figure["layout"]["yaxis"]["type"] == "log"
        assert [trace["meta"] for trace in figure["data"]] == ["PyTorch, eager", "<b>tree</b>"]
        assert figure["data"][0]["x"] == [100, 1000]
    assert figures[0]["data"][1]["y"] == pytest.approx([1.0, 10.0])
    body = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "&lt;b&gt;tree" in body and "<b>tree" not in body
    assert "red_softmax" in body and "log_prob is not normalised" in body
    assert "10.00 ms for 8 tokens, 100.0 times as fast as the eager softmax." in body
    assert text == page.html("Benchmark", ENVIRONMENT, list(grid_records()))


def test_the_page_of_promises_counts_them():
    line = goals.Line("1a", "exact", goals.ratio("a", "b"), at_most=2.0)
    kept, missed = line.judged(found_in_a_race(a=1.0, b=1.0)), line.judged(found_in_a_race(a=3.0, b=1.0))
    stretch = dataclasses.replace(line, stretch=True).judged(found_in_a_race(a=3.0, b=1.0))
    lost = dataclasses.replace(line, hurdle="no such CPU").judged(found_in_a_race())
    text = page.html("Promises", ENVIRONMENT, [], [kept, missed, stretch, lost])
    assert "1 of 3 promises are kept, 1 are missed, 1 could not be measured." in text
    assert "no such CPU" in text and "at most 2×" in text and len(text) < 100_000


def test_without_what_draws_there_are_tables_and_a_word_about_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "experiments.bench.page", None)
    monkeypatch.delattr("experiments.bench.page")
    benchmark.draw(tmp_path, "benchmark.html", "Benchmark", ENVIRONMENT, [])
    assert capsys.readouterr().out.startswith("no page, only the tables: ") and not list(tmp_path.iterdir())


# -- promises ---------------------------------------------------------------------------------------------------------


def found_in_a_race(**medians):
    """Times in which everybody takes the same in each round."""
    times = {key: Times((median,) * 3) for key, median in medians.items()}
    memories = {"a": Memory(peak=50 * 2**20, kept=2**20, gradients=20 * 2**20, resident=0)}
    return goals.Measured(times, memories, {"lost": Unavailable("not there: no such output layer")})


@pytest.mark.parametrize(
    ("line", "measured", "status"),
    [
        (goals.Line("1a", "", goals.ratio("a", "b"), at_most=2.0), 2.0, "pass"),
        (goals.Line("1a", "", goals.ratio("a", "b"), at_most=1.9), 2.0, "miss"),
        (goals.Line("1a", "", goals.ratio("a", "b"), at_least=2.0), 2.0, "pass"),
        (goals.Line("1a", "", goals.ratio("a", "b"), at_least=2.1), 2.0, "miss"),
        (goals.Line("7a", "", goals.ratio("a", "b"), at_least=2.1, stretch=True), 2.0, "short of it"),
        (goals.Line("5a", "", goals.percentage("b", "a"), at_most=40), 50.0, "miss"),
        (goals.Line("2c", "", goals.ratio_or_less("lost", "a", "b"), at_least=2), 2.0, "pass"),
        (goals.Line("2c", "", goals.ratio_or_less("c", "a", "b"), at_least=2), 4.0, "pass"),
        (goals.Line("1b", "", goals.beyond_gradients("a"), at_most=31), 31.0, "pass"),
        (goals.Line("5b", "", goals.beyond_state("a"), at_most=49), 50.0, "miss"),
        (goals.Line("6c", "", goals.worst_ratio([("c", "b"), ("a", "b")]), at_least=3), 2.0, "miss"),
        (goals.Line("5c", "", goals.exponent({10: "b", 100: "a", 1000: "c"}), at_most=0.31), math.log10(2), "pass"),
        (goals.Line("4a", "", goals.ratio("a", "lost"), at_least=2), None, "not there"),
        (goals.Line("1b", "", goals.beyond_gradients("b"), at_most=2), None, "unmeasured"),
        (goals.Line("1h", "", goals.ratio("a", "b"), at_most=2, hurdle="no such CPU"), None, "unmeasured"),
    ],
)
def test_a_promise_is_judged_by_its_figure(line, measured, status):
    result = line.judged(found_in_a_race(a=2.0, b=1.0, c=4.0))
    assert result.status == status
    assert result.value == (None if measured is None else pytest.approx(measured))


@pytest.mark.usefixtures("without_type_checks")
def test_promises_are_measured_in_one_race_and_missing_layers_named():
    entrants = {"exact": goals.Entrant(Layer("full_softmax"), CELL, measured=True),
                "products": goals.Entrant(limits.Products(), CELL),
                "lost": goals.Entrant(Layer("no_such_softmax"), CELL),
                "idle": goals.Entrant(Layer("full_softmax"), CELL)}  # fmt: skip
    lines = [goals.Line("1a", "exact", goals.ratio("exact", "products"), at_most=1e9),
             goals.Line("1b", "exact", goals.beyond_gradients("exact"), at_most=1e9),
             goals.Line("2a", "lost", goals.ratio("products", "lost"), at_least=1)]  # fmt: skip
    results, behind = goals.measured(goals.Race("N 8", entrants, lines), rounds=1, seconds=1)
    assert [result.status for result in results] == ["pass", "pass", "not there"]
    assert results[0].value > 0 and results[0].line.text == "exact, N 8"
    assert [record.label for record in behind] == ["full_softmax", "three products", "no_such_softmax"]
    table = goals.table(results)
    assert "not there: no such output layer" in table and "at most" in table
    read = list(csv.DictReader(goals.to_csv(results).splitlines()))
    assert [line["status"] for line in read] == ["pass", "pass", "not there"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_line_of_the_promises_names_entrants_of_its_race(device):
    races = promises(device, "adagrad", 1)
    names = [line.name for race in races for line in race.lines]
    assert len(names) == len(set(names))
    for one in races:
        assert {key for line in one.lines for key in line.figure.needs} <= set(one.entrants)
        assert all((line.at_most is None) != (line.at_least is None) for line in one.lines)
    expected = {"cpu": "1a 1b 1c 1d 1e 1f 1g 1h 2a 2b 2c 2d 2e 3a 3b 4a 4b 4c 4d 5a 5b 5c 5d 5e 5f 7a 7b 7c",
                "cuda": "6a 6b 6c 6d 6e 6f 6g 6h"}  # fmt: skip
    assert sorted(names) == expected[device].split()


def test_lines_are_chosen_by_number_or_by_name():
    races = goals.chosen(promises("cpu", "adagrad", 1), [3, "2c"])
    assert sorted(line.name for race in races for line in race.lines) == ["2c", "3a", "3b"]
    with pytest.raises(ValueError, match="study.lines=6: no such line here; choose from 1a, 1b"):
        goals.chosen(promises("cpu", "adagrad", 1), [6])


# -- where the time of a step goes ------------------------------------------------------------------------------------

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


def test_the_readme_says_how_to_install_every_peer():
    text = (CONFIGS.parent / "README.md").read_text("utf-8")
    for name, module in modules().items():
        if module.PACKAGE != "torch":
            assert module.INSTALL in text, name
