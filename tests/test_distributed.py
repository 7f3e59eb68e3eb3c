"""Layers and optimisers under DistributedDataParallel and FSDP2, over one process: what several share is PyTorch's."""

import pytest
import torch
import torch.distributed as dist
from cases import CASES, Batch, assert_close, dense, randomise
from optimizers import OPTIMIZERS, every_optimizer, gradient, some_ids, table
from torch import nn

from lvsoftmax.layers.hierarchical_softmax import HierarchicalSoftmax

if not dist.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

PER_ROW = {"adagrad_row", "adam_row"}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """All processes there are: this one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# -- layers -----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A backbone, and a layer whose objective is computed inside ``forward``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.backbone = nn.Linear(layer.hidden_size, layer.hidden_size, dtype=torch.float64)
        for value in self.backbone.parameters():
            nn.init.constant_(value, 0.1)

    def forward(self, batch: Batch, sample) -> torch.Tensor:
        hidden = self.backbone(batch.hidden).tanh()
        return self.layer.loss(hidden, batch.target, batch.upstream, batch.previous, sample)

    def objective(self, *arguments: torch.Tensor) -> torch.Tensor:
        return self.layer.loss(*arguments)


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.option], ids=str)
def test_a_wrapped_layer_takes_the_steps_of_a_plain_one(case, wrapper, mesh):
    def trained(wrap):
        layer = randomise(case.build(**dense(case)).double())
        batch = Batch.of(layer)
        model = Model(layer)
        sample = batch.draw(layer)
        wrapped = wrap(model)
        optimizer = OPTIMIZERS["adagrad"](model.parameters())
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(wrapped(batch, sample))
            losses[-1].backward()
            optimizer.step()
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        return [loss.detach() for loss in losses], whole

    def wrap(model):
        if wrapper == "FSDP2":
            return fully_shard(model, mesh=mesh)
        return DistributedDataParallel(model, find_unused_parameters=case.name == "adaptive_softmax")

    for wrapped, plain in zip(trained(wrap), trained(lambda model: model), strict=True):
        assert_close(wrapped, plain, 1e-10)


def test_an_objective_outside_of_forward_is_refused_until_it_is_registered(mesh):
    """The tree's kernels would be given parameters that are elsewhere."""
    model = Model(HierarchicalSoftmax(4, torch.arange(20, 0, -1), sparse=False)).double()
    hidden, weight = torch.randn(3, 4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    target = torch.tensor([0, 5, 19])
    expected = model.objective(hidden, target, weight).detach()
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="register_fsdp_forward_method"):
        model.objective(hidden, target, weight)
    register_fsdp_forward_method(model, "objective")
    assert_close(model.objective(hidden, target, weight), expected, 1e-12)


# -- optimisers -------------------------------------------------------------------------------------------------------


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
