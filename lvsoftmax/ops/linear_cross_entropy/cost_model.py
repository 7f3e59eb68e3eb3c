"""What the weighted sum and its gradients cost on this machine: seconds as a function of sizes, fitted to measurements.

Letters: N tokens, D hidden, V words. The seconds of a call are modelled as a sum of products of sizes,

    s = c_1 N D V + c_2 N V + c_3 N D + c_4 D V + c_5 V + c_6        with no c below zero

for arithmetic, exponentials, rows of hidden vectors and of the table, words, and the call itself. The kernels pad the
tokens of a block, so that N counts as 32 at least. The relative error over the calibration's own shapes is about 20 %.

The calibration takes about a second. Its result is kept in ``lvsoftmax/`` in the user's cache folder
(``XDG_CACHE_HOME``, else ``~/.cache``), in a file for each processor, device, number of threads, backend and version of
PyTorch; remove the file to measure again.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import tempfile
from pathlib import Path
from time import perf_counter, thread_time

import numpy as np
import torch
from torch import Tensor

from lvsoftmax.ops.backends import cache_folder, processor
from lvsoftmax.ops.linear_cross_entropy.autograd import BACKENDS, linear_cross_entropy_loss

logger = logging.getLogger(__name__)

SHAPES: list[tuple[int, int, int]] = [
    shape for shape in itertools.product((32, 256, 1024), (8, 64, 256), (64, 1024, 16384)) if np.prod(shape) < 2**30
]
"""Sizes that are measured: N, D, V."""

ROUNDS = range(4, 10)  # of measurements; the first warms up
BUDGET = 1.0  # seconds, after which no further round starts when there have been enough
FEWEST = 32  # tokens that a block is padded to


Size = np.ndarray | float | int


class CostModel:
    """The model with its coefficients.

    Args:
        coefficients: of the products of sizes, in the order of ``_products``.
    """

    def __init__(self, coefficients: np.ndarray) -> None:
        self.coefficients = coefficients

    def __call__(self, tokens: Size, hidden: Size, vocab: Size) -> np.ndarray:
        """Return the seconds of the weighted sum and its gradients; arguments are broadcast."""
        return np.asarray(_products(tokens, hidden, vocab) @ self.coefficients)


def cost_model(device: torch.device, backend: str = "auto") -> CostModel:
    """Return the model of this machine, from the cache or measured now.

    Args:
        device: whose seconds.
        backend: of the linear cross-entropy.
    """
    return _cost_model(device, BACKENDS.choose(backend, device), torch.get_num_threads())


@functools.cache
def _cost_model(device: torch.device, backend: str, threads: int) -> CostModel:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    identity = "\0".join([name, device.type, backend, str(threads), torch.__version__, str(SHAPES)])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    file = cache_folder() / f"cost-model-{device.type}-{backend}-{digest}.json"
    try:
        return CostModel(np.array(json.loads(file.read_text("utf-8"))["coefficients"], np.float64))
    except (OSError, ValueError, KeyError, TypeError):
        logger.info("measuring what the cross-entropy costs here (%s, %s, %d threads)", device, backend, threads)
    measured = np.array([*_measure(device, backend).items()], dtype=object)
    coefficients = fit(np.array([*measured[:, 0]], np.float64), measured[:, 1].astype(np.float64))
    _keep(file, json.dumps({"coefficients": coefficients.tolist()}))
    return CostModel(coefficients)


def fit(sizes: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Return the coefficients, none negative, with the least sum of squared relative errors.

    The best fit leaves out those products that would get negative coefficients: of all selections of products that
    give none, the one with the least error is it.

    Args:
        sizes: ``[shapes, 3]`` N, D and V.
        taken: ``[shapes]`` seconds.
    """
    products = _products(*sizes.T) / taken[:, None]
    best, least = np.zeros(products.shape[1]), np.inf
    for chosen in itertools.product((False, True), repeat=products.shape[1]):
        columns = products[:, chosen]
        found = np.linalg.lstsq(columns, np.ones(len(taken)))[0]
        error = np.square(columns @ found - 1).sum()
        if (found >= 0).all() and error < least:
            best, least = np.zeros(products.shape[1]), error
            best[list(chosen)] = found
    return best


def _products(tokens: Size, hidden: Size, vocab: Size) -> np.ndarray:
    n, d, v = np.broadcast_arrays(np.maximum(tokens, FEWEST), np.float64(hidden), np.float64(vocab))
    return np.stack([n * d * v, n * v, n * d, d * v, v, np.ones_like(n)], -1)


def _measure(device: torch.device, backend: str) -> dict[tuple[int, int, int], float]:
    """Return the least seconds of every shape over some rounds."""
    generator = torch.Generator().manual_seed(0)  # the caller's random stream is none of this one's business
    sizes = np.max(SHAPES, 0)[1:].tolist()
    options = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    tables = [torch.randn(size, **options).mul_(0.1).to(device) for size in sizes]
    least: dict[tuple[int, int, int], float] = dict.fromkeys(SHAPES, np.inf)
    started = perf_counter()
    for done in range(1, ROUNDS.stop):
        for shape in SHAPES:
            tokens, hidden, vocab = shape
            operands = [tables[0][:hidden].expand(tokens, hidden), tables[0][:hidden].expand(vocab, hidden)]
            least[shape] = min(least[shape], _time([*operands, tables[1][:vocab]], backend))
        if done >= ROUNDS.start and perf_counter() - started > BUDGET:
            break
    return least


@torch.enable_grad()
def _time(operands: list[Tensor], backend: str) -> float:
    hidden_ND, weight_VD, bias_V = (operand.contiguous().requires_grad_() for operand in operands)
    target_N = torch.arange(len(hidden_ND), device=hidden_ND.device) % len(weight_VD)
    token_weight_N = torch.ones_like(hidden_ND[:, 0])
    # With one thread it is the work that counts, whatever else the processor does meanwhile.
    on_cuda, clock = hidden_ND.is_cuda, thread_time if torch.get_num_threads() == 1 else perf_counter
    if on_cuda:
        torch.cuda.synchronize(hidden_ND.device)
        clock = perf_counter
    start = clock()
    linear_cross_entropy_loss(hidden_ND, weight_VD, bias_V, target_N, token_weight_N, backend=backend).backward()
    if on_cuda:
        torch.cuda.synchronize(hidden_ND.device)
    return clock() - start


def _keep(file: Path, content: str) -> None:
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Written under another name and renamed: another process finds it whole or not at all.
        descriptor, part = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(content)
        Path(part).replace(file)
    except OSError as error:
        logger.warning("%s cannot be written (%s): measured again next time; set XDG_CACHE_HOME", file, error)
