"""Counting tokens: right, once, with workers or without, bad records named."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from swissarmy.data.samples.encoders import TextEncoder, TokensEncoder
from swissarmy.data.samples.examples import Examples
from swissarmy.data.samples.lengths import count_lengths
from swissarmy.data.samples.pieces import Pieces
from swissarmy.data.source import RecordError
from tests.data.tiny_data import Records, Tokens, letters

TEXTS = Records([{"text": "ab" * (number % 7)} for number in range(2500)])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_are_those_of_the_samples(num_workers: int) -> None:
    samples = Examples(TEXTS, TextEncoder(tokenizer=letters()))
    lengths = count_lengths(samples, num_workers=num_workers)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [2 + 2 * (number % 7) for number in range(2500)]


def test_counting_leaves_what_is_random_alone() -> None:
    before = torch.random.get_rng_state()
    count_lengths(Examples(Tokens([3, 4]), TokensEncoder()))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_bad_record_is_an_error_unless_some_are_allowed(caplog: pytest.LogCaptureFixture) -> None:
    samples = Examples(Records([{"text": "a"}, None, {"txt": "a"}, {"text": "abc"}]), TextEncoder(tokenizer=letters()))
    with pytest.raises(RecordError, match=r"^a.jsonl:2: bad$"):
        count_lengths(samples)
    with pytest.raises(RecordError, match=r"^a.jsonl:3: .*2 bad records, and at most 1 are allowed"):
        count_lengths(samples, max_bad_records=1)
    with caplog.at_level(logging.WARNING):
        assert count_lengths(samples, max_bad_records=2).tolist() == [3, 0, 0, 5]
    assert "left out: a.jsonl:3: there is no field 'text'" in caplog.text


def test_counts_are_kept_under_the_fingerprint(tmp_path: Path) -> None:
    source = Tokens([3, 5, 2])
    folder = tmp_path / "cache"
    first = count_lengths(Examples(source, TokensEncoder()), cache_folder=folder)
    reads = source.reads
    again = count_lengths(Examples(source, TokensEncoder()), cache_folder=folder)
    assert source.reads == reads == 3
    assert isinstance(again, np.memmap)
    assert first.tolist() == again.tolist() == [3, 5, 2]
    assert count_lengths(Examples(source, TokensEncoder(), max_length=3), cache_folder=folder).tolist() == [3, 3, 2]
    assert source.reads == 6


def test_kept_counts_that_are_not_whole_are_counted_again(tmp_path: Path) -> None:
    samples = Examples(Tokens([3, 5, 2]), TokensEncoder())
    count_lengths(samples, cache_folder=tmp_path)
    [file] = tmp_path.iterdir()
    for content in (file.read_bytes()[:-3], b"", b"nonsense"):
        file.write_bytes(content)
        assert count_lengths(samples, cache_folder=tmp_path).tolist() == [3, 5, 2]


class Known(Tokens):
    """Says how long its records are."""

    def token_counts(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array([len(record["input_ids"]) for record in self.records if record])


def test_a_source_that_knows_its_lengths_is_not_read() -> None:
    source = Known([3, 5, 2])
    assert count_lengths(Examples(source, TokensEncoder())).tolist() == [3, 5, 2]
    assert count_lengths(Examples(source, TokensEncoder(), max_length=4)).tolist() == [3, 4, 2]
    assert count_lengths(Pieces(Examples(source, TokensEncoder()), 4)).tolist() == [3, 4, 1, 2]
    assert source.reads == 0
