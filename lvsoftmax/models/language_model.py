"""A backbone and an output layer joined into a word-level language model."""

from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lvsoftmax.layer import OutputLayer
from lvsoftmax.ops.buffers import empty_table


@runtime_checkable
class Backbone(Protocol):
    """A module ``(embedded [batch, time, embedding], state) -> (hidden [batch, time, hidden], state)``."""

    embedding_size: int
    hidden_size: int

    def __call__(self, embedded: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read a stretch of text; return the outputs and the state after it."""
        ...


class LanguageModel(nn.Module):
    """``p(word | words before)``: embed, read with the backbone, predict with the output layer.

    Tokens are flattened row by row: token ``b * time + t`` of the hidden vectors is position ``t`` of stream ``b``.

    Args:
        backbone: ``forward(embedded, state) -> (hidden, state)`` with ``embedding_size`` and ``hidden_size``.
        output: the output layer, over vectors of ``backbone.hidden_size``.
        tie: look input words up in the output layer's table instead of one of the model's own.
        dropout: probability with which an entry of the embedded words, and of the hidden vectors, is zeroed.
        embedding_range: the embedding starts uniform in ``+-embedding_range``.
        sparse_embedding: row-sparse gradients of the model's own embedding; a step touches few of its rows.

    Raises:
        ValueError: widths do not fit, or ``tie`` is asked of a layer that cannot embed.
    """

    def __init__(
        self,
        backbone: Backbone,
        output: OutputLayer,
        *,
        tie: bool = False,
        dropout: float = 0.0,
        embedding_range: float = 0.1,
        sparse_embedding: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout={dropout}: must be in [0, 1)")
        if output.hidden_size != backbone.hidden_size:
            raise ValueError(
                f"the output layer reads {output.hidden_size} values, the backbone gives {backbone.hidden_size}"
            )
        self.backbone = backbone
        self.output = output
        self.dropout = nn.Dropout(dropout)
        self.sparse_embedding = sparse_embedding
        if tie:
            if backbone.embedding_size != output.hidden_size:
                raise ValueError(
                    f"model.tie=true needs embeddings as wide as the hidden vectors: embedding_size="
                    f"{backbone.embedding_size}, hidden_size={output.hidden_size}"
                )
            if type(output).embed is OutputLayer.embed:
                raise ValueError(f"{type(output).__name__} has no row per word to tie to; set model.tie=false")
            self.embedding = None
        else:
            self.embedding = nn.Parameter(empty_table(output.vocab_size, backbone.embedding_size))
            nn.init.uniform_(self.embedding, -embedding_range, embedding_range)

    def embed(self, ids: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time embedding"]:
        """Look words up in the embedding, or in the output layer's table when tied."""
        if self.embedding is None:
            return self.output.embed(ids)
        return F.embedding(ids, self.embedding, sparse=self.sparse_embedding)

    def hidden(self, ids: Int[Tensor, "batch time"], state: Any = None) -> tuple[Float[Tensor, "tokens hidden"], Any]:
        """Read a stretch of text from ``state`` on (None: from nothing).

        Returns:
            The hidden vector that predicts the word after each token, and the state after the stretch, detached.
        """
        hidden, state = self.backbone(self.dropout(self.embed(ids)), state)
        return self.dropout(hidden).flatten(0, 1), detached(state)


def detached(state: Any) -> Any:
    """Cut the history of a backbone's state (nested tuples of tensors): truncated backpropagation through time."""
    return tuple(map(detached, state)) if isinstance(state, tuple) else state.detach()
