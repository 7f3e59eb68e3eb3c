"""The class-based softmax: first the class of a word, then the word within its class."""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lvsoftmax.layer import OutputLayer, unigram_log_prob
from lvsoftmax.ops import partition
from lvsoftmax.ops.buffers import empty_table
from lvsoftmax.ops.grouped_nll import BACKENDS as GROUPED_BACKENDS
from lvsoftmax.ops.grouped_nll import grouped_log_softmax, grouped_nll
from lvsoftmax.ops.inputs import look_up
from lvsoftmax.ops.linear_cross_entropy import BACKENDS, linear_cross_entropy, linear_cross_entropy_loss
from lvsoftmax.ops.noise import Sample, sample_count
from lvsoftmax.ops.softmax import log_softmax


class ClassSoftmax(OutputLayer):
    """Two softmaxes: ``p(w | h) = p(c | h) p(w | c, h)``, where c is the class of w.

    ``p(c | h) = softmax over classes of (u_c . h + a_c)`` and ``p(w | c, h) = softmax over the words of c of
    (v_w . h + b_w)``. Every word has one class. The classes are fixed:

    - ``sqrt``: stretches of the frequency ranking with equal sums of the square roots of the counts; of the three the
      one with the fewest words in the targets' classes;
    - ``mass``: stretches with equal sums of the counts (the frequency binning of Mikolov et al. 2011);
    - ``clustered``: words near in meaning. Given word vectors are ordered by recursive two-means, as the leaves of
      ``HierarchicalSoftmax``'s clustered tree, and the order is cut at equal sums of the square roots of the counts.

    Counts are raised by one. Weights start uniform in ``+-1/sqrt(D)``, biases at the log frequencies of classes and
    words, so that they alone are the smoothed unigram distribution. A training step gives gradients to the rows of the
    targets' classes only.

    Cost per token: ``6 D (C + s)`` FLOPs for a training step with C classes and s words in a target's class (expected:
    about V / C for ``mass``, V / (3 C) for ``sqrt`` under Zipf's law); ``2 D (C + V)`` for all log-probabilities.
    Memory of about 50 bytes for each of the s words.

    Reference: Goodman 2001, Classes for Fast Maximum Entropy Training, equation 2; Mikolov, Kombrink, Burget, Cernocky
    & Khudanpur 2011, Extensions of Recurrent Neural Network Language Model, section 4 (square roots: in their
    software). Neither has biases.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        classes: C, as a number (int) or a share of the vocabulary (float in (0, 1], rounded up); None: about sqrt(V).
        classes_by: what makes a class.
        embeddings: one vector per word ``[vocab, any]`` in the order of ``counts``, or the path of an .npy file that
            holds them; what ``classes_by=clustered`` clusters.
        sparse: row-sparse gradients of the words' table and bias.
        backend: what computes the softmax over classes; ``auto`` takes the fastest that can run on the device.

    Raises:
        ValueError: ``classes`` is below 1 or above the number of words, ``classes_by`` is unknown, ``clustered`` and
            there are no usable ``embeddings``, or ``backend`` cannot run here.
    """

    backends = BACKENDS

    bound: Tensor
    row: Tensor

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        classes: int | float | None = None,
        classes_by: Literal["sqrt", "mass", "clustered"] = "sqrt",
        embeddings: Tensor | str | None = None,
        sparse: bool = True,
        backend: Literal["auto", "eager", "cpp", "triton"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, backend=backend)
        self.sparse = sparse
        number = (
            round(math.sqrt(self.vocab_size)) if classes is None else sample_count("classes", classes, self.vocab_size)
        )
        if number > self.vocab_size:
            raise ValueError(f"classes={number}: more than the {self.vocab_size} words; every class needs one")
        count = counts.double().cpu().numpy() + 1
        order, mass = np.arange(self.vocab_size), np.sqrt(count)
        match classes_by:
            case "sqrt":
                pass
            case "mass":
                mass = count
            case "clustered":
                vectors = partition.word_vectors(embeddings, self.vocab_size, "classes_by=clustered")
                order = partition.clustered_order(vectors, count - 1)
            case _:
                raise ValueError(f"classes_by={classes_by!r}: choose sqrt, mass or clustered")
        bound = partition.classes(mass[order], number)
        self.register_buffer("bound", torch.from_numpy(bound))
        self.register_buffer("row", torch.from_numpy(np.argsort(order)))
        class_count = torch.from_numpy(np.add.reduceat(count[order], bound[:-1])) - 1
        self.class_weight = nn.Parameter(torch.empty(number, hidden_size))
        self.class_bias = nn.Parameter(unigram_log_prob(class_count))
        self.weight = nn.Parameter(empty_table(self.vocab_size, hidden_size))
        self.bias = nn.Parameter(unigram_log_prob(counts.cpu()[torch.from_numpy(order)]))
        for weight in (self.class_weight, self.weight):
            nn.init.uniform_(weight, -1 / math.sqrt(hidden_size), 1 / math.sqrt(hidden_size))

    def log_prob(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Score every class and every word by one product each, and normalise class by class."""
        class_log_prob = log_softmax(F.linear(hidden, self.class_weight, self.class_bias), dim=1)
        score = torch.addmm(self.bias[:, None], self.weight, hidden.T)
        group = self._class_of(torch.arange(self.vocab_size, device=self.bound.device))
        log_prob = grouped_log_softmax(score, group, len(self.class_weight)) + class_log_prob.T[group]
        return log_prob[self.row].T

    def nll(self, hidden: Float[Tensor, "tokens hidden"], target: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens"]:
        """Add what the target's class costs and what the word costs within it."""
        row = look_up(self.row, target)
        operands = hidden, self.class_weight, self.class_bias, self._class_of(row)
        return linear_cross_entropy(*operands, backend=self.backend) + self._word_nll(hidden, row)

    def loss(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        target: Int[Tensor, "tokens"],
        weight: Float[Tensor, "tokens"],
        previous: Int[Tensor, "tokens"] | None = None,
        sample: Sample | None = None,
    ) -> Float[Tensor, ""]:
        """Return ``sum(weight * nll)``, the gradients of the classes' softmax taken on the way."""
        row = look_up(self.row, target)
        operands = hidden, self.class_weight, self.class_bias, self._class_of(row), weight
        class_loss = linear_cross_entropy_loss(*operands, backend=self.backend)
        return class_loss + (weight * self._word_nll(hidden, row)).sum()

    def embed(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... hidden"]:
        """Look ``ids`` up in the words' table."""
        return F.embedding(look_up(self.row, ids), self.weight, sparse=self.sparse)

    def _class_of(self, row: Tensor) -> Tensor:
        return torch.bucketize(row, self.bound[1:-1], right=True)

    def _word_nll(self, hidden: Tensor, row: Tensor) -> Tensor:
        backend = self.backends.choose(self.backend, hidden.device.type)
        backend = backend if backend in GROUPED_BACKENDS.obstacles else "eager"  # there is no other in C++
        return grouped_nll(hidden, self.weight, self.bias, self.bound, row, sparse=self.sparse, backend=backend)
