import math

import numpy as np
import oracles
import pytest
import torch

from lvsoftmax.ops import noise as ops
from lvsoftmax.ops.linear_cross_entropy.sampled import black_out_slopes
from lvsoftmax.ops.objectives import (
    black_out,
    candidate_logits,
    effective_sample_size,
    importance_sampling,
    log_weight_sums,
    noise_contrastive,
    one_versus_each,
    sampled_softmax,
)

N, K, V, D = 5, 6, 11, 3


def toy():
    """Logits of a few draws; the first token's target is drawn twice, the last one's not at all."""
    ids = torch.tensor([4, 0, 4, 2, 1, 7])
    target = torch.tensor([4, 0, 1, 2, 9])
    target_logit, logit = torch.randn(N, dtype=torch.float64), torch.randn(N, K, dtype=torch.float64)
    log_expected = torch.randn(V, dtype=torch.float64) - 1
    return target, ids, target_logit, logit, log_expected[target], log_expected[ids]


def test_candidate_logits_are_those_of_the_full_product():
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    target, ids, *_ = toy()
    for b in (bias, None):
        logits = torch.nn.functional.linear(hidden, weight, b)
        target_logit, logit = candidate_logits(hidden, weight, b, target, ids, sparse=False)
        torch.testing.assert_close(target_logit, logits[range(N), target])
        torch.testing.assert_close(logit, logits[:, ids])


def test_candidate_logits_of_a_tokens_own_words_are_those_of_the_full_product():
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    target, ids = toy()[0], torch.randint(V, (N, K))
    for b in (bias, None):
        logits = torch.nn.functional.linear(hidden, weight, b)
        target_logit, logit = candidate_logits(hidden, weight, b, target, ids, sparse=False)
        torch.testing.assert_close(target_logit, logits[range(N), target])
        torch.testing.assert_close(logit, logits.gather(1, ids))


def test_sparse_gradients_have_the_rows_of_targets_and_draws_only():
    hidden = torch.randn(N, D)
    weight, bias = torch.randn(V, D, requires_grad=True), torch.randn(V, requires_grad=True)
    target, ids, *_ = toy()
    target_logit, logit = candidate_logits(hidden, weight, bias, target, ids, sparse=True)
    (target_logit.sum() + logit.sum()).backward()
    for gradient in (weight.grad, bias.grad):
        assert gradient.is_sparse
        assert gradient.coalesce().indices().tolist() == [[0, 1, 2, 4, 7, 9]]


def test_sampled_softmax_equals_its_formula():
    target, ids, target_logit, logit, target_log_expected, log_expected = toy()
    actual = sampled_softmax(target_logit, logit, target_log_expected, log_expected, target[:, None] == ids)
    expected = oracles.sampled_softmax_objective(
        *(x.numpy() for x in (target, ids, target_logit, logit, target_log_expected, log_expected))
    )
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


def test_objectives_of_a_tokens_own_words_are_those_of_shared_ones_token_by_token():
    target, _, target_logit, logit, target_log_expected, _ = toy()
    ids, log_expected = torch.randint(V, (N, K)), torch.randn(N, K, dtype=torch.float64)
    hit = target[:, None] == ids
    assert hit.any()
    softmax = sampled_softmax(target_logit, logit, target_log_expected, log_expected, hit)
    importance = importance_sampling(target_logit, logit, log_expected)
    for n in range(N):
        own, shared = slice(n, n + 1), (target_logit[n : n + 1], logit[n : n + 1])
        alone = sampled_softmax(*shared, target_log_expected[own], log_expected[n], target[own, None] == ids[n])
        torch.testing.assert_close(softmax[own], alone)
        torch.testing.assert_close(importance[own], importance_sampling(*shared, log_expected[n]))


def test_sampled_softmax_without_anything_to_compare_with_is_zero():
    logit = torch.randn(1, 2, requires_grad=True)
    value = sampled_softmax(torch.zeros(1), logit, torch.zeros(1), torch.zeros(2), torch.ones(1, 2, dtype=torch.bool))
    value.sum().backward()
    assert value == 0 and torch.equal(logit.grad, torch.zeros(1, 2))


def test_importance_sampling_equals_its_formula():
    _, ids, target_logit, logit, _, log_expected = toy()
    actual = importance_sampling(target_logit, logit, log_expected)
    log_q = log_expected - math.log(K)
    expected = oracles.importance_sampling_objective(*(x.numpy() for x in (target_logit, logit, log_q)))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


