"""What holds of every strategy, on every family that generates, with mixins that take part in decoding."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.core.hooks import Hook
from swissarmy.nn.kv_cache import KVCache
from swissarmy.testing import TINY_CONFIGS, tiny_model
from tests.generation.helpers import adapted


def generates(model: Any) -> bool:
    return bool(model.parts) or model.config.causal


MAKE: dict[str, Callable[[], sat.Strategy]] = {
    "greedy": sat.GreedyStrategy,
    "processed": lambda: sat.GreedyStrategy([7, 11], repetition_penalty=1.3, no_repeat_ngram_size=2, min_length=3),
    "sampling": lambda: sat.SamplingStrategy(temperature=1.5, top_k=20, top_p=0.9, seed=3, end_tokens=[7]),
    "beams": lambda: sat.BeamSearchStrategy(3, length_penalty=0.6, num_return_sequences=2, end_tokens=[7, 11]),
    "groups": lambda: sat.BeamSearchStrategy(4, num_beam_groups=2, diversity_penalty=0.5),
    "contrastive": lambda: sat.ContrastiveStrategy(0.6, 4, end_tokens=[7, 11]),
    "prompt lookup": lambda: sat.PromptLookupStrategy(sat.GreedyStrategy([7])),
    "speculative": lambda: sat.SpeculativeStrategy(tiny_model("gpt2", seed=5).double(), num_guesses=3),
}
GENERATING = [family for family in TINY_CONFIGS if generates(tiny_model(family))]
PROMPTS = [[5, 6, 5, 6], [9, 3, 4, 2]]
NEW = 8


def source_of(model: Model, rows: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[5, 6, 7], [9, 3, 4]])[:rows]} if model.parts else {}


def uncached(model: Model, strategy: sat.Strategy, tokens: Tensor, new: int) -> Tensor:
    """The same with everything read again for each token; a strategy's rows are found again in the source."""
    decoder, call = model.for_decoding(**source_of(model))
    given, width = len(tokens), tokens.shape[1] + new
    gaps = torch.arange(width).expand(given, -1) >= tokens.shape[1]
    cache = KVCache(decoder.config.num_layers)
    strategy.reset(given, tokens.device, gaps)
    while tokens.shape[1] < width and not strategy.is_done:
        times = len(tokens) // given
        row_call = {
            key: value.repeat_interleave(times, dim=0) if isinstance(value, Tensor) else value
            for key, value in call.items()
        }
        with torch.no_grad():
            logits = decoder(tokens.clamp(min=0), **row_call)[0][:, -1]
        tokens, cache = strategy.forward(logits, tokens, cache)
    tokens, _ = strategy.finalize(tokens, cache)
    return torch.cat((tokens, torch.full((len(tokens), width - tokens.shape[1]), -1)), dim=1)


@pytest.mark.parametrize("name", [name for name in MAKE if name != "contrastive"])
@pytest.mark.parametrize("family", GENERATING)
def test_it_gives_what_reading_everything_again_gives_with_prefix_tuning_and_lora(family: str, name: str) -> None:
    model, prompts = adapted(family), torch.tensor(PROMPTS)
    seq = torch.cat((prompts, torch.full((2, NEW), -1)), dim=1)
    tokens, mems = sat.fill_sequence(model, seq, strategy=MAKE[name](), **source_of(model))
    assert torch.equal(tokens, uncached(model, MAKE[name](), prompts, NEW))
    assert mems.shape[1] == len(tokens)
    for mixin in ("lora", "prefix-tuning"):
        model.del_mixin(mixin)
        assert not torch.equal(tokens, sat.fill_sequence(model, seq, strategy=MAKE[name](), **source_of(model))[0])


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("family", GENERATING)
def test_rows_of_any_lengths_equal_each_row_alone_with_prefix_tuning_and_lora(family: str, name: str) -> None:
    model = adapted(family)
    rows = [torch.tensor([5, 6, *[-1] * 6]), torch.tensor([9, 3, 4, 2, -1, -1, -1])]
    strategy = MAKE[name]()
    together, _ = sat.fill_sequence(model, rows, strategy=strategy, **source_of(model))
    times = len(together) // 2
    for index, row in enumerate(rows):
        if name == "sampling" and index:
            strategy = sat.SamplingStrategy(temperature=1.5, top_k=20, top_p=0.9, seed=4, end_tokens=[7])
        one = {key: value[index : index + 1] for key, value in source_of(model).items()}
        alone, _ = sat.fill_sequence(model, row, strategy=strategy, **one)
        part = together[index * times : (index + 1) * times, : len(row)]
        both = (part >= 0) & (alone >= 0)  # a row that is over alone ends the run, and -1 stands for the rest
        assert torch.equal(part[both], alone[both])
        assert bool((alone >= 0).sum() > 2 * times)


class MaskedVocabularyMixin(sat.BaseMixin):
    """The model itself rules tokens out."""

    def __init__(self, ruled_out: list[int]) -> None:
        super().__init__()
        self.ruled_out = ruled_out

    @sat.non_conflict
    def final_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        logits: Tensor = old_impl(hidden_states, **kw_args).clone()
        logits[..., self.ruled_out] = -math.inf
        return logits


