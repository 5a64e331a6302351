"""Prefix-tuning: plain, made by an MLP, and with positions that count after it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import swissarmy as sat
from swissarmy.core.errors import ConfigError, HookCallError, HookDefinitionError
from swissarmy.testing import tiny_model
from tests.mixins.method_cases import check_saving, close, logits, with_method

ENCODED = {"prefix_len": 3, "encoder_size": 7}


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5", "vit"])
def test_a_prefix_of_an_mlp_folds_into_a_plain_one(family: str) -> None:
    model = with_method(family, sat.PrefixTuningMixin, **ENCODED)
    expected = logits(model)
    mixins = model.mixins["method"] if model.parts else {"": model.get_mixin("method")}
    folded = {part: mixin.fold() for part, mixin in mixins.items()}
    model.del_mixin("method")
    model.add_mixin("plain", folded if model.parts else folded[""])
    close(logits(model), expected)
    names = {name.rpartition(".")[2] for name in model.state_dict() if "mixins.plain." in name}
    assert names == {"key", "value"}
    with pytest.raises(HookDefinitionError, match="it is plain already"):
        next(iter(folded.values())).fold()


def test_a_prefix_of_zeros_with_shifted_positions_is_the_model_at_later_positions() -> None:
    model = with_method("gpt2", sat.PrefixTuningMixin, prefix_len=3, shift_positions=True)
    for parameter in model.get_mixin("method").parameters():
        torch.nn.init.zeros_(parameter)
    unshifted = with_method("gpt2", sat.PrefixTuningMixin, prefix_len=3)
    for parameter in unshifted.get_mixin("method").parameters():
        torch.nn.init.zeros_(parameter)
    later = torch.arange(3, 12)[None]
    close(logits(model), logits(unshifted, position_ids=later))
    close(logits(model, position_ids=torch.arange(9)[None]), logits(model))
    assert not torch.allclose(logits(model), logits(unshifted))


@pytest.mark.parametrize("options", [{"shift_positions": True}, {**ENCODED, "shift_positions": True}], ids=str)
def test_it_is_loaded_again(options: dict[str, Any], tmp_path: Path) -> None:
    check_saving(tmp_path / "model", "gpt2", sat.PrefixTuningMixin, **options)


def test_positions_that_a_prefix_takes_are_counted_in_a_models_length() -> None:
    model = with_method("gpt2", sat.PrefixTuningMixin, prefix_len=60, shift_positions=True)
    model(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(HookCallError, match="65 tokens, and the model has 64 positions"):
        model(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(HookCallError, match="and the model has 64 positions"):
        sat.fill_sequence(model, [torch.tensor([1, 2, -1, -1, -1, -1]), torch.tensor([1, -1])])


@pytest.mark.parametrize("name", ["prefix_len", "encoder_size"])
@pytest.mark.parametrize("size", [0, 2.5, "3", True])
def test_sizes_that_are_none_are_refused(name: str, size: Any) -> None:
    options = {name: size}
    with pytest.raises(ConfigError, match=f"PrefixTuningMixin: {name}={size!r} must be a whole number, at least 1"):
        sat.PrefixTuningMixin.for_model(tiny_model("gpt2"), **options)
