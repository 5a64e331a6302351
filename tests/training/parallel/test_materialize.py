"""Weights come to a model that was built without any: the same numbers at every number of ranks, a tensor at a time."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.models._family import build_model
from swissarmy.testing import TINY_CONFIGS, run_distributed, tiny_inputs, tiny_model
from swissarmy.training.parallel.materialize import StoredWeights, materialize, outline_checkpoint
from swissarmy.training.parallel.new_weights import named_tensors, outline


def build(family: str) -> Model:
    model = build_model({"model_type": family, **TINY_CONFIGS[family]})
    model.add_mixin("prefix", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
    return model.add_mixin("lora", sat.LoRAMixin.for_model(model, r=2))


def new(family: str, seed: int = 0) -> Model:
    model, weights = outline(lambda: build(family), seed)
    materialize(model, weights)
    return model


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_new_weights_are_distributed_as_those_that_the_constructors_make(family: str) -> None:
    made, constructed = dict(named_tensors(new(family))), dict(named_tensors(build(family)))
    assert list(made) == list(constructed)
    for name, tensor in constructed.items():
        other = made[name]
        assert (other.shape, other.dtype, other.requires_grad) == (tensor.shape, tensor.dtype, tensor.requires_grad)
        if tensor.numel() < 64 or tensor.std() == 0:
            assert (other == tensor).all() == (tensor.unique().numel() == 1), name
        else:
            assert other.std().item() == pytest.approx(tensor.std().item(), rel=0.35), name


def test_new_weights_depend_on_the_seed_and_the_name_alone() -> None:
    first, again, other = (dict(named_tensors(new("gpt2", seed))) for seed in (0, 0, 1))
    name = "transformer.layers.0.attention.query.weight"
    torch.manual_seed(5)
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("query", "key")])


def test_making_weights_leaves_the_random_state_alone() -> None:
    model, weights = outline(lambda: build("gpt2"), 0)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    materialize(model, weights)
    assert torch.equal(torch.rand(3), expected)


class Copying(sat.BaseMixin):
    """Starts from the model's own embedding."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.copied = nn.Parameter(weight.detach() * 2)


def test_what_starts_from_the_values_of_another_tensor_is_refused() -> None:
    def copying() -> Model:
        model = build_model({"model_type": "gpt2", **TINY_CONFIGS["gpt2"]})
        return model.add_mixin("copying", Copying(model.transformer.word_embeddings.weight))

    with pytest.raises(sat.SwissArmyError, match=r"copied.*from the values of .*word_embeddings.*load the model whole"):
        outline(copying, 0)


def test_a_tensor_without_a_recipe_is_named() -> None:
    model, weights = outline(lambda: build_model({"model_type": "gpt2", **TINY_CONFIGS["gpt2"]}), 0)
    with torch.device("meta"):
        model.add_mixin("late", sat.PrefixTuningMixin.for_model(model))
    with pytest.raises(sat.SwissArmyError, match=r"no values for: mixins\.late"):
        materialize(model, weights)


def test_marks_of_parameters_survive() -> None:
    model, weights = outline(lambda: build("gpt2"), 0)
    next(model.parameters()).lr_scale = 4.0
    materialize(model, weights)
    assert next(model.parameters()).lr_scale == 4.0


@pytest.mark.parametrize("family", ["gpt2", "t5", "vit", "gemma3_text"])
def test_a_checkpoint_is_read_as_load_reads_it(family: str, tmp_path: Path) -> None:
    stored = tiny_model(family)
    stored.add_mixin("lora", sat.LoRAMixin.for_model(stored, r=2, targets="*"))
    with torch.no_grad():
        for name, parameter in stored.named_parameters():
            parameter.add_(0.1 if "lora_B" in name else 0.0)
    stored.save_pretrained(tmp_path / "saved")
    model, weights = outline_checkpoint(tmp_path / "saved")
    materialize(model, weights)
    loaded = sat.load(tmp_path / "saved")
    inputs = tiny_inputs(loaded)
    assert torch.equal(model(**inputs)[0], loaded(**inputs)[0])
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in loaded.named_parameters()]


def test_new_weights_in_another_precision_are_the_same_but_for_the_rounding() -> None:
    (whole, weights), (half, same) = (outline(lambda: build("gpt2"), 3) for _ in range(2))
    materialize(whole, weights)
    materialize(half.to(torch.bfloat16), same)
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name).bfloat16()), name


def test_mixins_that_start_anew_need_no_stored_values_and_others_do(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "saved")

    def extend(model: Model) -> object:
        return model.add_mixin("lora", sat.LoRAMixin.for_model(model, r=2))

    model, weights = outline_checkpoint(tmp_path / "saved", extend=extend, dtype=torch.float64)
    materialize(model, weights)
    inputs = tiny_inputs(model)
    expected = sat.load(tmp_path / "saved", dtype=torch.float64)(**inputs)[0]
    assert torch.equal(model(**inputs)[0], expected)  # a new LoRA changes nothing
    with pytest.raises(sat.CheckpointError, match="missing"):
        outline_checkpoint(tmp_path / "saved", overrides={"n_layer": 3})


def shards(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Every rank's shards put together again, and the most whole tensors that were alive at once."""
    mesh = init_device_mesh("cpu", (world_size,))
    found: dict[str, Any] = {}
    for name, (model, weights) in {
        "new": outline(lambda: build("llama"), 3),
        "stored": outline_checkpoint(folder),
    }.items():
        for layer in model.transformer.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        materialize(model, weights)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        local = sum(parameter.to_local().numel() for parameter in model.parameters())
        found[name] = {key: value.full_tensor().detach() for key, value in model.named_parameters()}, local
        logits = model(**tiny_inputs(model))[0]
        found[f"{name} logits"] = logits.detach()
    return found


def test_shards_are_those_of_the_whole_model(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    tiny_model("llama").save_pretrained(folder)
    whole = {"new": new("llama", 3), "stored": sat.load(folder)}
    for result in run_distributed(shards, 2, str(folder)):
        for name, model in whole.items():
            tensors, local = result[name]
            expected: dict[str, Tensor] = dict(model.named_parameters())
            assert list(tensors) == list(expected)
            assert all(torch.equal(tensors[key], value) for key, value in expected.items())
            assert local <= 0.52 * sum(value.numel() for value in expected.values())
            torch.testing.assert_close(result[f"{name} logits"], model(**tiny_inputs(model))[0])


class Watched:
    """Weights that count how many of the tensors they gave are still alive."""

    def __init__(self, weights: StoredWeights) -> None:
        self.weights, self.given, self.most = weights, list[weakref.ref[Tensor]](), 0

    def tensors(self, model: Model) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights.tensors(model):
            self.given.append(weakref.ref(tensor))
            self.most = max(self.most, sum(each() is not None for each in self.given))
            yield name, tensor


def test_of_whole_tensors_the_last_and_the_next_are_alive_and_no_others(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "saved")
    model, weights = outline_checkpoint(tmp_path / "saved")
    watched = Watched(weights)
    materialize(model, watched)
    assert len(watched.given) == len(list(model.parameters()))
    assert watched.most <= 2
