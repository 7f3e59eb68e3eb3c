"""What a training step of an output layer costs: parameters, operations, memory traffic, memory, time."""

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Size, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lvsoftmax.layer import OutputLayer
from lvsoftmax.ops import buffers


class Work(NamedTuple):
    """What a piece of code makes PyTorch do, counted, not derived; compiled code of others is not seen."""

    flops: int
    """Operations of matrix products and of weighted sums of rows, two per multiply-add; everything else (gathers,
    exponentials) is left out."""
    bytes: int
    """Read and written by all operations, each on its own: operands and results. Of a table in which an operation
    looks up or changes rows, only these rows count."""


class Cost(NamedTuple):
    """The cost of one training step of a layer: its loss, and the gradients of the hidden vectors and parameters."""

    parameters: int
    """Trainable numbers."""
    work: Work
    """Operations and memory traffic."""
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

    Memory that the C library kept from earlier work is given back first, but a fresh process is the surer place to
    measure it. Draws of the layer's own generator go on; its gradients are ``None`` afterwards.

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

    work = count_work(step)
    forget()
    extra = extra_bytes(step, hidden.device)
    forget()
    times = []
    for _ in range(repeats):
        times.append(seconds(step, hidden.device))
        forget()
    return Cost(
        parameters=sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad),
        work=work,
        peak_bytes=extra,
        seconds=statistics.median(times),
    )


def count_work(run: Callable[[], Any]) -> Work:
    """Run and count the operations that PyTorch executes, also those inside an ``autograd.Function``."""
    with _TrafficCounter() as traffic, FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
        run()
    return Work(counter.get_total_flops(), traffic.bytes)


def extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Run and return by how much memory grew at the highest point.

    On the CPU that is the high-water mark of the resident set, and so includes what compiled extensions allocate.
    """
    release_free_memory()
    reset_peak(device)
    before = peak_bytes(device)
    run()
    return peak_bytes(device) - before


def seconds(run: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Run and return how long it took, on the CPU by the ``clock``, on CUDA until the device has finished."""
    _synchronize(device)
    start = clock()
    run()
    _synchronize(device)
    return clock() - start


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


def release_free_memory() -> None:
    """Return what is kept for reuse, here and by the C library: it would hide what the next step takes."""
    buffers.release()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it, musl has not
        trim(0)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _product_flops(total: Size, left: Size, right: Size, out_shape: Size, **_: object) -> int:
    return 2 * math.prod(out_shape) * left[-1]


def _sum_flops(total: Tensor, left: Tensor, right: Tensor, **_: object) -> int:
    """Count ``total + left @ right``, where ``left`` may be sparse: then its entries count, not its shape."""
    return 2 * (left._nnz() if left.is_sparse else left.numel()) * right.shape[1]


_sum_flops._get_raw = True  # pyright: ignore[reportFunctionMemberAccess]  # is given tensors, where others get shapes


def _bag_flops(table: Size, row: Size, *_: object, **__: object) -> int:
    return 2 * row[0] * table[1]


def _bag_slope_flops(upstream: Size, *operands: Any, **__: object) -> int:
    return _bag_flops(*operands)


_ATEN = torch.ops.aten

_FLOPS = {
    # Products that add in place, sparse factors, and weighted sums of rows are missing in torch's own table.
    _ATEN.addmm: _sum_flops,
    _ATEN.addmm_: _product_flops,
    _ATEN.baddbmm_: _product_flops,
    _ATEN._embedding_bag: _bag_flops,
    _ATEN._embedding_bag_forward_only: _bag_flops,
    _ATEN._embedding_bag_per_sample_weights_backward: _bag_slope_flops,
}

_UNTOUCHED = {
    _ATEN.empty, _ATEN.new_empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN._unsafe_view, _ATEN.detach, _ATEN._nnz,
}  # fmt: skip
_FILLS = {
    _ATEN.new_zeros, _ATEN.zeros_like, _ATEN.zero_, _ATEN.new_ones, _ATEN.ones_like, _ATEN.new_full, _ATEN.full_like,
    _ATEN.fill_,
}  # fmt: skip
_LOOK_UPS = {_ATEN.index_select, _ATEN.index, _ATEN.gather, _ATEN.embedding, _ATEN.take}
_UPDATES = {
    _ATEN.index_add, _ATEN.index_add_, _ATEN.index_copy, _ATEN.index_copy_, _ATEN.index_put_, _ATEN._index_put_impl_,
    _ATEN.scatter, _ATEN.scatter_, _ATEN.scatter_add, _ATEN.scatter_add_,
}  # fmt: skip
_BAGS = {  # and the place of the table among the operands
    _ATEN._embedding_bag: 0,
    _ATEN._embedding_bag_forward_only: 0,
    _ATEN._embedding_bag_per_sample_weights_backward: 1,
}


class _TrafficCounter(TorchDispatchMode):
    """Adds up :attr:`Work.bytes`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if function.is_view or packet in _UNTOUCHED:
            return result
        given = {name: value for name, value in (kwargs or {}).items() if name != "out"}  # a result, counted as one
        operands = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if packet in _FILLS:
            self.bytes += _total(results)
        elif packet in _LOOK_UPS:
            self.bytes += _total(operands[1:]) + 2 * _total(results)
        elif packet in _UPDATES:
            table, *rest = operands  # the last of the rest has the shape of what changes
            self.bytes += _total(rest) + 2 * rest[-1].numel() * table.element_size()
            if not function._schema.is_mutable:
                self.bytes += 2 * _total([table])
        elif packet in _BAGS:
            table = operands.pop(_BAGS[packet])
            row = operands[_BAGS[packet]]
            self.bytes += row.numel() * table.shape[1] * table.element_size() + _total(operands) + _total(results)
        else:
            self.bytes += _total(operands) + _total(results)
        return result


def _total(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the tensors' values; those of a broadcast one count once."""
    total = 0
    for tensor in tensors:
        if tensor.is_sparse:
            total += _total([tensor._indices(), tensor._values()])
        else:
            shape = zip(tensor.shape, tensor.stride(), strict=True)
            total += tensor.element_size() * math.prod(size for size, stride in shape if stride)
    return total
