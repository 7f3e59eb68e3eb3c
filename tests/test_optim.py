"""Optimisers: torch's results on dense gradients, the dense step on touched rows of row-sparse ones."""

import inspect
import math
from pathlib import Path

import hydra
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from optimizers import OPTIMIZERS, ROWS, WIDTH, every_optimizer, gradient, some_ids, table
from torch import nn

from lvsoftmax.optim import SGD, Adagrad, Adam, clip_gradient_norm

CONFIGS = Path(__file__).parents[1] / "configs" / "optim"
TORCH = {
    "sgd": lambda p, **more: torch.optim.SGD(p, 0.1, **more),
    "momentum": lambda p, **more: torch.optim.SGD(p, 0.1, momentum=0.9, **more),
    "adagrad": lambda p, **more: torch.optim.Adagrad(p, 0.1, **more),
    "adagrad_start": lambda p, **more: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.3, eps=0.01, **more),
    "adam": lambda p, **more: torch.optim.AdamW(p, 0.1, betas=(0.8, 0.95), eps=1e-3, **{"weight_decay": 0.0, **more}),
}
every_decay = pytest.mark.parametrize("weight_decay", [0.0, 0.2])


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_may_be_one_number(name, dtype):
    scalar, vector = nn.Parameter(torch.tensor(0.5, dtype=dtype)), nn.Parameter(torch.tensor([0.5], dtype=dtype))
    scalar.grad, vector.grad = torch.tensor(0.3, dtype=dtype), torch.tensor([0.3], dtype=dtype)
    optimizer = OPTIMIZERS[name]([scalar, vector])
    for _ in range(2):
        optimizer.step()
    assert scalar == vector and scalar != 0.5


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


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_build_and_list_every_parameter(path):
    config = OmegaConf.load(path)
    assert set(config) - {"defaults"} == {"method", "learning_rate", "output_learning_rate", "clip", "accumulate"}
    optimizer = hydra.utils.instantiate(config.method, [table()], lr=config.learning_rate)
    assert set(config.method) - {"_target_"} == set(inspect.signature(type(optimizer)).parameters) - {"params", "lr"}
