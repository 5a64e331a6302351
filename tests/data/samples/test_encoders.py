"""What each kind of record becomes."""

import pickle
from typing import Any

import numpy as np
import pytest

from swissarmy.core.errors import ConfigError
from swissarmy.data.samples.encoders import (
    ClassificationEncoder,
    CompletionEncoder,
    Seq2SeqEncoder,
    TextEncoder,
    TokensEncoder,
)
from swissarmy.data.samples.examples import Cut, Encoder, Sample
from swissarmy.data.source import RecordError
from swissarmy.data.tokenizer import Tokenizer
from tests.data.tiny_data import byte_level, letters, pairs, spaced

A, B, C, D = 4, 5, 6, 7
BOS, EOS = 1, 2


def sample_of(encode: Encoder, record: dict[str, Any], cut: Cut | None = None) -> Sample:
    return encode(record, where="a.jsonl:7", cut=cut)


def refusal(encode: Encoder, record: dict[str, Any], cut: Cut | None = None) -> str:
    with pytest.raises(RecordError) as caught:
        sample_of(encode, record, cut)
    assert str(caught.value).startswith("a.jsonl:7: ")
    return str(caught.value)


def scored_text(tokenizer: Tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample["input_ids"][sample["loss_mask"]].tolist(), skip_special_tokens=False)


# Documents


def test_a_text_ends_with_the_end_token_once() -> None:
    assert sample_of(TextEncoder(tokenizer=letters()), {"text": "ab"})["input_ids"].tolist() == [BOS, A, B, EOS]
    ids = sample_of(TextEncoder(tokenizer=byte_level()), {"text": "it"})["input_ids"].tolist()
    assert ids.count(EOS) == 1  # this tokenizer adds one itself
    bare = TextEncoder(tokenizer=letters(), append_eos=False, add_special_tokens=False, text_field="body")
    sample = sample_of(bare, {"body": "abc"})
    assert sample["input_ids"].tolist() == [A, B, C]
    assert sample["loss_mask"].tolist() == [False, True, True]
    assert (sample["input_ids"].dtype, sample["loss_mask"].dtype) == (np.int64, np.bool_)


def test_an_end_token_that_does_not_exist_is_an_error_at_once() -> None:
    for kind in (TextEncoder, CompletionEncoder, Seq2SeqEncoder):
        with pytest.raises(ConfigError, match=rf"{kind.__name__}: the tokenizer has no eos_token"):
            kind(tokenizer=pairs())
    assert TextEncoder(tokenizer=pairs(), append_eos=False)


def test_a_missing_field_is_named_with_the_nearest_and_all_there_are() -> None:
    message = refusal(TextEncoder(tokenizer=letters()), {"txt": "a", "id": 3})
    assert "no field 'text'" in message
    assert "Did you mean 'txt'" in message
    assert "'txt', 'id'" in message


def test_a_field_of_another_type_is_an_error() -> None:
    assert "field 'text' holds a list, not text" in refusal(TextEncoder(tokenizer=letters()), {"text": ["a"]})
    assert "field 'text' holds a NoneType" in refusal(TextEncoder(tokenizer=letters()), {"text": None})


# Prompts and completions


@pytest.mark.parametrize("tokenizer", [letters(), byte_level(), spaced()], ids=["letters", "byte level", "spaced"])
def test_only_the_completion_and_the_end_are_scored(tokenizer: Tokenizer) -> None:
    record = {"prompt": "a\n", "completion": " b\n"}
    sample = sample_of(CompletionEncoder(tokenizer=tokenizer), record)
    assert tokenizer.decode(sample["input_ids"].tolist()) == "a\n b\n"
    assert scored_text(tokenizer, sample).lstrip() == "b\n</s>"
    assert sample["input_ids"].tolist()[-1] == EOS
    assert sample["input_ids"].tolist().count(EOS) == 1


def test_the_prompt_can_be_scored_as_well() -> None:
    sample = sample_of(CompletionEncoder(tokenizer=letters(), train_on_prompt=True), {"prompt": "a", "completion": "b"})
    assert sample["input_ids"].tolist() == [BOS, A, B, EOS]
    assert sample["loss_mask"].tolist() == [False, True, True, True]


def test_fields_of_prompt_and_completion_have_names() -> None:
    encode = CompletionEncoder(tokenizer=letters(), prompt_field="q", completion_field="r", append_eos=False)
    assert scored_text(letters(), sample_of(encode, {"q": "ab", "r": "cd"})) == "cd"
    assert "no field 'r'" in refusal(encode, {"q": "ab"})


def test_a_completion_that_is_cut_off_entirely_is_an_error_with_the_cure() -> None:
    encode, record = CompletionEncoder(tokenizer=letters()), {"prompt": "abc", "completion": "d"}
    message = refusal(encode, record, Cut(4, "right"))
    assert "of 6 tokens 4 are kept, and none of them is to be predicted: allow more, or cut at the other" in message
    assert scored_text(letters(), sample_of(encode, record, Cut(3, "left"))) == "d</s>"


def test_a_prompt_without_an_answer_is_an_error() -> None:
    encode = CompletionEncoder(tokenizer=letters(), append_eos=False)
    assert "no token of this record is to be predicted" in refusal(encode, {"prompt": "a", "completion": ""})


# Tokens


