"""Exact evaluation of a language model on a text: one dictionary of plain numbers, the same for every output layer."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from lvsoftmax.calibration import calibration_error, fit_temperature, log_power_sum, token_blocks
from lvsoftmax.data.batches import ContiguousBatches
from lvsoftmax.layer import OutputLayer, unigram_log_prob

TOP = (1, 5, 10)
"""How many of the most probable words count as a prediction."""

SMOOTHING = 0.01
"""Share of the uniform distribution in what the epsilon-perplexity is that of: ``epsilon = 0.01 / V``."""

FIT_TOKENS = 5000
"""How much held-out text a temperature is fitted to: enough for an error of about 1 %, 1e-4 nats."""


@runtime_checkable
class Model(Protocol):
    """A module that reads text and has an output layer, as :class:`lvsoftmax.models.language_model.LanguageModel`."""

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
    temperature: float | None = None,
    source: Source | None = None,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Measure ``model`` on a text, exactly and with the recurrent state carried from batch to batch.

    The model is in evaluation mode meanwhile and every module is put back as it was; no random number is drawn. It
    computes in the precision of the surrounding ``torch.autocast``; sums over tokens run in float64 and are divided
    once, by the number of tokens. Tokens of weight 0 are padding and left out.

    Cost per token: one ``nll``, or one ``log_prob_and_partition`` when ``full`` (and the ``nll`` under autocast, where
    it rounds less). Memory: blocks of 2**22 entries of ``[tokens, vocab]``, or of 32 tokens where that is more, and 60
    bytes per token of the text.

    Args:
        model: what to evaluate.
        batches: every token of the text once; rows of a batch continue those of the one before.
        counts: ``[vocab]`` training frequencies, for the perplexity of the unigram distribution.
        full: False leaves the figures up to ``bands``.
        temperature: one that was fitted on other text, to be tried on this.
        source: where the text came from, when that is known.
        progress: called with the number of tokens of each batch once it is measured.

    Returns:
        Numbers, nats per token unless another unit is named; infinite where a target has probability zero:

        * ``nll``, ``tokens``, ``perplexity = exp(nll)``,
        * ``coverage``: the share of targets of a probability above zero; 1 for every layer with full support,
        * ``epsilon``, and ``epsilon_perplexity``: see :func:`epsilon_perplexity`,
        * ``bands``: see :func:`band_losses`,
        * ``unigram_perplexity``: of the same tokens under :func:`lvsoftmax.layer.unigram_log_prob`,
        * ``accuracy``: for "1", "5", "10", the share of targets among that many most probable words; of equally
          probable words the more frequent comes first,
        * ``calibration_error``: see :func:`lvsoftmax.calibration.calibration_error`,
        * ``calibrated``: ``temperature``, and ``nll``, ``perplexity`` and ``calibration_error`` at this temperature;
          None without one,
        * ``sparsemax_score``: mean of ``p(target) + (1 - sum_w p(w)^2) / 2``, between 0 and 1 and the higher, the
          better: Martins, Marinho & Martins 2020, Sparse Text Generation, section 4,
        * ``support_size``: mean number of words of a probability above zero,
        * ``log_partition``: its ``mean`` and ``variance`` over tokens, None where the layer has none,
        * ``source_nll`` and ``excess = nll - source_nll``, None without a source.
    """
    columns = _Columns()
    for hidden, previous, target in _read(model, batches):
        columns.extend("previous", previous)
        columns.extend("target", target)
        for name, values in _scores(model.output, hidden, target, full, temperature):
            columns.extend(name, values)
        if progress is not None:
            progress(len(target))
    text = columns.filled()
    nll = _mean(text["nll"])
    result = {
        "nll": nll,
        "tokens": len(text["target"]),
        "perplexity": _perplexity(nll),
        "coverage": _mean(text["nll"] != math.inf),
        "epsilon": SMOOTHING / len(counts),
        "epsilon_perplexity": epsilon_perplexity(text["nll"], len(counts)),
        "bands": band_losses(text["nll"], text["target"], len(counts)),
    }
    if not full:
        return result
    correct, log_partition = text["place"] == 0, text.get("log_partition")
    source_nll = None if source is None else _mean(source.nll(text["target"], text["previous"]))
    calibrated = None
    if temperature is not None:
        tempered = _mean(text["tempered_nll"])
        calibrated = {
            "temperature": temperature,
            "nll": tempered,
            "perplexity": _perplexity(tempered),
            "calibration_error": calibration_error(text["tempered_confidence"], correct),
        }
    return result | {
        "unigram_perplexity": unigram_perplexity(text["target"], counts),
        "accuracy": {str(k): _mean(text["place"] < k) for k in TOP},
        "calibration_error": calibration_error(text["confidence"], correct),
        "calibrated": calibrated,
        "sparsemax_score": _mean(text["sparsemax_score"]),
        "support_size": _mean(text["support_size"]),
        "log_partition": None
        if log_partition is None
        else {"mean": _mean(log_partition), "variance": float(np.var(log_partition, dtype=np.float64))},
        "source_nll": source_nll,
        "excess": None if source_nll is None else nll - source_nll,
    }


