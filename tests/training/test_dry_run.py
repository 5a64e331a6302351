"""A dry run says what a real one takes, and what cannot be."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.cli.train_plan import show
from swissarmy.models._family import build_model
from swissarmy.testing import TINY_CONFIGS
from swissarmy.training.config import TrainConfig
from swissarmy.training.dry_run.plan import Plan, dry_run
from swissarmy.training.optimizer import make_optimizer

LIKE_LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def config(**changes: Any) -> TrainConfig:
    settings = {"output": "run", "train_data": ("text.txt",), "train_iters": 2, "batch_size": 2, "sequence_length": 16}
    return TrainConfig(**{**settings, **changes})


def tiny(family: str = "llama", **changes: Any) -> Model:
    return build_model({"model_type": family, **TINY_CONFIGS[family], **changes})


def small() -> Model:
    """Large enough that scalars and masks do not count."""
    return tiny(num_hidden_layers=5, hidden_size=128, intermediate_size=384, head_dim=32, vocab_size=64)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_parameters_gradients_and_optimizer_state_are_those_of_a_real_step(optimizer: str) -> None:
    settings = config(optimizer=optimizer)
    plan = dry_run(settings, tiny, 1)
    model = tiny()
    real = make_optimizer(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real.step()
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert plan.memory.parameters == plan.memory.gradients == size
    state = (value for each in real.state.values() for value in each.values() if isinstance(value, Tensor))
    assert plan.memory.optimizer == sum(value.nbytes for value in state)


def kept_by_a_real_run(model: Model, samples: int, length: int) -> int:
    """Bytes of all tensors that the backward pass needs, parameters left out."""
    own = {each.untyped_storage()._cdata for each in model.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(samples, length, dtype=torch.long)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, logits_to_keep=1)[0].sum()
    return sum(found.values())


def test_activations_are_what_a_real_run_keeps() -> None:
    plan = dry_run(config(batch_size=4, sequence_length=64), small, 1)
    assert plan.memory.activations == pytest.approx(kept_by_a_real_run(small(), 4, 64), rel=0.05)


def test_recomputing_keeps_less_and_selectively_something_between() -> None:
    plans = {
        kind: dry_run(config(batch_size=4, sequence_length=64, activation_checkpointing=kind), small, 1).memory
        for kind in ("none", "selective", "full")
    }
    assert plans["full"].activations < plans["selective"].activations < plans["none"].activations
    assert plans["none"].recomputed == 0 < plans["full"].recomputed < plans["none"].activations
    fewer = dry_run(
        config(batch_size=4, sequence_length=64, activation_checkpointing="full", checkpoint_every_layers=5), small, 1
    )
    assert plans["full"].activations < fewer.memory.activations < plans["none"].activations


def test_shards_divide_what_is_kept_and_products_what_is_computed() -> None:
    alone, sharded, shared = (
        dry_run(config(**changes), small, size)
        for changes, size in (({}, 1), ({"shard": 4}, 4), ({"tensor_parallel": 2}, 2))
    )
    assert sharded.memory.parameters == pytest.approx(alone.memory.parameters / 4, rel=0.02)
    assert sharded.memory.optimizer == pytest.approx(alone.memory.optimizer / 4, rel=0.02)
    assert sharded.memory.activations == alone.memory.activations
    assert sharded.tokens == 4 * alone.tokens
    assert shared.tokens == alone.tokens
    assert shared.memory.parameters == pytest.approx(alone.memory.parameters / 2, rel=0.02)
    assert shared.memory.activations < alone.memory.activations
    assert set(sharded.communication) == {"parameters, all_gather", "gradients, reduce_scatter"}
    assert "products, all_reduce" in shared.communication


def test_positions_divide_what_is_kept_and_keys_are_exchanged() -> None:
    changes: dict[str, Any] = {"batch_size": 4, "sequence_length": 64}
    alone, spread, sharded = (
        dry_run(config(**changes, **sizes), small, world_size)
        for sizes, world_size in (({}, 1), ({"context_parallel": 2}, 2), ({"context_parallel": 2, "shard": 2}, 4))
    )
    assert spread.axes == {"context": 2}
    assert spread.tokens == alone.tokens
    assert spread.memory.parameters == alone.memory.parameters
    assert spread.memory.activations < 0.65 * alone.memory.activations
    assert spread.memory.logits == alone.memory.logits // 2
    keys = 5 * 2 * 4 * 32 * 4 * 64  # layers, keys and values, samples, own positions, bytes, two heads of 32
    assert spread.communication["keys and values, all_gather_into_tensor"] >= keys
    assert spread.communication["gradients of own positions, all_reduce"] == alone.memory.gradients
    assert sharded.memory.activations == spread.memory.activations
    assert {"keys and values, all_gather_into_tensor", "parameters, all_gather"} < set(sharded.communication)
    with pytest.raises(sat.SwissArmyError, match="context_parallel and tensor_parallel together train"):
        dry_run(config(context_parallel=2, tensor_parallel=2), small, 4)


def test_frozen_weights_have_neither_gradients_nor_state() -> None:
    def with_lora() -> Model:
        model = small()
        return model.add_mixin("lora", sat.LoRAMixin.for_model(model, r=2))

    plan = dry_run(config(trainable=("mixins.lora",)), with_lora, 1)
    assert plan.trainable < plan.parameters / 20
    assert plan.memory.gradients == 4 * plan.trainable
    assert plan.memory.parameters == 4 * plan.parameters


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_every_family_has_a_plan(family: str) -> None:
    plan = dry_run(config(shard=2), lambda: tiny(family), 2)
    assert plan.memory.activations > 0
    assert plan.flops > 0


def test_eight_layers_of_a_large_model_on_512_processes() -> None:
    settings = config(batch_size=1, sequence_length=4096, shard=64, tensor_parallel=8, activation_checkpointing="full")
    plan = dry_run(settings, lambda: build_model(LIKE_LLAMA_70B), 512)
    assert plan.axes == {"shard": 64, "tensor": 8}
    assert plan.parameters == 2 * 128256 * 8192 + 8192 + 8 * 855_654_400
    assert plan.memory.parameters == pytest.approx(4 * plan.parameters / 512, rel=0.01)
    assert plan.memory.optimizer == pytest.approx(8 * plan.parameters / 512, rel=0.01)
    multiplied = plan.parameters - 128256 * 8192  # the table is looked up in
    assert 6 * multiplied * plan.tokens < plan.flops < 6.6 * multiplied * plan.tokens
    assert not dist.is_initialized()


def test_all_that_cannot_be_is_in_one_message() -> None:
    with pytest.raises(sat.ConfigError) as caught:
        dry_run(config(shard=3, tensor_parallel=3), small, 16)
    assert "shard=3 x tensor_parallel=3" in str(caught.value)
    assert "num_attention_heads=4" in str(caught.value)


def test_the_table_says_it_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    plan: Plan = dry_run(config(shard=2), small, 4)
    show(plan)
    printed = capsys.readouterr().out
    for words in ("4 processes (data 2 x shard 2)", "optimizer state", "activations", "8 samples of 16, 128 tokens"):
        assert words in printed
    assert plan.to_dict()["memory"]["total"] == plan.memory.total
