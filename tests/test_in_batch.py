import math

import pytest
import torch

from lvsoftmax.noise.in_batch import InBatchNoise
from lvsoftmax.ops.streaming import GAP

COUNTS = torch.tensor([50, 20, 9, 9, 4, 1, 0])
FREQUENCY = (COUNTS + 1) / (COUNTS + 1).sum()


def draw(noise, target):
    return noise.draw(torch.empty(len(target), 2), target, None, torch.Generator())


def by_the_algorithm(stream, rate):
    """Yi et al. 2019, algorithm 2, word by word, the mean forgetting once it stands for enough."""
    gap = [1 / p for p in FREQUENCY.tolist()]
    weight, last = [count + 1 for count in COUNTS.tolist()], [None] * len(COUNTS)
    for position, word in enumerate(stream):
        if last[word] is not None:
            share = max(rate, 1 / (weight[word] + 1))
            gap[word] = (1 - share) * gap[word] + share * (position - last[word])
        weight[word] += 1
        last[word] = position
    return gap


def test_the_draws_are_the_targets_with_the_expected_counts_of_the_others():
    target = torch.tensor([3, 0, 0, 6])
    sample = draw(InBatchNoise(COUNTS), target)
    assert torch.equal(sample.ids, target)
    for log_expected in (sample.log_expected, sample.target_log_expected):
        torch.testing.assert_close(log_expected.exp(), 3 * FREQUENCY[target], rtol=1e-3, atol=0)


@pytest.mark.parametrize("rate", [0.01, 0.2])
@pytest.mark.parametrize("stretch", [1, 7, 500])
def test_frequencies_follow_the_algorithm_however_the_stream_is_cut(stretch, rate):
    stream = torch.multinomial(torch.ones(7), 500, True)
    noise = InBatchNoise(COUNTS, rate=rate)
    for part in stream.split(stretch):
        noise.observe(part)
    expected = torch.tensor(by_the_algorithm(stream.tolist(), rate))
    torch.testing.assert_close(noise.gap / GAP, expected, rtol=1e-3, atol=1e-3)


def test_words_that_do_not_occur_stay_as_they_are():
    noise = InBatchNoise(COUNTS)
    before = noise.gap.clone()
    noise.observe(torch.tensor([2, 2, 0]))
    assert noise.gap[2] != before[2]
    rest = [0, 1, 3, 4, 5, 6]  # word 0 has occurred once: no distance yet
    assert torch.equal(noise.gap[rest], before[rest])
    noise.observe(torch.tensor([], dtype=torch.long))
    assert noise.position == 3


def test_frequencies_follow_a_stream_that_changes():
    noise, p = InBatchNoise(COUNTS, rate=0.02), torch.tensor([0.02, 0.03, 0.05, 0.1, 0.1, 0.2, 0.5])
    for part in torch.multinomial(p, 40_000, True).split(1000):
        noise.observe(part)
    torch.testing.assert_close(GAP / noise.gap, p, rtol=0.5, atol=0)
    # The mean of an exponential distance over about 2 / rate of them, on average over the words
    assert ((GAP / noise.gap) / p).log().mean().abs() < 0.15


def test_a_call_of_one_token_has_no_draws():
    sample = draw(InBatchNoise(COUNTS), torch.tensor([1]))
    assert sample.target_log_expected.item() == pytest.approx(math.log(FREQUENCY[1]), abs=1e-3)
