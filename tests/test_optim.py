"""Optimisers: torch's results on dense gradients, the dense step on touched rows of row-sparse ones."""

import copy
import inspect
import math
from pathlib import Path

import hydra
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from lvsoftmax import optim
from lvsoftmax.optim import SGD, Adagrad, Adam, clip_gradient_norm

CONFIGS = Path(__file__).parents[1] / "configs" / "optim"
ROWS, WIDTH = 23, 5
OPTIMIZERS = {
    "sgd": lambda p, lr=0.1, **more: SGD(p, lr, **more),
    "momentum": lambda p, lr=0.1, **more: SGD(p, lr, momentum=0.9, **more),
    "adagrad": lambda p, lr=0.1, **more: Adagrad(p, lr, **more),
    "adagrad_start": lambda p, lr=0.1, **more: Adagrad(p, lr, initial_accumulator=0.3, epsilon=0.01, **more),
    "adam": lambda p, lr=0.1, **more: Adam(p, lr, betas=(0.8, 0.95), epsilon=1e-3, **more),
    "adagrad_row": lambda p, lr=0.1, **more: Adagrad(
        p, lr, accumulator="row", initial_accumulator=0.3, epsilon=0.01, **more
    ),
    "adam_row": lambda p, lr=0.1, **more: Adam(p, lr, betas=(0.8, 0.95), second_moment="row", epsilon=1e-3, **more),
}
TORCH = {
    "sgd": lambda p, **more: torch.optim.SGD(p, 0.1, **more),
    "momentum": lambda p, **more: torch.optim.SGD(p, 0.1, momentum=0.9, **more),
    "adagrad": lambda p, **more: torch.optim.Adagrad(p, 0.1, **more),
    "adagrad_start": lambda p, **more: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.3, eps=0.01, **more),
    "adam": lambda p, **more: torch.optim.AdamW(p, 0.1, betas=(0.8, 0.95), eps=1e-3, **{"weight_decay": 0.0, **more}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_decay = pytest.mark.parametrize("weight_decay", [0.0, 0.2])


def table(dtype=torch.float64, *shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(shape or (ROWS, WIDTH), generator=generator, dtype=dtype))


def gradient(step: int, ids: torch.Tensor, *width: int) -> torch.Tensor:
    """A row-sparse gradient with the duplicates of ``ids``, uncoalesced."""
    values = torch.randn(len(ids), *width, generator=torch.Generator().manual_seed(step + 1), dtype=torch.float64)
    return torch.sparse_coo_tensor(ids[None], values, (ROWS, *width), check_invariants=True)


def some_ids(step: int, count: int = 17) -> torch.Tensor:
    return torch.randint(ROWS - 4, (count,), generator=torch.Generator().manual_seed(step + 100))


@pytest.mark.parametrize("name", TORCH)
@every_decay
def test_dense_gradients_give_the_step_of_torch(name, weight_decay):
    ours, theirs, bias = table(), table(), table(torch.float64, WIDTH)
    their_bias = nn.Parameter(bias.detach().clone())
    optimizer = OPTIMIZERS[name]([ours, bias], weight_decay=weight_decay)
    reference = TORCH[name]([theirs, their_bias], weight_decay=weight_decay)
    for step in range(4):
        for mine, other in ((ours, theirs), (bias, their_bias)):
            mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(step), dtype=mine.dtype)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(bias, their_bias, rtol=1e-12, atol=1e-14)


@every_optimizer
@every_decay
@pytest.mark.parametrize("width", [(WIDTH,), ()], ids=["table", "bias"])
def test_first_sparse_step_is_the_dense_step_on_touched_rows(name, weight_decay, width):
    ids = some_ids(0)
    touched = torch.zeros(ROWS, dtype=torch.bool).index_fill_(0, ids, True)
    start = table(torch.float64, ROWS, *width)
    sparse, dense = nn.Parameter(start.detach().clone()), nn.Parameter(start.detach().clone())
    sparse.grad = gradient(0, ids, *width)
    dense.grad = sparse.grad.to_dense()
    OPTIMIZERS[name]([sparse], weight_decay=weight_decay).step()
    OPTIMIZERS[name]([dense], weight_decay=weight_decay).step()
    torch.testing.assert_close(sparse[touched], dense[touched], rtol=1e-12, atol=1e-14)
    assert torch.equal(sparse[~touched], start[~touched])
    assert not touched.all()


