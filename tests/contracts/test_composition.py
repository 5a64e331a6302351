"""Every family x every shipped mixin: what design.md promises of a mixin holds wherever it is added.

A fast, generated matrix. What cannot be combined is named in `EXCLUDED`, with the reason.
"""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import BaseModel, Model, iterate_models
from swissarmy.core.mixin import BaseMixin
from swissarmy.testing import TINY_CONFIGS, tiny_inputs, tiny_model

Make = Callable[[Model], Any]


def of(kind: type[BaseMixin], **options: Any) -> Make:
    return lambda model: kind.for_model(model, **options)


def fusion_of_two_adapters(model: Model) -> Any:
    adapters = {"a": sat.AdapterMixin.for_model(model), "b": sat.CompacterMixin.for_model(model)}
    for adapter in adapters.values():
        for each in adapter.values() if isinstance(adapter, dict) else [adapter]:
            for parameter in each.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
    return sat.AdapterFusionMixin.for_model(model, adapters=adapters)


MIXINS: dict[str, Make] = {
    "adapter": of(sat.AdapterMixin),
    "adapter-fusion": fusion_of_two_adapters,
    "alibi": of(sat.ALiBiMixin),
    "attention-softcap": lambda model: sat.AttentionSoftcapMixin(2.0),
    "bitfit": of(sat.BitFitMixin),
    "auto-regressive": of(sat.CachedAutoRegressiveMixin),
    "compacter": of(sat.CompacterMixin),
    "dora": of(sat.LoRAMixin, r=2, dora=True, init="pissa"),
    "embedding-scale": of(sat.EmbeddingScaleMixin, scale=0.5),
    "ffadd": of(sat.FFADDMixin, num_neurons=3),
    "hidden-states": of(sat.HiddenStatesMixin),
    "ia3": of(sat.IA3Mixin, targets="*"),
    "layer-scaling": of(sat.LayerScalingMixin),
    "logit-softcap": lambda model: sat.LogitSoftcapMixin(3.0),
    "lora": of(sat.LoRAMixin, r=2, targets="*"),
    "loreft": of(sat.LoReFTMixin, rank=2, first=3),
    "mixture-of-experts": of(sat.MixtureOfExpertsMixin, num_experts=3),
    "prefix-tuning": of(sat.PrefixTuningMixin, prefix_len=3),
    "prefix-encoder": of(sat.PrefixTuningMixin, prefix_len=2, encoder_size=5, shift_positions=True),
    "prompt-tuning": of(sat.PromptTuningMixin, prompt_len=3),
    "qk-norm": of(sat.QKNormMixin),
    "reduced-weights": lambda model: sat.ReducedWeightsMixin.for_model(model, kind="fp16"),
    "relative-position-bias": of(sat.RelativePositionBiasMixin, num_buckets=8),
    "rotary": of(sat.RotaryMixin),
    "sliding-window": of(sat.SlidingWindowMixin, window=4),
    "token-types": of(sat.TokenTypesMixin),
    "vera": of(sat.VeRAMixin, r=3),
}
"""Mixins that go on top of any family; heads and positions that *replace* are tested where they are used."""

EXCLUDED = {
    **{
        ("rotary", family): "the family has rotary positions, and a key has one writer"
        for family in ("llama", "gemma3_text")
    },
}

FAMILIES = sorted(TINY_CONFIGS)
CAUSAL = ["gpt2", "llama", "gemma3_text", "swissarmy", "t5"]
PAIRS = [(family, mixin) for family in FAMILIES for mixin in MIXINS if (mixin, family) not in EXCLUDED]
CAUSAL_PAIRS = [(family, mixin) for family, mixin in PAIRS if family in CAUSAL]


def with_mixin(family: str, *names: str) -> Model:
    """The family with mixins, whose weights do not depend on the order of adding."""
    model = tiny_model(family)
    for name in names:
        torch.manual_seed(sum(map(ord, name)))
        mixin = MIXINS[name](model)
        for each in mixin.values() if isinstance(mixin, dict) else [mixin]:
            for parameter in each.parameters():
                torch.nn.init.normal_(parameter, std=0.5)
        model.add_mixin(f"added-{name}" if name in known_names(model) else name, mixin)
    return model.double().eval()


def known_names(model: Model) -> set[str]:
    return {name for _, plain in iterate_models(model) for name in plain.mixins}


def inputs_of(model: Model) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in tiny_inputs(model).items()}


def run(model: Model, **inputs: Tensor) -> Tensor:
    result: Tensor = model(**inputs)[0]
    return result


