"""Backbones and the language model."""

import numpy
import pytest
import torch

from lvsoftmax.layer import OutputLayer, check_counts
from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.models.language_model import LanguageModel
from lvsoftmax.models.lstm import LSTM
from lvsoftmax.models.transformer import Transformer

COUNTS = torch.arange(30, 0, -1)


def backbones():
    torch.manual_seed(0)
    return {
        "lstm": LSTM(hidden_size=16, layers=2),
        "transformer": Transformer(hidden_size=16, layers=2, heads=2, memory=64),
    }


@pytest.mark.parametrize("name", backbones())
def test_reading_in_pieces_equals_reading_at_once(name):
    backbone = backbones()[name]
    text = torch.randn(3, 12, 16)
    whole, _ = backbone(text, None)
    first, state = backbone(text[:, :5], None)
    second, state = backbone(text[:, 5:6], state)
    third, _ = backbone(text[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, second, third], 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", backbones())
def test_no_output_depends_on_later_words_or_other_streams(name):
    backbone = backbones()[name]
    text = torch.randn(3, 9, 16)
    changed = text.clone()
    changed[1, 4:] = torch.randn(5, 16)
    before, after = backbone(text, None)[0], backbone(changed, None)[0]
    torch.testing.assert_close(after[1, :4], before[1, :4])
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1, 4:], before[1, 4:], atol=1e-3)


def test_transformer_forgets_what_is_older_than_its_memory():
    backbone = Transformer(hidden_size=16, layers=1, heads=2, memory=3)
    text = torch.randn(1, 10, 16)
    older = text.clone()
    older[:, :4] = torch.randn(1, 4, 16)  # positions 0 to 3; the memory of three holds 4, 5 and 6
    outputs = []
    for version in (text, older):
        _, state = backbone(version[:, :7], None)
        outputs.append(backbone(version[:, 7:], state)[0])
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("length", [3, 5])
def test_transformer_sees_the_same_however_the_text_is_cut(length):
    """Stretches shorter and longer than the memory, in a text of many."""
    backbone = Transformer(hidden_size=16, layers=2, heads=2, memory=4)
    text = torch.randn(2, 41, 16)
    outputs, state = [], None
    for stretch in text.split(length, 1):
        output, state = backbone(stretch, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), backbone(text, None)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [5, 41])
@pytest.mark.usefixtures("in_double")
def test_transformer_sees_as_far_back_as_its_memory_in_every_layer(length):
    backbone = Transformer(hidden_size=16, layers=2, heads=2, memory=4)
    text = torch.randn(2, 41, 16)
    older = text.clone()
    older[:, :11] = torch.randn(2, 11, 16)
    outputs = []
    for version in (text, older):
        parts, state = [], None
        for stretch in version.split(length, 1):
            part, state = backbone(stretch, state)
            parts.append(part)
        outputs.append(torch.cat(parts, 1))
    change = (outputs[0] - outputs[1]).abs().amax((0, 2))
    assert change[18] > 1e-9  # position 10, two layers of four positions further on
    torch.testing.assert_close(change[19:], torch.zeros(22), rtol=0, atol=1e-12)


def test_transformer_without_memory_sees_its_stretch_from_the_start_on():
    backbone = Transformer(hidden_size=16, layers=1, heads=2, memory=0)
    text = torch.randn(1, 30, 16)
    other = text.clone()
    other[:, 0] = torch.randn(1, 16)
    outputs = [backbone(version, None)[0] for version in (text, other)]
    assert not torch.equal(outputs[0][:, -1], outputs[1][:, -1])
    _, state = backbone(text, None)
    torch.testing.assert_close(backbone(text, state)[0], outputs[0])


def test_transformer_attends_by_distance_only():
    backbone = Transformer(hidden_size=16, layers=1, heads=2, memory=64)
    text = torch.randn(1, 6, 16)
    _, state = backbone(text[:, :4], None)
    carried = backbone(text[:, 4:], state)[0]
    whole = backbone(text, None)[0][:, 4:]
    torch.testing.assert_close(carried, whole, rtol=1e-5, atol=1e-6)


