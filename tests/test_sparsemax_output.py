import numpy as np
import oracles
import pytest
import torch
from cases import assert_close, randomise, zipf_counts

from lvsoftmax.layers.sparsemax_output import SparsemaxOutput

D, N = 6, 9
COUNTS = zipf_counts(97)


def setting(counts=COUNTS) -> tuple[SparsemaxOutput, torch.Tensor, torch.Tensor]:
    layer = randomise(SparsemaxOutput(D, counts).double())
    return layer, torch.randn(N, D, dtype=torch.float64, requires_grad=True), torch.randint(len(counts), (N,))


@pytest.mark.parametrize("vocab", [2, 97, 3001])
def test_the_objective_is_the_papers(vocab):
    """Martins & Astudillo 2016, section 3.2, and Blondel et al. 2020: the same from two formulas."""
    layer, hidden, target = setting(zipf_counts(vocab))
    actual = layer(hidden, target).detach().numpy()
    logits = oracles.dense_logits(layer, hidden.detach().numpy())
    log_prob = oracles.sparsemax_output(layer, hidden.detach().numpy())
    np.testing.assert_allclose(
        actual, oracles.fenchel_young_objective(logits, log_prob, target.tolist(), 2.0), atol=1e-10
    )
    for value, z, p, word in zip(actual, logits, np.exp(log_prob), target.tolist(), strict=True):
        tau = z.max() - p.max()
        assert value == pytest.approx((z[p > 0] ** 2 - tau**2).sum() / 2 + 0.5 - z[word], abs=1e-10)


def test_of_two_words_it_is_a_straight_line():
    layer = SparsemaxOutput(1, torch.tensor([1, 1]))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [0.0]]))
    margin = torch.tensor([[-3.0], [-1.0], [-0.5], [0.0], [0.8], [1.0], [2.0]])
    assert_close(layer.log_prob(margin)[:, :1].exp(), ((margin + 1) / 2).clamp(0, 1), 1e-6)


def test_it_is_the_nearest_distribution():
    layer, hidden, _ = setting()
    z, p = layer.logits(hidden).detach(), layer.log_prob(hidden).exp().detach()
    others = torch.cat([torch.randn(1000, N, 97).double().softmax(2), p + 0.01 * (torch.rand(1000, N, 97) - p)])
    others /= others.sum(2, keepdim=True)
    assert ((others - z).norm(dim=2) >= (p - z).norm(dim=1)).all()


def test_the_gradient_by_the_scores_is_p_minus_y():
    layer, hidden, target = setting()
    (slope,) = torch.autograd.grad(layer(hidden, target).sum(), layer.bias)
    expected = layer.log_prob(hidden).exp().sum(0) - target.bincount(minlength=97)
    assert_close(slope, expected.detach(), 1e-10)


def test_what_is_ahead_by_one_has_everything():
    layer, hidden, target = setting()
    with torch.no_grad():
        rest = layer.logits(hidden).scatter(1, target[:, None], -torch.inf).amax(1)
        for margin, certain in ((0.99, False), (1.01, True)):
            layer.weight.zero_()
            layer.bias.fill_(-1.0)
            layer.bias[3] = margin - 1.0
            word = torch.full((N,), 3)
            assert ((layer.nll(hidden, word) == 0) == certain).all()
            assert ((layer(hidden, word) == 0) == certain).all()
    assert rest.isfinite().all()


def test_a_step_touches_the_rows_of_supports_and_targets_only():
    layer = randomise(SparsemaxOutput(D, zipf_counts(3001), sparse=True))
    hidden, target = 3 * torch.randn(N, D), torch.randint(3001, (N,))
    layer.loss(hidden, target, torch.ones(N)).backward()
    inside = (layer.log_prob(hidden) > -torch.inf).any(0)
    inside[target] = True
    rows = layer.weight.grad.coalesce().indices().flatten()
    assert set(rows.tolist()) <= set(inside.nonzero().flatten().tolist()) and len(rows) < 500
