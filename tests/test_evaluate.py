"""Evaluation against a brute-force NumPy loop over the text, token by token."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import lvsoftmax.calibration
from lvsoftmax.data.batches import ContiguousBatches
from lvsoftmax.evaluate import (
    band_losses,
    epsilon_perplexity,
    evaluate,
    frequency_bands,
    temperature_of,
    unigram_perplexity,
)
from lvsoftmax.layer import OutputLayer, unigram_log_prob
from lvsoftmax.layers.full_softmax import FullSoftmax

VOCAB, WIDTH, START = 137, 6, 3
COUNTS = (400 / torch.arange(1, VOCAB + 1)).long()
KEYS = (
    "nll tokens perplexity coverage epsilon epsilon_perplexity bands unigram_perplexity accuracy calibration_error "
    "calibrated sparsemax_score support_size log_partition source_nll excess"
).split()
SHORT = KEYS[:7]


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


def ece(tokens: list[dict], confidence: str) -> float:
    error = 0.0
    for m in range(1, 16):
        bin_tokens = [t for t in tokens if (m - 1) / 15 < t[confidence] <= m / 15]
        if bin_tokens:
            accuracy = np.mean([t["place"] == 0 for t in bin_tokens])
            error += len(bin_tokens) / len(tokens) * abs(accuracy - np.mean([t[confidence] for t in bin_tokens]))
    return error


def brute_force(model: Recurrent, ids: np.ndarray, size: int = 4, temperature: float = 1.6) -> dict:
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
        p = np.exp(logits) / partition
        tempered = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
        tokens.append(
            {
                "target": int(target),
                "nll": math.log(partition) - logits[target],
                "log_partition": math.log(partition),
                "place": int(np.flatnonzero(order == target)[0]),
                "confidence": p.max(),
                "smoothed": -math.log((p[target] + 0.01 / VOCAB) / 1.01),
                "score": 1 - ((np.eye(VOCAB)[target] - p) ** 2).sum() / 2,
                "tempered": -math.log(tempered[target]),
                "tempered_confidence": tempered.max(),
                "source": 0.01 * target + 0.001 * previous,
            }
        )
    nll = np.mean([t["nll"] for t in tokens])
    source_nll = np.mean([t["source"] for t in tokens])
    bands = []
    for first, last in ((0, 9), (10, 99), (100, VOCAB - 1)):
        inside = [t["nll"] for t in tokens if first <= t["target"] <= last]
        bands.append({"first": first, "last": last, "tokens": len(inside), "nll": np.mean(inside)})
    raised = COUNTS.double().numpy() + 1
    return {
        "nll": nll,
        "tokens": len(ids),
        "perplexity": math.exp(nll),
        "coverage": 1.0,
        "epsilon": 0.01 / VOCAB,
        "epsilon_perplexity": math.exp(np.mean([t["smoothed"] for t in tokens])),
        "bands": bands,
        "unigram_perplexity": math.exp(-np.mean(np.log(raised / raised.sum())[ids])),
        "accuracy": {str(k): np.mean([t["place"] < k for t in tokens]) for k in (1, 5, 10)},
        "calibration_error": ece(tokens, "confidence"),
        "calibrated": {
            "temperature": temperature,
            "nll": np.mean([t["tempered"] for t in tokens]),
            "perplexity": math.exp(np.mean([t["tempered"] for t in tokens])),
            "calibration_error": ece(tokens, "tempered_confidence"),
        },
        "sparsemax_score": np.mean([t["score"] for t in tokens]),
        "support_size": VOCAB,
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
    result = evaluate(model, batches(ids, size, length), counts=COUNTS, source=Source(), temperature=1.6)
    assert list(result) == KEYS
    expected = brute_force(model, ids, size)
    assert 0 < expected["accuracy"]["10"] < 1 or tokens == 9
    assert_same(result, expected, rel=1e-5)
    assert json.loads(json.dumps(result)) == result


def test_blocks_of_tokens_change_nothing(monkeypatch):
    model, ids = full_model(), text()
    whole = evaluate(model, batches(ids), counts=COUNTS)
    monkeypatch.setattr(lvsoftmax.calibration, "_FEWEST", 1)
    monkeypatch.setattr(lvsoftmax.calibration, "_ENTRIES", 5 * VOCAB)
    assert_same(evaluate(model, batches(ids), counts=COUNTS), whole, rel=1e-6)
    monkeypatch.setattr(lvsoftmax.calibration, "_ENTRIES", 1)
    assert_same(evaluate(model, batches(ids), counts=COUNTS), whole, rel=1e-6)


def test_log_probabilities_are_never_larger_than_a_block(monkeypatch):
    sizes = []

    class Watched(Uniform):
        def log_prob(self, hidden):
            sizes.append(len(hidden))
            return super().log_prob(hidden)

    monkeypatch.setattr(lvsoftmax.calibration, "_ENTRIES", 5 * VOCAB)
    monkeypatch.setattr(lvsoftmax.calibration, "_FEWEST", 4)
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


def test_the_short_form_asks_for_nll_alone():
    class Short(Uniform):
        def nll(self, hidden, target):
            return hidden.new_full((len(hidden),), math.log(self.vocab_size))

        def log_prob(self, hidden):
            raise AssertionError

    model = Recurrent(Short(WIDTH, COUNTS))
    short = evaluate(model, batches(text()), counts=COUNTS, full=False)
    assert list(short) == SHORT
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


def test_unigram_perplexity_is_smoothed():
    counts = torch.tensor([6, 1, 0])
    assert unigram_perplexity(np.array([0, 2]), counts) == pytest.approx(math.sqrt(10 / 7 * 10))
    assert unigram_log_prob(counts).exp().sum() == pytest.approx(1.0)


# -- words alike, words without a probability --------------------------------------------------------------------------


class Given(OutputLayer):
    """The same distribution everywhere."""

    def __init__(self, p: list[float]) -> None:
        super().__init__(WIDTH, COUNTS)
        self.full_support = 0 not in p
        self.p = torch.tensor([*p, *[0.0] * (VOCAB - len(p))]) if not self.full_support else torch.tensor(p)

    def log_prob(self, hidden):
        return self.p.log().expand(len(hidden), -1)


def test_of_words_alike_the_more_frequent_is_predicted():
    model = Recurrent(Uniform(WIDTH, COUNTS))
    ids = np.array([0, 1, 4, 5, 9, 10, 136], np.int32)
    result = evaluate(model, batches(ids, 1), counts=COUNTS)
    assert result["accuracy"] == pytest.approx({"1": 1 / 7, "5": 3 / 7, "10": 5 / 7})
    model = Recurrent(Given([0.1, 0.3, 0.1, 0.3, 0.1, 0.1, 0.0]))
    result = evaluate(model, batches(np.array([1, 3, 0, 2, 4, 5, 6], np.int32), 1), counts=COUNTS)
    assert result["accuracy"] == pytest.approx({"1": 1 / 7, "5": 5 / 7, "10": 6 / 7})


def test_words_of_probability_zero():
    """By hand: a target of probability 0 is no prediction, and makes infinite what it makes infinite."""
    model = Recurrent(Given([0.5, 0.25, 0.25, 0.0]))
    result = evaluate(model, batches(np.array([0, 1, 2, 50], np.int32), 1), counts=COUNTS, temperature=2.0)
    assert result["nll"] == result["perplexity"] == math.inf
    assert result["coverage"] == 0.75
    assert result["support_size"] == 3
    assert result["accuracy"] == {"1": 0.25, "5": 0.75, "10": 0.75}
    epsilon = 0.01 / VOCAB
    assert result["epsilon"] == epsilon
    p = np.array([0.5, 0.25, 0.25, 0.0])
    expected = np.exp(-np.log((p + epsilon) / (1 + epsilon * VOCAB)).mean())
    assert result["epsilon_perplexity"] == pytest.approx(expected)
    assert result["sparsemax_score"] == pytest.approx(0.25 + (1 - 0.25 - 0.0625 - 0.0625) / 2)
    assert [band["nll"] for band in result["bands"]] == [pytest.approx(-np.log(p[:3]).mean()), math.inf, None]
    assert result["calibrated"]["nll"] == math.inf and 0 < result["calibrated"]["calibration_error"] < 1
    short = evaluate(model, batches(np.array([0, 1, 2, 50], np.int32), 1), counts=COUNTS, full=False)
    assert short == {key: result[key] for key in SHORT}


def test_the_epsilon_perplexity_of_certainty_and_of_nothing():
    assert epsilon_perplexity(np.zeros(3), 50) == pytest.approx(1.01 / 1.0002)
    assert epsilon_perplexity(np.full(3, np.inf), 50) == pytest.approx(50 * 101)
    assert epsilon_perplexity(np.full(3, math.log(50)), 50) == pytest.approx(50)


# -- the temperature ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_type_checks")
def test_the_temperature_is_that_of_the_first_tokens_in_reading_order():
    model, ids = full_model(), text()
    nlls = {}
    for temperature in (found := temperature_of(model, batches(ids), 28), 0.99 * found, 1.01 * found):
        other = evaluate(model, list(batches(ids))[:1], counts=COUNTS, temperature=temperature)
        nlls[temperature] = other["calibrated"]["nll"]
    assert min(nlls, key=nlls.get) == found != 1
    assert temperature_of(model, batches(ids)) != found


def test_a_fitted_temperature_leaves_the_model_as_it_was():
    model = full_model().train()
    before = torch.get_rng_state()
    temperature_of(model, batches(text()), 50)
    assert model.training and model.output.training
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_rounds_no_likelihoods():
    model, ids = full_model(), text()
    with torch.autocast("cpu", torch.bfloat16):
        result = evaluate(model, batches(ids), counts=COUNTS)
        short = evaluate(model, batches(ids), counts=COUNTS, full=False)
    assert result["nll"] == pytest.approx(short["nll"], rel=1e-6)


def test_the_memory_of_a_block_is_given_to_the_next():
    """Numbers that are kept from each of 60 blocks of 16 MiB pin none of them; a fresh process tells."""
    program = """if True:
        import numpy as np, torch
        from lvsoftmax.data.batches import ContiguousBatches
        from lvsoftmax.evaluate import evaluate
        from lvsoftmax.layers.full_softmax import FullSoftmax
        from lvsoftmax.models.language_model import LanguageModel
        from lvsoftmax.models.lstm import LSTM

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096 / 2**20

        counts = torch.arange(20_000, 0, -1)
        model = LanguageModel(LSTM(hidden_size=8, layers=1), FullSoftmax(8, counts))

        def measure(tokens):
            ids = np.random.default_rng(0).integers(0, 20_000, tokens).astype(np.int32)
            batches = ContiguousBatches(ids, 8, 100, start=0, complete=True)
            evaluate(model, batches, counts=counts, temperature=1.1)

        measure(800)
        before = resident()
        measure(12_000)
        print(resident() - before)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100
