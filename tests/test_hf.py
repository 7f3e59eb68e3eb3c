"""Causal language models of Hugging Face under output layers: against formulas of their own, nothing downloaded."""

import copy
import functools
import os

import numpy as np
import pytest
import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("transformers", reason="lvsoftmax.hf needs transformers: pip install 'lvsoftmax[transformers]'")

import transformers  # noqa: E402

from lvsoftmax import optim  # noqa: E402
from lvsoftmax.hf import replace_head, token_counts  # noqa: E402
from lvsoftmax.layers.adaptive_softmax import AdaptiveSoftmax  # noqa: E402
from lvsoftmax.layers.full_softmax import FullSoftmax  # noqa: E402
from lvsoftmax.layers.hierarchical_softmax import HierarchicalSoftmax  # noqa: E402
from lvsoftmax.layers.sampled_softmax import SampledSoftmax  # noqa: E402
from lvsoftmax.layers.sparsemax_output import SparsemaxOutput  # noqa: E402
from lvsoftmax.permuted import Permuted  # noqa: E402

VOCAB, WIDTH, PAD = 40, 16, 2
SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": PAD}
COUNTS = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)) // 4 * 5  # some never seen, in any order


def gpt2(**options):
    config = transformers.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, **SPECIAL, **options)
    return transformers.GPT2LMHeadModel(config).eval()


def llama(**options):
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **SPECIAL, **options)).eval()


MODELS = {"gpt2": gpt2, "llama": llama}
LAYERS = {
    "full_softmax": FullSoftmax,
    "adaptive_softmax": AdaptiveSoftmax,
    "hierarchical_softmax": HierarchicalSoftmax,
    "sampled_softmax": functools.partial(SampledSoftmax, samples=12),
    "sparsemax_output": SparsemaxOutput,
}
for_every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
for_every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


def permuted(layer=FullSoftmax, **options):
    """A layer over token ids, off its start."""
    output = Permuted.from_counts(functools.partial(layer, WIDTH, **options), COUNTS)
    for parameter in output.parameters():
        nn.init.normal_(parameter, std=0.5)
    return output


@pytest.fixture
def batch():
    """Texts of unequal length, the first padded on the left; labels without padding and without half of the second."""
    ids = torch.randint(3, VOCAB, (3, 9))
    ids[0, :4] = PAD
    mask = (ids != PAD).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_hand(log_prob, labels):
    """The nats of every target, read one by one."""
    nats = []
    for text, label in zip(log_prob.detach().double().numpy(), labels.numpy(), strict=True):
        nats += [-text[place - 1, label[place]] for place in range(1, len(label)) if label[place] != -100]
    return np.array(nats)


@for_every_model
@for_every_layer
def test_the_exact_loss_is_that_of_the_distribution(make, layer, batch):
    model = replace_head(make(), permuted(layer))
    log_prob = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert log_prob.shape == (3, 9, VOCAB)
    torch.testing.assert_close(log_prob.logsumexp(2), torch.zeros(3, 9), rtol=0, atol=1e-5)
    nats = by_hand(log_prob, batch["labels"])
    assert len(nats) == 5 + 4 + 8
    assert model(**batch, exact=True).loss.item() == pytest.approx(nats.mean(), rel=1e-5)
    assert model(**batch, exact=True, num_items_in_batch=60).loss.item() == pytest.approx(nats.sum() / 60, rel=1e-5)


@for_every_model
@for_every_layer
def test_the_loss_is_the_layers_objective(make, layer, batch):
    model = replace_head(make(), permuted(layer))
    twin = copy.deepcopy(model.output)
    body = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    rows = [(text, place) for text in range(3) for place in range(1, 9) if batch["labels"][text, place] != -100]
    hidden = torch.stack([body.last_hidden_state[text, place - 1] for text, place in rows])
    target = torch.stack([batch["input_ids"][text, place] for text, place in rows])
    expected = twin(hidden, target).mean()
    for training in (False, True):
        twin_model = copy.deepcopy(model)
        twin_model.base_model.eval()
        twin_model.training = twin_model.output.training = training
        outputs = twin_model(**batch)
        assert outputs.logits is None
        torch.testing.assert_close(outputs.loss, expected, rtol=1e-5, atol=1e-6)


def test_an_exact_layer_trains_on_what_it_is_evaluated_by(batch):
    model = replace_head(gpt2(), permuted())
    torch.testing.assert_close(model(**batch).loss, model(**batch, exact=True).loss)


def test_the_word_before_each_target_is_the_one_that_was_read(batch):
    bigrams = torch.tensor([[PAD, 5, 1]])
    output = FullSoftmax(WIDTH, COUNTS.sort(descending=True).values)
    seen = []
    output.loss = lambda hidden, target, weight, previous: seen.append((target, previous)) or weight.sum()
    replace_head(llama(), output)(**batch)
    (target, previous), *_ = seen
    ids, labels = batch["input_ids"], batch["labels"]
    pairs = [(ids[t, p], ids[t, p - 1]) for t in range(3) for p in range(1, 9) if labels[t, p] != -100]
    assert [*zip(target.tolist(), previous.tolist(), strict=True)] == pairs
    model = replace_head(llama(), permuted(SampledSoftmax, noise="bigram", bigrams=bigrams))
    model(**batch).loss.backward()
    with pytest.raises(ValueError, match="previous"):
        model(inputs_embeds=torch.randn(1, 4, WIDTH), labels=torch.randint(VOCAB, (1, 4)))


