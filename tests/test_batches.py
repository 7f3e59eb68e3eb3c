"""Batches of contiguous text: every token once, rows that go on, what is left over."""

import numpy as np
import pytest
import torch

from lvsoftmax.data.batches import ContiguousBatches

SHAPES = [(1, 1, 1), (7, 1, 3), (7, 3, 2), (10, 4, 3), (20, 20, 5), (3, 5, 2), (100, 8, 7), (101, 10, 35), (64, 4, 4)]


@pytest.mark.parametrize(("tokens", "size", "length"), SHAPES)
def test_evaluation_predicts_every_token_exactly_once(tokens, size, length):
    batches = ContiguousBatches(np.arange(1, tokens + 1, dtype=np.int32), size, length, start=999, complete=True)
    seen = []
    for batch in (batches[step] for step in range(len(batches))):
        assert batch.input.shape == batch.target.shape == batch.weight.shape == (size, length)
        assert batch.weight.dtype == torch.float32
        assert set(batch.weight.unique().tolist()) <= {0.0, 1.0}
        assert (batch.target[batch.weight == 0] == 0).all()
        target, previous = (ids[batch.weight == 1] for ids in (batch.target, batch.input))
        assert torch.equal(previous, torch.where(target > 1, target - 1, 999))
        seen += target.tolist()
    assert sorted(seen) == list(range(1, tokens + 1))


@pytest.mark.parametrize(("tokens", "size", "length"), [shape for shape in SHAPES if shape[0] >= shape[1] * shape[2]])
@pytest.mark.parametrize("complete", [False, True])
def test_rows_go_on_in_the_next_batch(tokens, size, length, complete):
    ids = np.arange(tokens, dtype=np.int32)
    batches = ContiguousBatches(ids, size, length, start=999, complete=complete)
    for step in range(len(batches) - 1):
        first, second = batches[step], batches[step + 1]
        real = slice(None) if second.weight is None else second.weight[:, 0] == 1
        assert torch.equal(second.input[real, 0], first.target[real, -1])


def test_training_drops_the_tail():
    batches = ContiguousBatches(np.arange(15, dtype=np.int32), 2, 3, start=999, complete=False)
    assert len(batches) == 2
    assert batches[0].weight is None
    assert batches[0].input.tolist() == [[999, 0, 1], [6, 7, 8]]
    assert batches[0].target.tolist() == [[0, 1, 2], [7, 8, 9]]
    assert batches[1].input.tolist() == [[2, 3, 4], [9, 10, 11]]
    assert batches[1].target.tolist() == [[3, 4, 5], [10, 11, 12]]
    assert batches[1].target.dtype == torch.int64
    assert [batch.target[0, 0].item() for batch in batches] == [0, 3]  # iteration ends


def test_batches_reject_what_they_cannot_fill():
    ids = np.arange(5, dtype=np.int32)
    with pytest.raises(ValueError, match="5 tokens does not fill one batch of batch.size=2 x batch.length=3"):
        ContiguousBatches(ids, 2, 3, start=0, complete=False)
    with pytest.raises(ValueError, match="batch.size=0 and batch.length=3: both must be at least 1"):
        ContiguousBatches(ids, 0, 3, start=0, complete=True)
    with pytest.raises(ValueError, match="0 tokens"):
        ContiguousBatches(ids[:0], 2, 3, start=0, complete=True)
    with pytest.raises(IndexError, match="batch 1 of 1"):
        ContiguousBatches(ids, 1, 5, start=0, complete=True)[1]
