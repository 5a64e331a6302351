"""Span corruption: it can be undone, hides what it should, and leaves special tokens in the source."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import ConfigError
from swissarmy.data.objectives.draws import even_lengths, poisson_lengths, random_numbers
from swissarmy.data.objectives.options import ObjectiveOptions
from swissarmy.data.objectives.span_corruption import SpanCorruption
from swissarmy.data.objectives.spans import scattered_spans
from swissarmy.data.samples.examples import Ids, Sample
from swissarmy.data.source import DataError
from tests.data.objectives.tiny_vocabularies import FIRST, framed, text, word_pieces
from tests.data.tiny_data import letters, pairs

PAD, END = 0, 2
SENTINELS = range(8, 68)
TOKENIZER = word_pieces()


DEFAULT = SpanCorruption.of(TOKENIZER, ObjectiveOptions())


def corrupted(ids: Ids, number: int = 0, **options: Any) -> Sample:
    corrupt = replace(DEFAULT, options=ObjectiveOptions(**options))
    return corrupt({"input_ids": ids}, random_numbers(3, number))


def pieces(target: Ids) -> dict[int, list[int]]:
    """What follows each sentinel."""
    found: dict[int, list[int]] = {}
    for token in target.tolist():
        if token in SENTINELS:
            assert token == SENTINELS[len(found)], "sentinels come in order"
            found[token] = []
        else:
            found[list(found)[-1]].append(token)
    return found


def undone(sample: Sample) -> Iterator[int]:
    """The text that source and target were made of."""
    spans = pieces(sample["labels"][:-1])
    for token in sample["input_ids"][:-1].tolist():
        yield from spans.pop(token, [token])
    assert not spans


TEXTS = st.lists(st.sampled_from([1, PAD, *range(FIRST, FIRST + 40)]), min_size=1, max_size=120)


@settings(max_examples=80, deadline=None)
@given(ids=TEXTS, share=st.floats(0.01, 0.9), mean=st.floats(1, 20), number=st.integers(0, 2**62))
def test_nothing_is_lost_and_nothing_special_is_hidden(ids: list[int], share: float, mean: float, number: int) -> None:
    sample = corrupted(np.array(ids), number, mask_probability=share, mean_span_length=mean)
    assert list(undone(sample)) == ids
    assert sample["input_ids"][-1] == sample["labels"][-1] == END
    assert sample["decoder_input_ids"].tolist() == [PAD, *sample["labels"][:-1]]
    assert set(sample["labels"].tolist()).isdisjoint({1, PAD})
    hidden = sum(map(len, pieces(sample["labels"][:-1]).values()))
    free = sum(token >= FIRST for token in ids)
    assert hidden == min(max(round(free * share), 1), max(free - 1, 0))


def test_spans_are_as_long_as_is_said_on_average() -> None:
    for number in range(5):
        spans = pieces(corrupted(text(400), number)["labels"][:-1])
        assert len(spans) == 20
        assert sum(map(len, spans.values())) == 60
    assert len(pieces(corrupted(text(400), mean_span_length=10.0)["labels"][:-1])) == 6


def test_an_end_token_is_not_doubled_and_one_is_added_where_there_is_none() -> None:
    assert corrupted(framed(text(30)))["input_ids"].tolist().count(END) == 1
    assert corrupted(text(30))["input_ids"].tolist().count(END) == 1


@pytest.mark.parametrize("lengths", [even_lengths, poisson_lengths])
def test_no_place_of_a_text_is_spared(lengths: Any) -> None:
    spans = [scattered_spans(20, 0.3, 2.0, random_numbers(0, number), lengths) for number in range(2000)]
    shares = (np.stack(spans) >= 0).mean(axis=0)
    assert shares.mean() == pytest.approx(0.3)
    assert shares[1:-1] == pytest.approx(0.31, abs=0.07)
    assert shares[[0, -1]].min() > 0.15  # both neighbours of a span are visible, and an end has one


@pytest.mark.parametrize("lengths", [even_lengths, poisson_lengths])
def test_lengths_add_up_and_are_at_least_one(lengths: Any) -> None:
    for total, number in ((1, 1), (5, 5), (30, 7), (30, 1)):
        drawn = np.stack([lengths(total, number, random_numbers(0, key)) for key in range(50)])
        assert drawn.shape == (50, number)
        assert (drawn.sum(axis=1) == total).all()
        assert drawn.min() >= 1
    many = np.concatenate([lengths(300, 100, random_numbers(1, key)) for key in range(100)])
    poisson = lengths is poisson_lengths
    # of 1 + Poisson(2) the variance is 2; of even choices it is nearly that of a geometric length of mean 3, 6
    assert many.var() == pytest.approx(2.0 if poisson else 6.0, rel=0.1)


def test_more_spans_than_sentinels_is_an_error_with_a_cure() -> None:
    with pytest.raises(DataError, match=r"75 hidden spans, and the tokenizer 60 sentinels such as '<extra_id_0>': sh"):
        corrupted(text(500), mean_span_length=1.0)


def test_other_tokens_can_be_sentinels() -> None:
    corruption = SpanCorruption.of(word_pieces(), ObjectiveOptions(sentinels="<extra_id_1{}>"))
    assert corruption.sentinels.tolist() == list(range(18, 28))


def test_what_the_tokenizer_lacks_is_said() -> None:
    with pytest.raises(ConfigError, match="sentinels: the tokenizer has no '<extra_id_0>': add it"):
        SpanCorruption.of(letters(), ObjectiveOptions())
    with pytest.raises(ConfigError, match="needs a pad_token, to begin targets with, and an eos_token"):
        SpanCorruption.of(pairs(), ObjectiveOptions())
