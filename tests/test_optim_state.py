"""What optimisers keep: restored bit for bit, in float32 at least, allocated once; the memory of a step."""

import copy
import math

import pytest
import torch
from optimizers import OPTIMIZERS, WIDTH, every_optimizer, gradient, some_ids, table
from torch import nn

from lvsoftmax.optim import Adagrad, Adam, clip_gradient_norm


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
    for each in gradients:
        for parameter, optimizer in zip((adagrad, adam), optimizers, strict=True):
            parameter.grad = each.double().to_sparse(1) if sparse else each.double()
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
def test_a_state_of_single_precision_serves_parameters_made_double(name, sparse):
    single = table(torch.float32)
    optimizer = OPTIMIZERS[name]([single])
    single.grad = gradient(0, some_ids(0), WIDTH).float()
    optimizer.step()
    double = nn.Parameter(single.detach().double())
    other = OPTIMIZERS[name]([double])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in (single, double):
        parameter.grad = gradient(1, some_ids(1), WIDTH).to(parameter.dtype)
        parameter.grad = parameter.grad if sparse else parameter.grad.to_dense()
    optimizer.step()
    other.step()
    torch.testing.assert_close(double.float(), single, rtol=1e-5, atol=1e-6)
    assert all(value.dtype == torch.float64 for key, value in other.state[double].items() if key != "step")


@every_optimizer
@pytest.mark.parametrize("sparse", [True, False])
def test_the_default_device_is_no_matter(name, sparse):
    here, there = table(), table()
    for parameter, device in ((here, "cpu"), (there, "meta")):
        parameter.grad = gradient(0, some_ids(0), WIDTH)
        parameter.grad = parameter.grad if sparse else parameter.grad.to_dense()
        with torch.device(device):
            OPTIMIZERS[name]([parameter]).step()
    assert torch.equal(here, there)


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
