"""What `fill_sequence` tells the model beside the tokens: a short memory, weights, masks and positions, padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.core.hooks import Hook
from swissarmy.testing import tiny_model

CAUSAL = ["gpt2", "llama", "gemma3_text", "swissarmy"]
FAMILIES = [*CAUSAL, "t5"]
SOURCE = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 2]])


def source_of(model: Model, rows: slice = slice(None)) -> dict[str, Tensor]:
    return {"input_ids": SOURCE[rows]} if model.parts else {}


@torch.no_grad()
def by_hand(model: Model, row: list[int], index: int, **call: Any) -> list[int]:
    """Greedy, the whole prefix read again for each token; `call` may hold functions of the length."""
    tokens = list(row)
    for place, token in enumerate(tokens):
        if token == -1:
            keywords = {key: value(place) if callable(value) else value for key, value in call.items()}
            ids = torch.tensor([tokens[:place]])
            if model.parts:
                keywords = {f"decoder_{key}": value for key, value in keywords.items()}
                logits = model(SOURCE[index : index + 1], ids, **keywords)[0]
            else:
                logits = model(ids, **keywords)[0]
            tokens[place] = int(logits[0, -1].argmax())
    return tokens


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_memory_equals_a_model_that_sees_so_many_positions_before_each_token(family: str, prefix: bool) -> None:
    model = tiny_model(family)
    if prefix:
        model.add_mixin("prefix-tuning", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
    rows = [[5, 6, 7, 8, 9, -1, -1, 4, 3, -1, -1], [9, 3, -1, -1, -1]]
    for chosen in ([0], [1], [0, 1]):
        source = {"input_ids": SOURCE[chosen]} if model.parts else {}
        tokens, mems = sat.fill_sequence(
            model, [torch.tensor(rows[index]) for index in chosen], max_memory_length=3, **source
        )
        assert mems.shape[2] == 3
        for filled, index in zip(tokens.tolist(), chosen, strict=True):
            expected = by_hand(model, rows[index], index, attention_mask=sat.SlidingWindow(4))
            assert filled[: len(rows[index])] == expected


def test_a_memory_that_is_long_enough_changes_nothing_and_one_that_was_cut_continues() -> None:
    model = tiny_model("llama")
    seq = torch.tensor([[5, 6, *[-1] * 8], [7, 8, *[-1] * 8]])
    plain, _ = sat.fill_sequence(model, seq)
    assert torch.equal(sat.fill_sequence(model, seq, max_memory_length=9)[0], plain)
    whole, whole_mems = sat.fill_sequence(model, seq, max_memory_length=3)
    first, mems = sat.fill_sequence(model, seq[:, :6], max_memory_length=3)
    longer = torch.cat((first, torch.full((2, 4), -1)), dim=1)
    second, second_mems = sat.fill_sequence(model, longer, mems=mems, max_memory_length=3)
    assert torch.equal(second, whole)
    torch.testing.assert_close(second_mems, whole_mems, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_rule_out_keys_equal_a_mask(family: str, prefix: bool) -> None:
    model = tiny_model(family)
    if prefix:
        model.add_mixin("prefix-tuning", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
    row = [5, 6, 7, -1, 4, -1, -1]
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    visible[2:, 1] = False
    weights = torch.zeros(7, 7).masked_fill(~visible, -1e9)
    source = source_of(model, slice(1))
    tokens, _ = sat.fill_sequence(model, torch.tensor(row), log_attention_weights=weights, **source)
    assert tokens.tolist() == [by_hand(model, row, 0, attention_mask=lambda size: visible[:size, :size])]


@pytest.mark.parametrize("shape", [(9,), (1, 9), (9, 9), (4, 1, 9), (4, 9, 9), (2, 1, 9, 9), (2, 4, 9, 9)])
def test_weights_broadcast_and_are_cut_for_each_step_and_row(shape: tuple[int, ...]) -> None:
    model = tiny_model("gpt2").double()
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    rows = [[5, 6, 7, 8, -1, -1, 4, -1, -1], [9, -1, -1, -1, 3]]
    tokens, _ = sat.fill_sequence(model, [torch.tensor(row) for row in rows], log_attention_weights=weights)
    full = weights[(None,) * (4 - weights.dim())].expand(2, 4, 9, 9)
    for index, row in enumerate(rows):
        expected = by_hand(
            model, row, index, attention_bias=lambda size, index=index: full[index : index + 1, :, :size, :size]
        )
        assert tokens[index, : len(row)].tolist() == expected


@pytest.mark.parametrize("family", CAUSAL)
def test_a_prefix_is_seen_in_both_directions(family: str) -> None:
    model = tiny_model(family)
    rows = [[5, 6, 7, 8, -1, -1, -1], [9, 3, -1, -1, 2]]
    lengths = torch.tensor([4, 2])
    seen: list[Tensor] = []

    def masks(seq: Tensor) -> tuple[Any, None]:
        seen.append(seq)
        return sat.PrefixLM(lengths if seq.dim() == 2 else lengths[:1]), None

    def dense(seq: Tensor) -> tuple[Any, Tensor]:
        return sat.PrefixLM(lengths).dense(7, 7), torch.arange(7)

    given = [torch.tensor(row) for row in rows]
    tokens, _ = sat.fill_sequence(model, given, get_masks_and_position_ids=masks)
    assert seen[0].tolist() == [rows[0], [*rows[1], -1, -1]]
    for index, row in enumerate(rows):
        expected = by_hand(model, row, index, attention_mask=sat.PrefixLM(lengths[index : index + 1]))
        assert tokens[index, : len(row)].tolist() == expected
    again, _ = sat.fill_sequence(model, given, get_masks_and_position_ids=dense)
    assert torch.equal(again, tokens)
    one, _ = sat.fill_sequence(model, given[0], 3, get_masks_and_position_ids=masks)
    assert seen[-1].tolist() == rows[0]
    assert torch.equal(one, tokens[:1].expand(3, -1))


class TwoRows(sat.BaseMixin):
    """Positions in two rows, as GLM has them: in the text, and in the gap that is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = torch.nn.Parameter(torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)) * 3)

    @sat.non_conflict
    def position_embedding_forward(self, position_ids: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        assert position_ids.dim() == 3
        return self.tables[0][position_ids[:, 0]] + self.tables[1][position_ids[:, 1]]


@pytest.mark.parametrize("beams", [None, 2])
def test_two_rows_of_positions_pass_through(beams: int | None) -> None:
    model = sat.BaseModel(tiny_model("swissarmy").config).eval()
    model.add_mixin("two-rows", TwoRows())
    rows = [[5, 6, 7, 8, -1, -1, -1], [9, 3, -1, -1, -1]]
    contexts = torch.tensor([[4], [2]])

    def masks(seq: Tensor) -> tuple[Any, Tensor]:
        places = torch.arange(seq.shape[1])[None].expand(len(seq), -1)
        return None, torch.stack((places.minimum(contexts - 1), (places - contexts + 1).clamp(min=0)), dim=1)

    positions = masks(torch.zeros(2, 7))[1]
    strategy = None if beams is None else sat.BeamSearchStrategy(beams, end_tokens=[])
    tokens, _ = sat.fill_sequence(
        model, [torch.tensor(row) for row in rows], get_masks_and_position_ids=masks, strategy=strategy
    )
    for index, row in enumerate(rows):
        of_row = positions[index : index + 1]
        if beams is None:
            expected = by_hand(model, row, index, position_ids=lambda size, of_row=of_row: of_row[..., :size])
            assert tokens[index, : len(row)].tolist() == expected
        else:
            contexts = torch.tensor([[4], [2]])[index : index + 1]
            alone, _ = sat.fill_sequence(
                model, torch.tensor(row)[None], get_masks_and_position_ids=masks, strategy=strategy
            )
            assert tokens[index, : len(row)].tolist() == alone[0].tolist()
            contexts = torch.tensor([[4], [2]])


def test_padding_on_either_side_changes_nothing_and_stays() -> None:
    model = tiny_model("gpt2")
    seq = torch.tensor([[0, 0, 5, 6, -1, -1, -1], [7, 8, 9, 4, -1, -1, -1], [3, 2, -1, -1, 0, 0, 0]])
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    tokens, _ = sat.fill_sequence(model, seq, padding_mask=real)
    for filled, row, place in zip(tokens, seq, real.bool(), strict=True):
        assert filled[place].tolist() == by_hand(model, row[place].tolist(), 0)
        assert (filled[~place] == 0).all()


def test_a_ragged_batch_may_use_every_position_and_one_more_is_named() -> None:
    model = tiny_model("gpt2")
    rows = [torch.tensor([5] * 60 + [-1] * 5), torch.tensor([5, -1])]
    assert sat.fill_sequence(model, rows)[0].shape == (2, 65)
    rows[0] = torch.tensor([5] * 60 + [-1] * 6)
    with pytest.raises(sat.HookCallError, match="65 tokens, and the model has 64 positions"):
        sat.fill_sequence(model, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory_length": 0}, "max_memory_length=0"),
        ({"log_attention_weights": torch.zeros(2)}, r"log_attention_weights are \[2\]"),
        ({"log_attention_weights": torch.zeros(5, 1, 3, 3)}, r"log_attention_weights are \[5, 1, 3, 3\]"),
        ({"get_masks_and_position_ids": lambda seq: (None, torch.zeros(2))}, r"position_ids \[2\]"),
        ({"get_masks_and_position_ids": lambda seq: (torch.ones(2, 2), None)}, r"attention_mask has shape"),
        ({"get_masks_and_position_ids": lambda seq: (sat.PrefixLM(torch.tensor([1, 2])), None)}, "a mask for 2 rows"),
        ({"position_ids": torch.arange(3)[None]}, "position_ids belongs to one step"),
        ({"padding_mask": torch.ones(1, 2)}, r"padding_mask is \[1, 2\]"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.HookCallError, match=message):
        sat.fill_sequence(tiny_model("gpt2"), torch.tensor([5, 6, -1]), **options)


def test_the_accepted_spellings_are_the_same_things() -> None:
    assert sat.filling_sequence is sat.fill_sequence
    assert sat.CachedAutoregressiveMixin is sat.CachedAutoRegressiveMixin
