"""A function as an encoder."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from swissarmy.data.build import build_loaders
from swissarmy.data.config import DataConfig
from swissarmy.data.samples.encoders import TokensEncoder
from swissarmy.data.samples.examples import Cut
from swissarmy.data.samples.function_encoder import FunctionEncoder, as_encoder
from swissarmy.data.source import RecordError


class Numbers:
    """Ten records."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"number": index}


def counted(record: Mapping[str, Any]) -> dict[str, Any]:
    ids = list(range(record["number"] + 2))
    return {"input_ids": ids, "loss_mask": torch.ones(len(ids), dtype=torch.bool), "labels": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_of_a_record_makes_batches(workers: int) -> None:
    config = DataConfig(train_data=("numbers",), sequence_length=4, shuffle=False, num_workers=workers)
    options: dict[str, Any] = {"global_batch_size": 5, "num_steps": 1, "create_dataset": lambda path, config: Numbers()}
    loaders = build_loaders(config, encode=counted, **options)
    assert loaders.train is not None
    (batch,) = loaders.train
    assert batch["input_ids"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch["padding_mask"].sum(1).tolist() == [2, 3, 4, 4, 4]


def test_what_goes_with_the_tokens_is_cut_with_them() -> None:
    sample = FunctionEncoder(counted)({"number": 3}, where="here", cut=Cut(2, "left"))
    assert sample["input_ids"].tolist() == [3, 4]
    assert (sample["loss_mask"].shape, sample["labels"].shape) == ((2,), ())
    assert isinstance(sample["loss_mask"], np.ndarray)


def test_something_else_than_a_sample_is_an_error_with_its_place() -> None:
    with pytest.raises(RecordError, match=r"a\.jsonl:3: encode gave a list; a sample is a dict, \{'input_ids': ids\}"):
        FunctionEncoder(lambda record: [1])({}, where="a.jsonl:3")  # type: ignore[arg-type, return-value]


def test_it_is_known_by_the_name_of_the_function() -> None:
    assert FunctionEncoder(counted).fingerprint == FunctionEncoder(counted).fingerprint
    assert FunctionEncoder(counted).fingerprint != FunctionEncoder(partial(counted)).fingerprint


def test_an_encoder_stays_what_it_is() -> None:
    encoder = TokensEncoder()
    assert as_encoder(encoder) is encoder
    assert as_encoder(None) is None
