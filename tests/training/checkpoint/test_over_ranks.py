"""Checkpoints of several ranks: other shardings and other numbers of ranks read them, and all ranks fail as one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import swissarmy as sat
from swissarmy.core.errors import CheckpointError, ConfigError
from swissarmy.mixins.lora import LoRAMixin
from swissarmy.testing import run_distributed, tiny_model
from swissarmy.training.checkpoint import checkpoints as module
from swissarmy.training.checkpoint.checkpoints import Checkpoints
from swissarmy.training.checkpoint.final import save_final
from swissarmy.training.checkpoint.lock import RunLock
from swissarmy.training.checkpoint.options import CheckpointOptions
from swissarmy.training.checkpoint.state import TrainState
from swissarmy.training.ema import WeightAverage
from swissarmy.training.optimizer import OptimizerOptions, make_optimizer
from swissarmy.training.parallel.mesh import ParallelOptions, make_mesh
from swissarmy.training.parallel.parallelize import parallelize
from swissarmy.training.ranks import Ranks

IDS = torch.tensor([[1, 2, 3, 4]])


def sharded_run(seed: int, optimizer: str = "adamw", **sizes: int) -> tuple[Any, TrainState]:
    """A model over the ranks that there are, whose frozen part is always the same, and its optimizer."""
    model = tiny_model("gpt2", seed=7).double()
    torch.manual_seed(seed)
    model.add_mixin("lora", LoRAMixin.for_model(model, r=3).double())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name or "lora" in name)
        with torch.no_grad():
            parameter.add_(0.0 if not parameter.requires_grad else torch.randn_like(parameter))
    if dist.is_initialized():
        options = ParallelOptions(**sizes)
        parallelize(model, options, make_mesh(options, "cpu"))
    chosen = make_optimizer(model, OptimizerOptions(optimizer=optimizer))  # type: ignore[arg-type]
    return model, TrainState(model=model, optimizer=chosen, ema=WeightAverage(model, 0.5))


def take_made_up_step(state: TrainState) -> None:
    """Along a gradient that is a function of the whole parameter, so that it does not depend on the sharding."""
    for parameter in state.model.parameters():
        if parameter.requires_grad:
            parameter.grad = parameter.detach().clone()
    state.optimizer.step()
    state.optimizer.zero_grad()
    assert state.ema is not None
    state.ema.update()
    state.step += 1


def whole(state: TrainState) -> dict[str, Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in state.tensors().items()
    }


def ranks_of(rank: int, world_size: int) -> Ranks:
    return Ranks(rank=rank, world_size=world_size, data_rank=rank, data_size=world_size)


def checkpoints_in(folder: str, rank: int, world_size: int, **options: Any) -> Checkpoints:
    return Checkpoints(folder, CheckpointOptions(**options), ranks_of(rank, world_size), timeout=60)


def on_four(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model, state = sharded_run(1, shard=2, tensor_parallel=2)
    take_made_up_step(state)
    checkpoints = checkpoints_in(f"{folder}/adamw", rank, world_size)
    checkpoints.save(state)
    expected = whole(state)
    take_made_up_step(state)  # meanwhile
    checkpoints.wait()
    found["tensors"], found["ema"] = expected, checkpoints.load(state)
    found["same sharding"] = differences(whole(state), expected)
    drawn = torch.rand(3)
    checkpoints.load(state)
    found["random numbers"] = torch.equal(torch.rand(3), drawn)

    _, other = sharded_run(2, shard=4)
    checkpoints_in(f"{folder}/adamw", rank, world_size).load(other)
    found["shard=4"] = differences(whole(other), expected)

    for optimizer in ("muon", "adafactor"):
        _, state = sharded_run(3, optimizer, shard=2)
        take_made_up_step(state)
        checkpoints = checkpoints_in(f"{folder}/{optimizer}", rank, world_size, save_async=False)
        checkpoints.save(state)
        _, other = sharded_run(4, optimizer, data=1, shard=4)
        checkpoints.load(other)
        found[optimizer] = differences(whole(other), whole(state))

    save_final(model, Path(folder) / "final", None, ranks_of(rank, world_size))
    with torch.no_grad():
        found["logits"] = dict(whole_parameters(model).items())
    (Path(folder) / "full").mkdir(exist_ok=True)
    (Path(folder) / "full" / "notes").write_text("not ours")
    found["final refused"] = failure(lambda: save_final(model, Path(folder) / "full", None, ranks_of(rank, world_size)))
    return found if rank == 0 else {name: each for name, each in found.items() if name not in ("tensors", "logits")}


def whole_parameters(model: Any) -> dict[str, Tensor]:
    return {
        name: (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone()
        for name, each in model.named_parameters()
    }


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not the same to the bit."""
    return [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])]


