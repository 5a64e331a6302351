"""`score_continuations`: against logits of each row read alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import swissarmy as sat
from swissarmy.generation import continuations as module
from swissarmy.generation.continuations import score_continuations
from swissarmy.testing import tiny_model

CAUSAL = ["gpt2", "llama", "gemma3_text", "swissarmy"]


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def written_out(model: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]]))[0][0]
    predicting = logits[len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    own = predicting.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(own), bool((predicting.argmax(-1) == targets).all())


def likeliest(model: Any, context: Sequence[int], length: int) -> list[int]:
    tokens, _ = sat.fill_sequence(model, torch.tensor([*context, *[-1] * length]))
    return tokens[0, len(context) :].tolist()


SHARED = [ids(9, 1), ids(9, 1), ids(4, 2), ids(1, 3), ids(4, 2), ids(9, 1)]
DIFFERENT = [ids(length, length) for length in (9, 4, 1, 12, 3, 8)]


@pytest.mark.parametrize("contexts", [SHARED, DIFFERENT], ids=["shared", "different"])
@pytest.mark.parametrize("family", CAUSAL)
def test_scores_are_those_of_each_row_alone(
    family: str, contexts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family).double()
    texts = [ids(length, 20 + length) for length in (3, 7, 1, 5, 2)]
    texts.append(likeliest(model, contexts[5], 4))
    want = [written_out(model, *row) for row in zip(contexts, texts, strict=True)]
    assert [greedy for _, greedy in want].count(True) == 1
    for at_once in (1024, 3):
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
        for score, (logprob, is_greedy) in zip(score_continuations(model, contexts, texts), want, strict=True):
            assert score.logprob == pytest.approx(logprob, rel=1e-9, abs=1e-9)
            assert score.is_greedy == is_greedy


def test_a_context_that_rows_share_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    model = tiny_model("gpt2")
    monkeypatch.setattr(
        module, "scores_of_targets", lambda *args, **kw: read.append(args[1].shape) or REAL(*args, **kw)
    )
    score_continuations(model, [ids(20, 1)] * 4, [ids(2, seed) for seed in range(4)])
    assert read == [(1, 19), (4, 2)]


REAL = module.scores_of_targets


def test_mixins_that_are_present_count() -> None:
    model = tiny_model("llama").double()
    plain = score_continuations(model, SHARED, SHARED)
    model.add_mixin("prefix", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
    scores = score_continuations(model, SHARED, SHARED)
    assert scores[0].logprob != pytest.approx(plain[0].logprob, rel=1e-3)
    for score, row in zip(scores, SHARED, strict=True):
        assert score.logprob == pytest.approx(written_out(model, row, row)[0], rel=1e-9)


def test_a_row_as_long_as_the_model_takes_and_one_without_continuation() -> None:
    model = tiny_model("gpt2").double()
    contexts, texts = [ids(60, 1), ids(60, 1), ids(2, 2)], [ids(5, 3), ids(2, 4), []]
    scores = score_continuations(model, contexts, texts)
    assert scores[2] == (0.0, True)
    first = written_out(model, contexts[0], texts[0][:4])[0]
    assert scores[0].logprob < first
    assert scores[1].logprob == pytest.approx(written_out(model, contexts[1], texts[1])[0], rel=1e-9)
    long = ids(62, 5)
    mixed = score_continuations(model, contexts, [texts[0], texts[1], long])  # 121 columns, and no row above 64
    assert mixed[2].logprob == pytest.approx(written_out(model, contexts[2], long)[0], rel=1e-9)
    with pytest.raises(sat.HookCallError, match="64 positions"):
        score_continuations(model, contexts, [ids(6, 3), ids(2, 4), []])


@pytest.mark.parametrize(
    ("family", "contexts", "message"),
    [
        ("t5", [[1]], "answers a source"),
        ("bert", [[1]], "from both sides"),
        ("gpt2", [[]], "at least one token"),
        ("gpt2", [], "at least one row"),
        ("gpt2", [[1], [2]], "2 contexts and 1 continuations"),
    ],
)
def test_what_cannot_be_is_an_error(family: str, contexts: list[list[int]], message: str) -> None:
    with pytest.raises(sat.HookCallError, match=message):
        score_continuations(tiny_model(family), contexts, [[5]] * min(len(contexts), 1))
