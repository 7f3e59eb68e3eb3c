"""Optimisers that take dense and row-sparse gradients in one object.

A table of a million rows of which a step touches a few thousand must be updated in those rows only, or the update costs
more than everything before it. Layers mark such tables with ``sparse=True``; their gradient is then a sparse COO tensor
with one sparse dimension, the row. The other parameters of a model have dense gradients. One optimiser serves both, and
a parameter may change from one kind to the other between steps (torch adds a sparse and a dense gradient of one tied
table to a dense one).

Dense gradients go through torch's own fused kernels. A row-sparse gradient is coalesced once (unique rows, summed
values), and the update reads and writes these rows only (:mod:`lvsoftmax.ops.row_update`): no temporary has the size of
the table. On CUDA, coalescing needs the number of unique rows on the host; nothing else here waits for the device.

**Untouched rows are left alone** ("lazy" updates):

* moments, momentum and accumulators of a row neither decay nor move a row in a step that does not touch it,
* weight decay applies to the rows touched by a step, so that a rare word decays less than a frequent one,
* Adam's bias correction counts the steps of the whole parameter, not those of the row.

In a step that touches every row the result is that of the dense step. SGD without momentum and Adagrad give the dense
result in every step (without weight decay); for Adam and for momentum the rows that a step does not touch differ.

State is allocated and written once, at the first step that has a gradient for it: the first step is slower than the
others, and memory grows there and never again. It has the shape of the parameter; the squares of Adagrad and Adam may
instead have one number per row (``accumulator="row"``, ``second_moment="row"``), the mean over it: next to nothing for
a table, at a rate shared by the row. Running out of memory there leaves parameters and state as they were.

State is float32 at least. Parameters in bfloat16 or float16 are updated in float32 and rounded once, but what is
smaller than their last digit is lost: with autocast the parameters themselves stay in float32, which is better.

Parameters sharded as DTensors (FSDP2) are updated by torch's unfused kernels: dense gradients, float32 or float64, and
state by element.
"""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from lvsoftmax.ops.buffers import empty_table
from lvsoftmax.ops.row_update import adagrad_rows, adam_rows, sgd_rows


