"""Masked language modelling: how much is hidden, what becomes of it, and what is left alone."""

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import models

from swissarmy.core.errors import ConfigError
from swissarmy.data.loading.collate import Padding
from swissarmy.data.objectives.draws import random_numbers
from swissarmy.data.objectives.masked_lm import MaskedCollator, TokenMasking
from swissarmy.data.objectives.options import ObjectiveOptions
from swissarmy.data.samples.examples import Ids, Sample
from tests.data.objectives.tiny_vocabularies import FIRST, bytes_of_words, framed, made, text, vocabulary, word_pieces
from tests.data.tiny_data import letters

MASK = 3


def masked(ids: Ids, number: int = 0, tokenizer: Any = None, **options: Any) -> Sample:
    masking = TokenMasking.of(tokenizer or word_pieces(), ObjectiveOptions(**options))
    return masking({"input_ids": ids}, random_numbers(7, number))


def all_masked(ids: Ids, count: int, **options: Any) -> tuple[Ids, Ids]:
    """`input_ids` and `targets` of a text as so many samples, `[count, n]`."""
    masking = TokenMasking.of(word_pieces(), ObjectiveOptions(**options))
    samples = [masking({"input_ids": ids}, random_numbers(7, number)) for number in range(count)]
    return np.stack([each["input_ids"] for each in samples]), np.stack([each["targets"] for each in samples])


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("length", [3, 40, 300])
def test_the_share_that_is_hidden_is_right_on_average_in_texts_of_any_length(length: int, whole_words: bool) -> None:
    ids = framed(text(length))
    _, targets = all_masked(ids, 12000 // length, mask_whole_words=whole_words)
    assert (targets != -100).mean() * len(ids) / length == pytest.approx(0.15, abs=0.013)


def test_single_tokens_are_as_many_in_each_text_as_the_share_says() -> None:
    _, targets = all_masked(text(100), 50)
    assert set((targets != -100).sum(axis=1)) == {15}
    _, targets = all_masked(text(10), 200)
    assert set((targets != -100).sum(axis=1)) == {1, 2}


def test_hidden_tokens_become_masks_or_others_or_stay_and_all_others_stay() -> None:
    ids = text(2000)
    inputs, targets = all_masked(ids, 20)
    hidden = targets != -100
    assert (np.where(hidden, targets, inputs) == ids).all()
    kinds = inputs[hidden]
    assert (kinds == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (kinds == targets[hidden]).mean() == pytest.approx(0.1 + 0.1 / 40, abs=0.015)
    others = kinds[(kinds != MASK) & (kinds != targets[hidden])]
    assert set(others) == set(range(FIRST, FIRST + 40))


def test_shares_of_what_becomes_of_them_can_be_chosen() -> None:
    ids = text(500)
    inputs, targets = all_masked(ids, 2, mask_kept=0.0, mask_random=0.0)
    assert (inputs[targets != -100] == MASK).all()
    inputs, _ = all_masked(ids, 2, mask_kept=1.0, mask_random=0.0)
    assert (inputs == ids).all()


def test_special_tokens_and_ids_without_token_are_never_hidden() -> None:
    ids = np.tile(np.array([1, 2, 0, MASK, FIRST, 5000]), 20)
    inputs, targets = all_masked(ids, 20, mask_probability=0.9)
    assert set(targets[targets != -100]) == {FIRST}
    assert (inputs == ids)[:, ids != FIRST].all()
    inputs, targets = all_masked(np.array([1, 2]), 3)
    assert (targets == -100).all()
    assert (inputs == [1, 2]).all()


@pytest.mark.parametrize("tokenizer", [word_pieces, bytes_of_words])
def test_words_are_hidden_whole(tokenizer: Any) -> None:
    begin, inside = FIRST, FIRST + 1
    words = [[inside, inside], [begin, inside, inside], [begin], [begin, inside], [begin] + [inside] * 5]
    ids = framed(np.concatenate(words))
    borders = 1 + np.cumsum([0, *map(len, words)])
    seen = set()
    for number in range(30):
        hidden = masked(ids, number, tokenizer(), mask_whole_words=True, mask_probability=0.4)["targets"] != -100
        for word, part in enumerate(np.split(hidden, borders)[1:-1]):
            assert part.all() or not part.any()
            seen |= {word} if part.all() else set()
    assert seen == set(range(5))


def test_a_word_ends_with_its_document() -> None:
    inside = FIRST + 1
    masking = TokenMasking.of(word_pieces(), ObjectiveOptions(mask_whole_words=True, mask_probability=0.5))
    sample = {"input_ids": np.full(4, inside), "document_ids": np.array([0, 0, 1, 1])}
    hidden = [tuple(masking(sample, random_numbers(0, number))["targets"] != -100) for number in range(20)]
    assert set(hidden) == {(True, True, False, False), (False, False, True, True)}


def test_other_fields_stay() -> None:
    masking = TokenMasking.of(word_pieces(), ObjectiveOptions())
    types = np.zeros(5)
    assert masking({"input_ids": text(5), "token_type_ids": types}, random_numbers(0, 0))["token_type_ids"] is types


def test_batches_are_padded_and_have_types_where_samples_do() -> None:
    rows = [{"input_ids": np.array([1, 9, 2]), "targets": np.array([-100, 8, -100])}]
    rows += [{"input_ids": np.array([9]), "targets": np.array([-100])}]
    batch = MaskedCollator(padding=Padding(pad_id=0))(rows)
    assert batch["input_ids"].tolist() == [[1, 9, 2], [9, 0, 0]]
    assert batch["targets"].tolist() == [[-100, 8, -100], [-100] * 3]
    assert batch["padding_mask"].tolist() == [[True] * 3, [True, False, False]]
    assert set(batch) == {"input_ids", "targets", "padding_mask"}
    typed = MaskedCollator(padding=Padding(pad_id=0))([{**row, "token_type_ids": row["input_ids"] % 2} for row in rows])
    assert typed["token_type_ids"].tolist() == [[1, 1, 0], [1, 0, 0]]
    empty = MaskedCollator(padding=Padding(pad_id=0))([])
    assert {name: (value.shape, value.dtype) for name, value in empty.items()} == {
        "input_ids": ((0, 0), torch.int64),
        "targets": ((0, 0), torch.int64),
        "padding_mask": ((0, 0), torch.bool),
    }


def test_what_the_tokenizer_lacks_is_said() -> None:
    with pytest.raises(ConfigError, match=r"mask_token: the tokenizer has no '\[MASK\]' or '<mask>': add it"):
        TokenMasking.of(letters(), ObjectiveOptions())
    with pytest.raises(ConfigError, match="mask_token: the tokenizer has no 'blank'"):
        TokenMasking.of(word_pieces(), ObjectiveOptions(mask_token="blank"))
    unmarked = made(models.BPE(vocab=vocabulary("a", "b"), merges=[]))
    with pytest.raises(ConfigError, match="where words begin cannot be seen"):
        TokenMasking.of(unmarked, ObjectiveOptions(mask_whole_words=True))
    with pytest.raises(ConfigError, match="all tokens of the tokenizer are special"):
        TokenMasking.of(made(models.BPE(vocab=vocabulary(), merges=[])), ObjectiveOptions())
