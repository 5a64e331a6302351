"""Where tokens begin, and which tokenizer made them."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swissarmy.core.errors import TokenizerError
from swissarmy.data.samples.offset_tokenizer import OffsetTokenizer, tokenizer_fingerprint
from swissarmy.data.tokenizer import Tokenizer
from tests.data.tiny_data import byte_level, letters, spaced

KINDS = {"byte level": byte_level(), "letters": letters(), "spaced": spaced()}


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.sampled_from("ab \n.é你😀"), max_size=12), add_special_tokens=st.booleans())
def test_ids_are_those_of_the_tokenizer_and_begins_ascend(kind: str, text: str, add_special_tokens: bool) -> None:
    tokenizer = KINDS[kind]
    ids, begins = OffsetTokenizer(tokenizer)(text, add_special_tokens=add_special_tokens)
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=add_special_tokens)
    assert ids.dtype == begins.dtype == np.int64
    assert (np.diff(begins) >= 0).all()
    assert set(begins.tolist()) <= set(range(-1, len(text) + 1))


def test_whitespace_belongs_to_the_token_that_holds_it() -> None:
    text = "it?\n\n A"
    ids, begins = OffsetTokenizer(byte_level())(text, add_special_tokens=False)
    ends = [*begins[1:], len(text)]
    pieces = [text[begin:end] for begin, end in zip(begins, ends, strict=True)]
    assert [byte_level().decode([number]) for number in ids] == pieces
    assert any(piece.isspace() for piece in pieces)  # the token whose offset the post-processor would move


def test_special_tokens_stand_before_and_after_the_text() -> None:
    _, begins = OffsetTokenizer(byte_level())("A cat</s>.", add_special_tokens=True)
    assert begins[0] == -1
    assert begins[-1] == 10
    assert 5 in begins  # an end token written in the text is part of the text


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        OffsetTokenizer(letters())("\ud83d", add_special_tokens=False)


def test_it_travels_to_a_worker() -> None:
    offsets = OffsetTokenizer(spaced())
    before = offsets("ab a", add_special_tokens=True)
    after = pickle.loads(pickle.dumps(offsets))("ab a", add_special_tokens=True)
    assert before.input_ids.tolist() == after.input_ids.tolist()
    assert before.begins.tolist() == after.begins.tolist()


def test_the_fingerprint_tells_tokenizers_apart() -> None:
    kinds = [letters(), spaced(), letters(chat_template="x"), letters(eos_token_ids=[1])]
    assert len({tokenizer_fingerprint(kind) for kind in kinds}) == 4
    assert tokenizer_fingerprint(letters()) == tokenizer_fingerprint(letters())
    cut = Tokenizer(letters().backend, special_tokens={"eos_token": "</s>"})
    assert tokenizer_fingerprint(cut) != tokenizer_fingerprint(letters())