def test_lstm_starts_as_configured():
    lstm = LSTM(hidden_size=8, layers=2, init_range=0.05, forget_bias=3.0).lstm
    for layer in range(2):
        assert lstm.get_parameter(f"weight_hh_l{layer}").abs().max() <= 0.05
        assert lstm.get_parameter(f"weight_hh_l{layer}").abs().max() > 0.03
        bias = lstm.get_parameter(f"bias_ih_l{layer}") + lstm.get_parameter(f"bias_hh_l{layer}")
        assert (bias[8:16] > 2.9).all()
        assert (bias[:8].abs() <= 0.1).all()
        assert (bias[16:].abs() <= 0.1).all()


def test_language_model_flattens_stream_by_stream_and_cuts_history():
    model = LanguageModel(LSTM(hidden_size=16), FullSoftmax(16, COUNTS))
    ids = torch.randint(30, (2, 5))
    hidden, state = model.hidden(ids)
    alone, _ = model.hidden(ids[1:])
    torch.testing.assert_close(hidden[5:], alone)
    assert not any(part.requires_grad for part in state)


def test_tied_model_has_one_table_and_both_uses_train_it():
    torch.manual_seed(0)
    tied = LanguageModel(LSTM(hidden_size=16), FullSoftmax(16, COUNTS), tie=True)
    assert sum(p.numel() for p in tied.parameters() if p.shape == (30, 16)) == 30 * 16
    ids, target = torch.tensor([[3, 4]]), torch.tensor([7, 8])
    hidden, _ = tied.hidden(ids)
    hidden.sum().backward(retain_graph=True)
    looked_up = tied.output.weight.grad.clone()
    assert (looked_up[[3, 4]] != 0).any(1).all()
    assert (looked_up[[0, 7, 8]] == 0).all()
    tied.output.loss(hidden, target, torch.ones(2)).backward()
    assert (tied.output.weight.grad[[0, 7, 8]] != 0).any(1).all()


class Unembeddable(OutputLayer):
    def log_prob(self, hidden):
        return torch.log_softmax(hidden.new_zeros(len(hidden), self.vocab_size), 1)


def test_bad_models_are_refused():
    with pytest.raises(ValueError, match=r"Unembeddable has no row per word to tie to; set model\.tie=false"):
        LanguageModel(LSTM(hidden_size=16), Unembeddable(16, COUNTS), tie=True)
    with pytest.raises(ValueError, match="embedding_size=8, hidden_size=16"):
        LanguageModel(LSTM(hidden_size=16, embedding_size=8), FullSoftmax(16, COUNTS), tie=True)
    with pytest.raises(ValueError, match="reads 8 values, the backbone gives 16"):
        LanguageModel(LSTM(hidden_size=16), FullSoftmax(8, COUNTS))
    with pytest.raises(ValueError, match=r"dropout=1\.5"):
        LSTM(hidden_size=16, dropout=1.5)
    with pytest.raises(ValueError, match=r"dropout=0\.5 with layers=1: .* set model\.dropout, or layers=2"):
        LSTM(hidden_size=16, dropout=0.5)
    with pytest.raises(ValueError, match=r"hidden_size=18 must be a multiple of 2 \* heads = 8"):
        Transformer(hidden_size=18, heads=4)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            torch.tensor([1, 2, 3]),
            r"counts\[1\]=2 > counts\[0\]=1; number the words by .*Permuted\.from_counts",
        ),
        (torch.tensor([3, 1, -1]), "not negative; the smallest is -1"),
        (torch.tensor([0, 0]), "all zero"),
        (torch.tensor([5]), "counts has 1 words"),
        (torch.tensor([[5, 3]]), r"shape \(1, 2\): it must be of one dimension"),
        (numpy.array([5, 3]), r"counts is a ndarray: .*give torch\.as_tensor\(counts\)"),
        ([5, 3], "counts is a list"),
        (torch.ones(3, device="meta"), r"counts is on meta, and layers are built on cpu; give counts\.cpu\(\)"),
        (torch.tensor([2.0, float("nan")]), "finite"),
        (torch.tensor([0.6, 0.4]), r"counts are at most 0\.6.*: give how often words occur, not their shares"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        check_counts(counts)
