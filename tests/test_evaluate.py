"""Evaluation against a brute-force NumPy loop over the text, token by token."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import lvsoftmax.evaluate
from lvsoftmax.data.batches import ContiguousBatches
from lvsoftmax.evaluate import (
    band_losses,
    calibration_error,
    evaluate,
    frequency_bands,
    unigram_perplexity,
)
from lvsoftmax.layer import OutputLayer, unigram_log_prob
from lvsoftmax.layers.full_softmax import FullSoftmax

VOCAB, WIDTH, START = 137, 6, 3
COUNTS = (400 / torch.arange(1, VOCAB + 1)).long()
KEYS = (
    "nll tokens perplexity bands unigram_perplexity accuracy calibration_error log_partition source_nll excess".split()
)


class Recurrent(nn.Module):
    """``h_t = tanh(embedding of the word before + h_(t-1) / 2)``, with a dropout that evaluation must turn off."""

    def __init__(self, output: OutputLayer, scale: float = 1.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=scale)
        self.dropout = nn.Dropout(0.5)
        self.output = output

    def hidden(self, ids, state):
        embedded = self.dropout(self.embedding(ids))
        state = torch.zeros(len(ids), WIDTH) if state is None else state
        steps = []
        for step in embedded.unbind(1):
            state = (step + state / 2).tanh()
            steps.append(state)
        return torch.stack(steps, 1).flatten(0, 1), state


class Uniform(OutputLayer):
    """A layer of one method, without parameters or scores to normalise."""

    def log_prob(self, hidden):
        return hidden.new_full((len(hidden), self.vocab_size), -math.log(self.vocab_size))


class Source:
    def nll(self, ids, previous):
        return 0.01 * ids + 0.001 * previous


def full_model() -> Recurrent:
    model = Recurrent(FullSoftmax(WIDTH, COUNTS))
    nn.init.normal_(model.output.weight, std=2.0)
    return model


def text(tokens: int = 101) -> np.ndarray:
    draws = torch.multinomial(COUNTS.double(), tokens, replacement=True, generator=torch.Generator().manual_seed(5))
    return draws.int().numpy()


def batches(ids: np.ndarray, size: int = 4, length: int = 7) -> ContiguousBatches:
    return ContiguousBatches(ids, size, length, start=START, complete=True)


def brute_force(model: Recurrent, ids: np.ndarray, size: int = 4) -> dict:
    """One token at a time, in float64, from the definitions."""
    embedding, weight, bias = (
        x.detach().double().numpy() for x in (model.embedding.weight, model.output.weight, model.output.bias)
    )
    row_tokens = -(-len(ids) // size)
    tokens = []
    for position, target in enumerate(ids):
        previous = ids[position - 1] if position else START
        hidden = np.zeros(WIDTH) if position % row_tokens == 0 else hidden  # noqa: F821
        hidden = np.tanh(embedding[previous] + hidden / 2)
        logits = weight @ hidden + bias
        partition = np.exp(logits).sum()
        order = np.argsort(-logits)
        tokens.append(
            {
                "target": int(target),
                "nll": math.log(partition) - logits[target],
                "log_partition": math.log(partition),
                "place": int(np.flatnonzero(order == target)[0]),
                "confidence": math.exp(logits[order[0]]) / partition,
                "source": 0.01 * target + 0.001 * previous,
            }
        )
    nll = np.mean([t["nll"] for t in tokens])
    source_nll = np.mean([t["source"] for t in tokens])
    bands = []
    for first, last in ((0, 9), (10, 99), (100, VOCAB - 1)):
        inside = [t["nll"] for t in tokens if first <= t["target"] <= last]
        bands.append({"first": first, "last": last, "tokens": len(inside), "nll": np.mean(inside)})
    error = 0.0
    for m in range(1, 16):
        bin_tokens = [t for t in tokens if (m - 1) / 15 < t["confidence"] <= m / 15]
        if bin_tokens:
            accuracy = np.mean([t["place"] == 0 for t in bin_tokens])
            confidence = np.mean([t["confidence"] for t in bin_tokens])
            error += len(bin_tokens) / len(tokens) * abs(accuracy - confidence)
    raised = COUNTS.double().numpy() + 1
    return {
        "nll": nll,
        "tokens": len(ids),
        "perplexity": math.exp(nll),
        "bands": bands,
        "unigram_perplexity": math.exp(-np.mean(np.log(raised / raised.sum())[ids])),
        "accuracy": {str(k): np.mean([t["place"] < k for t in tokens]) for k in (1, 5, 10)},
        "calibration_error": error,
        "log_partition": {
            "mean": np.mean([t["log_partition"] for t in tokens]),
            "variance": np.var([t["log_partition"] for t in tokens]),
        },
        "source_nll": source_nll,
        "excess": nll - source_nll,
    }


def assert_same(result, expected, rel: float) -> None:
    """Compare nested dictionaries and lists of numbers."""
    if isinstance(expected, dict):
        assert list(result) == list(expected)
        for key in expected:
            assert_same(result[key], expected[key], rel)
    elif isinstance(expected, list):
        assert len(result) == len(expected)
        for one, other in zip(result, expected, strict=True):
            assert_same(one, other, rel)
    elif expected is None:
        assert result is None
    else:
        assert result == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize(("tokens", "size", "length"), [(101, 4, 7), (105, 3, 5), (9, 4, 7), (64, 1, 64)])
def test_equals_the_loop_over_tokens(tokens, size, length):
    model, ids = full_model(), text(tokens)
    if tokens == 9:
        ids[:] = [0, 10, 100, 1, 11, 101, 2, 12, 102]  # every band has a token
    result = evaluate(model, batches(ids, size, length), counts=COUNTS, source=Source())
    assert list(result) == KEYS
    expected = brute_force(model, ids, size)
    assert 0 < expected["accuracy"]["10"] < 1 or tokens == 9
    assert_same(result, expected, rel=1e-5)
    assert json.loads(json.dumps(result)) == result


def test_blocks_of_tokens_change_nothing(monkeypatch):
    model, ids = full_model(), text()
    whole = evaluate(model, batches(ids), counts=COUNTS)
    monkeypatch.setattr(lvsoftmax.evaluate, "_ENTRIES", 5 * VOCAB)
    assert_same(evaluate(model, batches(ids), counts=COUNTS), whole, rel=1e-6)
    monkeypatch.setattr(lvsoftmax.evaluate, "_ENTRIES", 1)
    assert_same(evaluate(model, batches(ids), counts=COUNTS), whole, rel=1e-6)


def test_log_probabilities_are_never_larger_than_a_block(monkeypatch):
    sizes = []

    class Watched(Uniform):
        def log_prob(self, hidden):
            sizes.append(len(hidden))
            return super().log_prob(hidden)

    monkeypatch.setattr(lvsoftmax.evaluate, "_ENTRIES", 5 * VOCAB)
    evaluate(Recurrent(Watched(WIDTH, COUNTS)), batches(text()), counts=COUNTS)
    assert max(sizes) == 5


def test_bands_sum_to_the_whole():
    result = evaluate(full_model(), batches(text()), counts=COUNTS)
    assert sum(band["tokens"] for band in result["bands"]) == result["tokens"] == 101
    total = sum(band["tokens"] * band["nll"] for band in result["bands"])
    assert total == pytest.approx(result["nll"] * result["tokens"])


def test_an_untrained_layer_at_the_origin_is_the_unigram_distribution():
    model, ids = full_model(), text()
    nn.init.zeros_(model.embedding.weight)
    result = evaluate(model, batches(ids), counts=COUNTS)
    assert result["perplexity"] == pytest.approx(result["unigram_perplexity"], rel=1e-6)
    assert result["unigram_perplexity"] == pytest.approx(unigram_perplexity(ids, COUNTS))
    assert result["log_partition"] == pytest.approx({"mean": 0.0, "variance": 0.0}, abs=1e-6)


def test_a_layer_of_one_method_is_measured():
    result = evaluate(Recurrent(Uniform(WIDTH, COUNTS)), batches(text()), counts=COUNTS)
    assert result["perplexity"] == pytest.approx(VOCAB, rel=1e-6)
    assert result["log_partition"] is None and result["source_nll"] is None and result["excess"] is None


def test_the_short_form_has_four_keys_and_no_topk():
    class Short(Uniform):
        def topk(self, hidden, k):
            raise AssertionError

    model = Recurrent(Short(WIDTH, COUNTS))
    short = evaluate(model, batches(text()), counts=COUNTS, full=False)
    assert list(short) == KEYS[:4]
    assert short["nll"] == pytest.approx(math.log(VOCAB))


def test_the_model_and_the_random_stream_are_left_as_they_were():
    model = full_model().train()
    model.dropout.eval()
    before, weight = torch.get_rng_state(), model.output.weight.clone()
    evaluate(model, batches(text()), counts=COUNTS)
    assert model.training and model.output.training and not model.dropout.training
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.output.weight, weight)
    assert all(parameter.grad is None for parameter in model.parameters()) and torch.is_grad_enabled()
    assert not model.output._generators


def test_dropout_is_off_and_training_mode_comes_back_after_an_error():
    model = full_model().train()
    ids = text()
    assert evaluate(model, batches(ids), counts=COUNTS) == evaluate(model.eval(), batches(ids), counts=COUNTS)
    model.train()
    with pytest.raises(IndexError):
        evaluate(model, batches(ids + VOCAB), counts=COUNTS)
    assert model.training and model.dropout.training


def test_batches_without_weights_count_whole_and_progress_counts_tokens():
    steps = []
    ids = text(4 * 21 + 3)
    training = ContiguousBatches(ids, 4, 7, start=START, complete=False)
    result = evaluate(full_model(), training, counts=COUNTS, progress=steps.append)
    assert steps == [28, 28, 28] and result["tokens"] == 84
    steps.clear()
    evaluate(full_model(), batches(ids), counts=COUNTS, progress=steps.append)
    assert sum(steps) == len(ids) and len(steps) == 4


@pytest.mark.parametrize("vocab", [2, 9, 10, 11, 97, 100, 101, 1_000_000])
def test_frequency_bands_cover_the_vocabulary(vocab):
    bands = frequency_bands(vocab)
    if vocab <= 1000:
        assert [word for band in bands for word in band] == list(range(vocab))
    assert all(len(band) for band in bands)
    assert bands[0].start == 0 and bands[-1].stop == vocab
    assert [band.start for band in bands[1:]] == [10**n for n in range(1, len(bands))]


def test_a_band_without_tokens_has_no_loss():
    losses = band_losses(np.array([1.0, 2.0, 6.0]), np.array([0, 9, 100]), 137)
    assert losses == [
        {"first": 0, "last": 9, "tokens": 2, "nll": 1.5},
        {"first": 10, "last": 99, "tokens": 0, "nll": None},
        {"first": 100, "last": 136, "tokens": 1, "nll": 6.0},
    ]


def test_calibration_error_by_hand():
    # Four bins. (0, 1/4]: 0.25 right; (1/4, 1/2]: 0.5 wrong, 0.375 right; (3/4, 1]: 1.0 right, 0.875 wrong.
    confidence = np.array([0.25, 0.5, 0.375, 1.0, 0.875])
    correct = np.array([True, False, True, True, False])
    # |1 - 0.25| * 1/5 + |0.5 - 0.4375| * 2/5 + |0.5 - 0.9375| * 2/5
    assert calibration_error(confidence, correct, bins=4) == pytest.approx(0.15 + 0.025 + 0.175)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0.0
    assert calibration_error(np.array([1.0 + 1e-12, 0.0]), np.array([True, False])) == pytest.approx(0.0)


def test_unigram_perplexity_is_smoothed():
    counts = torch.tensor([6, 1, 0])
    assert unigram_perplexity(np.array([0, 2]), counts) == pytest.approx(math.sqrt(10 / 7 * 10))
    assert unigram_log_prob(counts).exp().sum() == pytest.approx(1.0)