PROCESSED = {
    "repetition_penalty": st.floats(0.2, 5),
    "presence_penalty": st.floats(-3, 3),
    "frequency_penalty": st.floats(-3, 3),
    "no_repeat_ngram_size": st.integers(3, 4),
    "min_length": st.integers(0, 5),
}
SETTINGS = st.one_of(
    st.fixed_dictionaries({}, optional=PROCESSED).map(lambda options: sat.GreedyStrategy([3], **options)),
    st.fixed_dictionaries(
        {"temperature": st.floats(0.05, 20), "seed": st.integers(0, 99)},
        optional={"top_k": st.integers(1, 90), "top_p": st.floats(0.01, 1), "min_p": st.floats(0, 1), **PROCESSED},
    ).map(lambda options: sat.SamplingStrategy(end_tokens=[3], **options)),
    st.fixed_dictionaries(
        {"num_beams": st.integers(1, 9), "length_penalty": st.floats(-1, 2)},
        optional={"early_stopping": st.sampled_from([True, False, "never"]), **PROCESSED},
    ).map(lambda options: sat.BeamSearchStrategy(end_tokens=[3], **options)),
    st.fixed_dictionaries({"penalty_alpha": st.floats(0, 1), "top_k": st.integers(1, 70)}, optional=PROCESSED).map(
        lambda options: sat.ContrastiveStrategy(end_tokens=[3], **options)
    ),
    st.integers(1, 5).map(lambda guesses: sat.PromptLookupStrategy(sat.GreedyStrategy([3]), num_guesses=guesses)),
)


@settings(max_examples=120)
@given(strategy=SETTINGS, ruled_out=st.sets(st.integers(0, 60), min_size=30, max_size=57))
def test_no_setting_of_any_strategy_chooses_a_token_that_the_model_rules_out(
    strategy: sat.Strategy, ruled_out: set[int]
) -> None:
    allowed = {5, 6, 3, 40} | (set(range(61)) - ruled_out)
    model = MODEL.with_mixin("masked", MaskedVocabularyMixin(sorted(set(range(61)) - allowed)))
    tokens, _ = sat.fill_sequence(
        model, [torch.tensor([5, 6, *[-1] * 7]), torch.tensor([9, *[-1] * 5])], strategy=strategy
    )
    new = {*tokens[0, 2:].tolist(), *tokens[1, 1:].tolist()} - {-1}
    assert new <= allowed


MODEL: Any = tiny_model("gpt2")


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(("value", "message"), [(math.nan, "NaN"), (-math.inf, "every token is ruled out")])
def test_logits_that_leave_no_choice_are_refused_by_every_strategy(name: str, value: float, message: str) -> None:
    class Broken(sat.BaseMixin):
        @sat.non_conflict
        def final_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
            return torch.full_like(old_impl(hidden_states, **kw_args), value)

    model = MODEL.with_mixin("broken", Broken())
    with pytest.raises(sat.HookCallError, match=message) as error:
        sat.fill_sequence(model, torch.tensor([[5, 6, -1, -1], [9, 3, -1, -1]]), strategy=MAKE[name]())
    assert "row 0, column 2" in str(error.value)


@pytest.mark.parametrize("name", [name for name in MAKE if name not in ("prompt lookup", "speculative")])
@pytest.mark.parametrize(("value", "message"), [(math.nan, "NaN"), (-math.inf, "every token is ruled out")])
def test_processors_that_leave_no_choice_are_refused_by_every_strategy(name: str, value: float, message: str) -> None:
    strategy = MAKE[name]().with_processors([lambda logits, tokens: torch.full_like(logits, value)])
    with pytest.raises(sat.HookCallError, match=message) as error:
        sat.fill_sequence(MODEL, torch.tensor([5, 6, -1, -1]), strategy=strategy)
    assert "row 0, column 2" in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("family", GENERATING)
def test_mems_go_through_a_file(family: str, suffix: str, tmp_path: Path) -> None:
    model, path = adapted(family), tmp_path / f"mems{suffix}"
    whole, whole_mems = sat.fill_sequence(
        model, torch.tensor([[*row, *[-1] * 9] for row in PROMPTS]), **source_of(model)
    )
    first, mems = sat.fill_sequence(model, torch.tensor([[*row, *[-1] * 4] for row in PROMPTS]), **source_of(model))
    if suffix == ".pt":
        torch.save(mems, path)
        read = torch.load(path, weights_only=True)
    else:
        save_file({"mems": mems}, path)
        read = load_file(path)["mems"]
    assert torch.equal(read, mems)
    longer = torch.cat((first, torch.full((2, 5), -1)), dim=1)
    tokens, own = sat.fill_sequence(model, longer, mems=read, **source_of(model))
    assert torch.equal(tokens, whole)
    torch.testing.assert_close(own, whole_mems)
