import math

import numpy as np
import oracles
import pytest
import torch
from cases import assert_close, randomise, zipf_counts

from lvsoftmax.layers.entmax_output import EntmaxOutput
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.layers.sparsemax_output import SparsemaxOutput

D, N = 6, 9
COUNTS = zipf_counts(97)

for_every_alpha = pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0, 3.0])


def setting(counts=COUNTS, **options) -> tuple[EntmaxOutput, torch.Tensor, torch.Tensor]:
    layer = randomise(EntmaxOutput(D, counts, **options).double())
    return layer, torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.randint(len(counts), (N,))


@pytest.mark.parametrize("vocab", [2, 97, 3001])
@for_every_alpha
def test_distribution_and_objective_are_the_papers(alpha, vocab):
    layer, hidden, target = setting(zipf_counts(vocab), alpha=alpha)
    given = hidden.detach().numpy()
    log_prob = oracles.entmax_output(layer, given)
    np.testing.assert_allclose(layer.log_prob(hidden).exp().detach().numpy(), np.exp(log_prob), atol=1e-8)
    expected = oracles.fenchel_young_objective(oracles.dense_logits(layer, given), log_prob, target.tolist(), alpha)
    np.testing.assert_allclose(layer(hidden, target).detach().numpy(), expected, atol=1e-8)


@for_every_alpha
def test_an_untrained_layer_predicts_the_smoothed_unigram(alpha):
    layer = EntmaxOutput(D, COUNTS, alpha=alpha)
    expected = ((COUNTS + 1) / (COUNTS + 1).sum()).log()
    assert_close(layer.log_prob(torch.zeros(2, D)), expected.expand(2, -1), 1e-3)


@for_every_alpha
def test_the_gradient_by_the_scores_is_p_minus_y(alpha):
    layer, hidden, target = setting(alpha=alpha)
    (slope,) = torch.autograd.grad(layer(hidden, target).sum(), layer.bias)
    expected = layer.log_prob(hidden).exp().sum(0) - target.bincount(minlength=97)
    assert_close(slope, expected.detach(), 1e-8)


def test_alpha_2_is_sparsemax():
    layer, hidden, target = setting(alpha=2.0)
    other = SparsemaxOutput(D, COUNTS).double()
    assert_close(EntmaxOutput(D, COUNTS, alpha=2.0).bias, other.bias.float(), 1e-6)
    other.load_state_dict(layer.state_dict())
    assert_close(other.log_prob(hidden), layer.log_prob(hidden), 1e-12)
    assert_close(other(hidden, target), layer(hidden, target), 1e-12)


def test_alpha_near_1_is_the_softmax():
    layer, hidden, target = setting(alpha=1 + 1e-6)
    other = FullSoftmax(D, COUNTS).double()
    other.load_state_dict(layer.state_dict() | {"inverse_temperature": torch.tensor(1.0)})
    assert_close(layer.log_prob(hidden), other.log_prob(hidden), 1e-4)
    assert_close(layer(hidden, target), other(hidden, target), 1e-4)


def test_a_larger_alpha_leaves_fewer_words():
    sizes = []
    for alpha in (1.1, 1.5, 2.0, 3.0):
        layer, hidden, _ = setting(alpha=alpha)
        with torch.no_grad():
            hidden, layer.bias[:] = torch.linspace(-1, 1, N)[:, None].double().expand(-1, D), 0
        sizes.append((layer.log_prob(hidden) > -torch.inf).sum().item())
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


@for_every_alpha
def test_what_is_ahead_by_the_margin_has_everything(alpha):
    """Blondel et al. 2020, proposition 5: a margin of ``1 / (alpha - 1)``."""
    layer = EntmaxOutput(D, COUNTS, alpha=alpha)
    hidden, word = torch.randn(N, D), torch.full((N,), 3)
    with torch.no_grad():
        layer.weight.zero_()
        for share, certain in ((0.98, False), (1.02, True)):
            layer.bias.fill_(-1.0)
            layer.bias[3] += share / (alpha - 1)
            # At alpha = 1.1 what the others have is (0.02)^10 each, less than a float of 1 can tell.
            if certain or alpha > 1.2:
                assert ((layer.nll(hidden, word) == 0) == certain).all()
                assert ((layer(hidden, word) == 0) == certain).all()


@pytest.mark.parametrize("alpha", [1, 1.0, 0.0, -2.0, math.inf, math.nan])
@pytest.mark.usefixtures("without_type_checks")
def test_alpha_out_of_range_is_an_error(alpha):
    with pytest.raises(ValueError, match=rf"^alpha={alpha}: must be in \(1, inf\)"):
        EntmaxOutput(D, COUNTS, alpha=alpha)