def test_gradients_add_up_over_the_batches_of_a_step(batch):
    whole = replace_head(llama(), permuted())
    parts = copy.deepcopy(whole)
    whole(**batch).loss.backward()
    items = (batch["labels"][:, 1:] != -100).sum()
    for text in range(3):
        parts(
            **{name: value[text : text + 1] for name, value in batch.items()}, num_items_in_batch=items
        ).loss.backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_padding_is_nothing(batch):
    model = replace_head(llama(), permuted())
    alone = model(batch["input_ids"][:1, 4:]).logits
    together = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:1, 4:]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_batch_without_targets_has_no_loss_and_no_gradient(batch):
    model = replace_head(gpt2(), permuted())
    loss = model(batch["input_ids"], labels=torch.full_like(batch["labels"], -100)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_training_makes_no_logits(batch, monkeypatch):
    def refuse(*_):
        raise AssertionError("all words were scored")

    monkeypatch.setattr(SampledSoftmax, "log_prob", refuse)
    monkeypatch.setattr(SampledSoftmax, "logits", refuse)
    replace_head(gpt2(), permuted(LAYERS["sampled_softmax"]))(**batch).loss.backward()


def test_logits_of_the_positions_asked_for(batch):
    model = replace_head(llama(), permuted())
    ids = batch["input_ids"]
    every = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, every[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, every[:, [0, 3]])


@for_every_model
@pytest.mark.parametrize("tie", [False, True])
def test_started_from_the_head_a_full_softmax_is_the_model(make, tie, batch):
    model = make(tie_word_embeddings=tie or make is gpt2)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    before = model(**inputs).logits.log_softmax(2)
    beams = model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False)
    model = replace_head(model, permuted(), tie=tie, from_head=True)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, num_beams=3, do_sample=False), beams)


def test_started_from_a_head_with_a_bias():
    model = transformers.PhiForCausalLM(
        transformers.PhiConfig(
            hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, **SPECIAL
        )
    ).eval()
    nn.init.normal_(model.get_output_embeddings().bias)
    ids = torch.randint(VOCAB, (1, 4))
    before = model(ids).logits.log_softmax(2)
    with pytest.raises(ValueError, match="the head has a bias, FullSoftmax has none; build it with bias=True"):
        replace_head(model, permuted(bias=False), from_head=True)
    torch.testing.assert_close(replace_head(model, permuted(), from_head=True)(ids).logits, before)


@for_every_model
def test_generation_takes_the_most_probable_word(make, batch):
    model = replace_head(make(), permuted())
    ids = batch["input_ids"][1:]
    length = ids.shape[1]
    written = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for _ in range(6):
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, -1]
        ids = torch.cat([ids, model.output.log_prob(hidden).argmax(1, keepdim=True)], 1)
    assert torch.equal(written, ids) and len(set(ids[:, length:].flatten().tolist())) > 1
    uncached = model.generate(
        batch["input_ids"][1:], max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False
    )
    assert torch.equal(uncached, ids)


@for_every_model
def test_generation_reads_over_padding(make, batch):
    model = replace_head(make(), permuted())
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    assert torch.equal(together[:1, 4:], model.generate(batch["input_ids"][:1, 4:], **options))


def test_generation_draws_from_the_distribution():
    model = replace_head(gpt2(), permuted(SparsemaxOutput))
    ids = torch.randint(3, VOCAB, (1, 3))
    probability = model(ids).logits[0, -1].exp()
    drawn = model.generate(
        ids, max_new_tokens=1, do_sample=True, num_return_sequences=2000, top_k=0, eos_token_id=None
    )[:, -1]
    share = drawn.bincount(minlength=VOCAB) / 2000
    assert (probability == 0).any() and not share[probability == 0].any()
    assert ((share - probability).abs() <= 4 * (probability / 2000).sqrt() + 1e-6).all()


def test_the_head_is_gone_and_its_tie_is_cut():
    model = gpt2()
    table = model.get_input_embeddings().weight
    before = sum(p.numel() for p in model.parameters())
    model = replace_head(model, permuted(bias=False), from_head=True)
    assert model.get_output_embeddings() is None and model.get_input_embeddings().weight is table
    assert sum(p.numel() for p in model.parameters()) == before + VOCAB * WIDTH
    model.tie_weights()
    assert not torch.equal(model.output.layer.weight, table)  # by rank, and memory of its own
    ids = torch.tensor([[3, 4, 5]])
    model(ids, labels=ids).loss.backward()
    assert table.grad[[3, 4]].any(1).all() and not table.grad[5:].any()
    untied = llama()
    before = sum(p.numel() for p in untied.parameters())
    assert sum(p.numel() for p in replace_head(untied, permuted(bias=False)).parameters()) == before


