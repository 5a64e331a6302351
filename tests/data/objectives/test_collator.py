"""Objectives in loaders: the same for all ranks and workers, another in each epoch, and what they do not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swissarmy.core.errors import ConfigError
from swissarmy.data.build import Loaders, build_loaders
from swissarmy.data.config import DataConfig
from swissarmy.data.loading.loader import FingerprintError
from swissarmy.data.objectives.collator import objective_collator
from swissarmy.data.objectives.options import Objective, ObjectiveOptions
from swissarmy.data.source import DataError
from tests.data.objectives.tiny_vocabularies import FIRST, text, word_pieces

TOKENIZER = word_pieces()
CORRUPTING: list[Objective] = ["masked_lm", "span_corruption", "blank_infilling"]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Eighteen texts, of which the number is the first token; 8 a step is 2.25 steps an epoch."""
    rows = [{"input_ids": [FIRST + number, *text(12 + number, number).tolist()]} for number in range(18)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def built(objective: Objective, texts: str, *, ranks: tuple[int, int] = (0, 1), **settings: Any) -> Loaders:
    accumulation, options = settings.pop("accumulation", 1), settings.pop("options", None)
    config = DataConfig(train_data=(texts,), valid_data=(texts,), **settings)
    return build_loaders(
        config,
        TOKENIZER,
        global_batch_size=8,
        accumulation=accumulation,
        rank=ranks[0],
        world_size=ranks[1],
        num_steps=9,
        collate=objective_collator(objective, config, TOKENIZER, options),
    )


def by_number(batches: Any) -> dict[int, dict[str, list[int]]]:
    """Each sample, without its padding, by its number in the run."""
    found: dict[int, dict[str, list[int]]] = {}
    for batch in batches:
        for row, number in enumerate(batch["sample_ids"].tolist()):
            assert number not in found
            found[number] = {name: _plain(value[row], name) for name, value in batch.items() if name[-4:] != "mask"}
    return found


def _plain(values: Tensor, name: str) -> list[int]:
    """Trailing padding cut off, which depends on the other rows."""
    plain: list[int] = np.atleast_1d(values.numpy()).tolist()
    while len(plain) > 1 and plain[-1] in ((-100,) if name in ("targets", "labels") else (0,)):
        plain.pop()
    return [-100 if name == "targets" and not plain else each for each in plain]


@pytest.mark.parametrize("objective", CORRUPTING)
def test_what_is_hidden_does_not_depend_on_ranks_micro_batches_and_workers(objective: Objective, texts: str) -> None:
    alone = by_number(built(objective, texts).train)
    assert set(alone) == set(range(72))
    assert by_number(built(objective, texts, num_workers=1).train) == alone
    shared = [built(objective, texts, ranks=(rank, 2), accumulation=2).train for rank in range(2)]
    assert by_number(batch for loader in shared for batch in loader or ()) == alone


@pytest.mark.parametrize("objective", CORRUPTING)
def test_evaluation_asks_the_same_each_time_and_of_every_number_of_ranks(objective: Objective, texts: str) -> None:
    valid = built(objective, texts).valid
    first = by_number(valid)
    assert set(first) == set(range(18))
    assert by_number(valid) == first
    shared = [built(objective, texts, ranks=(rank, 4)).valid for rank in range(4)]
    assert by_number(batch for loader in shared for batch in loader or ()) == first


def test_a_text_is_masked_anew_in_each_epoch_and_with_each_seed(texts: str) -> None:
    def masks(**settings: Any) -> list[list[int]]:
        samples = by_number(built("masked_lm", texts, shuffle=False, **settings).train)
        return [samples[number]["targets"] for number in (3, 21, 39)]

    assert len({str(each) for each in masks()}) == 3
    assert masks(seed=1) != masks()
    assert masks() == masks()


def test_a_run_goes_on_with_the_objective_that_it_began_with(texts: str) -> None:
    def state(objective: Objective, **options: Any) -> dict[str, Any]:
        train = built(objective, texts, options=ObjectiveOptions(**options)).train
        assert train is not None
        return train.state_dict()

    goes_on = built("masked_lm", texts, options=ObjectiveOptions(mask_probability=0.3)).train
    assert goes_on is not None
    goes_on.load_state_dict(state("masked_lm", mask_probability=0.3))
    with pytest.raises(FingerprintError, match=r"mask_probability(.|\n)*0\.15(.|\n)*0\.3"):
        goes_on.load_state_dict(state("masked_lm"))
    with pytest.raises(FingerprintError, match=r"objective(.|\n)*span_corruption(.|\n)*masked_lm"):
        goes_on.load_state_dict(state("span_corruption", mask_probability=0.3))


def test_batches_have_what_the_steps_read(texts: str) -> None:
    fields = {objective: set(next(iter(built(objective, texts).train or ()))) for objective in CORRUPTING}
    assert fields == {
        "masked_lm": {"input_ids", "targets", "padding_mask", "sample_ids"},
        "span_corruption": {
            *("input_ids", "padding_mask", "decoder_input_ids", "decoder_padding_mask", "labels", "sample_ids"),
        },
        "blank_infilling": {*("input_ids", "targets", "position_ids", "padding_mask", "prefix_lengths", "sample_ids")},
    }


def test_packed_rows_are_masked_and_keep_their_documents(texts: str) -> None:
    loader = built("masked_lm", texts, packing=True, sequence_length=64).train
    batch = next(iter(loader or ()))
    assert set(batch) == {"input_ids", "targets", "document_ids", "position_ids", "sample_ids"}
    assert {tuple(batch[name].shape) for name in set(batch) - {"sample_ids"}} == {(8, 64)}
    padding = batch["document_ids"] == -1
    assert (batch["targets"][padding] == -100).all()
    assert (batch["targets"] != -100).sum() / (~padding).sum() == pytest.approx(0.15, abs=0.02)


def test_pairs_of_texts_keep_their_types(tmp_path: Path) -> None:
    config = DataConfig(train_data=("pairs",), record_format="classification")
    collate = objective_collator("masked_lm", config, TOKENIZER)
    assert collate is not None
    ids, types = text(9), np.array([0] * 5 + [1] * 4)
    batch = collate([{"input_ids": ids, "token_type_ids": types, "labels": 1, "sample_ids": 4}])
    assert batch["token_type_ids"].tolist() == [types.tolist()]
    assert "labels" not in batch


def test_other_objectives_leave_samples_as_they_are() -> None:
    config = DataConfig(train_data=("a.txt",))
    for objective in ("causal_lm", "seq2seq", "classification", "image_classification"):
        assert objective_collator(objective, config, None) is None


def test_options_reach_the_objective() -> None:
    config = DataConfig(train_data=("a.txt",))
    collate = objective_collator("masked_lm", config, TOKENIZER, ObjectiveOptions(mask_probability=0.5))
    assert collate is not None
    batch = collate([{"input_ids": text(100), "sample_ids": torch.tensor(0)}])
    assert int((batch["targets"] != -100).sum()) == 50


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("masked", {}, r"there is no objective 'masked'. Did you mean 'masked_lm'\?"),
        ("masked_lm", {"record_format": "images"}, "masked_lm is for texts, not for record_format='images'"),
        ("span_corruption", {"record_format": "classification"}, "span_corruption is for texts"),
        ("span_corruption", {"packing": True, "sequence_length": 64}, "which are not packed: say truncation='split'"),
        ("blank_infilling", {"padding_side": "left"}, "blank_infilling pads on the right"),
    ],
)
def test_data_that_does_not_fit_an_objective_is_refused(objective: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objective_collator(objective, DataConfig(train_data=("a.txt",), **settings), TOKENIZER)


def test_a_tokenizer_and_numbered_samples_of_tokens_are_needed() -> None:
    config = DataConfig(train_data=("a.txt",))
    with pytest.raises(ConfigError, match="masked_lm needs a tokenizer"):
        objective_collator("masked_lm", config, None)
    collate = objective_collator("masked_lm", config, TOKENIZER)
    assert collate is not None
    with pytest.raises(DataError, match="a sample with input_ids has no sample_ids"):
        collate([{"input_ids": text(3)}])
    with pytest.raises(DataError, match="a sample with pixel_values has no input_ids"):
        collate([{"pixel_values": text(3)}])