def test_tokens_bring_their_mask_or_labels() -> None:
    encode, ids = TokensEncoder(), [5, 6, 7, 8]
    by_mask = sample_of(encode, {"input_ids": ids, "loss_mask": [1, 0, True, 1]})
    by_labels = sample_of(encode, {"input_ids": np.array(ids, np.uint16), "labels": [-100, -100, 7, 8]})
    for sample in (by_mask, by_labels):
        assert sample["input_ids"].dtype == np.int64
        assert sample["loss_mask"].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [1.5]}, "no list of whole numbers, but float64"),
        ({"input_ids": "abc"}, "no list of whole numbers"),
        ({"input_ids": [[1], [2]]}, r"of shape \(2, 1\)"),
        ({"input_ids": [[1], [2, 3]]}, "no list of whole numbers"),
        ({"input_ids": [2**80]}, "no list of whole numbers, but object"),
        ({"input_ids": [True]}, "but bool"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "loss_mask has 1 values for 2 tokens"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, r"labels\[0\] is 2 beside token 1: labels repeat"),
    ],
)
def test_tokens_that_are_none_are_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        sample_of(TokensEncoder(), record)


# Sequence to sequence


def test_the_decoder_reads_the_target_one_token_late() -> None:
    sample = sample_of(Seq2SeqEncoder(tokenizer=letters()), {"source": "ab", "target": "cd"})
    assert sample["input_ids"].tolist() == [BOS, A, B, EOS]
    assert sample["labels"].tolist() == [BOS, C, D, EOS]
    assert sample["decoder_input_ids"].tolist() == [0, BOS, C, D]


def test_sources_take_a_prefix_and_decoders_a_start_token() -> None:
    encode = Seq2SeqEncoder(tokenizer=letters(), source_prefix="c", start_id=9)
    sample = sample_of(encode, {"source": "a", "target": "b"})
    assert sample["input_ids"].tolist() == [BOS, C, A, EOS]
    assert sample["decoder_input_ids"].tolist()[0] == 9
    bare = Tokenizer(letters().backend, special_tokens={"eos_token": "</s>"})
    with pytest.raises(ConfigError, match="no pad_token to begin targets with"):
        Seq2SeqEncoder(tokenizer=bare)


def test_cut_sequences_keep_their_end() -> None:
    encode, record = Seq2SeqEncoder(tokenizer=letters()), {"source": "abcd", "target": "a"}
    assert sample_of(encode, record, Cut(3))["input_ids"].tolist() == [BOS, A, EOS]
    assert sample_of(encode, record, Cut(3, "left"))["input_ids"].tolist() == [C, D, EOS]
    assert sample_of(encode, record, Cut(1))["labels"].tolist() == [EOS]


# Classification


def test_a_labelled_text_keeps_its_special_tokens_when_it_is_cut() -> None:
    encode = ClassificationEncoder(tokenizer=pairs())
    sample = sample_of(encode, {"text": "a b c", "label": 1}, Cut(4))
    assert sample["input_ids"].tolist() == [2, 4, 5, 3]
    assert sample["labels"] == 1
    assert sample["labels"].shape == ()
    with pytest.raises(ConfigError, match="cuts at the right only"):
        sample_of(encode, {"text": "a", "label": 0}, Cut(4, "left"))


def test_pairs_are_told_apart() -> None:
    encode = ClassificationEncoder(tokenizer=pairs(), text_pair_field="other", label_names=("no", "yes"))
    sample = sample_of(encode, {"text": "a b", "other": "c", "label": "yes"})
    assert sample["input_ids"].tolist() == [2, 4, 5, 3, 6, 3]
    assert sample["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1]
    assert sample["labels"] == 1


@pytest.mark.parametrize(
    ("label", "names", "message"),
    [
        ("yess", ("no", "yes"), "label is 'yess', and the classes are 'no', 'yes'. Did you mean 'yes'"),
        ("yes", (), "classes have no names here"),
        (2, ("no", "yes"), "label is 2, and classes are numbered from 0 to 1"),
        (-1, (), "from 0 on"),
        (True, (), "a class is a name or a whole number"),
        (0.5, (), "a class is a name or a whole number"),
        (None, (), "a class is a name or a whole number"),
    ],
)
def test_a_label_that_is_no_class_is_refused(label: object, names: tuple[str, ...], message: str) -> None:
    encode = ClassificationEncoder(tokenizer=pairs(), label_names=names)
    assert message in refusal(encode, {"text": "a", "label": label})


# All of them


def test_encoders_travel_to_workers_and_their_fingerprints_tell_them_apart() -> None:
    tokenizer = letters()
    encoders: list[Encoder] = [
        TextEncoder(tokenizer=tokenizer),
        TextEncoder(tokenizer=tokenizer, append_eos=False),
        TextEncoder(tokenizer=byte_level()),
        CompletionEncoder(tokenizer=tokenizer),
        CompletionEncoder(tokenizer=tokenizer, train_on_prompt=True),
        TokensEncoder(),
        Seq2SeqEncoder(tokenizer=tokenizer),
        ClassificationEncoder(tokenizer=tokenizer),
        ClassificationEncoder(tokenizer=tokenizer, label_names=("a", "b")),
    ]
    assert len({each.fingerprint for each in encoders}) == len(encoders)
    for each in encoders:
        assert pickle.loads(pickle.dumps(each)).fingerprint == each.fingerprint
    record = {"prompt": "ab", "completion": "c"}
    sample_of(encoders[3], record)
    twin = pickle.loads(pickle.dumps(encoders[3]))
    assert sample_of(twin, record)["input_ids"].tolist() == [BOS, A, B, C, EOS]
