"""The adaptive softmax: frequent words beside one entry for each band of rarer ones, which have narrower vectors."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lvsoftmax.layer import OutputLayer, unigram_log_prob
from lvsoftmax.ops import partition
from lvsoftmax.ops.buffers import empty_table
from lvsoftmax.ops.linear_cross_entropy import BACKENDS, linear_cross_entropy, linear_cross_entropy_loss
from lvsoftmax.ops.linear_cross_entropy.cost_model import cost_model
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.softmax import log_softmax, logsumexp

TOKENS = 1024  # of the training step that cutoffs="auto" is to make fast
LEAST_WIDTH = 1 / 16  # of the hidden vector: what a tail of cutoffs="auto" reads at least
MOST_TAILS = 8
STEPS = 8  # places for a cutoff within each factor of ten in rank


class AdaptiveSoftmax(OutputLayer):
    """Bands of words by frequency, the rarer the cheaper: ``p(w | h) = p(band | h) p(w | band, h)``.

    The vocabulary, ranked by frequency, is cut into a head and K tails. The head is a softmax over its words and one
    entry for each tail, ``softmax(W_0 h + b_0)``. A tail is reached through its entry and has a softmax of its own,
    over vectors of width ``d_k = max(1, floor(D / div_value^k))``::

        p(w | h) = softmax(W_0 h + b_0)[w]                                             for w in the head
        p(w | h) = softmax(W_0 h + b_0)[tail k] softmax(W_k P_k h + b_k)[w]            for w in tail k = 1 ... K

    In training a tail costs something only for the tokens whose targets are in it; where there are none it gets no
    gradient, and DistributedDataParallel must be told to expect that, ``find_unused_parameters=True``.

    Weights start uniform in plus or minus one over the root of the width they read, biases at the log frequencies of
    words and tails (counts raised by one), so that they alone are the smoothed unigram distribution. A tail narrower
    than the log-probabilities need is biased in its limit, KL bound: 0.15. With ``div_value=1`` it is not.

    ``embed`` is the adaptive input embedding with all weights shared: a word of the head is its row of ``W_0``, a word
    of tail k its row of ``W_k``, widened by the transpose of ``P_k``.

    ``cutoffs="auto"`` takes those, and as many, that make a step of 1,024 tokens fastest on this machine, according to
    seconds measured here (:mod:`lvsoftmax.ops.linear_cross_entropy.cost_model`, which says where they are kept) and to
    ``counts``, as in section 4.2 of the paper; on the device of ``counts``. No tail is narrower than D / 16 then, and
    there are no more than 8. What it may trade is accuracy: every further tail is a decision that learns apart. With
    ``div_value=4`` there are at most two, which cost nothing against the default cutoffs; 2 allows four, faster still
    and wider for words of the same rank, and yet worse by 6 % of perplexity after 600,000 tokens; 1 as many as save
    time. ``resolved`` returns the ranks chosen, with which the layer is the same on any machine; a run keeps them.

    Cost per token: ``6 (D V_0 + sum over k of m_k (d_k V_k + D d_k))`` FLOPs for a training step, with ``V_k`` words in
    band k and ``m_k`` of the tokens; with the defaults about 0.04 of a full softmax. All log-probabilities:
    ``2 sum over k of (d_k V_k + D d_k)``. Memory of one block of logits.

    Reference: Grave, Joulin, Cisse, Grangier & Jegou 2017, Efficient softmax approximation for GPUs, section 4 (no
    equation), as ``torch.nn.AdaptiveLogSoftmaxWithLoss`` has it, to which ``to_torch`` leads and from which
    ``from_torch`` comes; in both tails have no biases. Embedding: Baevski & Auli 2019, Adaptive Input Representations
    for Neural Language Modeling, section 3, where the head's vectors are projected, too.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        cutoffs: where the tails begin, rising: as ranks (ints in [1, vocab)) or shares (floats in (0, 1)), or ``auto``.
            Tails that would be empty are left out.
        cutoffs_of: whether shares are those of the words or of their mass in the training text.
        div_value: by how much each tail is narrower than the band before it; at least 1.
        bias: whether words and tails have biases.
        backend: what computes loss and gradients; ``auto`` takes the fastest that can run on the device.

    Raises:
        ValueError: ``cutoffs`` do not rise, are out of range or mix ranks with shares, ``div_value`` is below 1, or
            ``backend`` cannot run here.
    """

    backends = BACKENDS

    projections: nn.ParameterList
    tail_weights: nn.ParameterList
    tail_biases: nn.ParameterList | None

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        cutoffs: Sequence[int | float] | Literal["auto"] = (0.02, 0.2),
        cutoffs_of: Literal["vocabulary", "mass"] = "vocabulary",
        div_value: float = 4.0,
        bias: bool = True,
        backend: Literal["auto", "eager", "cpp", "triton"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, backend=backend)
        if cutoffs_of not in ("vocabulary", "mass"):
            raise ValueError(f"cutoffs_of={cutoffs_of!r}: choose vocabulary or mass")
        if not (math.isfinite(div_value) and div_value >= 1):
            raise ValueError(f"div_value={div_value}: must be a finite number of at least 1")
        self.div_value = div_value
        self.chooses = cutoffs == "auto"
        if isinstance(cutoffs, str):
            if not self.chooses:
                raise ValueError(f"cutoffs={cutoffs!r}: give ranks or shares, rising, or auto")
            cutoffs = _fastest(counts, hidden_size, div_value, self.backend)
        self.bounds = _bounds(counts, cutoffs, cutoffs_of)
        sizes = [last - first for first, last in zip(self.bounds, self.bounds[1:], strict=False)]
        self.tails = len(sizes) - 1
        widths = [_width(hidden_size, div_value, k) for k in range(self.tails)]
        self.head_weight = _table(sizes[0] + self.tails, hidden_size)
        self.projections = nn.ParameterList(_table(width, hidden_size) for width in widths)
        self.tail_weights = nn.ParameterList(_table(size, width) for size, width in zip(sizes[1:], widths, strict=True))
        self.head_bias = self.tail_biases = None
        if bias:
            head, *tails = unigram_log_prob(counts).split(sizes)
            self.head_bias = nn.Parameter(torch.cat([head, *(logsumexp(tail, dim=0)[None] for tail in tails)]))
            self.tail_biases = nn.ParameterList(tail.clone() for tail in tails)

    def log_prob(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Normalise the head and every tail, and add each tail's entry to its words."""
        head = log_softmax(F.linear(hidden, self.head_weight, self.head_bias), dim=1)
        words, entries = head.split([self.bounds[1], self.tails], 1)
        tails = [
            log_softmax(F.linear(F.linear(hidden, projection), weight, bias), dim=1)
            for projection, weight, bias in self._tails()
        ]
        return torch.cat([words, *(entries[:, k : k + 1] + tail for k, tail in enumerate(tails))], 1)

    def nll(self, hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Add what the head costs and, for the tokens with a target in a tail, what the tail costs."""
        cross_entropy = partial(linear_cross_entropy, backend=self.backend)
        nll = cross_entropy(hidden, self.head_weight, self.head_bias, self._head_target(target))
        if torch.compiler.is_compiling():  # shapes must not depend on data
            for k, (projection, weight, bias) in enumerate(self._tails()):
                tail_target = (target - self.bounds[k + 1]).clamp(0, len(weight) - 1)
                tail_nll = cross_entropy(F.linear(hidden, projection), weight, bias, tail_target)
                nll = nll + torch.where(self._band(target) == k + 1, tail_nll, 0.0)
            return nll
        for tokens, tail_hidden, weight, bias, tail_target in self._tokens_by_tail(hidden, target):
            nll = nll.index_add(0, tokens, cross_entropy(tail_hidden, weight, bias, tail_target))
        return nll

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * nll)``, the gradients of every softmax taken on the way."""
        cross_entropy_loss = partial(linear_cross_entropy_loss, backend=self.backend)
        loss = cross_entropy_loss(hidden, self.head_weight, self.head_bias, self._head_target(target), weight)
        for tokens, tail_hidden, table, bias, tail_target in self._tokens_by_tail(hidden, target):
            loss = loss + cross_entropy_loss(tail_hidden, table, bias, tail_target, weight[tokens])
        return loss

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... hidden"]:
        """Look ``ids`` up in the tables of their bands, and widen those of the tails by the transposed projections."""
        order, sizes = self._by_band(ids.flatten())
        head, *tails = ids.flatten()[order].split(sizes)
        rows = [F.embedding(head, self.head_weight)]
        for k, (projection, weight, _) in enumerate(self._tails()):
            rows.append(F.embedding(tails[k] - self.bounds[k + 1], weight) @ projection)
        return torch.cat(rows)[order.argsort()].view(*ids.shape, self.hidden_size)

    def resolved(self) -> dict[str, Any]:
        """Return the cutoffs, as ranks, if they were chosen here."""
        return {"cutoffs": self.bounds[1:-1]} if self.chooses else {}

    @classmethod
    def from_torch(cls, module: nn.AdaptiveLogSoftmaxWithLoss) -> "AdaptiveSoftmax":
        """Return a layer with a copy of PyTorch's weights and no biases in the tails.

        Raises:
            ValueError: a tail of it has no width.
        """
        if any(0 in parameter.shape for parameter in module.parameters()):
            raise ValueError(
                f"div_value={module.div_value}: a tail of PyTorch's module has width 0; choose a smaller one"
            )
        layer = cls(
            module.in_features,
            torch.ones(module.n_classes),
            cutoffs=module.cutoffs[:-1],
            div_value=float(module.div_value),
            bias=module.head_bias,
        ).to(module.head.weight)
        layer.tail_biases = None
        layer._exchange(module, lambda own, other: own.copy_(other))
        return layer

    def to_torch(self) -> nn.AdaptiveLogSoftmaxWithLoss:
        """Return PyTorch's module with a copy of the weights.

        Raises:
            ValueError: there is no tail, or tails have biases, which PyTorch's have not.
        """
        if self.tails == 0:
            raise ValueError(
                "cutoffs leave no tail, and PyTorch's module needs one; give cutoffs inside the vocabulary"
            )
        if any(bias.any() for bias in self.tail_biases or ()):
            raise ValueError("bias=True: the tails have biases and PyTorch's have not; train with bias=false")
        module = nn.AdaptiveLogSoftmaxWithLoss(
            self.hidden_size,
            self.vocab_size,
            self.bounds[1:-1],
            self.div_value,
            self.head_bias is not None,
        ).to(self.head_weight)
        self._exchange(module, lambda own, other: other.copy_(own))
        return module

    @torch.no_grad()
    def _exchange(self, module: nn.AdaptiveLogSoftmaxWithLoss, copy: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Copy one way between each pair of parameters."""
        copy(self.head_weight, module.head.weight)
        if self.head_bias is not None:
            copy(self.head_bias, module.head.bias)
        theirs = list(module.tail.parameters())
        for (projection, weight, _), other, table in zip(self._tails(), theirs[::2], theirs[1::2], strict=True):
            copy(projection, other)
            copy(weight, table)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, unless the state has other bands: then say which."""
        sizes, tail = [len(state_dict.get(f"{prefix}head_weight", self.head_weight))], f"{prefix}tail_weights."
        sizes += [len(table) for name, table in state_dict.items() if name.startswith(tail)]
        inner = np.cumsum([sizes[0] - len(sizes) + 1, *sizes[1:]])[:-1].tolist()
        if inner != self.bounds[1:-1] and f"{prefix}head_weight" in state_dict:
            raise ValueError(f"state_dict has tails from {inner}; build the layer with cutoffs={inner}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _tails(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Return projection, table and bias of every tail."""
        biases = self.tail_biases or [None] * self.tails
        return list(zip(self.projections, self.tail_weights, biases, strict=True))

    def _band(self, target: Tensor) -> Tensor:
        return sum((target >= bound for bound in self.bounds[1:-1]), torch.zeros_like(target))

    def _head_target(self, target: Tensor) -> Tensor:
        """Return the target's place in the head, that of its tail's entry if it has none itself."""
        return torch.where(target < self.bounds[1], target, self.bounds[1] - 1 + self._band(target))

    def _by_band(self, target: Tensor) -> tuple[Tensor, list[int]]:
        """Return the tokens ordered by the bands of their targets, and the numbers of tokens, read from the device."""
        band = self._band(target)
        return band.argsort(stable=True), torch.bincount(band, minlength=self.tails + 1).tolist()

    def _tokens_by_tail(
        self, hidden: Tensor, target: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]]:
        """Yield of every tail that has targets: their tokens, projected hidden vectors, table, bias, targets in it."""
        order, (in_head, *sizes) = self._by_band(target)
        in_tails = order[in_head:]
        tokens_by_tail, hidden_by_tail = in_tails.split(sizes), hidden.index_select(0, in_tails).split(sizes)
        for k, (projection, weight, bias) in enumerate(self._tails()):
            tokens = tokens_by_tail[k]
            if len(tokens):
                seen = F.linear(hidden_by_tail[k], projection)
                yield tokens, seen, weight, bias, target[tokens] - self.bounds[k + 1]


def _table(rows: int, width: int) -> nn.Parameter:
    bound = 1 / math.sqrt(width)
    return nn.Parameter(empty_table(rows, width).uniform_(-bound, bound))


def _width(hidden_size: int, div_value: float, k: int) -> int:
    return max(1, int(hidden_size // div_value ** (k + 1)))


def _fastest(counts: Tensor, hidden_size: int, div_value: float, backend: str) -> list[int]:
    """Return the cutoffs that make a step of ``TOKENS`` fastest, rounded to a grid even in the logarithm of ranks."""
    vocab, cost = len(counts), cost_model(counts.device, backend)
    mass = counts.double().cpu().numpy()
    share = np.append(0.0, np.cumsum(mass) / mass.sum())
    end = np.unique(np.rint(10 ** (np.arange(STEPS * math.log10(vocab)) / STEPS)).astype(np.int64))
    end = np.append(end[end < vocab], vocab)
    words = np.maximum(end - end[:, None], 0)
    reached = np.clip(share[end] - share[end][:, None], 0, 1)
    hit = np.maximum(-np.expm1(TOKENS * np.log1p(-np.minimum(reached, 1 - 1e-9))), 1e-9)  # any token at all
    tokens = TOKENS * reached / hit
    widths = [_width(hidden_size, div_value, k) for k in range(MOST_TAILS)]
    widths = [width for width in widths if width >= max(1, hidden_size * LEAST_WIDTH)]
    # A projection costs what a softmax over as many words as it has rows does, but for the exponentials.
    tails = [hit * (cost(tokens, width, words) + cost(tokens, hidden_size, width)) for width in widths]
    return end[partition.cheapest_cuts(cost(TOKENS, hidden_size, end), np.array(tails))].tolist()


def _bounds(counts: Tensor, cutoffs: Sequence[int | float], cutoffs_of: Literal["vocabulary", "mass"]) -> list[int]:
    """Return where the bands begin, and the end of the last, without empty ones."""
    given, vocab = list(cutoffs), len(counts)
    if any(low >= high for low, high in zip(given, given[1:], strict=False)):
        raise ValueError(f"cutoffs={given}: must rise from each to the next")
    if all(isinstance(cutoff, int) for cutoff in given):
        if given and not (1 <= given[0] and given[-1] < vocab):
            raise ValueError(f"cutoffs={given}: ranks must be at least 1 and below the {vocab} words")
        inner = [int(cutoff) for cutoff in given]
    elif all(isinstance(cutoff, float) and 0 < cutoff < 1 for cutoff in given):
        edges = [0.0, *given, 1.0]
        shares = [high - low for low, high in zip(edges, edges[1:], strict=False)]
        inner = partition.bands(counts.double().cpu().numpy(), shares, cutoffs_of)[1:-1].clip(1, vocab - 1).tolist()
    else:
        raise ValueError(f"cutoffs={given}: give ranks (whole numbers) or shares of the words or their mass, in (0, 1)")
    return sorted({0, *inner, vocab})
