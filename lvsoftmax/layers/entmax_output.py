"""The alpha-entmax: from the softmax (alpha near 1) to the sparsemax (2), with words of probability zero in between."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lvsoftmax.layer import DenseOutputLayer, unigram_log_prob
from lvsoftmax.ops.linear_cross_entropy.entmax import linear_entmax, linear_entmax_loss
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.sparse import check_alpha, full_support_logits, log_entmax


class EntmaxOutput(DenseOutputLayer):
    """Alpha-entmax: ``p(w | h) = [(alpha - 1) z_w - tau]_+^(1 / (alpha - 1))``, tau such that the sum is 1.

    With scores ``z = W h + b``. The larger alpha, the fewer words have a probability above 0: ``alpha -> 1`` is the
    softmax, ``alpha = 2`` the ``SparsemaxOutput``. A target can be among those that have none: the exact perplexity is
    infinite then, and reported so, beside the share of targets that have a probability.

    Likelihood can be no objective. Training minimises the Fenchel-Young loss of Tsallis' entropy H, never negative,
    zero once the target is ahead of all others by ``1 / (alpha - 1)``, and at its best, over many texts, where p is the
    true distribution; its gradient by the scores is ``p - y``, as the softmax's is::

        objective = p . z + H(p) - z_target        H(p) = sum_w (p_w - p_w^alpha) / (alpha (alpha - 1))

    The gradient is zero outside of the support and the target: where supports are small beside the vocabulary, a step
    costs hardly more than the logits; a small alpha keeps them wide. The bias starts at ``q^(alpha - 1) / (alpha - 1)``
    with the words' relative frequencies q (each count raised by one), of which the entmax is q.

    Cost per token: ``2 D V + 4 D S`` FLOPs for a training step with S words in the support, but no more than ``6 D V``;
    ``2 D V`` for evaluation; memory of one block of logits.

    References: Peters, Niculae & Martins 2019, Sparse Sequence-to-Sequence Models, section 3; Blondel, Martins &
    Niculae 2020, Learning with Fenchel-Young Losses, section 3; Martins, Marinho & Martins 2020, Sparse Text Generation
    (language models, and how to compare them). The bias is not from there.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        alpha: above 1.
        bias: whether words have a bias.
        sparse: row-sparse gradients of the table and the bias.

    Raises:
        ValueError: ``alpha`` is not in (1, inf).
    """

    full_support = False

    def __init__(
        self, hidden_size: int, counts: Tensor, *, alpha: float = 1.5, bias: bool = True, sparse: bool = False
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, sparse=sparse)
        check_alpha(alpha)
        self.alpha = float(alpha)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(full_support_logits(unigram_log_prob(counts).exp(), self.alpha))

    def normalise(self, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Return the logarithm of the entmax, minus infinity outside of the support."""
        return log_entmax(logits, self.alpha, dim=1)

    def forward(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, "tokens"]:
        """Return the Fenchel-Young loss."""
        return linear_entmax(*self.operands(hidden), target, self.alpha, sparse=self.sparse)

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * forward)``, gradients taken on the way."""
        return linear_entmax_loss(*self.operands(hidden), target, weight, self.alpha, sparse=self.sparse)