def test_a_tied_model_has_one_table_that_both_uses_train():
    model = gpt2()
    before = sum(p.numel() for p in model.parameters())
    model = replace_head(model, permuted(LAYERS["sampled_softmax"], bias=False), tie=True)
    assert sum(p.numel() for p in model.parameters()) == before
    ids = torch.tensor([[3, 4, 5]])
    model(ids, labels=ids).loss.backward()
    table = model.output.layer.weight
    ranks = model.output.order[ids[0]]
    assert table.grad.is_sparse and table.grad.to_dense()[ranks].any(1).all()
    read = model.base_model(inputs_embeds=table[model.output.order[ids]]).last_hidden_state
    torch.testing.assert_close(model(ids).logits[0], model.output.log_prob(read[0]))


@for_every_layer
@pytest.mark.parametrize("tie", [False, True])
def test_state_dicts_give_the_same_bits(layer, tie, tmp_path):
    if tie and layer is HierarchicalSoftmax:
        pytest.skip("the layer has no row per word to tie to")
    model = replace_head(gpt2(), permuted(layer), tie=tie)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.manual_seed(7)
    other = replace_head(gpt2(), permuted(layer), tie=tie)
    ids = torch.randint(VOCAB, (2, 5))
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_sampled_softmax_learns_with_row_sparse_gradients():
    model = replace_head(gpt2(), Permuted.from_counts(functools.partial(SampledSoftmax, WIDTH, samples=8), COUNTS))
    model.train()
    optimizer = optim.Adagrad(model.parameters(), lr=0.1)
    ids = torch.arange(3, 19)[None].expand(2, -1)
    losses = []
    for _ in range(25):
        losses.append(model(ids, labels=ids, exact=True).loss.item())
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        assert model.output.layer.weight.grad.is_sparse
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_trainer_divides_by_all_targets_of_a_step(tmp_path, batch):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate: pip install accelerate")
    rows = [{name: value[row] for name, value in batch.items()} for row in range(3)]

    class ExactTrainer(transformers.Trainer):
        def prediction_step(self, model, inputs, *args, **options):
            return super().prediction_step(model, inputs | {"exact": True}, *args, **options)

    def trainer(kind, model):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            max_steps=2,
            max_grad_norm=1e9,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        )
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1)
        return kind(model, arguments, train_dataset=rows, eval_dataset=rows, optimizers=(optimizer, schedule))

    for make in MODELS.values():
        no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if make is gpt2 else {}
        model = replace_head(make(**no_dropout), permuted(SampledSoftmax, samples=VOCAB, sparse=False))
        twin = copy.deepcopy(model)
        optimizer = optim.SGD(twin.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            twin(**batch).loss.backward()
            optimizer.step()
        trainer(transformers.Trainer, model).train()
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    model = replace_head(llama(), permuted(LAYERS["sampled_softmax"]))
    measured = trainer(ExactTrainer, model).evaluate()["eval_loss"]
    assert measured == pytest.approx(model(**batch, exact=True).loss.item(), rel=1e-4)


def test_token_counts():
    rows = [torch.tensor([3, 1, 3]), [], [0, 3]]
    assert token_counts(rows, 6).tolist() == [1, 1, 0, 3, 0, 0]
    for row in ([6], [-100, 2]):
        with pytest.raises(ValueError, match="give a vocab_size above them, and no padding"):
            token_counts([row], 6)


def test_what_does_not_fit_is_refused():
    ranked = COUNTS.sort(descending=True).values
    with pytest.raises(
        ValueError, match=r"has 39 words, GPT2LMHeadModel has 40; build the layer with a count for every"
    ):
        replace_head(gpt2(), FullSoftmax(WIDTH, ranked[:39]))
    with pytest.raises(
        ValueError, match="reads 8 values, LlamaForCausalLM gives 16; build the layer with hidden_size=16"
    ):
        replace_head(llama(), FullSoftmax(8, ranked))
    with pytest.raises(
        ValueError, match="LlamaForCausalLM does not embed its input by the head's table; set tie=False"
    ):
        replace_head(llama(), FullSoftmax(WIDTH, ranked), tie=True)
    with pytest.raises(ValueError, match="HierarchicalSoftmax has no row per word to tie to; set tie=False"):
        replace_head(gpt2(), permuted(HierarchicalSoftmax), tie=True)
    with pytest.raises(ValueError, match="AdaptiveSoftmax has no row per word to start; set from_head=False"):
        replace_head(gpt2(), permuted(AdaptiveSoftmax), from_head=True)
    model = replace_head(gpt2(), permuted())
    with pytest.raises(ValueError, match="cannot be resized; resize the model first"):
        model.resize_token_embeddings(50)
    for headless in (model, gpt2().base_model):
        with pytest.raises(ValueError, match="has no head on a decoder to replace; load the model with AutoModelFor"):
            replace_head(headless, permuted())
    dispatched = gpt2()
    dispatched.forward = dispatched.forward
    with pytest.raises(ValueError, match="is spread over devices; load it without device_map"):
        replace_head(dispatched, permuted())
