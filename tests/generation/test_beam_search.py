"""Beam search: exact on a small vocabulary, equal to `transformers`, with all state reordered."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.testing import tiny_model
from tests.generation.helpers import here_and_in_transformers, until_end

FAMILIES = ["gpt2", "llama", "gemma3_text", "t5"]
PROMPTS = [[5, 6], [9, 3]]


@torch.no_grad()
def log_probability(model: Model, row: list[int], start: int, **source: Tensor) -> float:
    """Of the tokens from `start` on, recomputed without a cache."""
    ids = torch.tensor([row])
    call = {**source, "decoder_input_ids": ids} if source else {"input_ids": ids}
    scores = model(**call)[0][0].double().log_softmax(dim=-1)
    return sum(float(scores[index - 1, row[index]]) for index in range(start, len(row)))


def gaps_after(prompts: list[list[int]], count: int) -> Tensor:
    return torch.tensor([[*prompt, *[-1] * count] for prompt in prompts])


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_it_equals_exhaustive_search_on_a_vocabulary_of_five(alpha: float) -> None:
    model = tiny_model("gpt2", vocab_size=5, scale=3.0).double()
    divisor = sat.gnmt_length_penalty(alpha)
    found: dict[tuple[int, ...], float] = {}
    for new in product(range(5), repeat=4):
        end = new.index(0) + 1 if 0 in new else 4
        found.setdefault(new[:end], log_probability(model, [2, 3, *new[:end]], 2) / divisor(end))
    best = sorted(found.items(), key=lambda item: -item[1])[:10]
    strategy = sat.BeamSearchStrategy(
        400, length_penalty=alpha, early_stopping="never", num_return_sequences=10, end_tokens=[0]
    )
    tokens, _ = sat.fill_sequence(model, torch.tensor([2, 3, -1, -1, -1, -1]), strategy=strategy)
    assert [tuple(row[2:]) for row in tokens.tolist()] == [(*new, *[0] * (4 - len(new))) for new, _ in best]
    assert strategy.scores is not None
    torch.testing.assert_close(strategy.scores, torch.tensor([score for _, score in best], dtype=torch.float64))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_its_score_is_the_recomputed_log_probability_and_its_mems_are_those_of_its_tokens(
    family: str, prefix: bool
) -> None:
    model = tiny_model(family, scale=4.0)
    if prefix:
        model.add_mixin("prefix-tuning", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
    source = {"input_ids": torch.tensor([[5, 6, 7], [9, 3, 4]])} if family == "t5" else {}
    strategy = sat.BeamSearchStrategy(3, length_penalty=0.7, num_return_sequences=2)
    tokens, mems = sat.fill_sequence(model, gaps_after(PROMPTS, 6), strategy=strategy, **source)
    assert tokens.shape == (4, 8)
    assert strategy.scores is not None
    for index, row in enumerate(tokens.tolist()):
        of_row = {key: value[index // 2 : index // 2 + 1] for key, value in source.items()}
        expected = log_probability(model, row, 2, **of_row) / sat.gnmt_length_penalty(0.7)(6)
        assert float(strategy.scores[index]) == pytest.approx(expected, abs=1e-4)
    repeated = {key: value.repeat_interleave(2, dim=0) for key, value in source.items()}
    _, read = sat.fill_sequence(model, tokens[:, :-1], **repeated)
    torch.testing.assert_close(mems, read, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_lengths_equal_each_row_alone(family: str) -> None:
    model = tiny_model(family, scale=4.0).double()
    rows = [torch.tensor(row) for row in ([5, 6, 7, -1, -1, -1, -1, -1], [9, -1, -1, 4, 8], [3, 4, 5], [8, -1, -1, -1])]
    lengths = torch.tensor([4, 2, 3, 1])
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0], [4, 5, 6, 0], [7, 0, 0, 0]])
    for options in ({}, {"end_tokens": [11, 30, 52]}):
        source: dict[str, Tensor] = {}
        if family == "t5":
            source = {"input_ids": ids, "padding_mask": torch.arange(4)[None] < lengths[:, None]}
        strategy = sat.BeamSearchStrategy(4, num_return_sequences=2, length_penalty=1.0, **options)
        together, mems = sat.fill_sequence(model, rows, strategy=strategy, **source)
        scores = strategy.scores
        assert scores is not None
        assert mems.shape[1] == len(together) == 8
        for index, row in enumerate(rows):
            one = {key: value[index : index + 1] for key, value in source.items()}
            alone, _ = sat.fill_sequence(model, row, strategy=strategy, **one)
            pair = slice(2 * index, 2 * index + 2)
            assert torch.equal(together[pair, : len(row)], alone)
            assert (together[pair, len(row) :] == -1).all()
            torch.testing.assert_close(scores[pair], strategy.scores)


def test_mems_of_ended_sequences_are_those_of_their_tokens() -> None:
    model = tiny_model("llama", scale=3.0)
    strategy = sat.BeamSearchStrategy(3, num_return_sequences=3, end_tokens=range(0, 60, 4))
    tokens, mems = sat.fill_sequence(model, gaps_after(PROMPTS, 6), strategy=strategy)
    assert any(row.count(0) for row in tokens.tolist())
    length = int((tokens >= 0).sum(dim=1).min())
    _, read = sat.fill_sequence(model, tokens[:, : length - 1])
    torch.testing.assert_close(mems[:, :, : length - 1], read, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_transformers(family: str, tmp_path: Path) -> None:
    ours, theirs = here_and_in_transformers(family, tmp_path)
    source = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 2]])
    is_pair = family == "t5"
    ends = list(range(1, 61, 6))
    for penalty, early, beams in product((0.0, 1.0, -0.5), (True, False, "never"), (2, 4)):
        config = transformers.GenerationConfig(
            num_beams=beams,
            num_return_sequences=2,
            length_penalty=penalty,
            early_stopping=early,
            max_new_tokens=9,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=ends[0],
            decoder_start_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        expected = theirs.generate(source, attention_mask=torch.ones_like(source), generation_config=config)
        strategy = sat.BeamSearchStrategy(
            beams,
            num_return_sequences=2,
            length_penalty=sat.power_length_penalty(penalty),
            early_stopping=early,
            end_tokens=ends,
        )
        if is_pair:
            seq, call = gaps_after([[0], [0]], 9), {"input_ids": source}
        else:
            seq, call = gaps_after(source.tolist(), 9), {}
        tokens, _ = sat.fill_sequence(ours, seq, strategy=strategy, **call)
        width = expected.sequences.shape[1]
        given = 1 if is_pair else 4
        assert until_end(tokens[:, :width], given, ends) == until_end(expected.sequences, given, ends)
        torch.testing.assert_close(strategy.scores, expected.sequences_scores.double(), rtol=1e-5, atol=1e-5)


def test_groups_differ_and_without_a_penalty_each_is_the_search_of_its_width() -> None:
    model = tiny_model("gpt2", scale=3.0).double()
    seq = torch.tensor([5, 6, -1, -1, -1, -1])

    def run(**options: Any) -> tuple[Tensor, Tensor]:
        strategy = sat.BeamSearchStrategy(num_return_sequences=options["num_beams"], **options)
        tokens, _ = sat.fill_sequence(model, seq, strategy=strategy)
        assert strategy.scores is not None
        return tokens, strategy.scores

    narrow, narrow_scores = run(num_beams=2)
    twice, twice_scores = run(num_beams=4, num_beam_groups=2)
    assert torch.equal(twice, narrow.repeat_interleave(2, dim=0))
    torch.testing.assert_close(twice_scores, narrow_scores.repeat_interleave(2))
    diverse, scores = run(num_beams=4, num_beam_groups=4, diversity_penalty=100.0)
    assert len(set(diverse[:, 2].tolist())) == 4
    for row, score in zip(diverse.tolist(), scores.tolist(), strict=True):
        assert score == pytest.approx(log_probability(model, row, 2))


def test_min_length_and_processors_hold() -> None:
    model = tiny_model("gpt2", scale=3.0)
    seq = gaps_after(PROMPTS, 8)
    free, _ = sat.fill_sequence(model, seq, strategy=sat.BeamSearchStrategy(3))
    end = int(free[0, 3])
    ended, _ = sat.fill_sequence(model, seq, strategy=sat.BeamSearchStrategy(3, min_length=5, end_tokens=[end]))
    assert end not in ended[0, 2:6].tolist()
    varied, _ = sat.fill_sequence(model, seq, strategy=sat.BeamSearchStrategy(3, no_repeat_ngram_size=1))
    assert all(len(set(row)) == len(row) for row in varied.tolist())


def test_one_beam_is_greedy() -> None:
    model = tiny_model("llama")
    seq = gaps_after(PROMPTS, 8)
    tokens, mems = sat.fill_sequence(model, seq, strategy=sat.BeamSearchStrategy(1))
    greedy, greedy_mems = sat.fill_sequence(model, seq)
    assert torch.equal(tokens, greedy)
    torch.testing.assert_close(mems, greedy_mems)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams=0"),
        ({"num_beam_groups": 3}, "num_beam_groups=3 must divide num_beams=4"),
        ({"diversity_penalty": -1.0}, "diversity_penalty=-1.0"),
        ({"num_return_sequences": 5}, "num_return_sequences=5"),
        ({"early_stopping": "ever"}, "early_stopping='ever'"),
        ({"min_length": -1}, "min_length=-1"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        sat.BeamSearchStrategy(**options)


def test_what_cannot_be_searched_is_refused() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(sat.HookCallError, match="row 0 has given tokens between its gaps"):
        sat.fill_sequence(model, torch.tensor([5, -1, 7, -1]), strategy=sat.BeamSearchStrategy(2))
    only_one = sat.BeamSearchStrategy(2, num_return_sequences=2, forced_tokens={1: 4})
    with pytest.raises(sat.HookCallError, match="row 0 has 1 sequences"):
        sat.fill_sequence(model, torch.tensor([5, -1]), strategy=only_one)


def test_the_cache_moves_only_the_rows_that_change_and_may_grow_or_shrink_in_rows() -> None:
    cache = sat.KVCache(1, capacity=9)
    k = torch.randn(3, 2, 5, 4)
    cache.update(0, k, -k)
    for rows in ([0, 1, 2], [1, 0, 0], [2, 2, 1], [0, 0, 1, 1, 2, 2], [5, 3]):
        cache.reorder(torch.tensor(rows))
        k = k[rows]
        new = torch.randn(len(rows), 2, 1, 4)
        k = torch.cat((k, new), dim=2)
        keys, values = cache.update(0, new, -new)
        assert torch.equal(keys, k)
        assert torch.equal(values, -k)
