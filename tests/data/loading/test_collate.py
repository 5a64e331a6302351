"""Batches of samples."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from swissarmy.core.errors import ConfigError
from swissarmy.data.loading.collate import (
    CausalCollator,
    ClassificationCollator,
    ImageCollator,
    PackedCollator,
    Padding,
    Seq2SeqCollator,
)
from swissarmy.data.source import DataError


def causal(*rows: list[int]) -> list[dict[str, Any]]:
    return [{"input_ids": np.array(row), "loss_mask": np.arange(len(row)) > 0, "extra": "x"} for row in rows]


def test_rows_are_padded_to_the_longest() -> None:
    batch = CausalCollator(padding=Padding(pad_id=9))(causal([1, 2, 3], [4]))
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["padding_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert batch["loss_mask"].tolist() == [[False, True, True], [False] * 3]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64,
        "loss_mask": torch.bool,
        "padding_mask": torch.bool,
        "position_ids": torch.int64,
    }


def test_padding_goes_to_the_side_and_multiple_that_is_said() -> None:
    batch = CausalCollator(padding=Padding(pad_id=9, side="left", pad_to_multiple=4))(causal([1, 2, 3], [4]))
    assert batch["input_ids"].tolist() == [[9, 1, 2, 3], [9, 9, 9, 4]]
    assert batch["padding_mask"].tolist() == [[False, True, True, True], [False, False, False, True]]
    assert batch["loss_mask"].tolist() == [[False, False, True, True], [False] * 4]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]


def test_packed_rows_have_one_width_and_their_padding_is_a_document_of_its_own() -> None:
    row = {
        "input_ids": np.array([5, 6, 7]),
        "loss_mask": np.array([False, True, False]),
        "document_ids": np.array([0, 0, 1]),
        "position_ids": np.array([0, 1, 0]),
    }
    batch = PackedCollator(length=5, pad_id=9)([row])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 9]]
    assert batch["document_ids"].tolist() == [[0, 0, 1, -1, -1]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[False, True, False, False, False]]
    with pytest.raises(DataError, match="a packed row has 3 tokens, and the batch has room for 2"):
        PackedCollator(length=2, pad_id=9)([row])


def test_sequences_of_both_sides_are_padded_apart() -> None:
    samples = [
        {"input_ids": np.array([1, 2, 3]), "decoder_input_ids": np.array([0, 4]), "labels": np.array([4, 5])},
        {"input_ids": np.array([1]), "decoder_input_ids": np.array([0]), "labels": np.array([5])},
    ]
    batch = Seq2SeqCollator(padding=Padding(pad_id=0))(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert batch["padding_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert batch["decoder_input_ids"].tolist() == [[0, 4], [0, 0]]
    assert batch["decoder_padding_mask"].tolist() == [[True, True], [True, False]]
    assert batch["labels"].tolist() == [[4, 5], [5, -100]]


def test_labelled_texts_have_token_types_if_the_model_does() -> None:
    samples = [
        {"input_ids": np.array([2, 4, 3]), "token_type_ids": np.array([0, 0, 1]), "labels": np.array(1)},
        {"input_ids": np.array([2]), "token_type_ids": np.array([0]), "labels": np.array(0)},
    ]
    batch = ClassificationCollator(padding=Padding(pad_id=0))(samples)
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["labels"].dtype == torch.int64
    assert "token_type_ids" not in ClassificationCollator(padding=Padding(pad_id=0), token_types=False)(samples)


def test_pictures_are_stacked() -> None:
    samples = [{"pixel_values": np.full((3, 2, 2), value, np.float32), "labels": np.array(value)} for value in (0, 1)]
    batch = ImageCollator()(samples)
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 1]
    assert list(ImageCollator(with_labels=False)(samples)) == ["pixel_values"]
    with pytest.raises(DataError, match=r"different shapes: \(3, 1, 2\), \(3, 2, 2\)"):
        ImageCollator()([*samples, {"pixel_values": np.zeros((3, 1, 2)), "labels": 0}])


COLLATORS: list[Any] = [
    CausalCollator(padding=Padding(pad_id=0)),
    PackedCollator(length=4, pad_id=0),
    Seq2SeqCollator(padding=Padding(pad_id=0)),
    ClassificationCollator(padding=Padding(pad_id=0)),
    ImageCollator(),
]
SAMPLE: dict[str, Any] = {
    **{
        name: np.array([0, 1])
        for name in ("input_ids", "loss_mask", "document_ids", "position_ids", "decoder_input_ids", "token_type_ids")
    },
    "pixel_values": np.zeros((1, 2, 2)),
}


@pytest.mark.parametrize("collate", COLLATORS, ids=lambda collate: type(collate).__name__)
def test_no_samples_give_the_same_fields_without_rows(collate: Any) -> None:
    labels = np.array([0, 1]) if isinstance(collate, Seq2SeqCollator) else np.array(1)
    full, empty = collate([{**SAMPLE, "labels": labels}]), collate([])
    assert {name: (value.dtype, value.dim()) for name, value in full.items()} == {
        name: (value.dtype, value.dim()) for name, value in empty.items()
    }
    assert all(len(value) == 0 for value in empty.values())


@pytest.mark.parametrize("collate", COLLATORS, ids=lambda collate: type(collate).__name__)
def test_collators_travel_to_workers(collate: Any) -> None:
    assert pickle.loads(pickle.dumps(collate)) == collate


def test_padding_that_makes_no_sense_is_reported_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)pad_id=-1 is no token.*side='top' is.*pad_to_multiple=0 must"):
        Padding(pad_id=-1, side="top", pad_to_multiple=0)  # type: ignore[arg-type]
