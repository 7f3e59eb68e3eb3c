"""What a training step of an output layer costs: parameters, operations, memory, time."""

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Size, Tensor
from torch.utils.flop_counter import FlopCounterMode

from lvsoftmax.layer import OutputLayer


class Cost(NamedTuple):
    """The cost of one training step of a layer: its loss, and the gradients of the hidden vectors and parameters."""

    parameters: int
    """Trainable numbers."""
    flops: int
    """Operations of matrix products, two per multiply-add; everything else (gathers, exponentials) is left out."""
    peak_bytes: int
    """Memory at the highest point beyond that in use before the step; the gradients are in it."""
    seconds: float
    """Median over repetitions."""


def measure(
    layer: OutputLayer,
    hidden: Float[Tensor, "tokens hidden"],
    target: Int[Tensor, "tokens"],
    previous: Int[Tensor, "tokens"] | None = None,
    *,
    repeats: int = 5,
) -> Cost:
    """Measure ``layer.loss`` of the mean over tokens and its backward pass, after one step of warm-up.

    The operations are counted, not derived: the products that PyTorch executes, also those inside an
    ``autograd.Function``. Memory on the CPU is the high-water mark of the resident set and so includes what compiled
    extensions allocate; memory that the C library kept from earlier work is given back first, but a fresh process is
    the surer place to measure it. Draws of the layer's own generator go on; its gradients are ``None`` afterwards.

    Args:
        layer: what to measure, on the device and in the precision it is in.
        hidden: hidden vectors.
        target: the word to predict.
        previous: the word before each target, where the layer wants it.
        repeats: steps timed.

    Returns:
        The cost of one step of all ``tokens``.

    Raises:
        ValueError: ``repeats`` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be at least 1")
    hidden = hidden.detach().requires_grad_()
    weight = torch.full_like(hidden[:, 0], 1 / len(hidden))

    def step() -> None:
        layer.loss(hidden, target, weight, previous).backward()

    def forget() -> None:
        layer.zero_grad(set_to_none=True)
        hidden.grad = None

    # Products that add in place are missing in torch's own table.
    in_place = dict.fromkeys((torch.ops.aten.addmm_, torch.ops.aten.baddbmm_), _product_flops)
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    forget()
    extra = _extra_bytes(step, hidden.device)
    forget()
    seconds = []
    for _ in range(repeats):
        seconds.append(_seconds(step, hidden.device))
        forget()
    return Cost(
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        flops=counter.get_total_flops(),
        peak_bytes=extra,
        seconds=statistics.median(seconds),
    )


def peak_bytes(device: torch.device | str = "cpu") -> int:
    """Return the highest memory in use since ``reset_peak``, in bytes.

    On CUDA what the allocator gave out; on the CPU the resident set of the process: ``VmHWM`` where Linux tells it,
    otherwise ``getrusage``, which knows the peak since the start of the process only.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _status_bytes("VmHWM")
    except OSError:
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device | str = "cpu") -> None:
    """Start a new peak at the memory now in use; without effect where the system has no way to do so."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # no /proc, or a read-only one: the peak stays that of the whole process


def _product_flops(total: Size, left: Size, right: Size, out_shape: Size, **_: object) -> int:
    return 2 * math.prod(out_shape) * left[-1]


def _extra_bytes(run: Callable[[], None], device: torch.device) -> int:
    _release_free_memory()
    reset_peak(device)
    before = peak_bytes(device)
    run()
    return peak_bytes(device) - before


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _release_free_memory() -> None:
    """Ask the C library to return freed memory, which would otherwise hide what the next step takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it, musl has not
        trim(0)
