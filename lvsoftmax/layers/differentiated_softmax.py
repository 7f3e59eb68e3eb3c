"""The differentiated softmax: frequent words read more of the hidden vector than rare ones."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lvsoftmax.layer import OutputLayer, unigram_log_prob
from lvsoftmax.ops.linear_cross_entropy import BACKENDS, banded_cross_entropy, banded_cross_entropy_loss
from lvsoftmax.ops.noise import Sample
from lvsoftmax.ops.numerics import upcast
from lvsoftmax.ops.partition import bands as cut_bands
from lvsoftmax.ops.softmax import log_softmax, logsumexp


class DifferentiatedSoftmax(OutputLayer):
    """One exact softmax whose words have vectors of different widths: ``logit(w) = w_w . h_b + b_w`` for w in band b.

    The vocabulary, ranked by frequency, is cut into bands. Band ``b`` sees ``d_b`` numbers ``h_b``:

    - ``slice``: its own slice of the hidden vector, so that the table is block-diagonal;
    - ``full``: the whole hidden vector, projected down to ``d_b``; Grave et al. 2017 compare with it as D-softmax*.

    Weights start uniform in ``+-1/sqrt(d_b)``, projections in ``+-1/sqrt(D)``, the bias at the unigram distribution.

    Cost per token: ``6 sum over b of d_b V_b`` FLOPs for a training step (``full``: and ``6 D sum over b of d_b``), a
    third of that for evaluation; with the defaults 0.26 of a full softmax. Memory of one block of logits.

    Reference: Chen, Grangier & Auli 2015, Strategies for Training Large Vocabulary Neural Language Models,
    "Differentiated Softmax" (a figure there, no equation); ``full``: Grave, Joulin, Cisse, Grangier & Jegou 2017,
    Efficient softmax approximation for GPUs, section 5.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        bands: what each band takes of the vocabulary, the most frequent words first; positive, together 1.
        bands_of: whether ``bands`` are shares of the words or of their mass in the training text.
        widths: ``d_b / D`` of each band; together 1 for ``slice``, each at most 1 for ``full``.
        projection: where a band's numbers come from.
        backend: what computes loss and gradients; ``auto`` takes the fastest that can run on the device.

    Raises:
        ValueError: ``bands`` do not cover the vocabulary, there is not a width per band, ``hidden_size`` cannot be cut
            into such widths, or ``backend`` cannot run here.
    """

    backends = BACKENDS

    weights: nn.ParameterList

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        bands: Sequence[float] = (0.05, 0.25, 0.7),
        bands_of: Literal["vocabulary", "mass"] = "vocabulary",
        widths: Sequence[float] = (0.5, 0.25, 0.25),
        projection: Literal["slice", "full"] = "slice",
        backend: Literal["auto", "eager", "cpp", "triton"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, backend=backend)
        if bands_of not in ("vocabulary", "mass"):
            raise ValueError(f"bands_of={bands_of!r}: choose vocabulary or mass")
        if projection not in ("slice", "full"):
            raise ValueError(f"projection={projection!r}: choose slice or full")
        bounds = cut_bands(counts.double().cpu().numpy(), bands, bands_of)
        self.widths = _columns(hidden_size, bands, widths, together=projection == "slice")
        self.weights = nn.ParameterList(
            torch.empty(size, width).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width))
            for size, width in zip((bounds[1:] - bounds[:-1]).tolist(), self.widths, strict=True)
        )
        self.bias = nn.Parameter(unigram_log_prob(counts))
        if projection == "full":
            bound = 1 / math.sqrt(hidden_size)
            self.projection = nn.Parameter(torch.empty(sum(self.widths), hidden_size).uniform_(-bound, bound))
        else:
            self.projection = None

    def inputs(self, hidden: Float[Tensor, "tokens hidden"]) -> tuple[Float[Tensor, "tokens _"], ...]:
        """Return what each band sees of the hidden vectors."""
        seen = hidden if self.projection is None else F.linear(hidden, self.projection)
        return seen.split(self.widths, 1)

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Return the score of every word."""
        seen = zip(self.inputs(hidden), self.weights, strict=True)
        return torch.cat([F.linear(x, weight) for x, weight in seen], 1) + self.bias

    def log_prob(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Normalise the logits of all bands together."""
        return log_softmax(self.logits(hidden), dim=1)

    def log_partition(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens"]:
        """Return the log-sum-exp of the logits."""
        return logsumexp(self.logits(hidden), dim=1)

    def log_prob_and_partition(
        self, hidden: Float[Tensor, "tokens hidden"]
    ) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, "tokens"]]:
        """Return both from the same logits."""
        logits = self.logits(hidden)
        log_prob = log_softmax(logits, dim=1)
        return log_prob, upcast(logits[:, 0]) - log_prob[:, 0]

    def nll(self, hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Return the exact negative log-likelihood, by blocks of tokens."""
        inputs, weights = self.inputs(hidden), tuple(self.weights)
        return banded_cross_entropy(inputs, weights, self.bias, target, backend=self.backend)

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * nll)``, by blocks of tokens."""
        inputs, weights = self.inputs(hidden), tuple(self.weights)
        return banded_cross_entropy_loss(inputs, weights, self.bias, target, weight, backend=self.backend)


def _columns(hidden_size: int, bands: Sequence[float], shares: Sequence[float], *, together: bool) -> list[int]:
    """Turn shares of ``hidden_size`` into numbers of columns."""
    given = f"widths={list(shares)}"
    if len(shares) != len(bands):
        raise ValueError(f"{given}: give one width for each of the {len(bands)} bands")
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"{given}: must be in (0, 1], shares of hidden_size")
    if together and not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"{given}: the slices share out the hidden vector, so give widths whose sum is 1")
    columns = [round(share * hidden_size) for share in shares]
    for column, share in zip(columns, shares, strict=True):
        if column == 0 or not math.isclose(column, share * hidden_size, abs_tol=1e-3):
            raise ValueError(
                f"hidden_size={hidden_size}: a band needs {share} of it, which is {share * hidden_size:g} columns; "
                "choose a multiple or other widths"
            )
    return columns
