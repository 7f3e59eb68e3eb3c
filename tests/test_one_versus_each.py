import pytest
import torch
from cases import assert_mean

from lvsoftmax.layers.one_versus_each import OneVersusEach
from lvsoftmax.ops import noise as ops

COUNTS = torch.tensor([900, 400, 300, 200, 100, 50, 30, 20, 10, 9, 8, 5, 5, 3, 2, 1, 1, 0])
V, D, N = len(COUNTS), 6, 9


def setting(counts=COUNTS, **options) -> tuple[OneVersusEach, torch.Tensor, torch.Tensor]:
    layer = OneVersusEach(D, counts, sparse=False, **options).double()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return layer, hidden, torch.arange(N) * 2 % len(counts)


def bound(layer: OneVersusEach, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The sum over all other words."""
    logits = layer.logits(hidden)
    terms = -(logits.gather(1, target[:, None]) - logits).sigmoid().log()
    return terms.scatter(1, target[:, None], 0.0).sum(1)


@pytest.mark.parametrize(
    "options",
    [{}, {"replacement": True}, {"noise": "unigram", "power": 0.5}, {"noise": "log_uniform", "replacement": True}],
    ids=str,
)
def test_the_expected_gradient_is_that_of_the_bound(options):
    layer, hidden, target = setting(samples=5, **options)
    hidden, target = hidden[:1].detach(), target[3:4]
    many = [torch.autograd.grad(layer(hidden, target).sum(), layer.bias)[0] for _ in range(1000)]
    expected = torch.autograd.grad(bound(layer, hidden, target).sum(), layer.bias)[0]
    assert_mean(torch.stack(many), expected)


@pytest.mark.parametrize("noise", ["uniform", "unigram"])
def test_with_all_words_drawn_once_it_is_the_bound(noise):
    layer, hidden, target = setting(samples=1.0, noise=noise)
    torch.testing.assert_close(layer(hidden, target), bound(layer, hidden, target))
    assert (layer(hidden, target) > layer.nll(hidden, target)).all()


def test_of_two_words_the_bound_is_the_likelihood():
    layer, hidden, target = setting(torch.tensor([5, 2]), samples=1.0)
    torch.testing.assert_close(layer(hidden, target), layer.nll(hidden, target))


def test_the_truth_is_the_optimum():
    layer, hidden, _ = setting(samples=1.0)
    p = torch.rand(V, dtype=torch.float64).softmax(0)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(p.log() + 2)
    hidden, target = hidden[:1].expand(V, D), torch.arange(V)
    gradient = torch.autograd.grad((p * layer(hidden, target)).sum(), layer.bias)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(p), rtol=0, atol=1e-8)


def test_a_draw_of_the_target_itself_is_no_comparison():
    layer, hidden, target = setting(samples=4)
    sample = ops.Sample(target[:1].expand(3), torch.zeros(3), torch.zeros(1))
    assert layer(hidden[:1], target[:1], None, sample) == 0
    assert layer.loss(hidden[:1], target[:1], torch.ones(1), None, sample) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples=0"),
        ({"samples": 19}, "samples=19: more than the 18 words"),
        ({"power": -1.0}, "power=-1.0"),
    ],
)
def test_settings_out_of_range_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        OneVersusEach(D, COUNTS, **options)
