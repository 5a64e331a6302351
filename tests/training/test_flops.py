"""The arithmetic of training: the formula against torch's own counter, which sees every product."""

from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.testing import tiny_inputs, tiny_model
from swissarmy.training.flops import TrainingCost


def model_of(family: str, **changes: Any) -> Model:
    """In float64, whose products torch's counter knows all of."""
    return tiny_model(family, **changes).double()


def counted(model: Model) -> tuple[float, float]:
    """A forward and backward pass over 2 samples: what torch counts, and what the formula gives."""
    inputs = tiny_inputs(model, batch=2, length=9)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = model(**inputs)[0]
        result.sum().backward()
    tokens = sum(ids.numel() for name, ids in inputs.items() if name.endswith("input_ids"))
    targets = inputs["decoder_input_ids"].numel() if "decoder_input_ids" in inputs else 0
    return counter.get_total_flops(), TrainingCost.of(model).flops(tokens, 2, targets=targets)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_formula_is_exact_where_all_trains(family: str) -> None:
    torch_counts, formula = counted(model_of(family))
    assert formula == torch_counts


def test_of_encoder_and_decoder_each_counts_its_own_tokens() -> None:
    torch_counts, formula = counted(model_of("t5"))
    assert formula == pytest.approx(torch_counts, rel=0.03)  # keys of the encoder's tokens count as the decoder's


@pytest.mark.parametrize("kind", [sat.LoRAMixin, sat.PrefixTuningMixin])
def test_frozen_weights_need_no_gradient(kind: Any) -> None:
    model = model_of("llama")
    everything = counted(model)[1]
    model.add_mixin("added", kind.for_model(model)).freeze_except("mixins.added")
    model.zero_grad()
    torch_counts, formula = counted(model)
    assert formula == pytest.approx(torch_counts, rel=0.1)  # of the first layer, of two, not all is passed through
    assert formula < 0.8 * everything


def test_what_lies_before_the_first_trained_weight_has_a_forward_pass_only() -> None:
    model = model_of("gpt2")
    model.freeze_except("transformer.layers.1")
    torch_counts, formula = counted(model)
    assert formula == torch_counts


def test_a_model_that_is_frozen_whole_costs_a_third() -> None:
    model = model_of("gpt2")
    everything = TrainingCost.of(model).flops(100, 10)
    model.requires_grad_(False)
    assert 3 * TrainingCost.of(model).flops(100, 10) == everything


def test_a_base_model_has_no_head_to_pay_for() -> None:
    with_head, without = model_of("gpt2"), model_of("gpt2")
    without.add_mixin("no-head", sat.NoHeadMixin())
    config: Any = with_head.config
    saved = TrainingCost.of(with_head).flops(100, 10) - TrainingCost.of(without).flops(100, 10)
    assert saved == 6 * 100 * config.vocab_size * config.hidden_size


def test_a_token_pays_for_the_experts_that_it_is_sent_to() -> None:
    def of(num_experts: int, top_k: int) -> float:
        model = model_of("llama")
        model.add_mixin("experts", sat.MixtureOfExpertsMixin.for_model(model, num_experts=num_experts, top_k=top_k))
        router = 6 * 100 * num_experts * model.config.hidden_size * model.config.num_layers
        return TrainingCost.of(model).flops(100, 10) - router

    assert of(8, 2) == of(4, 2) < of(8, 4)


def test_images_count_their_patches_and_nothing_costs_nothing() -> None:
    cost = TrainingCost.of(model_of("vit"))
    assert cost.flops(4, 4) == cost.flops(2, 2) * 2 > 0
    assert cost.flops(0, 4) == cost.flops(4, 0) == 0
