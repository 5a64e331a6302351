"""Sharded in any way, every optimizer, the average and the norm are what they are on one rank, in float64."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from swissarmy.testing import run_distributed
from swissarmy.training.ema import WeightAverage
from swissarmy.training.gradients import squared_norm
from swissarmy.training.optimizer import OptimizerOptions, make_optimizer, take_step

LAYOUTS = ["sharded", "replicated and sharded", "tensor-parallel and sharded"]
OPTIMIZERS = ["adamw", "muon", "adafactor", "schedule_free"]
WORLD = 4


def network():
    """Sizes that no number of ranks divides."""
    torch.manual_seed(0)
    net = nn.Module()
    net.word = nn.Embedding(5, 6)
    net.layers = nn.ModuleList([nn.Linear(6, 7), nn.Linear(7, 5)])
    net.norm = nn.LayerNorm(3)
    return net.double()


def sharded(layout):
    net = network()
    if layout == "sharded":
        return fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "inner"))
    if layout == "replicated and sharded":
        return fully_shard(net, mesh=mesh)
    split = {"layers.0.weight": Shard(0), "layers.0.bias": Shard(0), "layers.1.weight": Shard(1)}
    for path, module in net.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            place = split.get(f"{path}.{name}", Replicate())
            setattr(module, name, nn.Parameter(distribute_tensor(parameter, mesh["inner"], [place])))
    return fully_shard(net, mesh=mesh["data"])


def give_gradients(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        whole = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = whole if not isinstance(parameter, DTensor) else spread(whole, parameter)


def spread(whole, like):
    mesh = like.device_mesh
    replicas = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicas.redistribute(mesh, like.placements)


def distance(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return max((a - b.full_tensor()).abs().max().item() for a, b in pairs)


def compare(name, layout):
    """How far apart weights, averages and norms are after three steps, on one rank and on all."""
    options = OptimizerOptions(optimizer=name, lr=0.1, weight_decay_skips=())
    one, many = network(), sharded(layout)
    runs = [(net, make_optimizer(net, options), WeightAverage(net, 0.9)) for net in (one, many)]
    apart = 0.0
    for step in range(3):
        for net, _, _ in runs:
            give_gradients(net, step)
        whole, part = squared_norm(one.parameters()), squared_norm(many.parameters(), WORLD)
        dist.all_reduce(part)
        apart = max(apart, abs(part.item() / whole.item() - 1))
        for _, optimizer, average in runs:
            take_step(optimizer, 0.25)
            average.update()
    apart = max(apart, distance(one.parameters(), many.parameters()))
    apart = max(apart, distance(runs[0][2].averages.values(), runs[1][2].averages.values()))
    before = [each.to_local().clone() for each in many.parameters()]
    with runs[1][2].applied(), runs[0][2].applied():
        apart = max(apart, distance(one.parameters(), many.parameters()))
    exact = all(torch.equal(each.to_local(), kept) for each, kept in zip(many.parameters(), before, strict=True))
    return apart if exact else float("inf")


def on_a_rank(rank, world_size):
    return {(name, layout): compare(name, layout) for layout in LAYOUTS for name in OPTIMIZERS}


@cache
def results():
    return run_distributed(on_a_rank, WORLD, timeout=240)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharding_changes_nothing(name, layout):
    assert [rank[name, layout] < 1e-12 for rank in results()] == [True] * WORLD, results()
