"""Samples that the model can take, where the config does not say how large they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from swissarmy.core.errors import ConfigError, HookCallError
from swissarmy.data.config import DataConfig
from swissarmy.mixins.prompt_tuning import PromptTuningMixin
from swissarmy.testing import tiny_model
from swissarmy.training.sample_sizes import sized_for
from swissarmy.training.steps.tokens import causal_lm_step
from swissarmy.training.train import train
from tests.training.tiny_runs import config_for, model_of, run

CONFIG = DataConfig(train_data=("a",))


class LongRows:
    """Rows of a hundred tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [(index + place) % 61 for place in range(100)]}


@pytest.mark.parametrize(("family", "longest"), [("gpt2", 64), ("roberta", 62), ("llama", 64), ("t5", 512)])
def test_samples_are_as_long_as_the_model_takes(family: str, longest: int) -> None:
    assert sized_for(CONFIG, tiny_model(family)).sequence_length == longest
    assert sized_for(CONFIG.replace(sequence_length=7), tiny_model(family)).sequence_length == 7


def test_the_positions_of_a_prompt_are_not_for_samples() -> None:
    model = model_of()
    model.add_mixin("prompt", PromptTuningMixin.for_model(model, prompt_len=4).double())
    assert sized_for(CONFIG, model).sequence_length == 60
    with pytest.raises(ConfigError, match="sequence_length=61, and the model has 60 positions: give 60"):
        sized_for(CONFIG.replace(sequence_length=61), model)


def test_a_prompt_that_leaves_no_position_is_refused() -> None:
    model = model_of()
    model.add_mixin("prompt", PromptTuningMixin.for_model(model, prompt_len=64).double())
    with pytest.raises(ConfigError, match="the model's prompts take all its positions"):
        sized_for(CONFIG, model)


@pytest.mark.parametrize(("family", "longest"), [("gpt2", 64), ("roberta", 62), ("bert", 64)])
def test_more_than_there_are_positions_in_a_table_is_refused(family: str, longest: int) -> None:
    with pytest.raises(ConfigError, match=f"sequence_length=65, and the model has {longest} positions"):
        sized_for(CONFIG.replace(sequence_length=65), tiny_model(family))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_other_positions_go_on_where_that_is_asked_for(family: str) -> None:
    assert sized_for(CONFIG.replace(sequence_length=4096), tiny_model(family)).sequence_length == 4096


def test_longer_records_are_cut_and_the_run_says_at_what(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run", train_data=("long",))
    seen = []

    def watched(batch: Any, model: Any) -> Any:
        seen.append(batch["input_ids"].shape[1])
        return causal_lm_step(batch, model)

    train(model_of(), watched, lambda path, config: LongRows(), config)
    assert set(seen) == {64}
    assert "samples: at most 64 tokens\n" in (tmp_path / "run" / "log.txt").read_text()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["sequence_length"] == 64


def test_a_position_beyond_the_table_is_named() -> None:
    with pytest.raises(HookCallError, match="a position 64, and the last of the table is 63: shorten the input"):
        model_of()(torch.tensor([[1, 2]]), position_ids=torch.tensor([[63, 64]]))


def test_pictures_are_as_large_as_the_model_takes() -> None:
    sized = sized_for(CONFIG, tiny_model("vit"))
    assert (sized.image_shape, sized.image_mean, sized.image_std) == ((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    gray = sized_for(CONFIG, tiny_model("vit", num_channels=1, image_size=[8, 12]))
    assert (gray.image_shape, gray.image_mean) == ((1, 8, 12), (0.5,))
    assert sized_for(CONFIG.replace(image_size=(32, 32)), tiny_model("vit")).image_size == (32, 32)
    assert CONFIG.image_shape == (3, 224, 224)


def test_pictures_that_the_model_cannot_take_are_refused() -> None:
    wanted = CONFIG.replace(image_size=(18, 16), image_mean=(0.5,), image_std=(0.2,))
    with pytest.raises(
        ConfigError, match=r"(?s)the height is not divisible by .* 4.*image_mean=.*the model has 3 chan"
    ):
        sized_for(wanted, tiny_model("vit"))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_next_tokens_that_the_model_sees_are_not_predicted(family: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"causal_lm predicts each next token, and this model sees it"):
        run(tmp_path / "run", model=model_of(family), forward_step=causal_lm_step)
