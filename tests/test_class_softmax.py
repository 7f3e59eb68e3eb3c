"""What the class-based softmax promises beyond the laws: its classes, its cost, its sparse gradients, its errors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import (
    COUNTS,
    VOCABULARIES,
    LargestResult,
    assert_close,
    assert_one_gradient_alone,
    assert_strided,
    randomise,
    zipf_counts,
)

from lvsoftmax.layer import unigram_log_prob
from lvsoftmax.layers.class_softmax import ClassSoftmax
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.ops import pairs, partition
from lvsoftmax.ops.grouped_nll import grouped_nll, reference

KINDS = ("sqrt", "mass", "clustered")
for_every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind="sqrt", counts=COUNTS, hidden_size=8, **options):
    vectors = torch.randn(len(counts), 3, generator=torch.Generator().manual_seed(0))
    return ClassSoftmax(hidden_size, counts, classes_by=kind, embeddings=vectors, **options)


def class_of(layer, word) -> torch.Tensor:
    return torch.bucketize(layer.row[word], layer.bound[1:-1], right=True)


# -- classes ----------------------------------------------------------------------------------------------------------


def classes_word_by_word(mass, number) -> list[int]:
    """The class of every word, by Mikolov's loop: the class changes after the word that reaches its share, if others
    are left, and when as many words are left as classes."""
    total, reached, current, result = sum(mass), 0.0, 0, []
    for word, m in enumerate(mass):
        result.append(current)
        reached += m
        left = len(mass) - word - 1
        if current < number - 1 and (reached >= (current + 1) * total / number or left <= number - 1 - current):
            current += 1
    return result


@pytest.mark.parametrize("number", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("mass", [COUNTS, COUNTS.flip(0), torch.ones(64), torch.rand(80) + 1e-3], ids=range(4))
def test_classes_equal_those_of_the_plain_loop(mass, number):
    mass = mass.double().numpy()
    bound = partition.classes(mass, number)
    assert bound[0] == 0 and bound[-1] == len(mass) and (np.diff(bound) >= 1).all() and len(bound) == number + 1
    expected = classes_word_by_word(mass.tolist(), number)
    assert (np.searchsorted(bound, np.arange(len(mass)), side="right") - 1).tolist() == expected


@pytest.mark.parametrize("counts", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_as_many_classes_as_words(counts):
    assert partition.classes(counts.double().numpy() + 1, len(counts)).tolist() == list(range(len(counts) + 1))


def test_equal_mass_is_equal_probability():
    mass = np.full(10_000, 1.0)
    assert np.diff(partition.classes(mass, 100)).tolist() == [100] * 100
    counts = zipf_counts(10_000).double().numpy() + 1
    bound = partition.classes(counts, 20)
    mass = np.add.reduceat(counts, bound[:-1]) / counts.sum()
    assert mass[0] == pytest.approx(counts[0] / counts.sum())  # one word, twice its share
    assert np.abs(mass[4:] - 0.05).max() < 0.01


def test_square_roots_make_the_targets_classes_small():
    """Under Zipf's law a target's class has V / C words for equal mass, a third of that for equal square roots."""
    counts = zipf_counts(40_000)
    expected = {}
    for kind in ("sqrt", "mass"):
        layer = build(kind, counts, hidden_size=1)
        assert len(layer.class_weight) == 200
        size = layer.bound.diff()[class_of(layer, torch.arange(40_000))]
        expected[kind] = (size * counts / counts.sum()).sum().item()
    assert expected["mass"] == pytest.approx(200, rel=0.1)
    assert expected["sqrt"] == pytest.approx(200 / 3, rel=0.2)


def test_clustered_classes_hold_what_is_alike():
    """Words in two groups far apart: no class but the one at the border has words of both."""
    group = torch.randint(2, (97,), generator=torch.Generator().manual_seed(3))
    vectors = 10.0 * F.one_hot(group) + 0.1 * torch.randn(97, 2)
    layer = ClassSoftmax(4, torch.full((97,), 5), classes_by="clustered", embeddings=vectors)
    member = class_of(layer, torch.arange(97))
    mixed = sum(len(group[member == c].unique()) > 1 for c in range(len(layer.class_weight)))
    assert mixed <= 1
    assert sum(len(group[member == c].unique()) > 1 for c in (0, len(layer.class_weight) - 1)) == 0


def test_clustered_order_is_that_of_the_leaves():
    vectors = np.random.default_rng(0).normal(size=(50, 3))
    tree = partition.clustered_tree(vectors, COUNTS[:50].numpy())

    def path(word):
        branch, sides = int(tree.word_branch[word]), []
        while branch >= 0:
            sides.append(branch % 2)
            branch = int(tree.node_branch[branch // 2])
        return sides[::-1]

    assert partition.clustered_order(vectors, COUNTS[:50].numpy()).tolist() == sorted(range(50), key=path)


@for_every_kind
def test_biases_alone_are_the_unigram_by_class(kind):
    layer = build(kind)
    p = unigram_log_prob(COUNTS).exp()
    mass = torch.zeros(len(layer.class_weight)).index_add_(0, class_of(layer, torch.arange(97)), p)
    assert_close(layer.class_bias.exp(), mass, 1e-6)
    assert_close(layer.bias.exp()[layer.row], p, 1e-6)


# -- special cases ----------------------------------------------------------------------------------------------------


@for_every_kind
@pytest.mark.parametrize("classes", [1, 97])
def test_one_class_or_one_word_in_each_is_the_full_softmax(kind, classes):
    layer = randomise(build(kind, classes=classes).double())
    full = FullSoftmax(8, COUNTS).double()
    weight, bias = (layer.weight, layer.bias) if classes == 1 else (layer.class_weight, layer.class_bias)
    full.weight.data, full.bias.data = weight.data[layer.row], bias.data[layer.row]
    hidden, target = torch.randn(11, 8, dtype=torch.float64), torch.randint(97, (11,))
    assert_close(layer.log_prob(hidden), full.log_prob(hidden), 1e-12)
    assert_close(layer.nll(hidden, target), full.nll(hidden, target), 1e-12)


@pytest.mark.parametrize(
    ("classes", "number"), [(None, 10), (1, 1), (20, 20), (97, 97), (0.1, 10), (1.0, 97), (0.001, 1)]
)
def test_the_number_of_classes(classes, number):
    assert len(build(classes=classes).class_weight) == number


# -- likelihood and gradients -----------------------------------------------------------------------------------------


@for_every_kind
@pytest.mark.parametrize("tokens", [1, 300])
def test_sparse_gradients_have_the_rows_of_the_targets_classes(kind, tokens):
    layer = randomise(build(kind).double())
    hidden = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(len(COUNTS), (tokens,)).clamp(max=30)
    upstream = torch.randn(tokens, dtype=torch.float64)
    variables = (hidden, layer.weight, layer.bias, layer.class_weight, layer.class_bias)
    actual = torch.autograd.grad(layer.nll(hidden, target), variables, upstream)
    plain = F.nll_loss(layer.log_prob(hidden), target, reduction="none")
    expected = torch.autograd.grad(plain, variables, upstream)
    present = class_of(layer, target).unique()
    rows = torch.cat([torch.arange(int(layer.bound[c]), int(layer.bound[c + 1])) for c in present])
    assert not actual[0].is_sparse and not actual[3].is_sparse
    for gradient in actual[1:3]:
        assert gradient.is_sparse and gradient.is_coalesced()
        assert torch.equal(gradient.indices()[0], rows)
    assert_close([g.to_dense() for g in actual], list(expected), 1e-10)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_gradients_equal_small_ones(sparse, dtype, monkeypatch):
    """They are computed by another kernel, into other memory."""
    layer = randomise(build(sparse=sparse).to(dtype))
    hidden, target = torch.randn(60, 8, dtype=dtype), torch.randint(50, (60,))
    upstream = torch.randn(60, dtype=dtype)

    def found():
        return torch.autograd.grad(layer.nll(hidden, target), (layer.weight, layer.bias), upstream)

    small = found()
    monkeypatch.setattr(pairs, "LARGE", 0)
    large = found()
    assert [gradient.dtype for gradient in large] == [dtype, dtype]
    assert_close(large, small, 1e-6)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("sparse", [False, True])
def test_large_gradients_of_few_tokens(sparse, tokens, monkeypatch):
    monkeypatch.setattr(pairs, "LARGE", 0)
    layer = build(sparse=sparse)
    (gradient,) = torch.autograd.grad(layer.nll(torch.ones(tokens, 8), torch.zeros(tokens).long()).sum(), layer.weight)
    assert int((gradient.to_dense() != 0).any(1).sum()) == (int(layer.bound[1]) if tokens and layer.bound[1] > 1 else 0)


@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("sparse", [False, True])
def test_one_gradient_alone(sparse, wanted):
    assert_one_gradient_alone(randomise(build(sparse=sparse)), wanted)


def test_strided_inputs():
    assert_strided(randomise(build()))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_half_precision_table_sums_in_float32(sparse):
    hidden, weight, bias = torch.randn(40, 8), torch.randn(97, 8).bfloat16(), torch.randn(97)
    bound, target = build().bound, torch.randint(97, (40,))
    results = []
    for table in (weight, weight.float()):
        table = table.clone().requires_grad_()
        nll = grouped_nll(hidden, table, bias, bound, target, sparse=sparse)
        (gradient,) = torch.autograd.grad(nll.sum(), table)
        assert gradient.dtype == table.dtype
        results.append((nll, gradient.to_dense()))
    assert_close(results[0][0], results[1][0], 1e-5)
    assert_close(results[0][1].float(), results[1][1].bfloat16().float(), 1e-2)


@pytest.mark.parametrize("score", [20.0, 60.0, 100.0])
def test_sure_words_keep_their_digits(score):
    """``1 - softmax`` is 0 in float32 from a difference of 17 on."""
    weight = torch.tensor([[score], [0.0]], requires_grad=True)
    nll = grouped_nll(torch.ones(1, 1), weight, torch.zeros(2), torch.tensor([0, 2]), torch.tensor([0]), sparse=False)
    (gradient,) = torch.autograd.grad(nll, weight)
    assert nll.item() == pytest.approx(math.exp(-score), rel=1e-5)
    assert gradient.flatten().tolist() == pytest.approx([-math.exp(-score), math.exp(-score)], rel=1e-5)


def test_the_compilers_operation_is_sound():
    hidden, weight, bias = (torch.randn(x, requires_grad=True) for x in ((6, 3), (9, 3), (9,)))
    first, size, target = (
        torch.tensor([0, 4, 4, 8, 0, 8]),
        torch.tensor([4, 4, 4, 1, 4, 1]),
        torch.tensor([1, 7, 4, 8, 0, 8]),
    )
    torch.library.opcheck(reference._one_node, (hidden, weight, bias, first, size, target))
    first.zero_()[:] = 3  # a trace holds for other data, with another number of pairs
    traced = torch.compile(lambda b: grouped_nll(hidden, weight, bias, b, target, sparse=False), backend="aot_eager")
    for bound in (torch.tensor([0, 4, 8, 9]), torch.tensor([0, 1, 2, 9])):
        expected = grouped_nll(hidden, weight, bias, bound, target, sparse=False)
        assert_close(traced(bound), expected, 1e-6)


# -- cost -------------------------------------------------------------------------------------------------------------


def test_a_step_costs_the_root_of_the_vocabulary():
    """Neither an array per token and word, nor one as large as the table, nor a vector per pair."""
    hidden_size, tokens = 64, 32
    work = []
    for size in (10_000, 90_000):
        layer = build(counts=zipf_counts(size), hidden_size=hidden_size)
        hidden = torch.randn(tokens, hidden_size, requires_grad=True)
        target = torch.arange(tokens)
        with LargestResult() as results:
            layer.loss(hidden, target, torch.ones(tokens)).backward()
        rows = int(layer.bound.diff()[class_of(layer, target).unique()].sum())
        assert results.entries <= max(
            hidden_size * max(rows, len(layer.class_weight)), tokens * len(layer.class_weight)
        )
        assert results.entries < tokens * size and results.entries < size * hidden_size
        work.append(results.total)
    assert work[1] < 4 * work[0]


# -- state ------------------------------------------------------------------------------------------------------------


@for_every_kind
def test_any_classes_load_into_any_instance(kind):
    saved = randomise(build(kind))
    hidden, target = torch.randn(4, 8), torch.tensor([0, 5, 96, 5])
    for other in KINDS:
        loaded = build(other)
        loaded.load_state_dict(saved.state_dict())
        assert torch.equal(loaded.log_prob(hidden), saved.log_prob(hidden))
        assert torch.equal(loaded.nll(hidden, target), saved.nll(hidden, target))
    assert set(saved.state_dict()) == {"weight", "bias", "class_weight", "class_bias", "bound", "row"}


@for_every_kind
def test_the_table_to_tie_to_is_in_the_order_of_the_words(kind):
    layer = randomise(build(kind))
    embedded = layer.embed(torch.tensor([[0, 96], [5, 5]]))
    assert embedded.shape == (2, 2, 8)
    with pytest.raises(IndexError):
        layer.embed(torch.tensor([-1]))
    (gradient,) = torch.autograd.grad(embedded.sum(), layer.weight)
    assert gradient.is_sparse
    one, other = (class_of(layer, torch.arange(97)) == len(layer.class_weight) - 1).nonzero()[:2].flatten()
    hidden = torch.zeros(1, 8, requires_grad=True)
    log_odds = layer.log_prob(hidden)[0, one] - layer.log_prob(hidden)[0, other]
    (slope,) = torch.autograd.grad(log_odds, hidden)
    assert_close(slope[0], layer.embed(one) - layer.embed(other), 1e-5)


def test_embeddings_from_a_file(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(97, 4))
    np.save(tmp_path / "vectors.npy", vectors)
    from_file = ClassSoftmax(8, COUNTS, classes_by="clustered", embeddings=str(tmp_path / "vectors.npy"))
    given = ClassSoftmax(8, COUNTS, classes_by="clustered", embeddings=torch.from_numpy(vectors))
    assert torch.equal(from_file.row, given.row)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 98}, "classes=98: more than the 97 words"),
        ({"classes": 0}, "classes=0: must be a whole number of at least 1 or a share"),
        ({"classes": 1.5}, "classes=1.5: must be a whole number"),
        ({"classes_by": "clustered"}, "embeddings=None: classes_by=clustered needs a vector per word"),
        (
            {"classes_by": "clustered", "embeddings": torch.zeros(96, 3)},
            r"embeddings has shape \[96, 3\]: give one row",
        ),
    ],
)
def test_bad_classes(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ClassSoftmax(8, COUNTS, **options)
    assert "\n" not in str(error.value)
