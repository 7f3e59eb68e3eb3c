"""The sparsemax: the distribution nearest to the scores, in which most words have probability zero."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer, unigram_log_prob
from lvsoftmax.ops.linear_cross_entropy.entmax import linear_entmax, linear_entmax_loss
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.sparse import full_support_logits, log_entmax

ALPHA = 2.0


class SparsemaxOutput(DenseOutputLayer):
    """Sparsemax: ``p(. | h) = argmin over distributions p of |p - z|^2``, so that ``p(w | h) = [z_w - tau]_+``.

    With scores ``z = W h + b`` and tau such that the sum is 1. Words whose score is not above tau, most of a large
    vocabulary, have probability 0. A target can be among them: the exact perplexity is infinite then, and reported so,
    beside the share of targets that have a probability.

    Likelihood can be no objective. Training minimises the sparsemax loss, never negative, zero once the target is ahead
    of all others by 1, and at its best, over many texts, where p is the true distribution; its gradient by the scores
    is ``p - y``, as the softmax's is::

        objective = sum_{w: p_w > 0} (z_w^2 - tau^2) / 2 + 1/2 - z_target

    The gradient is zero outside of the support and the target: where supports are small beside the vocabulary, a step
    costs hardly more than the logits. The bias starts at the words' relative frequencies (each count raised by one), of
    which the sparsemax is themselves.

    Cost per token: ``2 D V + 4 D S`` FLOPs for a training step with S words in the support, but no more than ``6 D V``;
    ``2 D V`` for evaluation; memory of one block of logits.

    Reference: Martins & Astudillo 2016, From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label
    Classification, equations 2 and 3, and section 3 for the loss. The bias is not from there.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        bias: whether words have a bias.
        sparse: row-sparse gradients of the table and the bias.
    """

    full_support = False

    def __init__(self, hidden_size: int, counts: Tensor, *, bias: bool = True, sparse: bool = False) -> None:
        super().__init__(hidden_size, counts, bias=bias, sparse=sparse)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(full_support_logits(unigram_log_prob(counts).exp(), ALPHA))

    def normalise(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Return the logarithm of the sparsemax, minus infinity outside of the support."""
        return log_entmax(logits, ALPHA, dim=1)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the sparsemax loss."""
        return linear_entmax(*self.operands(hidden), target, ALPHA, sparse=self.sparse)

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * forward)``, gradients taken on the way."""
        return linear_entmax_loss(*self.operands(hidden), target, weight, ALPHA, sparse=self.sparse)
