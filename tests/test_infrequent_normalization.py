import oracles
import pytest
import torch
from cases import assert_close

from lvsoftmax.layers.infrequent_normalization import InfrequentNormalization
from lvsoftmax.ops.noise import Selection

COUNTS = torch.tensor([900, 400, 300, 200, 100, 50, 30, 20, 10, 9, 8, 5, 5, 3, 2, 1, 1, 0])
V, D, N = len(COUNTS), 6, 9


def setting(**options) -> tuple[InfrequentNormalization, torch.Tensor, torch.Tensor]:
    layer = InfrequentNormalization(D, COUNTS, **options).double()
    with torch.no_grad():
        layer.bias += torch.randn(V, dtype=torch.float64)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return layer, hidden, torch.arange(N) * 2


@pytest.mark.parametrize("penalty", ["linear", "squared"])
@pytest.mark.parametrize("offset", [-3.0, 3.0], ids=["Z below one", "Z above one"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_objective_equals_its_oracle(penalty, offset, share):
    layer, hidden, target = setting(penalty=penalty, strength=1.5, share=share)
    with torch.no_grad():
        layer.bias += offset
    drawn = layer.draw(hidden, target)
    assert len(drawn.tokens) == round(share * N)
    logits = layer.logits(hidden).detach().numpy()
    expected = oracles.infrequent_normalization_objective(
        logits, target.tolist(), drawn.tokens.tolist(), layer.strength, penalty
    )
    assert_close(layer(hidden, target, None, drawn), torch.from_numpy(expected), 1e-12)


@pytest.mark.parametrize("penalty", ["linear", "squared"])
def test_its_mean_over_the_draws_is_the_objective_of_all_tokens(penalty):
    """Every token is drawn equally often, and counts for those that are not: over N draws of one token each."""
    layer, hidden, target = setting(penalty=penalty)
    values = torch.stack([layer(hidden, target, None, Selection(torch.tensor([n]))) for n in range(N)]).mean(0)
    whole = layer(hidden, target, None, Selection(torch.arange(N)))
    assert_close(values, whole, 1e-12)
    gradients = [torch.autograd.grad(value.sum(), layer.weight, retain_graph=True)[0] for value in (values, whole)]
    assert_close(*gradients, 1e-12)


@pytest.mark.parametrize("offset", [-5.0, 5.0])
def test_linear_of_all_tokens_is_the_likelihood(offset):
    layer, hidden, target = setting(penalty="linear", share=1.0)
    with torch.no_grad():
        layer.bias += offset
    assert_close(layer(hidden, target), layer.nll(hidden, target), 1e-12)


def test_linear_is_an_unbiased_estimate_of_the_likelihood():
    """Of every draw of one token, each as likely: the mean over them is the likelihood of each token."""
    layer, hidden, target = setting(penalty="linear")
    values = torch.stack([layer(hidden, target, None, Selection(torch.tensor([n]))) for n in range(N)]).mean(0)
    assert_close(values, layer.nll(hidden, target), 1e-12)


def test_the_optimum_of_squared_is_the_truth_raised_by_a_constant():
    """One context, its distribution p known: -sum_w p_w s_w + 2 (log Z)^2 has no slope at s = log p + 1 / 4."""
    p = torch.softmax(torch.randn(V, dtype=torch.float64), 0)
    layer = InfrequentNormalization(D, COUNTS, strength=2.0, share=1.0).double()
    with torch.no_grad():
        layer.bias.copy_(p.log() + 0.25)
    (p * layer(torch.zeros(V, D, dtype=torch.float64), torch.arange(V))).sum().backward()
    assert_close(layer.bias.grad, torch.zeros(V, dtype=torch.float64), 1e-12)


def test_draws_are_different_tokens_and_every_token_is_drawn():
    layer, hidden, target = setting(share=0.4)
    drawn = torch.stack([layer.draw(hidden, target).tokens for _ in range(2000)])
    assert all(len(set(row)) == 4 for row in drawn.tolist())
    counts = drawn.flatten().bincount(minlength=N).double()
    expected = 2000 * 4 / N
    assert ((counts - expected).abs() < 5 * (expected * (1 - 4 / N)) ** 0.5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.5}, "share=1.5"),
        ({"strength": 0.0}, "strength=0.0"),
        ({"strength": float("nan")}, "strength=nan"),
    ],
)
def test_settings_out_of_range_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        InfrequentNormalization(D, COUNTS, **options)
