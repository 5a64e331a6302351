"""`evaluate_perplexity`: against sums written out, padding, masks, windows, and the real Gemma."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.generation import autoregressive_sampling, target_scores
from swissarmy.generation import perplexity as module
from swissarmy.generation.perplexity import evaluate_perplexity
from swissarmy.testing import tiny_model

GOLDEN = Path(__file__).parents[1] / "golden"
CAUSAL = ["gpt2", "llama", "gemma3_text", "swissarmy"]


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def written_out(model: Any, row: Tensor, **kw_args: Any) -> Tensor:
    """What each token of `[s]` costs."""
    with torch.no_grad():
        logits = model(row[None], **kw_args)[0][0].double()
    own = -logits[:-1].log_softmax(-1).gather(1, row[1:, None]).flatten()
    return torch.cat((torch.zeros(1, dtype=torch.float64), own))


def losses(model: Any, tokens: Any, **options: Any) -> Tensor:
    return evaluate_perplexity(model, tokens, reduction="none", **options)


@pytest.mark.parametrize("family", CAUSAL)
def test_losses_are_the_log_probabilities_written_out(family: str) -> None:
    model, tokens = tiny_model(family).double(), ids(3, 12)
    want = torch.stack([written_out(model, row) for row in tokens])
    torch.testing.assert_close(losses(model, tokens), want, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(losses(model, tokens[0]), want[0], atol=1e-9, rtol=1e-9)
    result = evaluate_perplexity(model, tokens)
    assert result.tokens == 33
    assert result.nll == pytest.approx(float(want.sum()) / 33, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(result.nll))


@pytest.mark.parametrize("family", CAUSAL)
def test_padding_on_any_side_and_neighbours_change_nothing(family: str) -> None:
    model = tiny_model(family).double()
    rows = [ids(length, seed=length) for length in (12, 5, 9, 1)]
    want = [losses(model, row) if len(row) > 1 else torch.zeros(1).double() for row in rows]
    right, left = torch.full((4, 14), -1), torch.full((4, 14), -7)
    for index, row in enumerate(rows):
        right[index, : len(row)] = row
        left[index, -len(row) :] = row
    for index, row in enumerate(rows):
        torch.testing.assert_close(losses(model, right)[index, : len(row)], want[index], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(losses(model, left)[index, -len(row) :], want[index], atol=1e-9, rtol=1e-9)
    assert losses(model, rows).shape == (4, 12)
    results = [evaluate_perplexity(model, each) for each in (rows, right, left)]
    assert {result.tokens for result in results} == {11 + 4 + 8}
    assert results[0].nll == pytest.approx(results[2].nll, rel=1e-12)
    assert results[0].nll == pytest.approx(float(sum(each.sum() for each in want)) / 23, rel=1e-12)


def test_tokens_below_zero_in_the_middle_are_passed_over() -> None:
    model, row = tiny_model("gpt2").double(), ids(8)
    holes = torch.cat((row[:3], torch.tensor([-1, -1]), row[3:]))
    want = losses(model, row)
    torch.testing.assert_close(losses(model, holes)[[0, 1, 2, 5, 6, 7, 8, 9]], want)
    assert losses(model, holes)[3:5].tolist() == [0, 0]


def test_the_callers_tensors_and_model_stay_as_they_are() -> None:
    model, tokens, mask = tiny_model("gpt2"), ids(2, 9), torch.ones(2, 9)
    tokens[0, :3] = -1
    before, hooks, mixins = (tokens.clone(), mask.clone()), model.hooks, dict(model.mixins.items())
    evaluate_perplexity(model, tokens, loss_mask=mask, invalid_slices=[slice(0, 2)])
    assert torch.equal(tokens, before[0])
    assert torch.equal(mask, before[1])
    assert (model.hooks, dict(model.mixins.items())) == (hooks, mixins)


def test_a_loss_mask_chooses_the_tokens_that_count() -> None:
    model, tokens = tiny_model("llama").double(), ids(2, 9)
    mask = torch.zeros(2, 9)
    mask[0, 2:5] = mask[1, 0] = 1
    want = losses(model, tokens)
    assert torch.equal(losses(model, tokens, loss_mask=mask) != 0, (mask != 0) & (want != 0))
    result = evaluate_perplexity(model, tokens, loss_mask=mask)
    assert result.tokens == 3
    assert result.nll == pytest.approx(float(want[0, 2:5].mean()), rel=1e-12)
    shared = evaluate_perplexity(model, tokens, loss_mask=mask[0])
    assert shared.tokens == 6


def test_ids_that_cannot_be_predicted_get_no_probability() -> None:
    model, row = tiny_model("gpt2").double(), ids(10) % 40
    with torch.no_grad():
        logits = model(row[None])[0][0, :-1]
    kept = torch.cat((logits[:, :45], logits[:, 50:55]), dim=1)
    want = -kept.log_softmax(-1).gather(1, row[1:, None]).flatten()
    got = losses(model, row, invalid_slices=[slice(45, 50), slice(55, None)])
    torch.testing.assert_close(got[1:], want)
    assert evaluate_perplexity(model, row, invalid_slices=[slice(0, 40)]).perplexity == math.inf


@pytest.mark.parametrize("left", [False, True])
def test_masks_and_positions_move_with_the_tokens(left: bool) -> None:
    model, row = tiny_model("gpt2").double(), ids(7)
    visible = torch.ones(7, 7).tril()
    visible[4:, 1] = 0
    positions = torch.tensor([0, 1, 2, 2, 3, 9, 10])
    want = written_out(model, row, attention_mask=visible, position_ids=positions[None])
    places = slice(3, 10) if left else slice(0, 7)
    tokens, wide, moved = torch.full((2, 10), -1), torch.zeros(10, 10), torch.zeros(10, dtype=torch.long)
    tokens[:, places], moved[places] = row, positions
    tokens[1, places.stop - 2 : places.stop] = -1
    wide[places, places] = visible
    for mask in (wide, sat.Dense(wide), wide.expand(2, 1, 10, 10)):
        got = losses(model, tokens, attention_mask=mask, position_ids=moved)
        torch.testing.assert_close(got[0, places], want)
        torch.testing.assert_close(got[1, places][:5], want[:5])


@pytest.mark.parametrize("family", CAUSAL)
def test_a_window_that_holds_the_text_equals_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model(family).double(), ids(2, 64)
    torch.testing.assert_close(losses(model, tokens, stride=5), losses(model, tokens), atol=0, rtol=0)
    monkeypatch.setattr(target_scores, "LOGITS_AT_ONCE", 300)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 10)
    torch.testing.assert_close(losses(model, tokens, stride=5), losses(model, tokens), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("stride", [1, 7, 32, 63])
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_every_token_of_a_long_text_is_scored_once_in_its_window(
    family: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, row = tiny_model(family).double(), ids(150)
    want = torch.zeros(150, dtype=torch.float64)
    want[:64] = written_out(model, row[:64])
    for stop in range(64 + stride, 150 + stride, stride):
        window = written_out(model, row[stop - 64 : stop])
        reached = min(stop, 150)
        want[stop - stride : reached] = window[64 - stride :][: reached - stop + stride]
    for block in (1024, 10):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", block)
        torch.testing.assert_close(losses(model, row, stride=stride), want, atol=1e-9, rtol=1e-9)
    batch = [row, row[:70], row[:20]]
    got = losses(model, batch, stride=stride)
    for index, each in enumerate(batch):
        torch.testing.assert_close(got[index, : len(each)], want[: len(each)], atol=1e-9, rtol=1e-9)
    assert evaluate_perplexity(model, batch, stride=stride).tokens == 149 + 69 + 19


def test_mixins_that_are_present_count() -> None:
    model, row = tiny_model("llama").double(), ids(100)
    plain = losses(model, row[:60])
    model.add_mixin("prefix", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
    assert not torch.allclose(losses(model, row[:60]), plain)
    torch.testing.assert_close(losses(model, row[:60]), written_out(model, row[:60]))
    torch.testing.assert_close(losses(model, row, stride=8)[:64], written_out(model, row[:64]))


def test_an_encoder_decoder_scores_the_target() -> None:
    model, source, target = tiny_model("t5").double(), ids(2, 6), ids(2, 8)
    with torch.no_grad():
        logits = model(source, decoder_input_ids=target)[0]
    want = -logits[:, :-1].log_softmax(-1).gather(2, target[:, 1:, None])[..., 0]
    torch.testing.assert_close(losses(model, target, input_ids=source)[:, 1:], want)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.tensor([5]), {}, "no token to score"),
        (torch.full((2, 4), -1), {}, "no token to score"),
        (torch.zeros(0, dtype=torch.long), {}, "no token to score"),
        (torch.ones(2, 4, dtype=torch.long), {"loss_mask": torch.zeros(4)}, "no token to score"),
        (torch.ones(2, 4, dtype=torch.long), {"loss_mask": torch.ones(5)}, "must match"),
        (torch.ones(2, 4, dtype=torch.long), {"position_ids": torch.ones(5)}, "position_ids"),
        (torch.ones(2, 4, dtype=torch.long), {"reduction": "sum"}, "reduction='sum'"),
        (torch.ones(2, 2, 4, dtype=torch.long), {}, "tokens and loss_mask are"),
        ([], {}, "no token to score"),
        (ids(100), {"stride": 0}, "stride=0"),
        (ids(10), {"stride": 64}, "below 64"),
        (ids(100), {"stride": 8, "attention_mask": -1}, "leave attention_mask"),
        (ids(100), {}, "64 positions"),
    ],
)
def test_what_cannot_be_is_an_error(tokens: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.HookCallError, match=message):
        evaluate_perplexity(tiny_model("gpt2"), tokens, **options)


def test_models_that_do_not_predict_the_next_token_are_refused() -> None:
    with pytest.raises(sat.HookCallError, match="from both sides"):
        evaluate_perplexity(tiny_model("bert"), ids(5))
    model = tiny_model("gpt2", architectures=["GPT2ForSequenceClassification"], num_labels=2, pad_token_id=0)
    with pytest.raises(sat.HookCallError, match="ClassificationHeadMixin"):
        evaluate_perplexity(model, ids(5) + 2)


def test_a_mask_makes_a_model_that_reads_both_sides_one_that_can_be_scored() -> None:
    model, row = tiny_model("bert").double(), ids(7)
    torch.testing.assert_close(losses(model, row, attention_mask=-1), written_out(model, row, attention_mask=-1))
    padded = torch.full((2, 9), -1)
    padded[0, 2:], padded[1, :4] = row, row[:4]
    got = losses(model, padded, attention_mask=sat.Causal())
    torch.testing.assert_close(got[0, 2:], written_out(model, row, attention_mask=-1))
    torch.testing.assert_close(got[1, :4], got[0, 2:6])


def test_the_name_is_where_the_contract_puts_it() -> None:
    assert autoregressive_sampling.evaluate_perplexity is evaluate_perplexity is sat.evaluate_perplexity


def test_gemma_scores_the_reference_text_as_the_reference(gemma_gguf: Path) -> None:
    """Measured with transformers 5.23 on the same dequantised weights."""
    golden = json.loads((GOLDEN / "gemma3_270m_perplexity.json").read_text())
    model = sat.load(gemma_gguf)
    text = (GOLDEN / "text_2000.txt").read_text(encoding="utf-8")
    row = torch.tensor(sat.load_tokenizer(gemma_gguf).encode(text)[:2000])
    own = losses(model, row, stride=100)
    assert int((own != 0).sum()) == golden["tokens_scored"]
    assert float(own.double().sum()) / golden["tokens_scored"] == pytest.approx(golden["mean_nll"], rel=1e-5)
    torch.testing.assert_close(own[1:101], torch.tensor(golden["nll_first_100"]), atol=2e-3, rtol=0)
    first = losses(model, row[:300])
    torch.testing.assert_close(first, own[:300], atol=1e-3, rtol=0)
