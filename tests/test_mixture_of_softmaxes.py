"""What the mixture of softmaxes promises beyond the laws: its operation, its rank, its memory, its cost."""

import math

import pytest
import torch
from cases import COUNTS, LargestResult, assert_close, randomise, zipf_counts
from torch.utils.flop_counter import FlopCounterMode

from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.layers.mixture_of_softmaxes import MixtureOfSoftmaxes
from lvsoftmax.ops.linear_cross_entropy import reference
from lvsoftmax.ops.mixture_nll import mixture_log_prob, mixture_nll, mixture_nll_loss

N, E, D, V = 11, 3, 5, 97


@pytest.fixture
def blocks_of_four_tokens(monkeypatch):
    """Several blocks, the last of them shorter."""
    monkeypatch.setattr(reference, "BLOCK", 4 * E * V)
    monkeypatch.setattr(reference, "FEWEST", 1)


def operands(dtype=torch.float64):
    shapes = (N, E), (N, E, D), (V, D), (V,)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return inputs, torch.randint(V, (N,))


def plain(prior, expert, weight, bias):
    """The formula, with [N, E, V]."""
    return ((expert @ weight.T + bias).log_softmax(2) + prior.log_softmax(1)[:, :, None]).logsumexp(1)


# -- the operation ----------------------------------------------------------------------------------------------------


def test_mixture_nll_per_token(backend, blocks_of_four_tokens):
    inputs, target = operands()
    upstream = torch.randn(N, dtype=torch.float64)
    upstream[::3] = 0
    actual, expected = mixture_nll(*inputs, target, backend=backend), -plain(*inputs)[range(N), target]
    assert_close(actual, expected, 1e-12)
    assert_close(torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), 1e-12)


def test_mixture_nll_in_sum(backend, blocks_of_four_tokens):
    inputs, target = operands()
    token_weight = torch.linspace(-1, 1, N, dtype=torch.float64).requires_grad_()
    upstream = torch.tensor(-2.5, dtype=torch.float64)
    actual = mixture_nll_loss(*inputs, target, token_weight, backend=backend)
    expected = -(token_weight * plain(*inputs)[range(N), target]).sum()
    assert_close(actual, expected, 1e-12)
    variables = [*inputs, token_weight]
    assert_close(
        torch.autograd.grad(actual, variables, upstream, retain_graph=True),
        torch.autograd.grad(expected, variables, upstream),
        1e-12,
    )
    if backend == "eager":
        with pytest.raises(RuntimeError, match="can be differentiated once; use the per-token one"):
            torch.autograd.grad(actual, variables, upstream)


def test_mixture_log_prob():
    inputs, _ = operands()
    upstream = torch.randn(N, V, dtype=torch.float64)
    actual = mixture_log_prob(inputs[0].log_softmax(1), *inputs[1:])
    assert_close(actual, plain(*inputs), 1e-12)
    assert_close(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(plain(*inputs), inputs, upstream), 1e-12
    )


def test_mixture_log_prob_of_words_that_no_expert_can_give():
    inputs, _ = operands()
    with torch.no_grad():
        inputs[3][-7:] = -torch.inf
    upstream = torch.randn(N, V, dtype=torch.float64)
    actual = mixture_log_prob(inputs[0].log_softmax(1), *inputs[1:])
    assert (actual[:, -7:] == -torch.inf).all()
    expected = plain(*inputs[:2], *(operand[:-7] for operand in inputs[2:]))
    assert_close(actual[:, :-7], expected, 1e-12)
    slopes = torch.autograd.grad(actual, inputs, upstream)
    assert_close(slopes, torch.autograd.grad(expected, inputs, upstream[:, :-7]), 1e-12)


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone(backend, wanted):
    inputs, target = operands()
    for i, variable in enumerate(inputs):
        variable.requires_grad_(i == wanted)
    expected = torch.autograd.grad(-plain(*inputs)[range(N), target].sum(), inputs[wanted])
    for actual in (
        mixture_nll(*inputs, target, backend=backend).sum(),
        mixture_nll_loss(*inputs, target, torch.ones(N, dtype=torch.float64), backend=backend),
        -mixture_log_prob(inputs[0].log_softmax(1), *inputs[1:])[range(N), target].sum(),
    ):
        assert_close(torch.autograd.grad(actual, inputs[wanted]), expected, 1e-12)


