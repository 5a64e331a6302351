"""Greedy and sampled decoding, and beams with processors, equal `generate` of `transformers` in what both can set."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import swissarmy as sat
from swissarmy.generation.strategies import TokenStrategy
from tests.generation.helpers import WITH_REFERENCE, here_and_in_transformers, until_end

SOURCE = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 2]])
NEW, ENDS = 10, [1, 7, 13, 19]

PLAIN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "repetition penalty": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    "no repeated bigrams": ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    "bad words": ({"bad_words_ids": [[40], [59, 16]]}, {"bad_words": [[40], [59, 16]]}),
    "suppressed": ({"suppress_tokens": [16, 40, 59]}, {"suppressed_tokens": [16, 40, 59]}),
    "at least six": ({"min_new_tokens": 6}, {"min_length": 6}),
    "several": (
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_length": 4},
    ),
}
"""Settings of `transformers`, and ours."""
SHAPED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.7},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.05},
    "typical-p": {"typical_p": 0.7},
    "all": {"temperature": 2.5, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
}
"""Settings that have one name in both."""


def theirs(model: Any, **options: Any) -> Any:
    """Sequences and scores of `generate`, with `top_k` off unless it is given."""
    config = transformers.GenerationConfig(
        **{"top_k": 0 if options.get("do_sample") else None, **options},
        max_new_tokens=NEW,
        pad_token_id=0,
        decoder_start_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    return model.generate(SOURCE, attention_mask=torch.ones_like(SOURCE), generation_config=config)


def ours(model: Any, strategy: sat.Strategy, *, family: str) -> Tensor:
    given = torch.zeros(2, 1, dtype=torch.long) if family == "t5" else SOURCE
    seq = torch.cat((given, torch.full((2, NEW), -1)), dim=1)
    return sat.fill_sequence(model, seq, strategy=strategy, **({"input_ids": SOURCE} if family == "t5" else {}))[0]


@pytest.mark.parametrize("family", WITH_REFERENCE)
def test_greedy_decoding_and_beams_equal_theirs(family: str, tmp_path: Path) -> None:
    mine, reference = here_and_in_transformers(family, tmp_path)
    start = 1 if family == "t5" else SOURCE.shape[1]
    for name, (options, own) in PLAIN.items():
        expected = theirs(reference, eos_token_id=ENDS, **options).sequences
        tokens = ours(mine, sat.GreedyStrategy(ENDS, **own), family=family)
        assert until_end(tokens[:, : expected.shape[1]], start, ENDS) == until_end(expected, start, ENDS), name
        beams = theirs(reference, eos_token_id=ENDS, num_beams=3, length_penalty=0.5, **options)
        strategy = sat.BeamSearchStrategy(3, length_penalty=sat.power_length_penalty(0.5), end_tokens=ENDS, **own)
        tokens = ours(mine, strategy, family=family)
        width = beams.sequences.shape[1]
        assert until_end(tokens[:, :width], start, ENDS) == until_end(beams.sequences, start, ENDS), name
        torch.testing.assert_close(strategy.scores, beams.sequences_scores.double(), rtol=1e-5, atol=1e-5)


class Replay(TokenStrategy):
    """Takes the tokens of another run, and keeps the scores that a sampling strategy would have drawn from."""

    def __init__(self, strategy: sat.SamplingStrategy, tokens: Tensor) -> None:
        super().__init__()
        self.processors, self.narrowing = strategy.processors, strategy.narrowing
        self.tokens, self.scores = iter(tokens.T), list[Tensor]()

    def choose(self, logits: Tensor, live: Tensor) -> Tensor:
        self.scores.append(logits)
        return next(self.tokens)


@pytest.mark.parametrize("family", WITH_REFERENCE)
def test_sampling_draws_from_their_distributions(family: str, tmp_path: Path) -> None:
    mine, reference = here_and_in_transformers(family, tmp_path)
    start = 1 if family == "t5" else SOURCE.shape[1]
    for name, options in SHAPED.items():
        torch.manual_seed(0)
        expected = theirs(reference, do_sample=True, eos_token_id=None, **options)
        strategy = Replay(sat.SamplingStrategy(**options), expected.sequences[:, start:])
        tokens = ours(mine, strategy, family=family)
        assert torch.equal(tokens, expected.sequences), name
        for found, wanted in zip(strategy.scores, expected.scores, strict=True):
            torch.testing.assert_close(found, wanted.double(), rtol=1e-4, atol=1e-4, msg=name)
