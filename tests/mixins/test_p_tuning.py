"""P-tuning: a prompt that an encoder makes."""

from pathlib import Path
from typing import Any

import pytest
import torch

import swissarmy as sat
from swissarmy.core.errors import ConfigError
from swissarmy.testing import tiny_model
from tests.mixins.method_cases import check_saving, close, logits, with_method


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5", "vit"])
def test_it_folds_into_a_plain_prompt(family: str, encoder: str) -> None:
    model = with_method(family, sat.PTuningMixin, prompt_len=3, encoder=encoder, encoder_size=6)
    expected = logits(model)
    mixin = model.get_mixin("method")
    model.del_mixin("method")
    assert not torch.allclose(logits(model), expected)
    plain = mixin.fold()
    assert isinstance(plain, sat.PromptTuningMixin)
    model.add_mixin("plain", plain, part="encoder" if model.parts else None)
    close(logits(model), expected)


def test_an_lstm_lets_neighbours_know_of_each_other_and_an_mlp_does_not() -> None:
    for encoder, reached in (("mlp", 1), ("lstm", 3)):
        mixin = with_method("gpt2", sat.PTuningMixin, prompt_len=3, encoder=encoder).get_mixin("method")
        mixin.make_prompt()[2].sum().backward()
        assert int(mixin.embedding.weight.grad.any(dim=1).sum()) == reached


def test_generation_is_that_of_the_plain_prompt() -> None:
    model = with_method("llama", sat.PTuningMixin, prompt_len=3)
    seq = torch.tensor([3, 9, -1, -1, -1, -1])
    tokens, _ = sat.fill_sequence(model, seq)
    plain = model.del_mixin("method").fold()
    assert sat.fill_sequence(model.add_mixin("plain", plain), seq)[0].tolist() == tokens.tolist()


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_it_is_loaded_again(encoder: str, tmp_path: Path) -> None:
    check_saving(tmp_path / "model", "t5", sat.PTuningMixin, prompt_len=2, encoder=encoder, encoder_size=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "lst"}, r"encoder='lst' is unknown. Did you mean 'lstm'\? There are: 'mlp', 'lstm'"),
        ({"encoder": 3}, "encoder=3 is unknown"),
        ({"encoder_size": 0}, "encoder_size=0 must be a whole number, at least 1"),
        ({"encoder_size": 2.5}, "encoder_size=2.5 must be a whole number"),
        ({"prompt_len": "3"}, "prompt_len='3' must be a whole number"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sat.PTuningMixin.for_model(tiny_model("gpt2"), **options)
