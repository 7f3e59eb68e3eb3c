"""Optimisers on parameters that are sharded over processes, as FSDP2 leaves them: here over a mesh of one process."""

import pytest
import torch
import torch.distributed as dist
from cases import assert_close
from optimizers import OPTIMIZERS, every_optimizer, gradient, some_ids, table
from torch import nn

if not dist.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

PER_ROW = {"adagrad_row", "adam_row"}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """All processes there are: this one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(plain: torch.Tensor, mesh: DeviceMesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))


@every_optimizer
def test_a_sharded_parameter_takes_the_steps_of_a_whole_one_or_none(name, mesh):
    whole = table()
    parts = sharded(whole, mesh)
    optimizers = [OPTIMIZERS[name]([parameter]) for parameter in (whole, parts)]
    for step in range(3):
        whole.grad = gradient(step, some_ids(step), whole.shape[1]).to_dense()
        parts.grad = distribute_tensor(whole.grad.clone(), mesh, [Shard(0)])
        if name in PER_ROW:
            before = parts.full_tensor().clone()
            with pytest.raises(ValueError, match="state by element, not by row"):
                optimizers[1].step()
            assert torch.equal(parts.full_tensor(), before) and not optimizers[1].state
            return
        for optimizer in optimizers:
            optimizer.step()
    assert_close(parts.full_tensor(), whole, 1e-12)


@every_optimizer
def test_half_precision_is_refused_before_anything_moves(name, mesh):
    """The update would be made in a copy in float32, and lost."""
    first, parts = table(), sharded(table(torch.bfloat16), mesh)
    before = first.detach().clone()
    first.grad, parts.grad = torch.ones_like(first), torch.ones_like(parts)
    with pytest.raises(ValueError, match="keep it in float32 or float64"):
        OPTIMIZERS[name]([first, parts]).step()
    assert torch.equal(first, before)