def failure(action: Any) -> str:
    try:
        action()
    except (CheckpointError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return "no failure"


def on_two(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    _, state = sharded_run(5, shard=2)
    checkpoints = checkpoints_in(f"{folder}/adamw", rank, world_size)
    checkpoints.load(state)
    found["tensors"] = whole(state)
    found["random numbers"] = torch.rand(2)
    state.step = 8

    real = module.write_step
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        checkpoints.save(state)
        found["one rank fails"] = failure(checkpoints.wait)
    found["left behind"] = sorted(path.name for path in Path(folder, "adamw", "checkpoints").iterdir())
    assert module.write_step is real
    found["saved afterwards"] = failure(lambda: (checkpoints.save(state), checkpoints.wait()))

    dist.barrier()
    if rank == 1:  # one rank sees a damaged file
        file = Path(folder, "adamw", "checkpoints", "step-00000008", "state.json")
        file.write_text(file.read_text().replace("8", "9"))
    dist.barrier()
    found["damaged"] = failure(lambda: checkpoints.load(state, 8))
    found["instead"] = checkpoints.load(state)
    with RunLock(f"{folder}/adamw", ranks_of(rank, world_size)):
        found["locked"] = failure(lambda: RunLock(f"{folder}/adamw", ranks_of(rank, world_size)).__enter__())
    return found if rank == 0 else {name: each for name, each in found.items() if name != "tensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, Any]]:
    return run_distributed(on_four, 4, str(folder))


def test_shards_are_read_back_by_the_same_and_by_another_sharding(four: list[dict[str, Any]]) -> None:
    for found in four:
        for name in ("same sharding", "shard=4", "muon", "adafactor"):
            assert found[name] == [], name
        assert found["random numbers"]


def test_each_rank_writes_its_own_part_once(four: list[dict[str, Any]], folder: Path) -> None:
    step = folder / "adamw" / "checkpoints" / "step-00000001"
    files = sorted(step.glob("rank-*/model.safetensors"))
    assert [file.parent.name for file in files] == [f"rank-{rank:05d}" for rank in range(4)]
    stored = sum(tensor.numel() for file in files for name, tensor in load_file(file).items() if "random." not in name)
    assert stored == sum(tensor.numel() for tensor in four[0]["tensors"].values())
    assert not any(b"PK\x03\x04" in file.read_bytes() or file.suffix in (".pt", ".distcp") for file in files)


def test_one_process_reads_what_four_wrote(four: list[dict[str, Any]], folder: Path) -> None:
    _, state = sharded_run(6)
    checkpoints = Checkpoints(folder / "adamw", CheckpointOptions(), Ranks())
    assert checkpoints.load(state) == 1
    assert differences(whole(state), four[0]["tensors"]) == []
    drawn = torch.rand(2)
    checkpoints.load(state)
    assert torch.equal(torch.rand(2), drawn)


def test_the_final_folder_holds_the_whole_model(four: list[dict[str, Any]], folder: Path) -> None:
    loaded = sat.load(folder / "final")
    parameters = {name: parameter.detach() for name, parameter in loaded.named_parameters()}
    assert differences(parameters, four[0]["logits"]) == []
    assert "lora" in loaded.mixins
    for found in four:
        assert found["final refused"].startswith("CheckpointError: cannot read")
        assert "full/m" in found["final refused"]


def test_two_ranks_read_what_four_wrote_and_fail_together(four: list[dict[str, Any]], folder: Path) -> None:
    first, second = run_distributed(on_two, 2, str(folder))
    assert differences(first["tensors"], four[0]["tensors"]) == []
    assert not torch.equal(first["random numbers"], second["random numbers"])
    assert first["one rank fails"] == second["one rank fails"]
    assert "step-00000008 was not written" in first["one rank fails"]
    assert "on rank 1" in first["one rank fails"]
    assert "No space left on device" in first["one rank fails"]
    assert first["left behind"] == ["latest", "step-00000001"]
    assert first["saved afterwards"] == second["saved afterwards"] == "no failure"
    for found in (first, second):
        assert "state.json" in found["damaged"]
        assert found["instead"] == 1
        assert found["locked"].startswith("CheckpointError")
        assert "goes on" in found["locked"]
