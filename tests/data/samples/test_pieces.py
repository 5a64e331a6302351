"""Long samples split or left out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swissarmy.core.errors import ConfigError
from swissarmy.data.samples.encoders import Seq2SeqEncoder, TokensEncoder
from swissarmy.data.samples.examples import Examples
from swissarmy.data.samples.pieces import Pieces, cut_up
from swissarmy.data.source import DataError, Source
from tests.data.tiny_data import Records, Tokens, letters


def pieces(lengths: list[int], length: int, **options: object) -> Pieces:
    return Pieces(Examples(Tokens(lengths), TokensEncoder()), length, **options)  # type: ignore[arg-type]


def test_a_long_sample_becomes_several() -> None:
    source = pieces([2, 7, 3], 3)
    assert isinstance(source, Source)
    assert [piece["input_ids"].tolist() for piece in source] == [
        [0, 1],
        [1000, 1001, 1002],
        [1003, 1004, 1005],
        [1006],
        [2000, 2001, 2002],
    ]
    assert source.token_counts().tolist() == [2, 3, 3, 1, 3]
    assert [source.where(index) for index in range(5)] == ["a.jsonl:1", *["a.jsonl:2"] * 3, "a.jsonl:3"]


def test_the_first_token_of_a_piece_has_nothing_before_it() -> None:
    assert [piece["loss_mask"].tolist() for piece in pieces([5], 3)] == [[False, True, True], [False, True]]


def test_long_samples_can_be_left_out() -> None:
    source = pieces([2, 7, 3], 3, too_long="drop")
    assert [piece["input_ids"].tolist() for piece in source] == [[0, 1], [2000, 2001, 2002]]
    assert source.where(1) == "a.jsonl:3"


@given(lengths=st.lists(st.integers(0, 20), max_size=20), length=st.integers(1, 9))
def test_pieces_cover_every_token_once(lengths: list[int], length: int) -> None:
    table = cut_up(np.array(lengths, dtype=np.int32), length, "split")
    tokens = [
        (document, token)
        for document, begin, size in zip(*(column.tolist() for column in table), strict=True)
        for token in range(begin, begin + size)
    ]
    assert tokens == [(document, token) for document, size in enumerate(lengths) for token in range(size)]
    assert all(1 <= size <= length for size in table.sizes.tolist())
    kept = cut_up(np.array(lengths, dtype=np.int32), length, "drop")
    assert kept.documents.tolist() == [document for document, size in enumerate(lengths) if 0 < size <= length]


def test_what_cannot_be_done_is_an_error() -> None:
    with pytest.raises(DataError, match="of 2 samples none is left: each is empty or has more than 3 tokens"):
        pieces([7, 8], 3, too_long="drop")
    with pytest.raises(ConfigError, match=r"(?s)length=0 must.*too_long='cut' is neither"):
        pieces([7], 0, too_long="cut")
    target = Examples(Records([{"source": "a", "target": "b"}]), Seq2SeqEncoder(tokenizer=letters()))
    with pytest.raises(DataError, match="only samples with input_ids and loss_mask can be cut and packed"):
        Pieces(target, 2)[0]


def test_data_that_shrank_since_it_was_counted_is_an_error() -> None:
    source = Pieces(Examples(Tokens([4]), TokensEncoder()), 3, lengths=np.array([7], dtype=np.int32))
    with pytest.raises(DataError, match="ends before its token 6"):
        source[2]


def test_the_fingerprint_changes_with_the_cut() -> None:
    variants = [pieces([7], 3), pieces([7], 4), pieces([3], 3), pieces([3], 3, too_long="drop")]
    assert len({each.fingerprint for each in variants}) == 4
