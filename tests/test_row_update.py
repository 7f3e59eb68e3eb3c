"""Row updates: the kernel against plain PyTorch in float64, and who is served by which."""

import pytest
import torch

from lvsoftmax.ops import row_update
from lvsoftmax.ops.row_update import adagrad_rows, reference

KERNEL = row_update.LIBRARY.obstacle(torch.device("cpu"))
needs_kernel = pytest.mark.skipif(KERNEL is not None, reason=str(KERNEL))

SHAPES = [(5, 3, ()), (40, 0, (7,)), (40, 1, (1,)), (40, 40, (7,)), (600, 333, (131,)), (9, 4, (3, 5))]


def problem(words, rows, shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(words)

    def draw(*sizes):
        return torch.rand(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    row = torch.randperm(words, generator=generator)[:rows].sort().values
    return draw(words, *shape) - 0.5, draw(words, *shape), draw(words, *shape), row, 3 * (draw(rows, *shape) - 0.5)


def sgd(module, tensors, decay=0.0, momentum=0.0):
    table, velocity, _, row, gradient = tensors
    module.sgd_rows(table, velocity if momentum else None, row, gradient, lr=0.1, momentum=momentum, decay=decay)


def sgd_with_momentum(module, tensors, decay=0.0):
    sgd(module, tensors, decay, momentum=0.9)


def adagrad(module, tensors, decay=0.0):
    table, first, _, row, gradient = tensors
    module.adagrad_rows(table, first, row, gradient, lr=0.1, epsilon=1e-10, decay=decay)


def adam(module, tensors, decay=0.0):
    table, first, second, row, gradient = tensors
    corrections = (torch.tensor(0.19, dtype=torch.float64), torch.tensor(0.002, dtype=torch.float64))
    module.adam_rows(
        table, first, second, row, gradient, lr=0.1, betas=(0.9, 0.999), corrections=corrections, epsilon=1e-8,
        decay=decay,
    )  # fmt: skip


def with_squares_by_row(update, tensors):
    """The same problem, its state of squares with one number per row."""
    place = 1 if update is adagrad else 2
    squares = tensors[place]
    tensors[place] = squares.reshape(len(squares), -1)[:, 0].reshape(-1, *[1] * (squares.ndim - 1)).contiguous()


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("size", ["element", "row"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("update", [adagrad, adam])
def test_the_kernel_is_as_exact_as_plain_pytorch(update, shape, size, decay, threads):
    torch.set_num_threads(threads)
    found, plain, truth = (list(problem(*shape)) for _ in range(3))
    truth = [x.double() if x.is_floating_point() else x for x in truth]
    for tensors in (found, plain, truth):
        if size == "row":
            with_squares_by_row(update, tensors)
    start = [x.clone() for x in found]
    update(row_update, found, decay)
    update(reference, plain, decay)
    update(reference, truth, decay)
    for own, theirs, exact, before in zip(found[:3], plain[:3], truth[:3], start[:3], strict=True):
        assert (own - exact).abs().max() <= 3 * (theirs - exact).abs().max() + 1e-6
        untouched = torch.ones(len(own), dtype=torch.bool)
        untouched[found[3]] = False
        assert torch.equal(own[untouched], before[untouched])


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("update", [sgd, sgd_with_momentum])
def test_the_kernel_of_gradient_descent_is_as_exact_as_plain_pytorch(update, shape, decay, threads):
    test_the_kernel_is_as_exact_as_plain_pytorch(update, shape, "element", decay, threads)


@needs_kernel
@pytest.mark.parametrize("update", [sgd_with_momentum, adagrad, adam])
def test_the_kernel_runs_where_it_can_and_the_change_is_known_to_autograd(update, monkeypatch):
    calls = []
    call = row_update.LIBRARY.call
    monkeypatch.setattr(row_update.LIBRARY, "call", lambda name, *rest: (calls.append(name), call(name, *rest)))
    tensors = problem(40, 9, (7,))
    versions = [x._version for x in tensors[:2]]
    update(row_update, tensors)
    assert len(calls) == 1
    assert all(x._version > version for x, version in zip(tensors[:2], versions, strict=True))
    strided = [x.T.contiguous().T if x.ndim == 2 and len(x) == 40 else x for x in problem(40, 9, (7,))]
    update(row_update, strided)
    update(row_update, problem(40, 9, (7,), torch.float64))
    assert len(calls) == 1
    torch.testing.assert_close(strided[0], tensors[0])


@pytest.mark.parametrize("update", [sgd, sgd_with_momentum, adagrad, adam])
def test_without_a_compiler_plain_pytorch_serves(update, monkeypatch):
    monkeypatch.setitem(row_update.BACKENDS.obstacles, "cpp", lambda device: "there is no C++ compiler")
    monkeypatch.setattr(row_update.LIBRARY, "call", None)
    found, plain = problem(40, 9, (7,)), problem(40, 9, (7,))
    update(row_update, found)
    update(reference, plain)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_a_rate_may_be_a_tensor():
    found, plain = problem(40, 9, (7,)), problem(40, 9, (7,))
    for tensors, rate in ((found, torch.tensor(0.1)), (plain, 0.1)):
        adagrad_rows(*tensors[:2], *tensors[3:], lr=rate, epsilon=1e-10, decay=0.0)
    torch.testing.assert_close(found[0], plain[0])


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("size", ["element", "row"])
@pytest.mark.parametrize("update", [adagrad, adam])
def test_all_rows_are_those_of_a_list_of_all(update, size, kernel, monkeypatch):
    """By blocks of a few rows where plain PyTorch serves."""
    monkeypatch.setattr(row_update, "BLOCK", 40)
    if not kernel:
        monkeypatch.setitem(row_update.BACKENDS.obstacles, "cpp", lambda device: "there is no C++ compiler")
    found, plain = list(problem(23, 23, (7,))), list(problem(23, 23, (7,)))
    for tensors in (found, plain):
        tensors[3] = torch.arange(23)
        if size == "row":
            with_squares_by_row(update, tensors)
    found[3] = None
    update(row_update, found, 0.1)
    update(reference, plain, 0.1)
    for own, theirs in zip(found[:3], plain[:3], strict=True):
        torch.testing.assert_close(own, theirs)