class _RowSparseOptimizer(Optimizer):
    """The loop that the optimisers share: start a parameter's state, then update it by the kind of its gradient."""

    def __init__(self, params: Iterable[Any], lr: float | Tensor, weight_decay: float, **defaults: Any) -> None:
        _check(lr >= 0, f"learning rate {lr}: must not be negative")
        _check(weight_decay >= 0, f"weight_decay={weight_decay}: must not be negative")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what ``closure`` (called with gradients on) returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # What needs memory, and what cannot be done, comes before the first change.
        parameters = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        started = {p: self._start(group, p) for p, group in parameters if not self._is_started(group, p)}
        rows = {p: _rows(p.grad) for p, _ in parameters if p.grad.is_sparse}
        by_row = {p for p, group in parameters if p in rows or not self._fuses(group, p)}
        _check(
            _are_plain(by_row),
            "a sharded parameter (DTensor) has no rows in memory to update: keep it in float32 or float64, its "
            "gradient dense (sparse=False) and its state by element, not by row",
        )
        self.state.update(started)
        for group in self.param_groups:
            fused = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter in by_row:
                    touched, gradient = rows.get(parameter) or (None, parameter.grad)
                    self._update_rows(group, parameter, touched, gradient, self.state[parameter])
                else:
                    fused.append(parameter)
            if fused:
                self._update(group, fused, [p.grad for p in fused], [self.state[p] for p in fused])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set them to zero; without torch's entry for a profiler, half of its time."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that ``state_dict`` returned; torch would round it to the parameters' precision."""
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name == "step" or not isinstance(value, Tensor):
                    continue
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                if self.state[parameter][name].dtype != dtype:
                    self.state[parameter][name] = value.to(parameter.device, dtype, copy=True)

    def _is_started(self, group: dict[str, Any], parameter: Tensor) -> bool:
        """Return whether a parameter has the state that its update needs."""
        return parameter in self.state

    def _fuses(self, group: dict[str, Any], parameter: Tensor) -> bool:
        """Return whether torch's fused kernels know the update of this parameter's dense gradient."""
        return parameter.dtype in (torch.float32, torch.float64)

    @abstractmethod
    def _start(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]: ...

    @abstractmethod
    def _update(
        self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]]
    ) -> None: ...

    @abstractmethod
    def _update_rows(
        self, group: dict[str, Any], parameter: Tensor, rows: Tensor | None, gradient: Tensor, state: dict[str, Tensor]
    ) -> None: ...


@final
class SGD(_RowSparseOptimizer):
    """Stochastic gradient descent: ``m <- momentum m + g + weight_decay p``, ``p <- p - lr m``.

    On dense gradients this is ``torch.optim.SGD`` without dampening or Nesterov's look-ahead.

    Args:
        params: parameters or groups of them.
        lr: learning rate, a number or a tensor of no dimension.
        momentum: 0 needs no state, which starts when a group's momentum is raised from there.
        weight_decay: L2 penalty; touched rows only where the gradient is row-sparse.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor, *, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        _check(0 <= momentum < 1, f"momentum={momentum}: must be in [0, 1)")
        super().__init__(params, lr, weight_decay, momentum=momentum)

    def _is_started(self, group, parameter):
        return parameter in self.state and (not group["momentum"] or "momentum" in self.state[parameter])

    def _start(self, group, parameter):
        return {"momentum": _zeros(parameter)} if group["momentum"] else {}

    def _update(self, group, parameters, gradients, states):
        sgd(
            parameters,
            gradients,
            [state.get("momentum") for state in states],
            fused=_are_plain(parameters) or None,
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def _update_rows(self, group, parameter, rows, gradient, state):
        sgd_rows(
            parameter,
            state.get("momentum"),
            rows,
            gradient,
            lr=group["lr"],
            momentum=group["momentum"],
            decay=group["weight_decay"],
        )


@final
class Adagrad(_RowSparseOptimizer):
    """Adagrad: ``s <- s + g^2``, ``p <- p - lr g / (sqrt(s) + epsilon)`` per element.

    Duchi, Hazan & Singer 2011, Adaptive Subgradient Methods, figure 1 with a diagonal matrix (there ``delta`` is
    ``epsilon``). The paper has no weight decay; here it is an L2 penalty added to ``g``. On dense gradients this is
    ``torch.optim.Adagrad``.

    With ``accumulator="row"`` a row of D elements shares ``s <- s + sum(g^2) / D``: Lerer et al. 2019,
    PyTorch-BigGraph: A Large-scale Graph Embedding System, where a vector's accumulated gradient is one number.

    Args:
        params: parameters or groups of them.
        lr: learning rate, a number or a tensor of no dimension.
        accumulator: what has an ``s`` of its own, each ``element`` or each ``row`` (an index of dimension 0).
        initial_accumulator: where ``s`` starts.
        epsilon: added to the root.
        weight_decay: L2 penalty; touched rows only where the gradient is row-sparse.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        accumulator: Literal["element", "row"] = "element",
        initial_accumulator: float = 0.0,
        epsilon: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        _check(initial_accumulator >= 0, f"initial_accumulator={initial_accumulator}: must not be negative")
        _check(epsilon >= 0, f"epsilon={epsilon}: must not be negative")
        _check_size("accumulator", accumulator)
        defaults = {"accumulator": accumulator, "initial_accumulator": initial_accumulator, "epsilon": epsilon}
        super().__init__(params, lr, weight_decay, **defaults)

    def _start(self, group, parameter):
        return {"sum": _zeros(parameter, group["accumulator"]).fill_(group["initial_accumulator"])}

    def _fuses(self, group, parameter):
        return super()._fuses(group, parameter) and not _keeps_one_per_row(parameter, group["accumulator"])

    def _update(self, group, parameters, gradients, states):
        adagrad(
            parameters,
            gradients,
            [state["sum"] for state in states],
            # Their steps serve a decay of the rate, which the schedules do here.
            [torch.zeros((), device="cpu")] * len(states),
            fused=(_are_plain(parameters) and all(p.is_cpu for p in parameters)) or None,  # no fused kernel on CUDA
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            lr_decay=0.0,
            eps=group["epsilon"],
            maximize=False,
        )

    def _update_rows(self, group, parameter, rows, gradient, state):
        adagrad_rows(
            parameter,
            state["sum"],
            rows,
            gradient,
            lr=group["lr"],
            epsilon=group["epsilon"],
            decay=group["weight_decay"],
        )


@final
class Adam(_RowSparseOptimizer):
    """Adam with decoupled weight decay.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, and with ``t`` the number of steps in which the parameter
    had a gradient ``p <- p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon) + weight_decay p)``.

    Kingma & Ba 2015, Adam, algorithm 1; Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization, algorithm 2.
    On dense gradients this is ``torch.optim.AdamW``. Row-sparse gradients follow the lazy rules at the top of this
    module, as ``torch.optim.SparseAdam`` does: a word that comes back after a long absence has its old moments.

    With ``second_moment="row"`` a row of D elements shares ``v <- b2 v + (1 - b2) sum(g^2) / D``, as in Zhang et al.
    2024, Adam-mini: Use Fewer Learning Rates To Gain More, for tables with a row per word.

    Args:
        params: parameters or groups of them.
        lr: learning rate, a number or a tensor of no dimension.
        betas: decay of the two moments.
        second_moment: what has a ``v`` of its own, each ``element`` or each ``row`` (an index of dimension 0).
        epsilon: added to the root.
        weight_decay: share of the learning rate; touched rows only where the gradient is row-sparse.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        betas: Sequence[float] = (0.9, 0.999),
        second_moment: Literal["element", "row"] = "element",
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _check(len(betas) == 2 and all(0 <= b < 1 for b in betas), f"betas={betas}: must be two numbers in [0, 1)")
        _check(epsilon >= 0, f"epsilon={epsilon}: must not be negative")
        _check_size("second_moment", second_moment)
        # The key `fused` makes load_state_dict put the step counter where the fused kernel wants it.
        defaults = {"betas": tuple(betas), "second_moment": second_moment, "epsilon": epsilon, "fused": True}
        super().__init__(params, lr, weight_decay, **defaults)

    def _start(self, group, parameter):
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "first": _zeros(parameter),
            "second": _zeros(parameter, group["second_moment"]),
        }

    def _fuses(self, group, parameter):
        return super()._fuses(group, parameter) and not _keeps_one_per_row(parameter, group["second_moment"])

    def _update(self, group, parameters, gradients, states):
        adam(
            parameters,
            gradients,
            [state["first"] for state in states],
            [state["second"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            decoupled_weight_decay=True,
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["epsilon"],
            maximize=False,
        )

    def _update_rows(self, group, parameter, rows, gradient, state):
        beta1, beta2 = group["betas"]
        # A tensor on the parameter's device, so that nothing waits for it; float64, where 1 - b2^t keeps its digits.
        step = state["step"].double() + 1
        adam_rows(
            parameter,
            state["first"],
            state["second"],
            rows,
            gradient,
            lr=group["lr"],
            betas=group["betas"],
            corrections=(1 - beta1**step, 1 - beta2**step),
            epsilon=group["epsilon"],
            decay=group["weight_decay"],
        )
        state["step"] += 1


@torch.no_grad()
def clip_gradient_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients, in place, by ``min(1, max_norm / norm)``; return the ``norm`` they had together.

    Pascanu, Mikolov & Bengio 2013, On the difficulty of training recurrent neural networks, algorithm 1, with the
    Euclidean norm over all parameters. Row-sparse gradients count as the dense gradients they stand for: duplicate rows
    are summed first, and ``grad`` is replaced by its coalesced form, which the optimisers do not coalesce again.
    Unlike ``torch.nn.utils.clip_grad_norm_`` it adds no 1e-6 to the norm. A norm that is not finite makes the
    gradients so, for the training loop to see.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: largest norm allowed; ``math.inf`` only measures.

    Returns:
        The norm before clipping, a tensor of no dimension on the gradients' device.

    Raises:
        ValueError: ``max_norm`` is not positive.
    """
    _check(max_norm > 0, f"clip={max_norm}: must be positive; null turns clipping off")
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = _coalesced(parameter.grad)
            values.append(parameter.grad._values())
        else:
            values.append(parameter.grad)
    norm = torch.nn.utils.get_total_norm(values)
    if max_norm < math.inf and not (norm.device.type == "cpu" and norm <= max_norm):  # elsewhere asking would wait
        scale = (max_norm / norm).clamp(max=1).where(norm.isfinite(), math.nan)
        for value in values:
            value.mul_(scale.to(value.device))
    return norm


def _rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unique rows of a row-sparse gradient and the sum of its values in each."""
    dimensions = gradient.sparse_dim()
    if dimensions != 1:
        raise ValueError(f"a sparse gradient of {dimensions} sparse dimensions: only whole rows (one) can be updated")
    gradient = _coalesced(gradient)
    return gradient._indices()[0].contiguous(), gradient._values()


def _coalesced(gradient: Tensor) -> Tensor:
    """Return a row-sparse gradient with every row once, in order.

    Layers make them so, but the flag that says it is lost on the way through autograd: to look at the rows again is
    cheap on the CPU, and a copy of all values is not.
    """
    if gradient.is_coalesced() or not gradient.is_cpu or gradient.sparse_dim() != 1:
        return gradient.coalesce()
    row = gradient._indices()[0]
    return gradient._coalesced_(True) if bool((row[1:] > row[:-1]).all()) else gradient.coalesce()


def _check(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _keeps_one_per_row(parameter: Tensor, size: str) -> bool:
    """Return whether state of a size is one number per row, and not of the parameter's shape."""
    return size == "row" and parameter.ndim > 1


def _zeros(parameter: Tensor, size: str = "element") -> Tensor:
    """Return zeros in the precision of sums, of the parameter's shape or with one number per row.

    Memory that the system gives only when it is touched would be given row by row as rare words occur, at the price of
    a page fault each: a table's state is touched here, at once.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if _keeps_one_per_row(parameter, size):
        return parameter.new_zeros(len(parameter), *(1 for _ in parameter.shape[1:]), dtype=dtype)
    if parameter.ndim == 2 and parameter.is_cpu and _are_plain([parameter]):
        rows, width = parameter.shape
        return empty_table(rows, width, dtype, parameter.device).zero_()
    return torch.zeros_like(parameter, dtype=dtype)


def _are_plain(parameters: Iterable[Tensor]) -> bool:
    """Return whether all are torch's own tensors: fused kernels, and updates by row, know no DTensor of FSDP2."""
    return all(type(parameter) in (Tensor, Parameter) for parameter in parameters)


def _check_size(name: str, size: str) -> None:
    _check(size in ("element", "row"), f"{name}={size!r}: choose element or row")
