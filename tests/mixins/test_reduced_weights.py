"""Reduced weights stand in for the model's own, on every family, and in everything that a model does."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.backbone.projections import plain_models, projections_of
from swissarmy.mixins.reduced_weights import NAME, ReducedWeightsMixin, reduce_weights
from swissarmy.nn.reduced_linear import Kind
from swissarmy.testing import TINY_CONFIGS, tiny_inputs, tiny_model
from tests.generation.helpers import adapted

FAMILIES = sorted(TINY_CONFIGS)
KINDS: tuple[Kind, ...] = ("fp16", "int8", "int4")


def output(model: Model) -> Tensor:
    result = model(**tiny_inputs(model))[0]
    return (result if isinstance(result, Tensor) else result[0]).detach()


def relative(have: Tensor, want: Tensor) -> float:
    return ((have - want).norm() / want.norm()).item()


def widened(model: Model) -> Model:
    """A copy whose own weights are what its reduced ones hold."""
    model, dtype = copy.deepcopy(model), model.dtype
    for part in plain_models(model).values():
        mixin: Any = part.get_mixin(NAME)
        for projection in projections_of(part):
            key = projection.name.replace(".", "_")
            projection.linear.weight.data = mixin.layers[projection.layer_id][key].widened()
        if mixin.head is not None:
            table = part.transformer.word_embeddings = copy.deepcopy(part.transformer.word_embeddings)  # parts share it
            table.weight.data = mixin.table(torch.arange(table.num_embeddings)[None])[0]
            if part.transformer.lm_head is not None:
                part.transformer.lm_head.weight.data = mixin.head.widened()
    model.del_mixin(NAME)
    return model.to(dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_the_model_with_rounded_weights(family: str) -> None:
    model = tiny_model(family)
    model.add_mixin(NAME, ReducedWeightsMixin.for_model(model, kind="fp16"))
    assert relative(output(model), output(widened(model))) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_letting_go_of_the_weights_changes_nothing(family: str, kind: Kind) -> None:
    model = tiny_model(family)
    before = output(model)
    model.add_mixin(NAME, ReducedWeightsMixin.for_model(model, kind=kind))
    beside = output(model)
    model.del_mixin(NAME)
    assert torch.equal(output(model), before)
    reduce_weights(model, kind)
    assert torch.equal(output(model), beside)
    assert torch.equal(output(copy.deepcopy(model)), beside)
    assert model.device.type == "cpu"
    assert sum(each.numel() for each in model.parameters() if each.is_meta) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_uncached(kind: Kind) -> None:
    """The kernels differ by the number of rows, in bfloat16's rounding; fp16's does not."""
    model = tiny_model("llama")
    reduce_weights(model, kind)
    prompt = torch.tensor([5, 9, 11, 30])
    tokens, _ = sat.fill_sequence(model, torch.cat((prompt, torch.full((8,), -1))))
    for stop in range(4, 12):
        logits = model(tokens[:, :stop])[0][:, -1]
        chosen = logits.gather(1, tokens[:, stop, None]) if stop < 12 else logits.amax(1, keepdim=True)
        assert (logits.amax(1, keepdim=True) - chosen).item() <= {"fp16": 1e-5, "int8": 0.02, "int4": 0.02}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixin_trains_on_top(kind: Kind) -> None:
    model = tiny_model("gpt2")
    reduce_weights(model, kind)
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, targets="attention.*"))
    model.freeze_except("mixins.lora")
    ids = tiny_inputs(model)["input_ids"]
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(ids)[0][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bert"])
def test_load_reduces(family: str, kind: Kind, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "saved")
    loaded = sat.load(tmp_path / "saved", quantize=kind)
    model.add_mixin(NAME, ReducedWeightsMixin.for_model(model, kind=kind))
    assert torch.equal(output(loaded), output(model))
    with pytest.raises(sat.CheckpointError, match=r"cannot be saved"):
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "swissarmy", "t5"])
def test_a_later_change_of_precision_reaches_what_is_reduced(family: str, kind: Kind) -> None:
    model = tiny_model(family)
    reduce_weights(model, kind)
    before = output(model)
    after = output(model.double())
    assert after.dtype is torch.float64
    assert relative(after, before.double()) < {"fp16": 1e-5, "int8": 2e-2, "int4": 2e-2}[kind]


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_beams_with_a_prefix_and_lora_are_those_of_the_rounded_weights(family: str) -> None:
    model = adapted(family)
    model.add_mixin(NAME, ReducedWeightsMixin.for_model(model, kind="fp16"))
    seq = torch.tensor([5, 9, 11, *[-1] * 8])
    found = []
    for each in (model, widened(model)):
        source = {"input_ids": torch.tensor([[5, 6, 7]])} if each.parts else {}
        found.append(sat.fill_sequence(each, seq, strategy=sat.BeamSearchStrategy(3, num_return_sequences=2), **source))
    (tokens, mems), (expected, expected_mems) = found
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(mems, expected_mems, rtol=1e-4, atol=1e-4)
    assert len(tokens) == 2


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with pytest.raises(sat.ConfigError, match=r"quantize='int5' is not known. Did you mean 'int[48]'"):
        ReducedWeightsMixin.for_model(model, kind="int5")
    with pytest.raises(sat.ConfigError, match=r"There are: fp16, int8, int4"):
        sat.load(tmp_path, quantize="half")  # type: ignore[arg-type]


def test_ids_outside_the_vocabulary_are_named() -> None:
    model = tiny_model("gpt2")
    reduce_weights(model, "int8")
    with pytest.raises(sat.HookCallError, match=r"from 3 to 999; this model's vocabulary has"):
        model(torch.tensor([[3, 999]]))


def test_explain_says_who_projects() -> None:
    model = tiny_model("gpt2")
    reduce_weights(model, "int8")
    line = next(line for line in model.explain().splitlines() if line.strip().startswith("linear_forward"))
    assert "reduced-weights" in line
