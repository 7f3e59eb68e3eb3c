"""The few laws that a contestant must keep to be timed; the tests hold layers to these and more, far more strictly."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from experiments.bench.cell import Batch, Cell, Instance, Unavailable, dense_table, problem
from lvsoftmax.layer import OutputLayer


def broken_law(layer: OutputLayer, batch: Batch, tolerance: float = 1e-3) -> str:
    """Return which of a few laws a layer breaks, in words; an empty string if none.

    ``log_prob`` is normalised, ``nll`` is minus its value at the target, ``loss`` is the weighted sum of ``forward``,
    and the gradients of these two are alike and finite.
    """
    hidden, target, previous, _, weight = batch
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():  # off the start, where symmetries and zeros hide mistakes
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.1 * noise.to(parameter.device, parameter.dtype)
        log_prob = layer.log_prob(hidden)
        off = log_prob.logsumexp(1).abs().max().item()
        if not off <= tolerance:
            return f"log_prob is not normalised: its logsumexp is off by {off:.2g}"
        expected = -log_prob.gather(1, target[:, None]).squeeze(1)
        if not torch.allclose(layer.nll(hidden, target), expected, rtol=tolerance, atol=tolerance):
            return "nll is not minus log_prob of the target"
    sample = layer.draw(hidden, target, previous)
    tensors = [hidden, *layer.parameters()]
    found = []
    for value in (
        layer.loss(hidden, target, weight, previous, sample),
        (weight * layer(hidden, target, previous, sample)).sum(),
    ):
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
        dense = [torch.zeros_like(x) if g is None else g.to_dense() for x, g in zip(tensors, gradients, strict=True)]
        found.append((value.detach(), dense))
    (loss, slopes), (total, reference) = found
    if not torch.allclose(loss, total, rtol=tolerance, atol=tolerance * weight.sum().item()):
        return f"loss is {loss.item():.4g}, the weighted sum of forward {total.item():.4g}"
    for slope, expected in zip(slopes, reference, strict=True):
        if not slope.isfinite().all():
            return "a gradient of loss is not finite"
        if not (slope - expected).norm() <= 10 * tolerance * expected.norm() + 1e-6:
            return "a gradient of loss differs from that of the weighted sum of forward"
    return ""


def difference_to_full_softmax(instance: Instance, cell: Cell) -> str:
    """Return in which way a softmax over ``dense_table`` is wrong, in words; an empty string if in none."""
    batch = problem(cell).batches[0]
    loss = float(instance.modes["train"](batch))
    gradient = batch.hidden.grad
    instance.forget(batch)
    weight, bias = (parameter.detach().float() for parameter in dense_table(cell))
    hidden = batch.hidden.detach().float().requires_grad_()
    truth = F.cross_entropy(F.linear(hidden, weight, bias), batch.target)
    truth.backward()
    tolerance = 1e-4 if cell.precision == "fp32" else 2e-2
    if not abs(loss - truth.item()) <= tolerance * truth.item():
        return f"its loss is {loss:.4g}, the right one {truth.item():.4g}"
    if gradient is None or not (gradient.float() - hidden.grad).norm() <= 10 * tolerance * hidden.grad.norm():
        return "its gradient of the hidden vectors is wrong"
    return ""


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn whatever goes wrong in somebody's code into a reason."""
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(f"fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