@pytest.mark.parametrize(("family", "mixin"), PAIRS)
def test_forward_and_backward_reach_every_parameter_of_the_mixin(family: str, mixin: str) -> None:
    model = with_mixin(family, mixin)
    inputs = inputs_of(model)
    run(model, **inputs).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter is not None and "mixins." in name and mixin in name:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize(("family", "mixin"), PAIRS)
def test_detaching_restores_the_model_bit_for_bit(family: str, mixin: str) -> None:
    model = tiny_model(family).double()
    inputs = inputs_of(model)
    before, keys = run(model, **inputs), list(model.state_dict())
    changed = with_mixin(family, mixin)
    added = next(name for name in (f"added-{mixin}", mixin) if name in known_names(changed))
    changed.del_mixin(added)
    assert torch.equal(run(changed, **inputs), before)
    assert list(changed.state_dict()) == keys


@pytest.mark.parametrize(("family", "mixin"), PAIRS)
def test_activation_checkpointing_changes_no_gradient(family: str, mixin: str) -> None:
    gradients = []
    for every in (0, 1):
        model = with_mixin(family, mixin).enable_activation_checkpointing(every)
        run(model, **inputs_of(model)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


@pytest.mark.parametrize(("family", "mixin"), CAUSAL_PAIRS)
def test_cached_equals_uncached(family: str, mixin: str) -> None:
    model = with_mixin(family, mixin)
    torch.testing.assert_close(cached_logits(model), full_logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        (family, *order)
        for family in CAUSAL
        for others in (
            ("prefix-tuning", "alibi"),
            ("prefix-tuning", "relative-position-bias"),
            ("prefix-tuning", "sliding-window"),
            ("qk-norm", "attention-softcap"),
            ("lora", "prefix-tuning"),
        )
        for order in permutations(others)
    ],
)
def test_two_mixins_in_both_orders_give_the_same_cached_and_uncached(family: str, first: str, second: str) -> None:
    model, other = with_mixin(family, first, second), with_mixin(family, second, first)
    expected = full_logits(model)
    torch.testing.assert_close(full_logits(other), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached_logits(other), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "mixin"), CAUSAL_PAIRS)
def test_batched_equals_single_and_ragged_equals_unpadded(family: str, mixin: str) -> None:
    model = with_mixin(family, mixin)
    gaps = torch.full((5,), -1)
    rows = [torch.cat((torch.arange(3, 3 + length), gaps)) for length in (2, 6, 4)]
    sources = torch.arange(12).view(3, 4) + 5
    kw_args = {"input_ids": sources} if model.parts else {}
    together, _ = sat.fill_sequence(model, rows, **kw_args)
    for index, row in enumerate(rows):
        alone, _ = sat.fill_sequence(model, row, **{key: value[index : index + 1] for key, value in kw_args.items()})
        assert together[index, : len(row)].tolist() == alone[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_graph_compilation_with_all_mixins_at_once_gives_the_same(family: str) -> None:
    torch.compiler.reset()
    model = with_mixin(family, *(mixin for name, mixin in PAIRS if name == family))
    inputs = inputs_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs)[0], run(model, **inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_full_graph_compilation_of_cached_decoding_gives_the_same(family: str) -> None:
    torch.compiler.reset()
    model = with_mixin(family, "prefix-tuning")
    expected = full_logits(model)
    decoder = model.for_decoding(input_ids=inputs_of(model)["input_ids"])[0] if model.parts else model
    decoder.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(cached_logits(model), expected, rtol=1e-4, atol=1e-4)


def full_logits(model: Model) -> Tensor:
    inputs = inputs_of(model)
    with torch.no_grad():
        return run(model, **inputs)


def cached_logits(model: Model) -> Tensor:
    """Logits of the same tokens, read as one prefill, a pair, and one by one."""
    inputs = inputs_of(model)
    ids = inputs.pop("decoder_input_ids", None)
    if ids is None:
        ids = inputs.pop("input_ids")
    with torch.no_grad():
        decoder, kw_args = model.for_decoding(**inputs)
        assert isinstance(decoder, BaseModel)
        if decoder.find_mixin(sat.CachedAutoRegressiveMixin) is None:
            decoder = decoder.with_mixin("the-cache", sat.CachedAutoRegressiveMixin())
        cache = sat.KVCache(decoder.config.num_layers)
        pieces = [ids[:, :4], ids[:, 4:6], *ids[:, 6:].split(1, dim=1)]
        return torch.cat([run(decoder, input_ids=piece, mems=cache, **kw_args) for piece in pieces], dim=1)
