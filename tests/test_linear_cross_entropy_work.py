"""What the fused cross-entropy takes: memory, products, copies, and the threads that there are."""

import os
import subprocess
import sys

import pytest
import torch
from cases import LargestResult
from cross_entropies import D, N, V, operands
from torch.utils.flop_counter import FlopCounterMode

from lvsoftmax.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_loss, native, reference

pytestmark = pytest.mark.usefixtures("blocks_of_few_tokens")


def test_no_array_holds_a_logit_per_token_and_word(backend):
    *tensors, target = operands()
    with LargestResult() as largest:
        linear_cross_entropy(*tensors, target, backend=backend).sum().backward()
        ones = torch.ones(N, dtype=torch.float64)
        linear_cross_entropy_loss(*tensors, target, ones, backend=backend).backward()
    assert largest.entries <= max(reference.BLOCK, V * D) < N * V


def test_autograd_takes_the_gradients_without_copying_them(backend):
    *tensors, target = operands()
    loss = linear_cross_entropy_loss(*tensors, target, torch.ones(N, dtype=torch.float64), backend=backend)
    made = [gradient.data_ptr() for gradient in loss.grad_fn.gradients if gradient is not None]
    loss.backward()
    assert [tensor.grad.data_ptr() for tensor in tensors] == made


def test_the_weighted_sum_is_differentiated_once(backend):
    *tensors, target = operands()
    loss = linear_cross_entropy_loss(*tensors, target, torch.ones(N, dtype=torch.float64), backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once; use the per-token one"):
        loss.backward()


def test_operations_are_counted(backend):
    """Three products for the loss, four by the token, one without gradients; Triton has four for the loss as well."""
    *tensors, target = operands()
    product = 2 * N * D * V

    def count(step):
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops() / product

    ones = torch.ones(N, dtype=torch.float64)
    in_place = 1 if backend == "eager" else 0  # a product that adds in place is missing in torch's own table
    loss = count(lambda: linear_cross_entropy_loss(*tensors, target, ones, backend=backend))
    assert loss == (4 if backend == "triton" else 3 - in_place)
    assert count(lambda: linear_cross_entropy(*tensors, target, backend=backend).sum().backward()) == 4 - in_place
    with torch.no_grad():
        assert count(lambda: linear_cross_entropy(*tensors, target, backend=backend)) == 1
        assert count(lambda: linear_cross_entropy_loss(*tensors, target, ones, backend=backend)) == 1


def test_results_do_not_depend_on_the_weather(backend):
    """Sums are taken in one order, whichever thread is faster."""
    *tensors, target = operands(torch.float32, 70, 33, 900)
    torch.set_num_threads(3)
    ones = torch.ones(70)
    runs = [
        torch.autograd.grad(linear_cross_entropy_loss(*tensors, target, ones, backend=backend), tensors)
        for _ in range(5)
    ]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_blocks_fit_into_what_may_be_kept(monkeypatch):
    monkeypatch.setattr(native, "TOKENS", 512)
    assert native._block(4096, 100_000, 4, True) == (410, True)
    assert native._block(1024, 33_278, 4, True) == (512, True)
    assert native._block(1024, 33_278, 4, False) == (512, False)
    assert native._block(4096, 1_000_000, 4, True) == (512, False)
    assert native._block(20, 1_000_000, 4, True) == (20, True)
    assert native._block(1, 10**9, 8, True) == (1, False)
    for tokens in (1, 100, 600, 5000):
        for vocab in (2, 50_000, 10**6):
            size, keeps = native._block(tokens, vocab, 4, True)
            assert 1 <= size <= 512
            assert not keeps or -(-size // native.WHOLE) * native.WHOLE * vocab * 4 <= native.KEPT


def test_fewer_threads_than_asked_for_give_the_same(tmp_path):
    """The system decides how many there are, by its own rules or by a limit."""
    code = """
import sys, torch
from lvsoftmax.ops.linear_cross_entropy import linear_cross_entropy_loss
torch.set_num_threads(3)
draw = torch.Generator().manual_seed(1)
hidden, weight, bias = (torch.randn(*size, generator=draw).requires_grad_() for size in ((40, 24), (1500, 24), (1500,)))
target = torch.randint(1500, (40,), generator=draw)
found = []
for backend in ("cpp", "eager"):
    loss = linear_cross_entropy_loss(hidden, weight, bias, target, torch.full((40,), 1 / 40), backend=backend)
    found.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
for one, other in zip(*found):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"OMP_THREAD_LIMIT": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