@pytest.mark.parametrize("margin", [10.0, 20.0, 60.0])
def test_sure_mixtures_keep_their_digits(backend, margin):
    """Two experts over two words, sure of the first by ``margin`` and ``margin + 1``."""
    expert = torch.tensor([[[margin], [margin + 1]]], requires_grad=True)
    prior = torch.tensor([[0.5, 0.0]], requires_grad=True)
    weight, bias, target = torch.tensor([[1.0], [0.0]]), torch.zeros(2), torch.tensor([0])
    pi = 1 / (1 + math.exp(-0.5))
    miss = [1 / (1 + math.exp(margin + e)) for e in (0, 1)]
    missed = pi * miss[0] + (1 - pi) * miss[1]
    slope = pi * (miss[0] - missed) / (1 - missed)
    pulls = [-share * m * (1 - m) / (1 - missed) for share, m in zip((pi, 1 - pi), miss, strict=True)]
    for nll in (
        mixture_nll(prior, expert, weight, bias, target, backend=backend).sum(),
        mixture_nll_loss(prior, expert, weight, bias, target, torch.ones(1), backend=backend),
    ):
        of_prior, of_expert = torch.autograd.grad(nll, (prior, expert))
        assert nll.item() == pytest.approx(-math.log1p(-missed), rel=1e-5)
        assert of_prior.flatten().tolist() == pytest.approx([slope, -slope], rel=1e-5)
        assert of_expert.flatten().tolist() == pytest.approx(pulls, rel=1e-5)


# -- the layer --------------------------------------------------------------------------------------------------------


def test_one_expert_is_a_softmax_of_its_vector():
    layer = randomise(MixtureOfSoftmaxes(8, COUNTS, experts=1))
    full = FullSoftmax(8, COUNTS)
    full.weight.data, full.bias.data = layer.weight.data, layer.bias.data
    hidden, target, weight = torch.randn(N, 8), torch.randint(V, (N,)), torch.randn(N)
    latent = torch.tanh(hidden @ layer.latent_weight.T + layer.latent_bias)
    assert_close(layer.log_prob(hidden), full.log_prob(latent), 1e-5)
    assert_close(layer.loss(hidden, target, weight), full.loss(latent, target, weight), 1e-5)


def test_a_mixture_is_not_bound_to_the_rank_of_one_softmax():
    hidden = torch.randn(60, 3, dtype=torch.float64)

    def rank(layer):
        return int(torch.linalg.matrix_rank(randomise(layer.double(), 2.0).log_prob(hidden), rtol=1e-9))

    assert rank(FullSoftmax(3, COUNTS)) == 5  # hidden vectors, biases, the normaliser
    assert rank(MixtureOfSoftmaxes(3, COUNTS, experts=1)) == 5
    assert rank(MixtureOfSoftmaxes(3, COUNTS, experts=2)) > 20


def test_the_width_is_a_share_of_the_hidden_size():
    layer = MixtureOfSoftmaxes(8, COUNTS, experts=3, width=0.5)
    assert layer.weight.shape == (97, 4) and layer.latent_weight.shape == (12, 8)
    prior, latent = layer.mixture(torch.randn(5, 8))
    assert prior.shape == (5, 3) and latent.shape == (5, 3, 4)
    with pytest.raises(ValueError, match="width=4 is not hidden_size=8; to tie, set output.width=1.0"):
        layer.embed(torch.tensor([0]))
    layer = MixtureOfSoftmaxes(8, COUNTS)
    assert torch.equal(layer.embed(torch.tensor([5])), layer.weight[5:6])


def test_no_array_holds_a_logit_per_token_expert_and_word(blocks_of_four_tokens):
    layer = MixtureOfSoftmaxes(4, COUNTS, experts=E, backend="eager")
    hidden, target = torch.randn(N, 4, requires_grad=True), torch.randint(V, (N,))
    with LargestResult() as largest:
        layer.nll(hidden, target).sum().backward()
        layer.loss(hidden, target, torch.ones(N)).backward()
    assert largest.entries <= reference.BLOCK < N * E * V
    with LargestResult() as largest:
        layer.log_prob(hidden).sum().backward()
    assert largest.entries == N * V


def test_gradients_on_the_way_take_three_products_per_expert():
    counts = zipf_counts(1000)
    layer = MixtureOfSoftmaxes(64, counts, experts=3, backend="eager")
    hidden, target = torch.randn(4, 64, requires_grad=True), torch.randint(1000, (4,))
    own = {torch.ops.aten.addmm_: lambda total, left, right, out_shape, **_: 2 * math.prod(out_shape) * left[-1]}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        layer.loss(hidden, target, torch.ones(4)).backward()
    product = 2 * 4 * 64
    assert counter.get_total_flops() == 3 * product * 3 * (1000 + 64 + 1)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts=0: a mixture needs at least 1"),
        ({"experts": -1}, "experts=-1: a mixture needs at least 1"),
        ({"width": 0.0}, "width=0.0: must be a share of hidden_size=8 that leaves at least 1"),
        ({"width": -1.0}, "width=-1.0: must be"),
        ({"width": 0.01}, "width=0.01: must be"),
        ({"width": math.nan}, "width=nan: must be"),
    ],
)
def test_bad_mixtures(options, message):
    with pytest.raises(ValueError, match=message) as error:
        MixtureOfSoftmaxes(8, COUNTS, **options)
    assert "\n" not in str(error.value)
