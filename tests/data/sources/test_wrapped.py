"""Anybody's dataset as a source."""

import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from swissarmy.data.source import DataError, RecordError, Source
from swissarmy.data.sources.wrapped import Wrapped, as_source, content_hash


class Squares(Dataset[dict[str, Any]]):
    """`{"n": tensor}`; `noise` makes each reading different."""

    def __init__(self, length: int = 20, *, power: int = 2, noise: bool = False) -> None:
        self.length, self.power, self.noise = length, power, noise

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"n": torch.tensor([index**self.power + (random.random() if self.noise else 0)])}


def test_a_dataset_of_mappings_is_a_source() -> None:
    source = as_source(Squares())
    assert isinstance(source, Source)
    assert (len(source), source[3]["n"].item(), source[-1]["n"].item()) == (20, 9, 361)
    assert source.where(-1) == "Squares[19]"
    assert as_source(source) is source
    assert pickle.loads(pickle.dumps(source))[2]["n"].item() == 4
    with pytest.raises(IndexError):
        source[20]


def test_tuples_get_names() -> None:
    pairs = TensorDataset(torch.arange(3), torch.arange(3) * 10)
    assert Wrapped(pairs, fields=("x", "y"))[2] == {"x": 2, "y": 20}
    assert Wrapped(["a", "b"], fields=["text"])[1] == {"text": "b"}
    assert Wrapped([[1, 2], [3]], fields=["input_ids"])[0] == {"input_ids": [1, 2]}
    for fields in ((), ("x",), ("x", "y", "z")):
        if len(fields) != 1:
            with pytest.raises(RecordError, match=r"TensorDataset\[0\]: a record is a mapping, not a tuple"):
                Wrapped(pairs, fields=fields)[0]


def test_what_has_no_length_is_refused() -> None:
    class Endless(IterableDataset[dict[str, int]]):
        def __iter__(self) -> Iterator[dict[str, int]]:
            yield {}

    with pytest.raises(DataError, match=r"Endless has no length.*use Stream"):
        as_source(Endless())


def test_the_fingerprint_is_of_a_few_records_and_the_length() -> None:
    prints = {Wrapped(Squares(length, power=power)).fingerprint for length in (20, 21) for power in (2, 3)}
    assert len(prints) == 4
    assert Wrapped(Squares()).fingerprint in prints
    assert Wrapped(Squares(0)).fingerprint
    assert Wrapped(Squares(), fingerprint="v1").fingerprint == Wrapped(Squares(9), fingerprint="v1").fingerprint


def test_records_that_are_augmented_count_by_their_types() -> None:
    assert Wrapped(Squares(noise=True)).fingerprint == Wrapped(Squares(noise=True)).fingerprint
    assert Wrapped(Squares(noise=True)).fingerprint != Wrapped(Squares(9, noise=True)).fingerprint


def test_a_content_hash_tells_values_and_types_apart() -> None:
    values: list[Any] = [
        {"a": 1},
        {"a": True},
        {"a": "1"},
        {"b": 1},
        {"a": [1]},
        {"a": [1, 1]},
        {"a": np.array([1])},
        {"a": np.array([1.0])},
        {"a": np.array([[1]])},
        {"a": torch.tensor([1])},
        {"a": torch.tensor([1.0], dtype=torch.bfloat16)},
        {"a": None},
        {"a": b"1"},
    ]
    assert len({content_hash(value) for value in values}) == len(values)
    assert content_hash({"a": torch.arange(6).view(2, 3).t()}) == content_hash(
        {"a": torch.tensor([[0, 3], [1, 4], [2, 5]])}
    )
