"""Who takes part in the benchmark, who is not timed, and why."""

import dataclasses
import re

import pytest
import torch
from benchmarked import CELL
from torch import nn

from experiments.bench import grid
from experiments.bench.cell import TorchInstance, Unavailable, dense_table, problem, zipf_counts
from experiments.bench.contestants import Layer, layers, peers
from experiments.bench.peers import modules
from experiments.bench.records import tables
from experiments.cli import CONFIGS
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.layers.hierarchical_softmax import HierarchicalSoftmax


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


def test_the_readme_says_how_to_install_every_peer():
    text = (CONFIGS.parent / "README.md").read_text("utf-8")
    for name, module in modules().items():
        if module.PACKAGE != "torch":
            assert module.INSTALL in text, name
