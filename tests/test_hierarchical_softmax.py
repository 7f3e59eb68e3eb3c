"""What the tree promises beyond the laws: its start, its cost, its sparse gradients, its trees."""

import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import COUNTS, LargestResult, assert_close, assert_one_gradient_alone, assert_strided, randomise, zipf_counts

from lvsoftmax.layer import unigram_log_prob
from lvsoftmax.layers.hierarchical_softmax import HierarchicalSoftmax
from lvsoftmax.ops import partition

TREES = ("huffman", "plain huffman", "balanced", "random", "clustered")
for_every_tree = pytest.mark.parametrize("tree", TREES)


def build(tree="huffman", counts=COUNTS, hidden_size=8, **options):
    vectors = torch.randn(len(counts), 3, generator=torch.Generator().manual_seed(0))
    if tree == "plain huffman":
        tree, vectors = "huffman", None
    return HierarchicalSoftmax(hidden_size, counts, tree=tree, embeddings=vectors, **options)


def nodes_on_paths(layer, target) -> set[int]:
    nodes = set()
    for branch in layer.word_branch[target].tolist():
        while branch >= 0:
            nodes.add(branch // 2)
            branch = int(layer.node_branch[branch // 2])
    return nodes


# -- the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [COUNTS, torch.tensor([7, 0]), torch.tensor([10**9] + [3] * 30 + [0] * 9)])
@for_every_tree
def test_without_weights_it_is_the_smoothed_unigram_distribution(tree, counts):
    layer = build(tree, counts)
    layer.weight.data.zero_()
    hidden = torch.randn(3, 8)
    assert_close(layer.log_prob(hidden), unigram_log_prob(counts).expand(3, -1), 2e-6)
    assert_close(layer.nll(hidden[:1], torch.tensor([1])), -unigram_log_prob(counts)[1:2], 2e-6)


@pytest.mark.usefixtures("in_double")
@for_every_tree
def test_in_double_it_starts_as_near_to_that_as_double_is(tree):
    layer = build(tree)
    assert layer.pace.dtype == layer.bias.dtype == torch.float64
    layer.weight.data.zero_()
    expected = ((COUNTS.double() + 1) / (COUNTS.double() + 1).sum()).log()
    assert_close(layer.log_prob(torch.randn(3, 8)), expected.expand(3, -1), 1e-12)


def test_random_trees_follow_the_global_seed():
    def words(seed):
        torch.manual_seed(seed)
        return build("random").word_branch

    assert torch.equal(words(1), words(1))
    assert not torch.equal(words(1), words(2))


# -- likelihood and gradients along the path --------------------------------------------------------------------------


@for_every_tree
@pytest.mark.parametrize("tokens", [1, 300])
def test_sparse_gradients_have_the_rows_of_the_paths(tree, tokens):
    layer = randomise(build(tree).double())
    hidden = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(len(COUNTS), (tokens,)).clamp(max=30)
    upstream = torch.randn(tokens, dtype=torch.float64)
    actual = torch.autograd.grad(layer.nll(hidden, target), (hidden, layer.weight, layer.bias), upstream)
    plain = F.nll_loss(layer.log_prob(hidden), target, reduction="none")
    expected = torch.autograd.grad(plain, (hidden, layer.weight, layer.bias), upstream)
    rows = sorted(nodes_on_paths(layer, target))
    assert not actual[0].is_sparse
    for gradient in actual[1:]:
        assert gradient.is_sparse and gradient.is_coalesced()
        assert gradient.indices()[0].tolist() == rows
    assert_close([g.to_dense() for g in actual], list(expected), 1e-10)


@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("sparse", [False, True])
def test_one_gradient_alone(sparse, wanted):
    assert_one_gradient_alone(randomise(build(sparse=sparse)), wanted)


def test_strided_inputs():
    assert_strided(randomise(build()))


def test_a_half_precision_layer_sums_in_float32():
    layer = randomise(build()).bfloat16()
    exact = build().double()
    exact.load_state_dict(layer.state_dict())
    hidden = torch.randn(6, 8).bfloat16().requires_grad_()
    target = torch.tensor([0, 0, 1, 20, 96, 50])
    nll = layer.nll(hidden, target)
    assert nll.dtype == torch.float32
    assert_close(nll.double(), exact.nll(hidden.double(), target), 1e-5)
    nll.sum().backward()
    assert hidden.grad.dtype == layer.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_step_costs_the_logarithm_of_the_vocabulary(backend):
    """Neither an array per token and word, nor one as large as the table, nor a vector per pair."""
    hidden_size, tokens = 64, 32
    work = []
    for size in (1000, 64_000):
        layer = HierarchicalSoftmax(hidden_size, zipf_counts(size), tree="balanced", backend=backend)
        hidden = torch.randn(tokens, hidden_size, requires_grad=True)
        target = torch.randint(size, (tokens,))
        with LargestResult() as results:
            layer.loss(hidden, target, torch.ones(tokens)).backward()
        depth = math.ceil(math.log2(size))
        rows = 1.25 * len(nodes_on_paths(layer, target))  # memory for another step's rows included
        assert results.entries <= hidden_size * rows < tokens * depth * hidden_size
        assert results.entries < size * hidden_size
        work.append(results.total / depth)
    assert work[1] < 2 * work[0]


@pytest.mark.parametrize("score", [20.0, 60.0, 100.0])
def test_sure_decisions_keep_their_digits(score):
    """``1 - sigmoid(20)`` is 0 in float32."""
    layer = HierarchicalSoftmax(1, torch.tensor([1, 1]), sparse=False)
    layer.pace.fill_(1)
    for word, sign in zip(layer.word_branch.argsort().tolist(), (1, -1), strict=True):
        layer.weight.data.fill_(sign * score)
        hidden = torch.ones(1, 1, requires_grad=True)
        nll = layer.nll(hidden, torch.tensor([word]))
        slope = torch.autograd.grad(nll, layer.weight)[0].item()
        assert nll.item() == pytest.approx(math.exp(-score), rel=1e-5)
        assert slope == pytest.approx(-sign * math.exp(-score), rel=1e-5)


# -- state ------------------------------------------------------------------------------------------------------------


@for_every_tree
def test_any_tree_loads_into_any_instance(tree):
    saved = randomise(build(tree))
    hidden, target = torch.randn(4, 8), torch.tensor([0, 5, 96, 5])
    for other in TREES:
        torch.manual_seed(99)
        loaded = build(other)
        loaded.load_state_dict(saved.state_dict())
        assert torch.equal(loaded.log_prob(hidden), saved.log_prob(hidden))
        assert torch.equal(loaded.nll(hidden, target), saved.nll(hidden, target))
    assert set(saved.state_dict()) == {"weight", "bias", "pace", "node_branch", "word_branch"}
    again = pickle.loads(pickle.dumps(saved))
    again.load_state_dict(saved.state_dict())
    assert torch.equal(again.log_prob(hidden), saved.log_prob(hidden))


@pytest.mark.parametrize("tree", ["huffman", "clustered"])
def test_embeddings_from_a_file(tree, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(97, 4))
    np.save(tmp_path / "vectors.npy", vectors)
    from_file = HierarchicalSoftmax(8, COUNTS, tree=tree, embeddings=str(tmp_path / "vectors.npy"))
    given = HierarchicalSoftmax(8, COUNTS, tree=tree, embeddings=torch.from_numpy(vectors))
    assert torch.equal(from_file.word_branch, given.word_branch)
    assert not torch.equal(given.word_branch, HierarchicalSoftmax(8, COUNTS, tree="balanced").word_branch)


def test_meaning_changes_which_words_share_a_path_and_no_length_of_one():
    arranged, plain = build("huffman"), build("plain huffman")
    assert not torch.equal(arranged.word_branch, plain.word_branch)
    depth = [partition.depths(partition.Tree(x.node_branch.numpy(), x.word_branch.numpy())) for x in (arranged, plain)]
    assert depth[0].tolist() == depth[1].tolist()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (None, "embeddings=None: tree=clustered needs a vector per word"),
        ("missing.npy", r"embeddings='.*missing.npy': cannot be read; give the path of an .npy file"),
        ("text.npy", r"embeddings='.*text.npy': cannot be read; give the path of an .npy file"),
        (torch.zeros(96, 3), r"embeddings has shape \[96, 3\]: give one row for each of the 97 words"),
        (torch.zeros(97), r"embeddings has shape \[97\]: give one row"),
        (torch.full((97, 2), math.nan), "embeddings has values that are not finite"),
    ],
)
def test_unusable_embeddings(embeddings, message, tmp_path):
    (tmp_path / "text.npy").write_text("the of and")
    if isinstance(embeddings, str):
        embeddings = str(tmp_path / embeddings)
    with pytest.raises(ValueError, match=message) as error:
        HierarchicalSoftmax(8, COUNTS, tree="clustered", embeddings=embeddings)
    assert "\n" not in str(error.value)