def test_the_gradient_of_importance_sampling_is_the_self_normalised_estimator():
    _, _, target_logit, logit, _, log_expected = toy()
    logit.requires_grad_()
    importance_sampling(target_logit, logit, log_expected).sum().backward()
    weight = (logit.detach() - log_expected).exp()
    torch.testing.assert_close(logit.grad, weight / weight.sum(1, keepdim=True))


def test_effective_sample_size_equals_its_formula_also_over_blocks():
    _, _, _, logit, _, log_expected = toy()
    weight = np.exp(logit.numpy() - log_expected.numpy())
    expected = [sum(w) ** 2 / sum(x**2 for x in w) for w in weight]
    whole = log_weight_sums(logit, log_expected)
    joined = torch.logaddexp(
        log_weight_sums(logit[:, :2], log_expected[:2]), log_weight_sums(logit[:, 2:], log_expected[2:])
    )
    for log_sums in (whole, joined):
        np.testing.assert_allclose(effective_sample_size(log_sums).numpy(), expected, rtol=1e-12)


def test_equal_weights_are_all_effective():
    log_sums = log_weight_sums(torch.full((2, 8), 10.0), torch.full((8,), -3.0))
    torch.testing.assert_close(effective_sample_size(log_sums), torch.full((2,), 8.0))


def test_noise_contrastive_equals_its_formula():
    _, _, target_logit, logit, target_log_expected, log_expected = toy()
    actual = noise_contrastive(target_logit - target_log_expected, logit - log_expected)
    shift = math.log(K)
    expected = oracles.noise_contrastive_objective(
        *(x.numpy() for x in (target_logit, logit, target_log_expected - shift, log_expected - shift)), K
    )
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_contrastive_keeps_its_digits(dtype):
    """Also where float64 can tell ``softplus`` from its argument, and where there is next to nothing left to learn."""
    score = torch.tensor([-60.0, -20.0, 0.0, 20.5, 60.0], dtype=dtype)
    expected = torch.tensor([np.log1p(np.exp(x)) if x < 30 else x + np.exp(-x) for x in score.double().tolist()])
    tolerance = 4 * torch.finfo(dtype).eps
    none = torch.full((5,), torch.inf, dtype=dtype)
    torch.testing.assert_close(noise_contrastive(none, score[:, None]), expected.to(dtype), rtol=tolerance, atol=0)
    torch.testing.assert_close(noise_contrastive(-score, -none[:, None]), expected.to(dtype), rtol=tolerance, atol=0)


def test_black_out_equals_its_formula():
    target, ids, target_logit, logit, target_log_expected, log_expected = toy()
    actual = black_out(target_logit, logit, target_log_expected, log_expected, target[:, None] == ids)
    log_q = (x - math.log(K) for x in (target_log_expected, log_expected))
    expected = oracles.black_out_objective(*(x.numpy() for x in (target, ids, target_logit, logit, *log_q)))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


