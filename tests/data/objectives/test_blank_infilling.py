"""Blank infilling: rows can be undone, positions say where spans belong, and rows stay as long as they may be."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import ConfigError
from swissarmy.data.loading.collate import Padding
from swissarmy.data.objectives.blank_infilling import BlankInfilling, InfillingCollator
from swissarmy.data.objectives.draws import random_numbers
from swissarmy.data.objectives.options import ObjectiveOptions
from swissarmy.data.samples.examples import Ids, Sample
from tests.data.objectives.tiny_vocabularies import FIRST, framed, sentences, text
from tests.data.tiny_data import letters

END_OF_TEXT, SHORT, LONG, SENTENCE, START, END = range(2, 8)
MASKS = (SHORT, LONG, SENTENCE)
TOKENIZER = sentences()


DEFAULT = BlankInfilling.of(TOKENIZER, ObjectiveOptions(), None)


def infilled(ids: Ids, number: int = 0, longest: int | None = None, **options: Any) -> Sample:
    corrupt = replace(DEFAULT, options=ObjectiveOptions(infilling_block_positions=True, **options), longest=longest)
    return corrupt({"input_ids": ids}, random_numbers(11, number))


def undone(sample: Sample) -> list[int]:
    """The text: each span is put where the first of its two positions says that its mask stands."""
    prefix = int(sample["prefix_lengths"])
    context: list[Any] = sample["input_ids"][:prefix].tolist()
    wanted, positions = sample["targets"][prefix:], sample["position_ids"][prefix:]
    assert (sample["targets"][:prefix] == -100).all()
    for span in np.split(np.arange(len(wanted)), np.flatnonzero(wanted == END) + 1)[:-1]:
        (place,) = set(positions[span])
        assert context[place] in MASKS
        assert sample["block_position_ids"][prefix + span].tolist() == list(range(1, len(span) + 1))
        assert sample["input_ids"][prefix + span].tolist() == [START, *wanted[span][:-1]]
        context[place] = wanted[span][:-1].tolist()
    return [token for part in context for token in (part if isinstance(part, list) else [part])]


KINDS: list[dict[str, float]] = [
    {"infilling_long": 0.0},
    {"infilling_long": 1.0},
    {"infilling_long": 0.0, "infilling_sentences": 1.0},
    {"infilling_long": 0.3, "infilling_sentences": 0.3},
]


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.sampled_from([0, 1, *range(FIRST, FIRST + 40)]), min_size=1, max_size=120),
    kind=st.sampled_from(KINDS),
    share=st.floats(0.01, 0.9),
    number=st.integers(0, 2**62),
)
def test_nothing_is_lost(ids: list[int], kind: dict[str, float], share: float, number: int) -> None:
    sample = infilled(np.array(ids), number, mask_probability=share, **kind)
    assert undone(sample) == ids
    assert len({len(value) for name, value in sample.items() if name != "prefix_lengths"}) == 1


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.sampled_from([0, *range(FIRST, FIRST + 40)]), min_size=1, max_size=120),
    kind=st.sampled_from(KINDS),
    longest=st.integers(12, 90),
    number=st.integers(0, 2**62),
)
def test_rows_are_no_longer_than_they_may_be(ids: list[int], kind: dict[str, float], longest: int, number: int) -> None:
    sample = infilled(np.array(ids), number, longest, **kind)
    assert len(sample["input_ids"]) <= longest
    whole = undone(sample)
    assert whole == ids[: len(whole)]
    assert len(whole) >= min(len(ids), longest * 3 // 4)


def masks_of(sample: Sample) -> list[int]:
    return [token for token in sample["input_ids"][: int(sample["prefix_lengths"])].tolist() if token in MASKS]


def hidden_by(sample: Sample) -> int:
    return int(((sample["targets"] != -100) & (sample["targets"] != END)).sum())


def test_short_spans_hide_the_share_and_are_as_long_as_is_said() -> None:
    sample = infilled(text(400), infilling_long=0.0)
    assert masks_of(sample) == [SHORT] * 20
    assert hidden_by(sample) == 60


def test_spans_come_in_random_order() -> None:
    sample = infilled(text(400), infilling_long=0.0)
    prefix = int(sample["prefix_lengths"])
    places = sample["position_ids"][prefix:][sample["input_ids"][prefix:] == START]
    assert sorted(places) != list(places)


def test_a_long_span_is_half_of_the_text_or_more_at_its_end() -> None:
    lengths = []
    for number in range(200):
        sample = infilled(framed(text(41)), number, infilling_long=1.0)
        assert masks_of(sample) == [LONG]
        assert int(sample["input_ids"][int(sample["prefix_lengths"]) - 1]) == LONG
        lengths.append(hidden_by(sample))
    assert set(lengths) == set(range(21, 42))


def test_sentences_are_hidden_whole() -> None:
    words = [FIRST + 1, FIRST + 2, FIRST + 3, FIRST]  # `w0.` ends a sentence
    ids = np.array(words * 10 + words[:2])
    for number in range(20):
        sample = infilled(ids, number, infilling_long=0.0, infilling_sentences=1.0)
        assert masks_of(sample) in ([SENTENCE] * 2, [SENTENCE] * 3)
        for span in np.split(sample["targets"], np.flatnonzero(sample["targets"] == END) + 1)[:-1]:
            assert span[span != -100][:-1].tolist() in (words, words[:2])
    assert masks_of(infilled(np.array(words), infilling_long=0.0, infilling_sentences=1.0)) == [SHORT]


def test_kinds_come_in_their_shares() -> None:
    ids = text(200)
    kinds = [masks_of(infilled(ids, number, infilling_long=0.5, infilling_sentences=0.3))[0] for number in range(600)]
    shares = {kind: kinds.count(kind) / len(kinds) for kind in MASKS}
    assert shares == pytest.approx({LONG: 0.5, SENTENCE: 0.3, SHORT: 0.2}, abs=0.06)


def test_an_end_token_is_left_out_and_special_tokens_are_seen() -> None:
    sample = infilled(framed(text(50)), infilling_long=0.0, mask_probability=0.6)
    assert sample["input_ids"][0] == 1
    assert END_OF_TEXT not in sample["input_ids"]
    assert set(sample["targets"]).isdisjoint({0, 1, 2})


def test_without_block_positions_positions_count_on() -> None:
    sample = DEFAULT({"input_ids": text(50)}, random_numbers(0, 0))
    assert sample["position_ids"].tolist() == list(range(len(sample["input_ids"])))


def test_batches_are_padded_on_the_right() -> None:
    rows = [infilled(text(length), length) for length in (30, 12)]
    batch = InfillingCollator(padding=Padding(pad_id=0), block_positions=True)(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["padding_mask"].sum(dim=1).tolist() == lengths
    assert batch["prefix_lengths"].tolist() == [int(row["prefix_lengths"]) for row in rows]
    for name, fill in {"input_ids": 0, "targets": -100, "position_ids": 0, "block_position_ids": 0}.items():
        for line, row in zip(batch[name], rows, strict=True):
            assert line.tolist() == [*row[name].tolist(), *[fill] * (max(lengths) - len(row[name]))]
    empty = InfillingCollator(padding=Padding(pad_id=0))([])
    assert set(empty) == set(batch) - {"block_position_ids"}
    assert all(len(value) == 0 for value in empty.values())
    assert empty["prefix_lengths"].dtype == torch.int64


def test_one_mask_token_does_and_the_others_can_be_named() -> None:
    options = ObjectiveOptions(mask_token=".", infilling_start_token="<s>", infilling_end_token="</s>")
    tokens = BlankInfilling.of(letters(), options, None).tokens
    stop = letters().token_to_id(".")
    assert (tokens.short, tokens.sentence, tokens.long, tokens.start, tokens.end) == (stop, stop, stop, 1, 2)


def test_what_the_tokenizer_lacks_and_rows_that_are_too_short_are_said() -> None:
    with pytest.raises(
        ConfigError, match=r"infilling_start_token: the tokenizer has no '<\|startofpiece\|>' or '<sop>'"
    ):
        BlankInfilling.of(letters(), ObjectiveOptions(mask_token="."), None)
    with pytest.raises(ConfigError, match="sequence_length=3 has no room for a text and its spans"):
        BlankInfilling.of(TOKENIZER, ObjectiveOptions(), 3)
