import pytest
import torch

from lvsoftmax.layers.sampled_softmax import SampledSoftmax
from lvsoftmax.ops.noise import Sample, log_expected_count

COUNTS = torch.tensor([900, 400, 300, 200, 100, 50, 30, 20, 10, 9, 8, 5, 5, 3, 2, 1, 1, 0])
V, D, N = len(COUNTS), 6, 9
for_every_noise = pytest.mark.parametrize("noise", ["uniform", "log_uniform", "unigram"])


def setting(**options) -> tuple[SampledSoftmax, torch.Tensor, torch.Tensor]:
    layer = SampledSoftmax(D, COUNTS, sparse=False, **options).double()
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    return layer, hidden, torch.arange(N) * 2


def gradient_of_table(value: torch.Tensor, layer: SampledSoftmax) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), layer.weight)[0]


@for_every_noise
def test_with_all_words_drawn_it_is_the_exact_softmax(noise):
    layer, hidden, target = setting(samples=1.0, noise=noise)
    actual, expected = layer(hidden, target), layer.nll(hidden, target)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient_of_table(actual, layer), gradient_of_table(expected, layer))


@for_every_noise
def test_with_many_draws_with_replacement_it_approaches_the_exact_softmax(noise):
    """It would not, were a target's correction its expected count: frequent words would lose their own share."""
    layer, hidden, target = setting(samples=400_000, noise=noise, replacement=True)
    actual, expected = layer(hidden, target), layer.nll(hidden, target)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.02)
    torch.testing.assert_close(gradient_of_table(actual, layer), gradient_of_table(expected, layer), rtol=0, atol=0.02)


@pytest.mark.parametrize("replacement", [False, True])
def test_a_draw_of_the_target_itself_is_left_out(replacement):
    layer, hidden, target = setting(samples=4, replacement=replacement)
    words = torch.tensor([1, 0, 2, 4])
    sample = Sample(words, torch.tensor([-0.3, -0.7, 0.2, -1.0]), torch.zeros(N))
    rest = words != 2
    without = Sample(words[rest], sample.log_expected[rest], sample.target_log_expected)
    token = torch.arange(N) == 1
    assert target[token] == 2
    assert layer(hidden, target, None, sample)[token] == layer(hidden, target, None, without)[token]
    assert (layer(hidden, target, None, sample)[~token] > layer(hidden, target, None, without)[~token]).all()


def test_the_correction_of_draws_and_targets():
    layer, hidden, target = setting(samples=5, replacement=True)
    sample = layer.draw(hidden, target)
    expected_count = log_expected_count(layer.noise.mass, torch.arange(V), 5).exp()
    torch.testing.assert_close(sample.log_expected.exp(), expected_count[sample.ids])
    torch.testing.assert_close(sample.target_log_expected.exp(), (1 - (1 - expected_count / 5) ** 5)[target])
    layer, hidden, target = setting(samples=5)
    sample = layer.draw(hidden, target)
    inclusion = layer.noise.mass / layer.noise.mass.sum() * 5
    torch.testing.assert_close(sample.log_expected.exp(), inclusion[sample.ids])
    torch.testing.assert_close(sample.target_log_expected.exp(), inclusion[target])


def test_a_call_draws_anew_and_a_given_sample_is_kept():
    layer, hidden, target = setting(samples=4)
    sample = layer.draw(hidden, target)
    assert torch.equal(layer(hidden, target, None, sample), layer(hidden, target, None, sample))
    assert len({tuple(layer(hidden, target).tolist()) for _ in range(20)}) > 1


def test_no_gradient_leaves_the_rows_of_targets_and_draws():
    layer = SampledSoftmax(D, COUNTS, samples=4)
    target = torch.tensor([17, 17, 3])
    sample = layer.draw(torch.randn(3, D), target)
    layer(torch.randn(3, D), target, None, sample).sum().backward()
    for parameter in (layer.weight, layer.bias):
        assert parameter.grad.is_sparse
        assert set(parameter.grad.coalesce().indices()[0].tolist()) == {17, 3, *sample.ids.tolist()}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "samples=0"),
        ({"samples": 1.5}, "samples=1.5"),
        ({"samples": 19}, "samples=19: more than the 18 words"),
        ({"power": -1.0}, "power=-1.0"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        SampledSoftmax(D, COUNTS, **options)
