"""All gaps at once: what each round keeps, compared with the same written position by position."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.testing import tiny_model

MASK = 60
ROWS = [[5, -1, 7, -1, -1, 4, -1, -1], [9, 3, -1, -1, 8], [4, 5, 6]]


def prefix_lm(tokens: Tensor) -> tuple[sat.Mask, None]:
    """The first five positions, gaps among them, are seen from everywhere."""
    return sat.PrefixLM(torch.tensor([5])), None


@torch.no_grad()
def distribution(model: Model, row: list[int], place: int, **call: Any) -> Tensor:
    """Of the token at a place, `[vocab]`, with the mask token never chosen."""
    ids = torch.tensor([[MASK if token == -1 else token for token in row]])
    logits = model(ids, **call)[0][0]
    scores = logits[place - 1 if model.config.causal else place].clone()
    scores[MASK] = -math.inf
    return scores.softmax(dim=-1)


def by_hand(model: Model, row: list[int], rounds: int, threshold: float | None, **call: Any) -> list[int]:
    """The most likely token of the surest positions, round after round."""
    row, gaps = list(row), [place for place, token in enumerate(row) if token == -1]
    for done in range(1, rounds + 1):
        still = [place for place in gaps if row[place] == -1]
        found = {place: distribution(model, row, place, **call) for place in still}
        entropy = {place: float(torch.special.entr(each).sum()) for place, each in found.items()}
        surest = sorted(still, key=lambda place: entropy[place])
        if done == rounds:
            kept = surest
        elif threshold is None:
            wanted = math.ceil(len(gaps) * (1 - math.cos(math.pi / 2 * done / rounds)))
            kept = surest[: max(1, wanted - (len(gaps) - len(still)))]
        else:
            kept = [place for place in surest if entropy[place] <= threshold] or surest[:1]
        for place in kept:
            row[place] = int(found[place].argmax())
    return row


@pytest.mark.parametrize("threshold", [None, 0.0, 1.0])
@pytest.mark.parametrize("rounds", [1, 3, 8])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_fills_its_masks_surest_first(family: str, rounds: int, threshold: float | None) -> None:
    model = tiny_model(family, scale=4.0).double()
    strategy = sat.IterativeEntropyFilterStrategy(rounds, entropy_threshold=threshold, top_k=1)
    rows = [torch.tensor(row) for row in [*ROWS, [-1, -1, 5, -1]]]
    tokens = sat.fill_sequence_in_parallel(model, rows, mask_token=MASK, strategy=strategy)
    assert tokens.dtype == torch.int64
    for filled, row in zip(tokens.tolist(), rows, strict=True):
        expected = by_hand(model, row.tolist(), rounds, threshold)
        assert filled == expected + [-1] * (len(filled) - len(expected))


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("family", ["gpt2", "llama", "swissarmy"])
def test_a_prefix_lm_predicts_the_next_token_of_every_position(family: str, rounds: int) -> None:
    model = tiny_model(family).double()
    row = [5, 6, -1, -1, 7, -1, -1, -1, 9]
    tokens = sat.fill_sequence_in_parallel(
        model,
        torch.tensor(row),
        mask_token=MASK,
        strategy=sat.IterativeEntropyFilterStrategy(rounds, top_k=1),
        get_masks_and_position_ids=prefix_lm,
    )
    mask, _ = prefix_lm(torch.tensor(row))
    assert tokens.tolist() == [by_hand(model, row, rounds, None, attention_mask=mask)]
    if family == "llama":  # tied weights leave the others little choice
        assert tokens.tolist() != [by_hand(model, row, rounds, None)]


def test_an_encoder_decoder_fills_its_target() -> None:
    model = tiny_model("t5", scale=4.0).double()
    source, row = torch.tensor([[5, 6, 7]]), torch.tensor([0, -1, -1, 4, -1])
    strategy = sat.IterativeEntropyFilterStrategy(1, top_k=1)
    tokens = sat.fill_sequence_in_parallel(model, row, mask_token=MASK, strategy=strategy, input_ids=source)
    fed = torch.where(row == -1, MASK, row)[None]
    with torch.no_grad():
        logits = model(source, decoder_input_ids=fed)[0][0]
    logits[:, MASK] = -math.inf
    assert tokens.tolist() == [[0, *[int(logits[place - 1].argmax()) for place in (1, 2)], 4, int(logits[3].argmax())]]


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"num_rounds": 3}, 3),
        ({"num_rounds": 50}, 8),
        ({"num_rounds": 50, "entropy_threshold": 100.0}, 1),
        ({"num_rounds": 50, "entropy_threshold": 0.0}, 8),
        ({"num_rounds": 4, "entropy_threshold": [0.0, 0.0, 100.0, 0.0]}, 3),
    ],
)
def test_the_passes_are_those_of_the_rounds_and_end_when_all_is_filled(options: dict[str, Any], calls: int) -> None:
    model, seen = tiny_model("bert"), []
    with model.transformer.register_forward_hook(lambda *arguments: seen.append(1)):  # type: ignore[operator,union-attr]
        tokens = sat.fill_sequence_in_parallel(
            model, torch.tensor([5, *[-1] * 8]), mask_token=MASK, strategy=sat.IterativeEntropyFilterStrategy(**options)
        )
    assert len(seen) == calls
    assert bool((tokens >= 0).all())


def test_draws_repeat_with_a_seed_follow_torch_without_and_do_not_depend_on_neighbours() -> None:
    model = tiny_model("bert").double()
    rows = [torch.tensor([5, *[-1] * 7]), torch.tensor([9, 3, *[-1] * 3])]

    def fill(given: Any, **options: Any) -> Tensor:
        strategy = sat.IterativeEntropyFilterStrategy(3, temperature=[4.0, 3.0, 2.0], **options)
        return sat.fill_sequence_in_parallel(model, given, mask_token=MASK, strategy=strategy)

    assert torch.equal(fill(rows, seed=3), fill(rows, seed=3))
    assert torch.equal(fill(rows, seed=3)[0], fill(rows[0], seed=3)[0])
    assert torch.equal(fill(rows, seed=3)[1, :5], fill([rows[1]], seed=4)[0])
    torch.manual_seed(0)
    first, second = fill(rows), fill(rows)
    torch.manual_seed(0)
    assert torch.equal(fill(rows), first)
    assert not torch.equal(first, second)


def test_neither_the_mask_token_nor_a_suppressed_one_is_drawn() -> None:
    model = tiny_model("bert")
    allowed = {3, 4, MASK}
    strategy = sat.IterativeEntropyFilterStrategy(
        3, temperature=50.0, suppressed_tokens=[token for token in range(61) if token not in allowed], seed=0
    )
    tokens = sat.fill_sequence_in_parallel(model, torch.tensor([5, *[-1] * 20]), 4, mask_token=MASK, strategy=strategy)
    assert tokens.shape == (4, 21)
    assert set(tokens[:, 1:].flatten().tolist()) == {3, 4}


def test_a_model_in_training_mode_fills_without_dropout() -> None:
    model = tiny_model("bert", hidden_dropout_prob=0.5)
    strategy = sat.IterativeEntropyFilterStrategy(2, top_k=1)
    row = torch.tensor([5, *[-1] * 7])
    expected = sat.fill_sequence_in_parallel(model, row, mask_token=MASK, strategy=strategy)
    model.train()
    assert torch.equal(sat.fill_sequence_in_parallel(model, row, mask_token=MASK, strategy=strategy), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rounds": 0}, "num_rounds=0"),
        ({"entropy_threshold": -1.0}, "entropy_threshold=-1.0"),
        ({"entropy_threshold": float("nan")}, "entropy_threshold=nan"),
        ({"num_rounds": 3, "entropy_threshold": [1.0, 2.0]}, "entropy_threshold has 2 values for num_rounds=3"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"num_rounds": 2, "temperature": [1.0]}, "temperature has 1 values"),
        ({"top_k": 0}, "top_k=0"),
        ({"suppressed_tokens": [-3]}, "suppressed_tokens"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError) as error:
        sat.IterativeEntropyFilterStrategy(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("family", "row", "options", "message"),
    [
        ("gpt2", [-1, 5], {}, "row 0 begins with a gap"),
        ("bert", [5, -2], {}, "seq holds -2"),
        ("bert", [], {}, "row 0 is empty"),
        ("bert", [5, -1], {"mask_token": 61}, "mask_token=61"),
        ("bert", [5, -1], {"mask_token": -1}, "mask_token=-1"),
        (
            "bert",
            [5, -1],
            {"strategy": sat.IterativeEntropyFilterStrategy(suppressed_tokens=range(61))},
            "every token is",
        ),
    ],
)
def test_bad_input_is_named(family: str, row: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.HookCallError) as error:
        sat.fill_sequence_in_parallel(
            tiny_model(family), torch.tensor(row, dtype=torch.long), **{"mask_token": MASK, **options}
        )
    assert message in str(error.value)


def test_a_model_without_logits_and_logits_that_are_no_numbers_are_refused() -> None:
    row = torch.tensor([5, 6, -1])
    with pytest.raises(sat.HookCallError, match="the model's head gives"):
        sat.fill_sequence_in_parallel(tiny_model("bert", architectures=["BertModel"]), row, mask_token=MASK)
    model = tiny_model("bert")
    with torch.no_grad():
        model.transformer.layers[0].mlp.down.weight.fill_(math.nan)  # type: ignore[union-attr,index]
    with pytest.raises(sat.HookCallError, match="row 0, column 2 hold NaN"):
        sat.fill_sequence_in_parallel(model, row, mask_token=MASK)
