"""Stop strings, the time limit, and the log-probabilities of generated tokens."""

from itertools import pairwise

import pytest
import torch

import swissarmy as sat
from swissarmy.generation import stopping
from swissarmy.generation.stopping import StopStrings
from swissarmy.generation.text import generate_with_logprobs
from swissarmy.testing import tiny_model
from tests.generation.helpers import Letters


def sampled(**options: int) -> sat.Strategy:
    return sat.SamplingStrategy(seed=3, temperature=20.0, **options)


def test_pieces_are_held_back_only_while_they_may_begin_a_stop_string() -> None:
    stops = StopStrings(["###", "#!"])
    assert [stops.put(piece) for piece in ("a", "b#", "#c", "##", "", "d#")] == ["a", "b", "##c", "", "", "##d"]
    assert not stops.found
    assert [stops.put("!x"), stops.found, stops.end()] == ["", True, ""]
    stops = StopStrings("###")
    assert (stops.put("a##"), stops.end(), stops.found) == ("a", "##", False)


@pytest.mark.parametrize("stop", [["cd"], ["abcd", "bc"], ["bc", "abc"], ["d", "bcd"], "x", ["ab", "b", "zz"]])
def test_streaming_and_cutting_agree_however_the_text_is_split(stop: list[str]) -> None:
    text = "aababcabcd"
    for first, second in pairwise(range(len(text) + 1)):
        stops = StopStrings(stop)
        pieces = [text[:first], text[first:second], text[second:]]
        shown = "".join(stops.put(piece) for piece in pieces if not stops.found) + stops.end()
        want = stops.cut(text)
        assert shown == (text if want is None else want)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_text_ends_before_the_first_stop_string(family: str) -> None:
    model, prompts = tiny_model(family), ["HELLO", "A", "WORLDS"]
    full = sat.generate(model, Letters(), prompts, max_new_tokens=12, strategy=sampled())
    assert {len(text) for text in full} == {12}
    stop = [full[0][4:6], full[1][2]]
    got = sat.generate(model, Letters(), prompts, max_new_tokens=12, strategy=sampled(), stop=stop)
    for text, whole in zip(got, full, strict=True):
        assert text == (StopStrings(stop).cut(whole) if StopStrings(stop).cut(whole) is not None else whole)
    assert len(got[1]) <= 2
    pieces = sat.stream(model, Letters(), "HELLO", max_new_tokens=12, strategy=sampled(), stop=stop)
    assert "".join(pieces) == got[0]


def test_no_further_token_is_chosen_when_every_text_is_over() -> None:
    model, strategy = tiny_model("gpt2"), sampled()
    (full,) = sat.generate(model, Letters(), "HELLO", max_new_tokens=12, strategy=strategy)
    calls: list[int] = []
    with model.transformer.register_forward_hook(lambda *arguments: calls.append(1)):  # type: ignore[operator]
        sat.generate(model, Letters(), "HELLO", max_new_tokens=12, strategy=strategy, stop=full[:3])
    assert len(calls) == 3


def test_when_the_time_is_up_nothing_more_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ticks = tiny_model("gpt2"), iter(range(1000))
    full = sat.generate(model, Letters(), "HELLO", max_new_tokens=12)[0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(ticks))
    (made,) = generate_with_logprobs(model, Letters(), "HELLO", max_new_tokens=12, max_time=3)
    assert made.finish_reason == "time"
    assert 0 < len(made.tokens) < 12
    assert full.startswith(made.text)
    pieces = "".join(sat.stream(model, Letters(), "HELLO", max_new_tokens=12, max_time=3))
    assert 0 < len(pieces) < 12
    assert full.startswith(pieces)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "t5"])
def test_log_probabilities_are_those_of_the_model(family: str) -> None:
    model, prompts = tiny_model(family).double(), ["HELLO", "A", "WORLDS"]
    made = generate_with_logprobs(model, Letters(), prompts, max_new_tokens=6, strategy=sampled())
    assert [each.text for each in made] == sat.generate(model, Letters(), prompts, max_new_tokens=6, strategy=sampled())
    for prompt, each in zip(prompts, made, strict=True):
        ids, new = torch.tensor([Letters().encode(prompt)]), torch.tensor([each.tokens])
        with torch.no_grad():
            if family == "t5":
                logits = model(ids, decoder_input_ids=torch.cat((torch.zeros_like(new[:, :1]), new), dim=1))[0][:, :-1]
            else:
                logits = model(torch.cat((ids, new), dim=1))[0][:, ids.shape[1] - 1 : -1]
        want = logits.log_softmax(-1).gather(2, new[..., None]).flatten()
        torch.testing.assert_close(torch.tensor(each.logprobs, dtype=torch.float64), want)


def test_the_reason_why_a_text_ends_is_told() -> None:
    model = tiny_model("gpt2")
    (full,) = generate_with_logprobs(model, Letters(), "HELLO", max_new_tokens=8, strategy=sampled())
    assert full.finish_reason == "length"
    (ended,) = generate_with_logprobs(model, Letters(full.tokens[5]), "HELLO", max_new_tokens=8, strategy=sampled())
    assert ended.finish_reason == "end"
    assert ended.tokens == full.tokens[: full.tokens.index(full.tokens[5])]
    (stopped,) = generate_with_logprobs(
        model, Letters(), "HELLO", max_new_tokens=8, strategy=sampled(), stop=full.text[1:3]
    )
    assert (stopped.finish_reason, stopped.text, stopped.tokens) == ("stop", full.text[:1], full.tokens[:3])
    assert stopped.logprobs == pytest.approx(full.logprobs[:3], abs=1e-4)
    (nothing,) = generate_with_logprobs(model, Letters(full.tokens[0]), "HELLO", strategy=sampled(), max_new_tokens=3)
    assert nothing == ("", [], [], "end")
    assert generate_with_logprobs(model, Letters(), ["A"], max_new_tokens=0) == [("", [], [], "length")]


def test_a_strategy_that_follows_several_texts_gives_them_all_and_is_not_streamed() -> None:
    model, prompts = tiny_model("t5").double(), ["HELLO", "A"]
    beams = sat.BeamSearchStrategy(num_beams=3, num_return_sequences=2)
    made = generate_with_logprobs(model, Letters(), prompts, max_new_tokens=5, strategy=beams)
    assert len(made) == 4
    for each, prompt in zip(made, ["HELLO", "HELLO", "A", "A"], strict=True):
        source, new = torch.tensor([Letters().encode(prompt)]), torch.tensor([each.tokens])
        with torch.no_grad():
            logits = model(source, decoder_input_ids=torch.cat((torch.zeros_like(new[:, :1]), new), dim=1))[0][:, :-1]
        want = logits.log_softmax(-1).gather(2, new[..., None]).flatten()
        torch.testing.assert_close(torch.tensor(each.logprobs, dtype=torch.float64), want)
    with pytest.raises(sat.HookCallError, match="only at the end"):
        list(sat.stream(model, Letters(), "A", strategy=beams))
    stopped = sat.generate(model, Letters(), prompts, max_new_tokens=5, strategy=beams, stop=made[0].text[2])
    assert stopped[0] == made[0].text[: made[0].text.index(made[0].text[2])]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stop": ["a", ""]}, "stop string is empty"), ({"max_time": 0}, "max_time=0"), ({"max_time": -1}, "above 0")],
)
def test_limits_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(sat.HookCallError, match=message):
        sat.generate(tiny_model("gpt2"), Letters(), "A", **options)
    with pytest.raises(sat.HookCallError, match=message):
        list(sat.stream(tiny_model("gpt2"), Letters(), "A", **options))