def test_black_out_without_anything_to_compare_with_is_zero():
    logit = torch.randn(1, 2, requires_grad=True)
    value = black_out(torch.zeros(1), logit, torch.zeros(1), torch.zeros(2), torch.ones(1, 2, dtype=torch.bool))
    value.sum().backward()
    assert value == 0 and torch.equal(logit.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("gap", [20.0, 200.0])
@pytest.mark.parametrize("first", ["target", "draw"])
def test_black_out_keeps_its_digits_as_one_word_takes_all(first, gap):
    """In float32 ``1 - p`` would be zero, its logarithm infinite, and ``r = p / (1 - p)`` beyond float32."""
    other = torch.tensor([[0.3, -1.0, 0.4]])
    own = torch.tensor([gap if first == "target" else 0.1])
    if first == "draw":
        other[0, 1] = gap
    found = []
    for dtype in (torch.float32, torch.float64):
        logits = (own.to(dtype).requires_grad_(), other.to(dtype).requires_grad_())
        zero = torch.zeros(3, dtype=dtype)
        value = black_out(*logits, zero[:1], zero, torch.zeros(1, 3, dtype=torch.bool))
        by_block = [x.detach().clone() for x in logits]
        slopes = black_out_slopes(*by_block, torch.ones(1, dtype=dtype))
        found.append([value, *torch.autograd.grad(value.sum(), logits), *slopes, by_block[1]])
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-44)
    value, by_own, by_other, *slopes = found[1]
    for actual, expected in zip(slopes, (value, by_own, by_other), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_one_versus_each_equals_its_formula():
    target, ids, target_logit, logit, _, log_expected = toy()
    actual = one_versus_each(target_logit, logit, log_expected, target[:, None] == ids)
    expected = oracles.one_versus_each_objective(*(x.numpy() for x in (target, ids, target_logit, logit, log_expected)))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


# -- the bias of the gradient -----------------------------------------------------------------------------------------


class Context:
    """One token's logits ``theta * slope`` at ``theta = 1``, and the derivative of objectives by ``theta``."""

    words, target = 4096, 3

    def __init__(self, target_logit: float | None = None) -> None:
        source = torch.Generator().manual_seed(2)
        self.slope = torch.randn(self.words, generator=source, dtype=torch.float64)
        self.slope -= 0.1 * torch.arange(1, self.words + 1).log()
        if target_logit is not None:
            self.slope[self.target] = target_logit
        self.partition = self.slope.exp().sum()
        self.exact = (self.slope.softmax(0) @ self.slope) - self.slope[self.target]
        self.q = ops.noise_probability(torch.ones(self.words), "log_uniform", 0.3)

    def derivative(self, objective, ids, *log_expected) -> torch.Tensor:
        """Derivatives [R] of an objective over R independent draws [R, K]."""
        theta = torch.ones(len(ids), dtype=torch.float64, requires_grad=True)
        value = objective(theta * self.slope[self.target], theta[:, None] * self.slope[ids], *log_expected)
        return torch.autograd.grad(value.sum(), theta)[0]

    def noise_of_first_order(self, ids, log_expected) -> torch.Tensor:
        """The linear part of the estimator's error: mean zero, and nearly all of its variance."""
        weight = (self.slope[ids] - log_expected).exp() / self.partition
        centred = self.slope[ids] - self.slope.softmax(0) @ self.slope
        return (weight * centred).sum(1)


def slope_of_bias(bias: dict[int, float]) -> float:
    count, size = np.log(list(bias)), np.log(np.abs(list(bias.values())))
    return np.polyfit(count, size, 1)[0]


COUNTS_OF_DRAWS = (8, 16, 32, 64, 128, 256, 512)


def test_the_bias_of_importance_sampling_falls_as_one_over_the_draws():
    context, source, repeats = Context(), torch.Generator().manual_seed(0), 20_000
    table, bias = ops.alias_table(context.q), {}
    for count in COUNTS_OF_DRAWS:
        errors = []
        for _ in range(repeats // 2000):
            ids = ops.draw_independent(table, (2000, count), source)
            log_expected = (count * context.q).log()[ids]
            derivative = context.derivative(importance_sampling, ids, log_expected)
            errors.append(derivative - context.exact - context.noise_of_first_order(ids, log_expected))
        error = torch.cat(errors)
        bias[count] = error.mean().item()
    assert slope_of_bias(bias) == pytest.approx(-1, abs=0.2)


def test_the_bias_of_a_target_that_was_not_drawn_falls_as_one_over_the_draws():
    """``positive=corrected``: nothing comes off the target's logit, and draws that hit it are left out.

    The target is probable: otherwise nothing of this would matter.
    """
    context, source, bias = Context(target_logit=7.0), torch.Generator().manual_seed(0), {}
    table, target = ops.alias_table(context.q), torch.zeros(2000, dtype=torch.float64)
    own = (
        context.slope.softmax(0)[context.target] * -context.exact
    )  # what the target adds that is left out of the draws
    for count in COUNTS_OF_DRAWS:
        errors = []
        for _ in range(10):
            ids = ops.draw_independent(table, (2000, count), source)
            log_expected = (count * context.q).log()[ids]
            hit = ids == context.target
            derivative = context.derivative(sampled_softmax, ids, target, log_expected, hit)
            linear = context.noise_of_first_order(ids, log_expected.masked_fill(hit, torch.inf)) + own
            errors.append(derivative - context.exact - linear)
        bias[count] = torch.cat(errors).mean().item()
    assert slope_of_bias(bias) == pytest.approx(-1, abs=0.2)


def test_the_bias_of_sampled_softmax_falls_as_one_over_the_draws():
    context, source, repeats = Context(), torch.Generator().manual_seed(0), 1000
    bias = {}
    for count in COUNTS_OF_DRAWS:
        mass = ops.inclusion_mass(context.q, count)
        inclusion = (mass.double() / ops.DRAW).log()
        ids = ops.draw_distinct(mass.cumsum(0), (repeats, count), source)
        log_expected = (inclusion[[context.target]].expand(repeats), inclusion[ids])
        derivative = context.derivative(sampled_softmax, ids, *log_expected, ids == context.target)
        error = derivative - context.exact - context.noise_of_first_order(ids, inclusion[ids])
        bias[count] = error.mean().item()
    assert slope_of_bias(bias) == pytest.approx(-1, abs=0.2)
