"""Adapters apart from their model: any mixin in a folder of its own, put onto the same weights again."""

from pathlib import Path
from typing import Any

import pytest
import torch

import swissarmy as sat
from swissarmy.core.errors import CheckpointError, SwissArmyError
from swissarmy.interop.safe_write import verify_manifest
from swissarmy.mixins.reduced_weights import reduce_weights
from swissarmy.testing import tiny_inputs, tiny_model
from tests.contracts.rows import ROWS
from tests.helpers import Scale


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**tiny_inputs(model))[0]
    return result


def with_row(family: str, row: str) -> Any:
    """A model with the mixin of a row, whose parameters are random as if it had been trained."""
    model = tiny_model(family)
    addition = ROWS[row]
    model.add_mixin("added", addition.kind.for_model(model, **addition.options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixins.added." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def with_lora(seed: int = 5, **options: Any) -> Any:
    model = tiny_model("gpt2")
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, r=2, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixins.lora." in name:
                parameter.normal_(generator=generator)
    return model


def mixins_alone(model: Any, folder: Path) -> Path:
    """As a run over reduced weights leaves them."""
    model.save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("row", [row for row, each in ROWS.items() if not each.kind.keeps_outputs])
def test_any_mixin_of_the_library_comes_back_on_the_same_weights(family: str, row: str, tmp_path: Path) -> None:
    try:
        model = with_row(family, row)
    except SwissArmyError:
        pytest.skip("the matrix names the reason")
    model.save_adapter(tmp_path / "adapter", layout="mixins")
    assert not (tmp_path / "adapter" / "config.json").exists()
    again = sat.load_adapter(tiny_model(family), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_methods_that_peft_has_are_written_for_it_and_others_in_a_folder_of_mixins(tmp_path: Path) -> None:
    model = with_lora()
    model.save_adapter(tmp_path / "lora")
    model.add_mixin("compacter", sat.CompacterMixin.for_model(model))
    model.save_adapter(tmp_path / "compacter", "compacter")
    assert sorted(verify_manifest(tmp_path / "lora")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(verify_manifest(tmp_path / "compacter")) == ["mixins/mixins.json", "mixins/model.safetensors"]
    again = tiny_model("gpt2")
    for each in ("lora", "compacter"):
        sat.load_adapter(again, tmp_path / each)
    assert list(again.mixins) == list(model.mixins)
    torch.testing.assert_close(logits(again), logits(model))


def test_two_of_one_name_are_put_side_by_side_under_other_names(tmp_path: Path) -> None:
    both = tiny_model("gpt2")
    for name, seed in (("first", 1), ("second", 2)):
        model = with_lora(seed, targets="*")
        model.save_adapter(tmp_path / name, layout="mixins")
        both.add_mixin(name, model.del_mixin("lora"))
        assert "mixins.lora" in (tmp_path / name / "mixins" / "mixins.json").read_text()
    again = tiny_model("gpt2")
    sat.load_adapter(again, tmp_path / "first", name="first")
    with pytest.raises(sat.HookConflictError, match="there is a mixin 'first' already"):
        sat.load_adapter(again, tmp_path / "second", name="first")
    sat.load_adapter(again, tmp_path / "second", name="second")
    assert torch.equal(logits(again), logits(both))


def test_several_in_one_folder_are_added_together(tmp_path: Path) -> None:
    model = with_lora()
    both = mixins_alone(model.add_mixin("scale", Scale(2.0)), tmp_path / "both")
    again = sat.load_adapter(tiny_model("gpt2"), both, mixins={"scale": Scale(1.0)})
    assert torch.equal(logits(again), logits(model))
    named = sat.load_adapter(tiny_model("gpt2"), both, name="my", mixins={"my-scale": Scale(1.0)})
    assert {"my-lora", "my-scale"} <= {*named.mixins}
    assert torch.equal(logits(named), logits(model))


def test_an_adapter_trained_over_reduced_weights_fits_them_and_the_whole_ones(tmp_path: Path) -> None:
    model = tiny_model("llama")
    reduce_weights(model, "int8")
    model.add_mixin("compacter", sat.CompacterMixin.for_model(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "compacter" in name:
                parameter.fill_(0.1)
    model.save_adapter(tmp_path / "adapter")
    reduced = tiny_model("llama")
    reduce_weights(reduced, "int8")
    assert torch.equal(logits(sat.load_adapter(reduced, tmp_path / "adapter")), logits(model))
    whole = sat.load_adapter(tiny_model("llama"), tmp_path / "adapter")
    assert list(whole.mixins)[-1] == "compacter"
    torch.testing.assert_close(logits(whole), logits(model), atol=0.1, rtol=0.1)


def test_mixins_of_a_user_are_given_and_filled(tmp_path: Path) -> None:
    model = tiny_model("gpt2").add_mixin("scale", Scale(2.0))
    model.save_adapter(tmp_path / "adapter")
    again = sat.load_adapter(tiny_model("gpt2"), tmp_path / "adapter", mixins={"scale": Scale(1.0)})
    assert torch.equal(logits(again), logits(model))
    with_lora().save_adapter(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="holds no mixins of your own"):
        sat.load_adapter(again, tmp_path / "lora", mixins={"other": Scale(1.0)})


def test_what_does_not_fit_adds_nothing(tmp_path: Path) -> None:
    model = tiny_model("gpt2").add_mixin("scale", Scale(2.0))
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, r=2))
    both = mixins_alone(model, tmp_path / "both")
    target = tiny_model("gpt2")
    before = list(target.mixins)
    with pytest.raises(CheckpointError, match=r"'mixins\.scale' \(Scale\), and has none of that name"):
        sat.load_adapter(target, both)
    other = tiny_model("gpt2", n_embd=64)
    with pytest.raises(CheckpointError, match="have"):
        sat.load_adapter(other, both, mixins={"scale": Scale(1.0)})
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"is a whole model.*: load it with sat.load"):
        sat.load_adapter(target, tmp_path / "whole", mixins={"scale": Scale(1.0)})
    assert list(target.mixins) == list(other.mixins) == before


def test_what_cannot_be_saved_alone_is_told(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt2")
    model.add_mixin("cache", sat.CachedAutoRegressiveMixin.for_model(model))
    with pytest.raises(CheckpointError, match="the model has no mixin that was added"):
        model.save_adapter(tmp_path / "none")
    model.add_mixin("a", Scale(1.0)).add_mixin("b", Scale(1.0))
    with pytest.raises(CheckpointError, match=r"several mixins: say name='a' or another of \['a', 'b'\]"):
        model.save_adapter(tmp_path / "none")
    with pytest.raises(sat.ConfigError, match=r"layout='pfet' is not known. Did you mean 'peft'"):
        model.save_adapter(tmp_path / "none", "a", layout="pfet")
    assert not (tmp_path / "none").exists()
