"""Output layers on Hugging Face's causal language models; the only module that imports transformers.

A tokeniser's ids are no frequency ranks, which is what ``Permuted`` is for::

    model = AutoModelForCausalLM.from_pretrained("gpt2")
    counts = token_counts(dataset["input_ids"], model.config.vocab_size)
    factory = functools.partial(SampledSoftmax, model.config.hidden_size, sparse=False)
    layer = Permuted.from_counts(factory, counts).to(model.device)
    model = replace_head(model, layer, from_head=True)
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lvsoftmax.layer import DenseOutputLayer, OutputLayer
from lvsoftmax.permuted import Permuted

try:
    from transformers.modeling_outputs import CausalLMOutputWithPast  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("lvsoftmax.hf needs transformers: pip install 'lvsoftmax[transformers]'") from error

IGNORED = -100
"""The label of a token that is no target."""


class WithOutputLayer(nn.Module):
    """What :func:`replace_head` adds to the class of a model: a ``forward`` through ``output``.

    With ``labels`` the loss is the layer's training objective, shifted: the hidden vector of position ``t`` predicts
    label ``t + 1``. Labels of -100 are left out, and with n others::

        loss = 1/n sum over them of output.forward(hidden_t, label_(t+1), previous=id_t)

    With ``exact=True`` it is the exact ``output.nll`` in the place of the objective, and ``exp(loss)`` the perplexity.
    Neither depends on ``self.training``: what ``Trainer.evaluate`` reports of a surrogate is no likelihood, and what
    this does is one::

        class ExactTrainer(Trainer):
            def prediction_step(self, model, inputs, *args, **options):
                return super().prediction_step(model, inputs | {"exact": True}, *args, **options)

    Without ``labels`` the logits are the layer's exact log-probabilities, which ``generate`` works with. With
    ``labels`` there are none.

    Cost: the layer's, one copy of the hidden vectors and, on CUDA, one synchronisation for the number of targets.
    """

    base_model: Any
    output: OutputLayer
    tied: bool

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Float[Tensor, "batch time embedding"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        exact: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Read token ids; return their loss, or the distributions of what follows each.

        Args:
            input_ids: token ids.
            attention_mask: of the model, as are all arguments not named here.
            position_ids: of the model.
            inputs_embeds: in the place of ``input_ids``. Noise that looks at the word before each target then fails.
            labels: the token at each position, usually ``input_ids``; -100 where it is no target.
            logits_to_keep: how many of the last positions have logits, or which; 0 for all.
            num_items_in_batch: n, where it is not the number of targets here but, say, in all of a step's batches.
            exact: whether the loss is the exact negative log-likelihood, whatever the layer trains on.
            kwargs: of the model.

        Returns:
            ``loss`` or ``logits [batch, kept, vocab]``, and what else the model returns: cache, hidden states.
        """
        previous = input_ids
        if self.tied and input_ids is not None:
            input_ids, inputs_embeds = None, self.output.embed(input_ids)
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        outputs = self.base_model(**inputs, attention_mask=attention_mask, **kwargs | {"return_dict": True})
        hidden = outputs.last_hidden_state
        if labels is None:
            kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
            log_prob = self.output.log_prob(kept.flatten(0, 1))
            result = CausalLMOutputWithPast(logits=log_prob.unflatten(0, kept.shape[:2]))
        else:
            counted = labels[:, 1:] != IGNORED
            hidden, target = hidden[:, :-1][counted], labels[:, 1:][counted]
            n = torch.as_tensor(len(target) if num_items_in_batch is None else num_items_in_batch, device=hidden.device)
            weight = hidden.new_ones(len(target), dtype=torch.promote_types(hidden.dtype, torch.float32)) / n
            if exact:
                loss = (weight * self.output.nll(hidden, target)).sum()
            else:
                previous = None if previous is None else previous[:, :-1][counted]
                loss = self.output.loss(hidden, target, weight, previous)
            result = CausalLMOutputWithPast(loss=loss)
        for name, value in outputs.items():
            if name != "last_hidden_state":
                result[name] = value
        return result

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the head that shared a parameter is gone."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Raise ``ValueError``: a layer's bands, trees and noise are those of its counts."""
        raise ValueError("an output layer cannot be resized; resize the model first, then replace its head")


