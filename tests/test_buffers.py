"""Recycled memory: reused when nobody can see it any more, never before."""

import gc
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lvsoftmax.layers.full_softmax import FullSoftmax
from lvsoftmax.ops import buffers
from lvsoftmax.ops.buffers import empty_like, empty_rows, empty_table, recycled
from lvsoftmax.optim import Adagrad

ENTRIES = buffers.SMALLEST // 4
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


@pytest.fixture(autouse=True)
def nothing_waits():
    gc.collect()
    buffers.release()
    yield
    buffers.release()


def test_memory_of_a_dead_tensor_serves_the_next():
    first = recycled((ENTRIES,), torch.float32)
    place = first.data_ptr()
    assert place % 64 == 0
    del first
    second = recycled((2, ENTRIES // 2), torch.float32)
    assert second.data_ptr() == place and second.shape == (2, ENTRIES // 2)
    del second
    assert recycled((ENTRIES * 2,), torch.bfloat16).data_ptr() == place
    assert recycled((ENTRIES + 1,), torch.float32).data_ptr() != place


@pytest.mark.parametrize(
    "keep", [lambda x: x[3:5], lambda x: x.detach(), lambda x: x.numpy(), lambda x: x.untyped_storage()]
)
def test_memory_that_somebody_still_sees_is_left_alone(keep):
    first = recycled((ENTRIES,), torch.float32)
    place, kept = first.data_ptr(), keep(first)
    del first
    second = recycled((ENTRIES,), torch.float32)
    assert second.data_ptr() != place
    del kept
    assert recycled((ENTRIES,), torch.float32).data_ptr() == place


def test_memory_that_serves_nobody_goes_back(monkeypatch):
    monkeypatch.setattr(buffers, "PATIENCE", 3)
    recycled((ENTRIES,), torch.float32)
    assert len(buffers._free) == 1
    for _ in range(5):
        recycled((ENTRIES * 2,), torch.float32)
    assert [len(memory) for _, memory in buffers._free] == [ENTRIES * 8 + buffers.ALIGNMENT]


def test_nothing_goes_back_while_it_is_to_be_kept(monkeypatch):
    monkeypatch.setattr(buffers, "PATIENCE", 3)
    with buffers.kept():
        recycled((ENTRIES,), torch.float32)
        for _ in range(5):
            recycled((ENTRIES * 2,), torch.float32)
        assert len(buffers._free) == 2 and buffers.waiting() == 3 * ENTRIES * 4 + 2 * buffers.ALIGNMENT
    recycled((ENTRIES * 2,), torch.float32)
    assert [len(memory) for _, memory in buffers._free] == [ENTRIES * 8 + buffers.ALIGNMENT]


def test_small_and_foreign_tensors_are_ordinary():
    recycled((8,), torch.float32)
    assert not buffers._free
    assert recycled((0, 5), torch.float64).shape == (0, 5)
    like = torch.empty(1, device="meta")
    assert empty_like(like, (ENTRIES,), torch.float32).device.type == "meta"
    assert empty_like(torch.empty(1), (ENTRIES,), torch.float64).dtype == torch.float64


def test_rows_of_a_number_that_changes_find_memory_of_about_their_size():
    buffers.release()
    like = torch.empty(1, dtype=torch.float64)
    places = set()
    for rows in (41_000, 42_500, 49_000, 45_300):
        result = empty_rows(like, rows, 16)
        assert result.shape == (rows, 16) and result.dtype == torch.float64 and result.is_contiguous()
        places.add(result.data_ptr())
        del result
    assert len(places) == 1
    for rows in (0, 1, 7, 9):
        assert empty_rows(like, rows, 3).shape == (rows, 3)


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_gradients_use_the_memory_of_the_step_before_and_never_that_of_a_kept_one(backend):
    counts = torch.arange(5000, 0, -1)
    layer = FullSoftmax(64, counts, backend=backend)
    hidden, target = torch.randn(8, 64), torch.randint(5000, (8,))

    def step(scale):
        layer.loss(scale * hidden, target, torch.full((8,), 1 / 8)).backward()
        return layer.weight.grad

    place = step(1.0).data_ptr()
    for _ in range(3):
        layer.zero_grad()
        assert step(1.0).data_ptr() == place
    kept = layer.weight.grad
    copy = kept.clone()
    layer.zero_grad()
    assert step(2.0).data_ptr() != place
    assert torch.equal(kept, copy)
    # gradients that add up: the second one goes into the first
    layer.zero_grad()
    step(1.0)
    step(1.0)
    torch.testing.assert_close(layer.weight.grad, 2 * copy)


def flags_of_memory_at(place):
    """Return what Linux knows of the mapping around an address: ``hg`` stands for huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= place < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="the system has no huge pages to ask for")
def test_a_large_table_and_its_state_ask_for_huge_pages():
    rows = 2**24 // 4 // 64
    layer = FullSoftmax(64, torch.ones(rows))
    middle = layer.weight.data_ptr() + 2**23
    assert layer.weight.data_ptr() % buffers.ALIGNMENT == 0
    assert "hg" in flags_of_memory_at(middle) and torch.isfinite(layer.weight).all()
    optimiser = Adagrad(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 64), torch.zeros(1, dtype=torch.long)).mean().backward()
    optimiser.step()
    assert "hg" in flags_of_memory_at(optimiser.state[layer.weight]["sum"].data_ptr() + 2**23)
    ordinary = torch.empty(rows, 64)
    assert "hg" not in flags_of_memory_at(ordinary.data_ptr() + 2**23)


def test_a_table_is_of_the_type_and_on_the_device_that_torch_would_take():
    before = torch.get_default_dtype()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert empty_table(3, 2).dtype == dtype and empty_table(3, 2).shape == (3, 2)
        finally:
            torch.set_default_dtype(before)
    with torch.device("meta"):
        assert empty_table(3, 2).is_meta
    with FakeTensorMode():
        assert type(empty_table(3, 2)) is FakeTensor


def test_threads_get_memory_of_the_size_that_they_asked_for(monkeypatch):
    monkeypatch.setattr(buffers, "SMALLEST", 1)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def take(seed):
        chance = random.Random(seed)
        for _ in range(400):
            size = chance.choice((10, 20, 30, 40))
            memory = recycled((size,), torch.float32)
            memory.fill_(seed)
            assert memory.shape == (size,) and (memory == seed).all()

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(take, range(8)))
    finally:
        sys.setswitchinterval(interval)
