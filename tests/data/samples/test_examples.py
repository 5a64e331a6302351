"""Samples of records: checked, no longer than allowed, and named when they are bad."""

from typing import Any

import numpy as np
import pytest

from swissarmy.core.errors import ConfigError
from swissarmy.data.samples.encoders import ClassificationEncoder, Seq2SeqEncoder, TextEncoder, TokensEncoder
from swissarmy.data.samples.examples import Examples, length_of
from swissarmy.data.source import DataError, RecordError, Source
from tests.data.tiny_data import Records, letters, pairs

IDS = Records([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10, 11, 12]}])


def examples(**options: Any) -> Examples:
    return Examples(IDS, TokensEncoder(), **options)


def test_examples_are_a_source_of_samples() -> None:
    samples = examples()
    assert isinstance(samples, Source)
    assert len(samples) == 2
    assert samples[0]["input_ids"].tolist() == [5, 6, 7]
    assert samples[-1]["input_ids"].tolist() == [8, 9, 10, 11, 12]
    assert samples.where(1) == "a.jsonl:2"
    with pytest.raises(IndexError):
        samples[2]


def test_the_first_token_is_not_scored() -> None:
    assert examples()[0]["loss_mask"].tolist() == [False, True, True]
    assert examples(max_length=2, truncation="left")[0]["loss_mask"].tolist() == [False, True]


def test_a_long_sequence_is_cut_at_the_side_that_is_said() -> None:
    assert examples(max_length=3)[1]["input_ids"].tolist() == [8, 9, 10]
    assert examples(max_length=3, truncation="left")[1]["input_ids"].tolist() == [10, 11, 12]
    assert examples(max_length=5, truncation="left")[0]["input_ids"].tolist() == [5, 6, 7]


def test_a_long_sequence_is_an_error_where_this_is_said() -> None:
    samples = examples(max_length=3, truncation="error")
    assert length_of(samples[0]) == 3
    with pytest.raises(RecordError, match=r"^a.jsonl:2: input_ids has 5 tokens, more than 3: allow truncation"):
        samples[1]


@pytest.mark.parametrize(("wrong", "position"), [(61, 1), (-1, 0), (10**12, 2)])
def test_an_id_outside_the_vocabulary_is_caught_with_the_name_of_its_record(wrong: int, position: int) -> None:
    ids = [7, 8, 9]
    ids[position] = wrong
    samples = Examples(Records([{"input_ids": [60, 0]}, {"input_ids": ids}]), TokensEncoder(), vocab_size=61)
    assert samples[0]["input_ids"].tolist() == [60, 0]
    with pytest.raises(RecordError, match=rf"^a.jsonl:2: token id {wrong} at position {position} of input_ids: the mo"):
        samples[1]


def test_a_negative_id_is_refused_even_by_who_does_not_know_the_vocabulary() -> None:
    with pytest.raises(RecordError, match="token id -3 at position 1"):
        Examples(Records([{"input_ids": [0, -3]}]), TokensEncoder())[0]


def test_ids_of_the_target_are_checked_too() -> None:
    encode = Seq2SeqEncoder(tokenizer=letters())
    record = {"source": "ab", "target": "abc"}
    with pytest.raises(RecordError, match="token id 6 at position 4 of decoder_input_ids: the model knows 0 to 5"):
        Examples(Records([record]), encode, vocab_size=6)[0]


def test_a_record_without_tokens_is_an_error() -> None:
    with pytest.raises(RecordError, match=r"^a.jsonl:1: input_ids is empty"):
        Examples(Records([{"input_ids": []}]), TokensEncoder())[0]


def test_what_the_tokenizer_refuses_is_named() -> None:
    with pytest.raises(RecordError, match=r"^a.jsonl:1: the text has half of a surrogate pair"):
        Examples(Records([{"text": "a\ud83d"}]), TextEncoder(tokenizer=letters()))[0]


def test_where_a_record_stands_is_found_out_only_if_it_is_bad() -> None:
    class Slow(Records):
        asked = 0

        def where(self, index: int) -> str:
            self.asked += 1
            return super().where(index)

    source = Slow([{"text": "a"}, {"body": "b"}])
    samples = Examples(source, TextEncoder(tokenizer=letters()))
    assert samples[0]["input_ids"].tolist() == [1, 4, 2]
    assert source.asked == 0
    with pytest.raises(RecordError, match=r"^a.jsonl:2: there is no field 'text'"):
        samples[1]
    assert source.asked == 1


def test_a_wrong_setting_is_not_taken_for_a_bad_record() -> None:
    records = Records([{"text": "a b c", "label": 0}])
    samples = Examples(records, ClassificationEncoder(tokenizer=pairs()), max_length=3, truncation="left")
    with pytest.raises(ConfigError, match="cuts at the right only"):
        samples[0]


def test_arguments_that_make_no_sense_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)max_length=0 must.*vocab_size=-1 must.*truncation='middle' is none of"):
        Examples(IDS, TokensEncoder(), max_length=0, vocab_size=-1, truncation="middle")  # type: ignore[arg-type]


def test_the_fingerprint_changes_with_data_encoder_and_limit() -> None:
    other = Records([{"input_ids": [5, 6, 8]}])
    variants = [
        examples(),
        examples(max_length=3),
        examples(max_length=4),
        examples(max_length=3, truncation="left"),
        Examples(IDS, TokensEncoder(tokens_field="ids")),
        Examples(other, TokensEncoder()),
    ]
    assert len({each.fingerprint for each in variants}) == len(variants)
    assert examples().fingerprint == examples(vocab_size=99).fingerprint


def test_the_length_of_a_sample_is_that_of_its_longest_sequence() -> None:
    assert length_of({"input_ids": np.arange(3), "decoder_input_ids": np.arange(5)}) == 5
    with pytest.raises(DataError, match="pixel_values has no tokens"):
        length_of({"pixel_values": np.zeros((3, 2, 2))})