@torch.no_grad()
def temperature_of(model: Model, batches: ContiguousBatches, tokens: int = FIT_TOKENS) -> float:
    """Return the temperature fitted to the first ``tokens`` tokens that ``batches`` give, held out from training.

    They come from as many places of the text as a batch has rows. See :func:`lvsoftmax.calibration.fit_temperature`.
    """
    read: list[tuple[Tensor, Tensor]] = []
    for hidden, _, target in _read(model, batches):
        read.append((hidden, target))
        if sum(len(target) for _, target in read) >= tokens:
            break
    hidden, target = (torch.cat(parts)[:tokens] for parts in zip(*read, strict=True))
    return fit_temperature(model.output, hidden, target)


class _Columns:
    """Named columns of numbers per token, on the CPU.

    They are allocated a few times, not once per block: small tensors that outlive the large ones made between them keep
    the allocator from giving the memory of one ``[tokens, vocab]`` block to the next, 20 GB over 150,000 tokens.
    """

    def __init__(self) -> None:
        self._columns: dict[str, Tensor] = {}
        self._lengths: dict[str, int] = defaultdict(int)

    def extend(self, name: str, values: Tensor) -> None:
        begin, end = self._lengths[name], self._lengths[name] + len(values)
        column = self._columns.get(name, torch.empty(0, dtype=values.dtype))
        if end > len(column):
            grown = torch.empty(max(2 * end, 2**16), dtype=values.dtype)
            grown[:begin] = column[:begin]
            column = self._columns[name] = grown
        column[begin:end] = values
        self._lengths[name] = end

    def filled(self) -> dict[str, np.ndarray]:
        return {name: column[: self._lengths[name]].numpy() for name, column in self._columns.items()}


def epsilon_perplexity(nll: Float[np.ndarray, "tokens"], vocab_size: int) -> float:
    """Return the perplexity with ``(p + epsilon) / (1 + epsilon V)`` in the place of p: always finite.

    Martins et al. 2020, section 4. There epsilon is the best one for the text; here ``epsilon V`` is 0.01, the same for
    every layer and every text.
    """
    epsilon = SMOOTHING / vocab_size
    return _perplexity(_mean(math.log1p(SMOOTHING) - np.log(np.exp(-nll.astype(np.float64)) + epsilon)))


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


def unigram_perplexity(target: Int[np.ndarray, "tokens"], counts: Shaped[Tensor, "vocab"]) -> float:
    """Return the perplexity of a text under the smoothed relative frequencies of the training text."""
    return _perplexity(_mean(-unigram_log_prob(counts.cpu()).numpy()[target]))


def _read(model: Model, batches: ContiguousBatches) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield hidden vectors, the words before and the targets of each batch, in evaluation mode, padding left out."""
    device = next(model.output.parameters(), torch.empty(0)).device
    state = None
    with _evaluation_mode(model):
        for batch in batches:
            hidden, state = model.hidden(batch.input.to(device), state)
            real = slice(None) if batch.weight is None else batch.weight.flatten() != 0
            previous, target = batch.input.flatten()[real], batch.target.flatten()[real]
            yield hidden[real], previous, target.to(device)


def _scores(
    output: OutputLayer, hidden: Tensor, target: Tensor, full: bool, temperature: float | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield named columns of numbers per token, block by block."""
    for hidden_block, target_block in token_blocks(hidden, target, output.vocab_size):
        if not full:
            yield "nll", output.nll(hidden_block, target_block)
            continue
        log_prob, log_partition = output.log_prob_and_partition(hidden_block)
        own, top = log_prob.gather(1, target_block[:, None]), log_prob.amax(1)
        # Autocast rounds scores to 8 bits; nll, which has no array of them, does not.
        exact = torch.is_autocast_enabled(hidden.device.type)
        nll = output.nll(hidden_block, target_block) if exact else -own.squeeze(1)
        yield "nll", nll
        yield "place", _places(log_prob, own, target_block)
        yield "confidence", top.double().exp()
        yield "sparsemax_score", (-nll).exp() + (1 - log_power_sum(log_prob, 2.0).exp()) / 2
        full_size = torch.full_like(top, output.vocab_size)
        yield "support_size", full_size if output.full_support else _count(torch.gt, log_prob, -torch.inf)
        if log_partition is not None:
            yield "log_partition", log_partition
        if temperature is not None:
            normaliser = log_power_sum(log_prob, 1 / temperature)
            yield "tempered_nll", nll / temperature + normaliser
            yield "tempered_confidence", (top.double() / temperature - normaliser).exp()


def _places(log_prob: Tensor, own: Tensor, target: Tensor) -> Tensor:
    """Return how many words come before the target: more probable ones and, of those alike, the more frequent.

    The latter are counted only where they can decide about a prediction. A target of probability zero is none.
    """
    place = _count(torch.gt, log_prob, own)
    near = (place < max(TOP)).nonzero().squeeze(1)
    rivals, own_near = log_prob[near], own[near]
    alike = (_count(torch.eq, rivals, own_near) > 1).nonzero().squeeze(1)
    if len(alike):
        rows = near[alike]
        before = torch.arange(log_prob.shape[1], device=target.device) < target[rows, None]
        place[rows] += ((rivals[alike] == own_near[alike]) & before).sum(1)
    return place.masked_fill_(own.squeeze(1) == -torch.inf, log_prob.shape[1])


def _count(compare: Callable[..., Tensor], left: Tensor, right: Tensor | float) -> Tensor:
    """Return in how many columns a comparison holds, as a float: sums of floats are vectorised, those of bools not."""
    return compare(left, right, out=torch.empty_like(left)).sum(1)


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
