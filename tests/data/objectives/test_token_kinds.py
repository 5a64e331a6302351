"""What tokens are, by how tokenizers of each kind write them."""

import numpy as np

from swissarmy.data.objectives.token_kinds import kind_of, sentence_ends, special_tokens, word_beginnings
from swissarmy.data.tokenizer import Tokenizer
from tests.data.objectives.tiny_vocabularies import word_pieces
from tests.data.tiny_data import byte_level, letters, pairs, spaced


def tokens(tokenizer: Tokenizer, flags: np.ndarray) -> set[str | None]:
    return {tokenizer.id_to_token(int(number)) for number in np.flatnonzero(flags[:-1])}


def test_special_tokens_are_those_of_roles_and_ids_that_nobody_knows() -> None:
    special = special_tokens(letters())
    assert tokens(letters(), special) == {"<pad>", "<s>", "</s>"}
    assert kind_of(special, np.array([0, 5, len(letters()), 10**6])).tolist() == [True, False, True, True]


def test_words_begin_where_tokenizers_of_each_kind_say() -> None:
    pieces = tokens(word_pieces(), word_beginnings(word_pieces()))
    assert "w2" in pieces
    assert "##w1" not in pieces
    assert tokens(spaced(), word_beginnings(spaced())) == {"▁", "▁a"}
    in_bytes = tokens(byte_level(), word_beginnings(byte_level()))
    assert in_bytes
    assert all(str(token).startswith("Ġ") for token in in_bytes)
    assert word_beginnings(pairs()).all()


def test_sentences_end_with_stops_and_line_breaks_however_they_are_written() -> None:
    assert tokens(letters(), sentence_ends(letters())) == {".", "\n"}
    in_bytes = tokens(byte_level(), sentence_ends(byte_level()))
    assert {".", "?", "!", "Ċ"} <= in_bytes
    assert "a" not in in_bytes
    assert "<0x0A>" in tokens(spaced(), sentence_ends(spaced()))