def replace_head(model: Any, output: OutputLayer, *, tie: bool = False, from_head: bool = False) -> Any:
    """Put an output layer in the place of a causal language model's head.

    The model is changed and returned: without its head, the layer as ``model.output``, and the ``forward`` of
    :class:`WithOutputLayer`. The rest stays as it is, and what asks for the model's class, such as ``generate`` and
    ``Trainer``, goes on working. What some models do to the hidden vectors before the head, or to its logits, is left
    out with it; a cap is an option of ``FullSoftmax``.

    The layer's ``observe`` and ``refresh`` remain to the training loop. For ``Trainer``, whose optimisers and clipping
    take no row-sparse gradients, build the layer with ``sparse=False``.

    To load a ``state_dict``, replace the head of a model of the same configuration first.

    Args:
        model: a model with a ``base_model`` that returns ``last_hidden_state``, not yet spread over devices.
        output: the layer, over token ids. Where these are no frequency ranks, it is
            :class:`~lvsoftmax.permuted.Permuted`.
        tie: look tokens up in the layer's table, in the place of the one that the head shared with the input. False
            cuts the tie: the input keeps that table.
        from_head: start the layer's table from the head's, and its bias from the head's or zero. A plain softmax is
            then what the model was.

    Raises:
        ValueError: the model has no head that can be replaced, the layer has another vocabulary or width, or the two
            cannot be tied, or one started from the other.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None or model.base_model is model or model.config.is_encoder_decoder:
        raise ValueError(f"{name} has no head on a decoder to replace; load the model with AutoModelForCausalLM")
    if "forward" in vars(model):
        raise ValueError(f"{name} is spread over devices; load it without device_map and replace the head first")
    vocab_size, hidden_size = head.weight.shape
    if output.vocab_size != vocab_size:
        raise ValueError(
            f"the output layer has {output.vocab_size} words, {name} has {vocab_size}; build the layer with a count "
            "for every token id, as lvsoftmax.hf.token_counts gives them"
        )
    if output.hidden_size != hidden_size:
        raise ValueError(
            f"the output layer reads {output.hidden_size} values, {name} gives {hidden_size}; build the layer with "
            f"hidden_size={hidden_size}"
        )
    layer, order = (output.layer, output.order) if isinstance(output, Permuted) else (output, slice(None))
    if tie:
        table = model.get_input_embeddings()
        if type(table) is not nn.Embedding or table.weight is not head.weight:
            raise ValueError(f"{name} does not embed its input by the head's table; set tie=False")
        if type(layer).embed is OutputLayer.embed:
            raise ValueError(f"{type(layer).__name__} has no row per word to tie to; set tie=False")
    if from_head:
        if not isinstance(layer, DenseOutputLayer):
            raise ValueError(f"{type(layer).__name__} has no row per word to start; set from_head=False")
        _start(layer, order, head.weight, getattr(head, "bias", None))
    if tie:
        model.set_input_embeddings(None)
    model.set_output_embeddings(None)
    model.loss_type = "ForCausalLM"  # by which Trainer knows that labels are shifted, and counts them so
    model.__class__ = _with_output_layer(type(model))
    model.output, model.tied = output, tie
    return model


def token_counts(rows: Iterable[Int[Tensor, "tokens"] | Iterable[int]], vocab_size: int) -> Int[Tensor, "vocab"]:
    """Count the token ids of a data set: what ``Permuted.from_counts`` ranks.

    An id that never occurs has count 0, which every layer takes: it starts as probable, and is drawn as often, as if it
    had been seen once.

    Args:
        rows: the token ids of each text, without padding.
        vocab_size: V, the model's: it may be larger than the tokeniser's.

    Raises:
        ValueError: an id is outside ``[0, vocab_size)``.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for row in rows:
        ids = torch.as_tensor(row, dtype=torch.int64, device="cpu")
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"token ids from {ids.min()} to {ids.max()}: give a vocab_size above them, and no padding")
        counts.index_add_(0, ids, torch.ones_like(ids))
    return counts


@torch.no_grad()
def _start(layer: DenseOutputLayer, order: Tensor | slice, weight: Tensor, bias: Tensor | None) -> None:
    """Start the row of each id's rank from the id's row of a head."""
    if layer.bias is None and bias is not None:
        raise ValueError(f"the head has a bias, {type(layer).__name__} has none; build it with bias=True")
    layer.weight[order] = weight.to(layer.weight)
    if layer.bias is not None:
        layer.bias[order] = layer.bias.new_zeros(layer.vocab_size) if bias is None else bias.to(layer.bias)
    layer.refresh()


@functools.cache
def _with_output_layer(model_class: type) -> type:
    """Return a subclass of the model's with our ``forward``, in the way of PyTorch's ``fully_shard``."""
    return type(f"{model_class.__name__}WithOutputLayer", (WithOutputLayer, model_class), {})
