"""Other people's implementations, from what they returned when ``tests/fixtures/make_*.py`` asked them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lvsoftmax.layers.noise_contrastive_estimation import NoiseContrastiveEstimation
from lvsoftmax.layers.sampled_softmax import SampledSoftmax
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.objectives import candidate_logits, leave_out, noise_contrastive, sampled_softmax
from lvsoftmax.ops.partition import depths, huffman_tree

FIXTURES = Path(__file__).parent / "fixtures"
CODES = json.loads((FIXTURES / "gensim.json").read_text())["codes"]


@pytest.fixture
def tensorflow() -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / "tensorflow.npz") as record:
        return {key: torch.from_numpy(value) for key, value in record.items() if key != "version"}


def given(record) -> Sample:
    """The negatives, with TensorFlow's correction: the expected count of the target, too, were it drawn like them."""
    return Sample(record["ids"], record["expected"].log(), record["target_expected"].log())


def assert_equals_tensorflow(record, name, value, operands) -> None:
    torch.testing.assert_close(value, record[name], rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(value, operands, record["upstream"])
    for operand, gradient in zip(("weight", "bias", "hidden"), gradients, strict=True):
        torch.testing.assert_close(gradient.to_dense(), record[f"{name}_{operand}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "layer_class, name", [(SampledSoftmax, "sampled_softmax"), (NoiseContrastiveEstimation, "nce_with_hits")]
)
def test_a_layer_equals_tensorflow_on_the_same_negatives(tensorflow, layer_class, name, sparse):
    vocab, width = tensorflow["weight"].shape
    layer = layer_class(width, torch.arange(vocab, 0, -1), samples=len(tensorflow["ids"]), sparse=sparse)
    layer.load_state_dict({key: tensorflow[key] for key in ("weight", "bias")}, strict=False)
    hidden = tensorflow["hidden"].requires_grad_()
    value = layer(hidden, tensorflow["target"], None, given(tensorflow))
    assert_equals_tensorflow(tensorflow, name, value, (layer.weight, layer.bias, hidden))


@pytest.mark.parametrize("name", ["sampled_softmax", "sampled_softmax_with_hits", "nce", "nce_with_hits"])
def test_an_objective_equals_tensorflow_with_hits_and_without(tensorflow, name):
    operands = [tensorflow[key].requires_grad_() for key in ("weight", "bias", "hidden")]
    weight, bias, hidden = operands
    target, (ids, log_expected, target_log_expected) = tensorflow["target"], given(tensorflow)
    target_logit, logit = candidate_logits(hidden, weight, bias, target, ids, sparse=False)
    hit = target[:, None] == ids
    assert hit.any()
    if name.startswith("nce"):
        seen = leave_out(logit - log_expected, None if name.endswith("hits") else (target, ids))
        value = noise_contrastive(target_logit - target_log_expected, seen)
    else:
        left_out = torch.zeros_like(hit) if name.endswith("hits") else hit
        value = sampled_softmax(target_logit, logit, target_log_expected, log_expected, left_out)
    assert_equals_tensorflow(tensorflow, name, value, operands)


def test_tensorflow_corrects_a_target_by_its_expected_count_where_sampled_softmax_takes_the_chance_to_be_drawn():
    """With replacement they differ where a word is expected about once or more; see the docstring of the layer."""
    layer = SampledSoftmax(4, torch.tensor([90, 5, 5]), samples=10, replacement=True)
    sample = layer.draw(torch.zeros(2, 4), torch.tensor([0, 2]))
    expected_count = 10 * torch.tensor([0.9, 0.05])
    torch.testing.assert_close(sample.target_log_expected.exp(), 1 - (1 - expected_count / 10) ** 10)
    assert (sample.target_log_expected.exp() < expected_count).all()


@pytest.mark.parametrize("name", CODES)
def test_huffman_codes_are_as_long_as_gensims(name):
    """Ties may be broken otherwise: words may then swap lengths, and so may trees, but not at the cost of a bit."""
    counts, lengths = np.array(CODES[name]["counts"]), np.array(CODES[name]["lengths"])
    depth = depths(huffman_tree(counts))
    assert counts @ depth == counts @ lengths
    if name in ("powers of two", "flat"):
        np.testing.assert_array_equal(np.sort(depth), np.sort(lengths))
