import oracles
import pytest
import torch
from cases import assert_close

from lvsoftmax.layers.self_normalized_softmax import SelfNormalizedSoftmax

COUNTS = torch.tensor([900, 400, 300, 200, 100, 50, 30, 20, 10, 9, 8, 5, 5, 3, 2, 1, 1, 0])
V, D, N = len(COUNTS), 6, 9


@pytest.mark.parametrize("strength", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("offset", [-3.0, 3.0])
def test_the_objective_equals_its_oracle(strength, offset):
    layer = SelfNormalizedSoftmax(D, COUNTS, strength=strength).double()
    with torch.no_grad():
        layer.bias += offset
    hidden, target = torch.randn(N, D, dtype=torch.float64), torch.arange(N) * 2
    expected = oracles.self_normalized_objective(layer.logits(hidden).detach().numpy(), target.tolist(), strength)
    assert_close(layer(hidden, target), torch.from_numpy(expected), 1e-12)


def test_without_a_penalty_it_is_the_full_softmax():
    layer = SelfNormalizedSoftmax(D, COUNTS, strength=0.0).double()
    hidden, target = torch.randn(N, D, dtype=torch.float64), torch.arange(N) * 2
    assert_close(layer(hidden, target), layer.nll(hidden, target), 1e-12)


def test_training_normalises_the_scores():
    """The likelihood alone leaves the log-partition where it was; the penalty brings it near zero."""
    target = torch.arange(N) * 2
    hidden = torch.randn(N, D)
    found = {}
    for strength in (0.0, 1.0):
        torch.manual_seed(1)
        layer = SelfNormalizedSoftmax(D, COUNTS, strength=strength)
        with torch.no_grad():
            layer.bias += 2
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.2)
        for _ in range(500):
            optimiser.zero_grad()
            layer.loss(hidden, target, torch.full((N,), 1 / N)).backward()
            optimiser.step()
        found[strength] = layer.log_partition(hidden).abs().max().item()
    assert found[1.0] < 0.3 and found[0.0] > 1.5


@pytest.mark.parametrize("strength", [-0.1, float("inf"), float("nan")])
def test_a_strength_out_of_range_is_an_error(strength):
    with pytest.raises(ValueError, match=f"strength={strength}"):
        SelfNormalizedSoftmax(D, COUNTS, strength=strength)