@every_optimizer
@every_decay
def test_sparse_steps_that_touch_every_row_are_dense_steps(name, weight_decay):
    sparse, dense = table(), table()
    one, other = (
        OPTIMIZERS[name]([sparse], weight_decay=weight_decay),
        OPTIMIZERS[name]([dense], weight_decay=weight_decay),
    )
    for step in range(5):
        sparse.grad = gradient(step, torch.cat([torch.arange(ROWS), some_ids(step)]), WIDTH)
        dense.grad = sparse.grad.to_dense()
        one.step()
        other.step()
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adagrad_start", "adagrad_row"])
def test_sgd_and_adagrad_are_dense_in_every_step(name):
    sparse, dense = table(), table()
    one, other = OPTIMIZERS[name]([sparse]), OPTIMIZERS[name]([dense])
    for step in range(5):
        sparse.grad = gradient(step, some_ids(step), WIDTH)
        dense.grad = sparse.grad.to_dense()
        one.step()
        other.step()
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-14)


def test_adam_counts_steps_of_the_parameter_and_keeps_the_moments_of_untouched_rows():
    parameter = nn.Parameter(torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    optimizer = Adam([parameter], 0.1, betas=(0.5, 0.75), epsilon=0.0)
    for row, value in ((0, 2.0), (1, 3.0), (0, 4.0)):
        parameter.grad = torch.sparse_coo_tensor([[row]], [[value]], (2, 1), dtype=torch.float64, check_invariants=True)
        optimizer.step()
    # Row 1, touched in step 2 only: m = 3/2, v = 9/4, corrections 3/4 and 7/16.
    second = 2.0 - 0.1 * (1.5 / 0.75) / math.sqrt(2.25 / (7 / 16))
    # Row 0, step 1: m = 1, v = 1, ratio 1. Step 3: m = 1/2 + 2, v = 3/4 + 4, corrections 7/8 and 37/64.
    first = 1.0 - 0.1 - 0.1 * (2.5 / (7 / 8)) / math.sqrt(4.75 / (37 / 64))
    torch.testing.assert_close(parameter.detach(), torch.tensor([[first], [second]], dtype=torch.float64))


def test_momentum_of_untouched_rows_neither_moves_nor_decays():
    parameter = nn.Parameter(torch.zeros(2, 1))
    optimizer = SGD([parameter], 1.0, momentum=0.5)
    for row in (0, 1, 0):
        parameter.grad = torch.sparse_coo_tensor([[row]], [[1.0]], (2, 1), check_invariants=True)
        optimizer.step()
    assert parameter.flatten().tolist() == [-1.0 - 1.5, -1.0]


class Tied(nn.Module):
    """One table read three times, twice as an embedding, with a dense linear layer between."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(table().detach())
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        nn.init.eye_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 0.1)
        self.sparse = sparse

    def forward(self, source, target):
        hidden = self.linear(F.embedding(source, self.weight, sparse=self.sparse)).tanh()
        return (hidden * F.embedding(target, self.weight, sparse=self.sparse)).sum()


@every_optimizer
def test_one_tied_table_with_two_sparse_gradients(name):
    sparse, dense = Tied(True), Tied(False)
    one, other = OPTIMIZERS[name](sparse.parameters()), OPTIMIZERS[name](dense.parameters())
    steps = 1 if name in ("momentum", "adam", "adam_row") else 3
    for step in range(steps):
        source, target = some_ids(step), some_ids(step + 50)
        for model, optimizer in ((sparse, one), (dense, other)):
            optimizer.zero_grad()
            model(source, target).backward()
        assert sparse.weight.grad.is_sparse and not dense.weight.grad.is_sparse
        one_norm, other_norm = clip_gradient_norm(sparse.parameters(), 1.0), clip_gradient_norm(dense.parameters(), 1.0)
        torch.testing.assert_close(one_norm, other_norm, rtol=1e-12, atol=0)
        one.step()
        other.step()
    for mine, reference in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-14)


@every_optimizer
@pytest.mark.parametrize("order", ["embedding first", "output first"])
def test_one_tied_table_with_a_sparse_and_a_dense_gradient(name, order):
    sparse, dense = table(), table()
    one, other = OPTIMIZERS[name]([sparse]), OPTIMIZERS[name]([dense])
    for step in range(3):
        for parameter, optimizer, is_sparse in ((sparse, one, True), (dense, other, False)):
            optimizer.zero_grad()
            hidden = F.embedding(some_ids(step), parameter, sparse=is_sparse)
            logits = hidden @ parameter.T
            terms = [logits.logsumexp(1).sum(), hidden.sin().sum()]
            for term in terms if order == "embedding first" else reversed(terms):
                term.backward(retain_graph=True)
        clip_gradient_norm([sparse], 1.0)
        clip_gradient_norm([dense], 1.0)
        one.step()
        other.step()
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-14)


def test_a_parameter_may_change_between_sparse_and_dense_gradients():
    for name, make in OPTIMIZERS.items():
        switching, dense = table(), table()
        one, other = make([switching]), make([dense])
        for step in range(4):
            full = gradient(step, torch.arange(ROWS), WIDTH)
            switching.grad, dense.grad = full if step % 2 else full.to_dense(), full.to_dense()
            one.step()
            other.step()
        torch.testing.assert_close(switching, dense, rtol=1e-12, atol=1e-14, msg=name)


@every_optimizer
def test_accumulated_batches_are_one_large_batch(name):
    pieces, whole = Tied(True), Tied(True)
    one, other = OPTIMIZERS[name](pieces.parameters()), OPTIMIZERS[name](whole.parameters())
    source, target = some_ids(0, 24), some_ids(50, 24)
    for part in range(4):
        pieces(source[part::4], target[part::4]).backward()
    whole(source, target).backward()
    torch.testing.assert_close(
        clip_gradient_norm(pieces.parameters(), 0.5), clip_gradient_norm(whole.parameters(), 0.5)
    )
    one.step()
    other.step()
    for mine, reference in zip(pieces.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-14)


def test_clipping_counts_duplicates_and_replaces_the_gradient_by_its_coalesced_form():
    sparse, dense, without = table(), table(torch.float64, WIDTH), table()
    ids = torch.tensor([3, 3, 7, 3])
    sparse.grad, dense.grad = gradient(0, ids, WIDTH), torch.full((WIDTH,), 2.0, dtype=torch.float64)
    expected = torch.cat([sparse.grad.to_dense().flatten(), dense.grad]).norm()
    before, dense_before = sparse.grad.to_dense(), dense.grad
    assert torch.equal(clip_gradient_norm([sparse, dense, without], math.inf), expected)
    assert sparse.grad.is_coalesced() and torch.equal(sparse.grad.to_dense(), before)
    norm = clip_gradient_norm([sparse, dense, without], float(expected) / 4)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(sparse.grad.to_dense(), before / 4)
    assert dense.grad is dense_before and sparse.grad.is_coalesced()
    torch.testing.assert_close(dense.grad, torch.full((WIDTH,), 0.5, dtype=torch.float64))
    assert without.grad is None


def test_clipping_leaves_small_gradients_alone_and_lets_broken_ones_be_seen():
    parameter = table()
    parameter.grad = torch.zeros_like(parameter)
    assert clip_gradient_norm([parameter], 1.0) == 0
    assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    parameter.grad[0, 0] = math.inf
    assert clip_gradient_norm([parameter], 1.0).isinf()
    assert not parameter.grad.isfinite().all()
    assert clip_gradient_norm([table()], 1.0) == 0


@every_optimizer
@pytest.mark.parametrize("sparse", [True, False])
def test_a_restored_optimizer_continues_bit_for_bit(name, sparse):
    def train(parameter, optimizer, steps):
        for step in steps:
            parameter.grad = gradient(step, some_ids(step), WIDTH)
            if not sparse:
                parameter.grad = parameter.grad.to_dense()
            optimizer.step()

    parameter = table()
    optimizer = OPTIMIZERS[name]([parameter])
    train(parameter, optimizer, range(3))
    saved, saved_parameter = copy.deepcopy(optimizer.state_dict()), parameter.detach().clone()
    train(parameter, optimizer, range(3, 6))

    restored = nn.Parameter(saved_parameter)
    other = OPTIMIZERS[name]([restored], lr=123.0)
    other.load_state_dict(saved)
    train(restored, other, range(3, 6))
    assert torch.equal(parameter, restored)


@every_optimizer
@pytest.mark.parametrize("sparse", [True, False])
def test_the_rate_of_a_group_may_change_and_may_be_a_tensor(name, sparse):
    results = []
    for kind in (float, lambda rate: torch.tensor(rate, dtype=torch.float64)):
        parameter, other = table(), table()
        optimizer = OPTIMIZERS[name]([{"params": [parameter]}, {"params": [other], "lr": kind(0.3)}], lr=kind(0.1))
        for step, rate in enumerate((0.1, 0.5)):
            optimizer.param_groups[0]["lr"] = kind(rate)
            for member in (parameter, other):
                member.grad = gradient(step, some_ids(step), WIDTH)
                if not sparse:
                    member.grad = member.grad.to_dense()
            optimizer.step()
        assert not torch.allclose(parameter, other)
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


@every_optimizer
def test_a_sparse_gradient_without_rows_changes_nothing(name):
    parameter = table()
    parameter.grad = gradient(0, torch.empty(0, dtype=torch.int64), WIDTH)
    assert clip_gradient_norm([parameter], 1.0) == 0
    OPTIMIZERS[name]([parameter]).step()
    assert torch.equal(parameter, table())


@every_optimizer
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, WIDTH), (0,), (ROWS, 0)], ids=str)
def test_a_parameter_without_numbers_has_nothing_to_update(name, shape, dtype, sparse):
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
    parameter.grad = torch.empty(shape, dtype=dtype).to_sparse(1) if sparse else torch.empty(shape, dtype=dtype)
    OPTIMIZERS[name]([parameter]).step()
    assert parameter.shape == shape


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_may_be_one_number(name, dtype):
    scalar, vector = nn.Parameter(torch.tensor(0.5, dtype=dtype)), nn.Parameter(torch.tensor([0.5], dtype=dtype))
    scalar.grad, vector.grad = torch.tensor(0.3, dtype=dtype), torch.tensor([0.3], dtype=dtype)
    optimizer = OPTIMIZERS[name]([scalar, vector])
    for _ in range(2):
        optimizer.step()
    assert scalar == vector and scalar != 0.5


@every_optimizer
def test_the_rows_of_a_gradient_may_lie_apart_in_memory(name):
    first, second = (table(torch.float32) for _ in range(2))
    index, values = torch.tensor([[2, 0], [5, 0], [11, 0]]), torch.randn(3, WIDTH)
    for parameter, row in ((first, index[:, 0]), (second, index[:, 0].clone())):
        parameter.grad = torch.sparse_coo_tensor(row[None], values, parameter.shape, check_invariants=False)
        OPTIMIZERS[name]([parameter]).step()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("sparse", [True, False])
def test_momentum_may_start_late(sparse):
    ours, theirs = table(), table()
    optimizer, reference = SGD([ours], 0.1), torch.optim.SGD([theirs], 0.1)
    for step in range(4):
        if step == 1:
            optimizer.param_groups[0]["momentum"] = reference.param_groups[0]["momentum"] = 0.9
        theirs.grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(step), dtype=theirs.dtype)
        ours.grad = theirs.grad.to_sparse(1) if sparse else theirs.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@every_optimizer
def test_sparse_steps_allocate_no_table(name):
    rows = 200_000
    parameter = nn.Parameter(torch.zeros(rows, 4))
    optimizer = OPTIMIZERS[name]([parameter])
    ids = torch.arange(0, 50)

    def step():
        parameter.grad = torch.sparse_coo_tensor(ids[None], torch.ones(50, 4), (rows, 4), check_invariants=False)
        clip_gradient_norm([parameter], 1.0)
        optimizer.step()

    step()  # allocates the state
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < parameter.nbytes / 100


@pytest.mark.parametrize("sparse", [True, False])
def test_one_number_per_row_is_the_mean_of_the_squares(sparse):
    """Written out, of two steps on one row of two numbers: squares 1 and 9, then 4 and 4."""
    gradients = [torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, -2.0]])]
    adagrad, adam = (nn.Parameter(torch.zeros(1, 2, dtype=torch.float64)) for _ in range(2))
    optimizers = [
        Adagrad([adagrad], 1.0, accumulator="row", epsilon=0.0),
        Adam([adam], 1.0, betas=(0.5, 0.75), second_moment="row", epsilon=0.0),
    ]
    for gradient in gradients:
        for parameter, optimizer in zip((adagrad, adam), optimizers, strict=True):
            parameter.grad = gradient.double().to_sparse(1) if sparse else gradient.double()
            optimizer.step()
    expected = -gradients[0] / math.sqrt(5) - gradients[1] / math.sqrt(9)
    torch.testing.assert_close(adagrad.detach(), expected.double())
    # v = 5/4, then 15/16 + 1; m = g1 / 2, then g1 / 4 + g2 / 2; corrections 1/2 and 1/4, then 3/4 and 7/16
    first = (gradients[0] / 2 / (1 / 2)) / math.sqrt((5 / 4) / (1 / 4))
    second = ((gradients[0] / 4 + gradients[1] / 2) / (3 / 4)) / math.sqrt((15 / 16 + 1) / (7 / 16))
    torch.testing.assert_close(adam.detach(), -(first + second).double())
    assert optimizers[0].state[adagrad]["sum"].shape == optimizers[1].state[adam]["second"].shape == (1, 1)


@every_optimizer
@pytest.mark.parametrize("sparse", [True, False])
def test_parameters_of_low_precision_are_updated_in_float32_and_rounded_once(name, sparse):
    low, exact = table(torch.bfloat16), nn.Parameter(table(torch.bfloat16).detach().double())
    one, other = OPTIMIZERS[name]([low]), OPTIMIZERS[name]([exact])
    for step in range(3):
        low.grad = gradient(step, some_ids(step), WIDTH).bfloat16().coalesce()
        exact.grad = low.grad.double()
        if not sparse:
            low.grad, exact.grad = low.grad.to_dense(), exact.grad.to_dense()
        one.step()
        other.step()
        unrounded = exact.detach().clone()
        with torch.no_grad():
            exact.copy_(exact.bfloat16())
        assert (low.double() - unrounded).abs().max() <= 2**-8 * unrounded.abs().max()
        mistaken = (low.double() != exact).double().mean()
        assert mistaken <= 0.02  # float32 and float64 differ where a tie is close
        with torch.no_grad():
            exact.copy_(low)
    assert all(value.dtype == torch.float32 for value in one.state[low].values())


@every_optimizer
def test_a_restored_optimizer_keeps_the_digits_of_its_state(name):
    parameter = table(torch.bfloat16)
    optimizer = OPTIMIZERS[name]([parameter])
    parameter.grad = gradient(0, some_ids(0), WIDTH).bfloat16()
    optimizer.step()
    other = OPTIMIZERS[name]([nn.Parameter(parameter.detach().clone())])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    (mine,), (theirs,) = optimizer.state_dict()["state"].values(), other.state_dict()["state"].values()
    if name == "sgd":
        assert not mine and not theirs
    for key, value in mine.items():
        assert value.dtype == torch.float32 and torch.equal(value, theirs[key])


@every_optimizer
@pytest.mark.parametrize("sparse", [True, False])
def test_running_out_of_memory_leaves_parameters_and_state_alone(name, sparse, monkeypatch):
    first, second = table(), table()
    optimizer = OPTIMIZERS[name]([first, second])
    for parameter in (first, second):
        parameter.grad = gradient(0, some_ids(0), WIDTH)
        parameter.grad = parameter.grad if sparse else parameter.grad.to_dense()
    start, calls = optimizer._start, []

    def full(group, parameter):
        calls.append(parameter)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return start(group, parameter)

    monkeypatch.setattr(optimizer, "_start", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert torch.equal(first, table()) and torch.equal(second, table())
    assert not optimizer.state
    monkeypatch.undo()
    optimizer.step()
    assert torch.equal(first, second) and not torch.equal(first, table())


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_steps_allocate_no_table(name, dtype):
    rows = 400_000
    parameter = nn.Parameter(torch.zeros(rows, 8, dtype=dtype))
    optimizer = OPTIMIZERS[name]([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # allocates the state
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    assert max((event.cpu_memory_usage for event in profile.events()), default=0) < rows * 8 * 4 / 4


@pytest.mark.parametrize("rows", [[1, 3, 4], [3, 1, 4], [1, 3, 3], [2], []], ids=str)
def test_rows_that_are_in_order_are_not_sorted_again(rows, monkeypatch):
    """Autograd loses the flag; what it hands on is looked at, and coalesced only where it has to be."""
    values = torch.randn(len(rows), WIDTH, dtype=torch.float64)
    index = torch.tensor([rows], dtype=torch.int64)
    given = torch.sparse_coo_tensor(index, values, (ROWS, WIDTH), check_invariants=False)
    expected = given.coalesce()
    in_order = rows == sorted(set(rows))
    if in_order and not given.is_coalesced():  # as one row alone is
        monkeypatch.setattr(torch.Tensor, "coalesce", None)
    row, value = optim._rows(given)
    assert torch.equal(row, expected.indices()[0]) and torch.equal(value, expected.values())
    assert (value.data_ptr() == given._values().data_ptr()) == in_order or not rows


@pytest.mark.parametrize("sparse", [True, False])
def test_gradients_are_forgotten_or_set_to_zero(sparse):
    parameters = [table(), table(), table()]
    optimizer = SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], 0.1)
    for parameter in parameters[:2]:
        parameter.grad = gradient(0, some_ids(0), WIDTH) if sparse else torch.ones(ROWS, WIDTH, dtype=torch.float64)
    optimizer.zero_grad(set_to_none=False)
    for parameter in parameters[:2]:
        assert torch.equal(parameter.grad.to_dense(), torch.zeros(ROWS, WIDTH, dtype=torch.float64))
    assert parameters[2].grad is None
    optimizer.zero_grad()
    assert [parameter.grad for parameter in parameters] == [None] * 3


def test_closure_is_called_with_gradients_on():
    parameter = table()
    optimizer = SGD([parameter], 0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    before = parameter.detach().clone()
    assert optimizer.step(closure) == before.square().sum()
    torch.testing.assert_close(parameter.detach(), before * 0.8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD(p, -1.0), "learning rate -1.0"),
        (lambda p: SGD(p, 1.0, momentum=1.0), "momentum=1.0"),
        (lambda p: SGD(p, 1.0, weight_decay=-0.1), "weight_decay=-0.1"),
        (lambda p: Adagrad(p, 1.0, initial_accumulator=-1.0), "initial_accumulator=-1.0"),
        (lambda p: Adagrad(p, 1.0, epsilon=-1.0), "epsilon=-1.0"),
        (lambda p: Adam(p, 1.0, betas=(0.9, 1.0)), "betas="),
        (lambda p: Adagrad(p, 1.0, accumulator="table"), "accumulator='table': choose element or row"),
        (lambda p: Adam(p, 1.0, second_moment="table"), "second_moment='table': choose element or row"),
        (lambda p: Adam(p, math.nan), "learning rate nan"),
        (lambda p: clip_gradient_norm(p, 0.0), "clip=0.0"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make([table()])


def test_a_gradient_sparse_in_its_columns_is_refused():
    parameter = table()
    parameter.grad = torch.randn(ROWS, WIDTH, dtype=torch.float64).to_sparse()
    with pytest.raises(ValueError, match="2 sparse dimensions"):
        SGD([parameter], 0.1).step()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_build_and_list_every_parameter(path):
    config = OmegaConf.load(path)
    assert set(config) - {"defaults"} == {"method", "learning_rate", "output_learning_rate", "clip", "accumulate"}
    optimizer = hydra.utils.instantiate(config.method, [table()], lr=config.learning_rate)
    assert set(config.method) - {"_target_"} == set(inspect.signature(type(optimizer)).parameters) - {"params", "lr"}
