import oracles
import pytest
import torch

from lvsoftmax.layers.black_out import BlackOut
from lvsoftmax.ops import noise as ops

COUNTS = torch.tensor([900, 400, 300, 200, 100, 50, 30, 20, 10, 9, 8, 5, 5, 3, 2, 1, 1, 0])
V, D, N = len(COUNTS), 6, 9


def setting(**options) -> tuple[BlackOut, torch.Tensor, torch.Tensor]:
    layer = BlackOut(D, COUNTS, sparse=False, **options).double()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return layer, hidden, torch.arange(N) * 2


@pytest.mark.parametrize("options", [{}, {"power": 1.0}, {"noise": "log_uniform", "power": 0.7}], ids=str)
def test_draws_and_targets_weigh_one_over_their_probability(options):
    """As in the paper, but that of a target is to be among the draws at all."""
    layer, hidden, target = setting(samples=6, replacement=True, **options)
    q = ops.noise_probability(COUNTS, options.get("noise", "unigram"), options.get("power", 0.4))
    target_q = (1 - (1 - q) ** 6) / 6
    sample = layer.draw(hidden, target)
    logits = layer.logits(hidden).detach()
    expected = oracles.black_out_objective(
        *(x.numpy() for x in (target, sample.ids, logits[range(N), target], logits[:, sample.ids])),
        *(x.numpy() for x in (target_q.log()[target], q.log()[sample.ids])),
    )
    torch.testing.assert_close(layer(hidden, target, None, sample), torch.tensor(expected), rtol=1e-5, atol=0)


def test_with_all_words_drawn_it_is_the_discriminative_loss_of_the_softmax():
    layer, hidden, target = setting(samples=1.0)
    p = layer.log_prob(hidden).exp()
    right = torch.zeros(N, V, dtype=torch.bool).scatter(1, target[:, None], True)
    expected = -torch.where(right, p, 1 - p).log().sum(1)
    torch.testing.assert_close(layer(hidden, target), expected)


def test_with_all_words_drawn_the_truth_is_the_optimum():
    layer, hidden, _ = setting(samples=1.0)
    p = torch.rand(V, dtype=torch.float64).softmax(0)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(p.log())
    hidden, target = hidden[:1].expand(V, D), torch.arange(V)
    gradient = torch.autograd.grad((p * layer(hidden, target)).sum(), layer.bias)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(p), rtol=0, atol=1e-8)


def test_a_draw_of_the_target_itself_is_left_out():
    layer, hidden, target = setting(samples=4)
    words = torch.tensor([1, 0, 2, 4])
    sample = ops.Sample(words, torch.tensor([-0.3, -0.7, 0.2, -1.0]), torch.zeros(N))
    rest = words != 2
    without = ops.Sample(words[rest], sample.log_expected[rest], sample.target_log_expected)
    token = torch.arange(N) == 1
    assert target[token] == 2
    torch.testing.assert_close(layer(hidden, target, None, sample)[token], layer(hidden, target, None, without)[token])
    assert (layer(hidden, target, None, sample)[~token] != layer(hidden, target, None, without)[~token]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples=0"),
        ({"samples": 19}, "samples=19: more than the 18 words"),
        ({"power": -0.4}, "power=-0.4"),
    ],
)
def test_settings_out_of_range_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        BlackOut(D, COUNTS, **options)
