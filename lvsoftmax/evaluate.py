"""Exact evaluation of a language model on a text: one dictionary of plain numbers, the same for every output layer."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from lvsoftmax.data.batches import ContiguousBatches
from lvsoftmax.layer import OutputLayer, unigram_log_prob

TOP = (1, 5, 10)
"""How many of the most probable words count as a prediction."""

_ENTRIES = 2**25  # of one [tokens, vocab] block of log-probabilities: 128 MiB in float32


@runtime_checkable
class Model(Protocol):
    """A module that reads text and has an output layer, such as :class:`lvsoftmax.models.LanguageModel`."""

    output: OutputLayer

    def hidden(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return ``[batch * time, hidden]``, row by row, for ``ids`` of ``[batch, time]``, and the state after them."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Return the module and all its parts."""
        ...


@runtime_checkable
class Source(Protocol):
    """The known source of a synthetic text."""

    def nll(self, ids: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Return ``-log p(ids | previous)`` of each token, in nats."""
        ...


@torch.no_grad()
def evaluate(
    model: Model,
    batches: ContiguousBatches,
    *,
    counts: Shaped[Tensor, "vocab"],
    full: bool = True,
    source: Source | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Measure ``model`` on a text, exactly and with the recurrent state carried from batch to batch.

    The model is in evaluation mode meanwhile and every module is put back as it was; no random number is drawn. It
    computes in the precision of the surrounding ``torch.autocast``; sums over tokens run in float64 and are divided
    once, by the number of tokens. Tokens of weight 0 are padding and left out.

    Cost per token: one ``nll``; when ``full``, one ``topk`` and one ``log_partition`` more. Memory: blocks of 2**25
    entries of ``[tokens, vocab]``, whatever the batch and the vocabulary, and 40 bytes per token of the text.

    Args:
        model: what to evaluate.
        batches: every token of the text once; rows of a batch continue those of the one before.
        counts: ``[vocab]`` training frequencies, for the perplexity of the unigram distribution.
        full: False leaves ``nll``, ``tokens``, ``perplexity`` and ``bands`` only.
        source: where the text came from, when that is known.
        progress: called with the number of tokens of each batch once it is measured.

    Returns:
        Numbers that can be written as JSON, nats per token unless another unit is named:

        * ``nll``, ``tokens``, ``perplexity = exp(nll)``,
        * ``bands``: see :func:`band_losses`,
        * ``unigram_perplexity``: of the same tokens under :func:`lvsoftmax.layer.unigram_log_prob`,
        * ``accuracy``: for "1", "5", "10", the share of targets among that many most probable words,
        * ``calibration_error``: see :func:`calibration_error`,
        * ``log_partition``: its ``mean`` and ``variance`` over tokens, None where the layer has none,
        * ``source_nll`` and ``excess = nll - source_nll``, None without a source.
    """
    device = next(model.output.parameters(), counts).device
    columns: dict[str, list[Tensor]] = defaultdict(list)
    state = None
    with _evaluation_mode(model):
        for batch in batches:
            hidden, state = model.hidden(batch.input.to(device), state)
            real = slice(None) if batch.weight is None else batch.weight.flatten() != 0
            previous, target = batch.input.flatten()[real], batch.target.flatten()[real]
            columns["previous"].append(previous)
            columns["target"].append(target)
            for name, values in _scores(model.output, hidden[real], target.to(device), full):
                columns[name].append(values.cpu())
            if progress is not None:
                progress(len(target))
    text = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    nll = _mean(text["nll"])
    result = {
        "nll": nll,
        "tokens": len(text["target"]),
        "perplexity": _perplexity(nll),
        "bands": band_losses(text["nll"], text["target"], len(counts)),
    }
    if not full:
        return result
    log_partition = text.get("log_partition")
    source_nll = None if source is None else _mean(source.nll(text["target"], text["previous"]))
    return result | {
        "unigram_perplexity": unigram_perplexity(text["target"], counts),
        "accuracy": {str(k): _mean(text["place"] < k) for k in TOP},
        "calibration_error": calibration_error(text["confidence"], text["place"] == 0),
        "log_partition": None
        if log_partition is None
        else {"mean": _mean(log_partition), "variance": float(np.var(log_partition, dtype=np.float64))},
        "source_nll": source_nll,
        "excess": None if source_nll is None else nll - source_nll,
    }


def frequency_bands(vocab_size: int) -> list[range]:
    """Split word ids, which are frequency ranks, at the powers of ten: the first 10 words, the next 90, 900 ...

    Under Zipf's law every band holds about the same share of a text, whatever the size of the vocabulary, and a band
    has the same words in every layer and nearly the same in every corpus.
    """
    edges = [0]
    while (edge := 10 ** len(edges)) < vocab_size:
        edges.append(edge)
    return [range(*pair) for pair in zip(edges, [*edges[1:], vocab_size], strict=True)]


def band_losses(
    nll: Float[np.ndarray, "tokens"], target: Int[np.ndarray, "tokens"], vocab_size: int
) -> list[dict[str, Any]]:
    """Return, for each frequency band of the target, ``first`` and ``last`` rank, ``tokens`` and mean ``nll``.

    The mean is None where no token falls into the band.
    """
    losses = []
    for band in frequency_bands(vocab_size):
        inside = nll[(target >= band.start) & (target < band.stop)]
        mean = _mean(inside) if len(inside) else None
        losses.append({"first": band.start, "last": band.stop - 1, "tokens": len(inside), "nll": mean})
    return losses


def calibration_error(
    confidence: Float[np.ndarray, "tokens"], correct: Bool[np.ndarray, "tokens"], bins: int = 15
) -> float:
    """Return the expected calibration error of the most probable word.

    ``sum_m |B_m| / n * |acc(B_m) - conf(B_m)|`` where bin ``m`` of M holds the tokens whose highest probability lies in
    ``((m - 1) / M, m / M]``: Guo, Pleiss, Sun & Weinberger 2017, On Calibration of Modern Neural Networks, equation 3.

    Args:
        confidence: probability of the most probable word.
        correct: whether that word is the target.
        bins: M.
    """
    bin_of = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    # |B_m| * (acc - conf) is the sum of the differences inside the bin.
    difference = np.bincount(bin_of, weights=correct.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(difference).sum() / len(confidence))


def unigram_perplexity(target: Int[np.ndarray, "tokens"], counts: Shaped[Tensor, "vocab"]) -> float:
    """Return the perplexity of a text under the smoothed relative frequencies of the training text."""
    return _perplexity(_mean(-unigram_log_prob(counts.cpu()).numpy()[target]))


def _scores(output: OutputLayer, hidden: Tensor, target: Tensor, full: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield named columns of numbers per token, in blocks of tokens small enough for ``[tokens, vocab]``."""
    block = max(1, _ENTRIES // output.vocab_size)
    for hidden_block, target_block in zip(hidden.split(block), target.split(block), strict=True):
        yield "nll", output.nll(hidden_block, target_block)
        if not full:
            continue
        log_prob, ids = output.topk(hidden_block, min(max(TOP), output.vocab_size))
        found = ids == target_block[:, None]
        yield "place", torch.where(found.any(1), found.int().argmax(1), max(TOP))
        yield "confidence", log_prob[:, 0].double().exp()
        log_partition = output.log_partition(hidden_block)
        if log_partition is not None:
            yield "log_partition", log_partition


@contextmanager
def _evaluation_mode(model: Model) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64))


def _perplexity(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
