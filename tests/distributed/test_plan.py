"""A plan that cannot be is refused in one message, with what could be, before any process starts."""

import pytest

import swissarmy as sat
from swissarmy.backbone.model import iterate_models
from swissarmy.backbone.plan import divisors, layer_units, shared_dims
from swissarmy.testing import TINY_CONFIGS, tiny_model
from swissarmy.training.parallel.mesh import ParallelOptions, check_plan

GPT2 = sat.TransformerConfig(
    num_layers=2, hidden_size=96, num_attention_heads=12, vocab_size=50257, max_sequence_length=64
)
LLAMA = sat.TransformerConfig(
    num_layers=2,
    hidden_size=96,
    num_attention_heads=12,
    num_key_value_heads=4,
    intermediate_size=250,
    vocab_size=64,
    max_sequence_length=64,
)


def refusal(world_size: int, *configs: sat.TransformerConfig, **options: object) -> str:
    with pytest.raises(sat.SwissArmyError) as caught:
        check_plan(ParallelOptions.from_dict(options), configs or (LLAMA,), world_size)
    return str(caught.value)


def test_all_that_is_not_divisible_is_in_one_message_with_the_valid_sizes() -> None:
    message = refusal(3, tensor_parallel=3)
    assert "tensor_parallel=3 does not divide num_key_value_heads=4, intermediate_size=250, vocab_size=64" in message
    assert "it can be 1 or 2" in message


def test_a_vocabulary_that_is_not_divisible_may_stay_whole() -> None:
    assert "does not divide vocab_size=50257" in refusal(4, GPT2, tensor_parallel=4)
    assert "shard_vocabulary=False" in refusal(4, GPT2, tensor_parallel=4)
    check_plan(ParallelOptions(tensor_parallel=4, shard_vocabulary=False), [GPT2], 4)


def test_every_part_of_a_model_counts() -> None:
    assert "vocab_size=50257" in refusal(2, LLAMA, GPT2, tensor_parallel=2)


@pytest.mark.parametrize(
    ("world_size", "options", "said"),
    [
        (8, {"shard": 3}, "shard=3 does not divide the number of processes, 8: the product can be 1 or 2 or 4 or 8"),
        (
            8,
            {"data": 2, "shard": 2},
            "data=2 x shard=2 is not the number of processes, 8: leave `data` out, or say data=4",
        ),
        (2, {"data": 4}, "data=4 is not the number of processes, 2: leave `data` out, or say data=2"),
    ],
)
def test_sizes_multiply_to_the_number_of_processes(world_size: int, options: dict[str, int], said: str) -> None:
    assert said in refusal(world_size, **options)


def test_the_world_and_the_model_are_checked_together() -> None:
    message = refusal(4, shard=3, tensor_parallel=3)
    assert "2 problems" in message
    assert "number of processes" in message
    assert "num_key_value_heads" in message


def test_processes_that_share_samples_multiply() -> None:
    check_plan(ParallelOptions(context_parallel=2, tensor_parallel=2, shard=2), (LLAMA,), 8)
    assert "context_parallel=2 x tensor_parallel=2 does not divide the number of processes, 6" in refusal(
        6, context_parallel=2, tensor_parallel=2
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard": 0}, "shard=0 must be at least 1"),
        ({"sequence_parallel": True}, "needs tensor_parallel of 2 or more"),
        ({"distributed_timeout": 0}, "seconds, and more than 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(sat.SwissArmyError, match=said):
        ParallelOptions.from_dict(options)


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_every_large_matrix_of_every_family_is_shared(family: str) -> None:
    model = tiny_model(family)
    dims = shared_dims(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = ".attention." in name or ".cross_attention." in name or ".mlp." in name
        if inside and "mixins" not in name and parameter.dim() == 2:
            assert name in dims, name
            assert parameter.shape[dims[name]] % 2 == 0
        if "word_embeddings" in name or "lm_head" in name:
            assert dims[name] == 0
            assert name not in shared_dims(model, shard_vocabulary=False)


def test_mixins_say_which_of_their_dimensions_are_heads_width_and_tokens() -> None:
    model = tiny_model("bert")
    model.add_mixin("prefix", sat.PrefixTuningMixin.for_model(model))
    model.add_mixin("bias", sat.RelativePositionBiasMixin.for_model(model))
    model.add_mixin("experts", sat.MixtureOfExpertsMixin.for_model(model))
    dims = {name: dim for name, dim in shared_dims(model).items() if name.startswith("mixins.")}
    assert dims["mixins.prefix.layers.0.key"] == 0
    assert dims["mixins.bias.table.weight"] == 1
    assert dims["mixins.experts.layers.1.experts.0.down.weight"] == 1
    assert dims["mixins.head.bias"] == 0
    assert not any("positions" in name or "router" in name for name in dims)


def test_a_layer_is_one_unit_with_what_mixins_hold_for_it() -> None:
    model = tiny_model("t5")
    model.add_mixin("prefix", sat.PrefixTuningMixin.for_model(model))
    units = list(layer_units(model))
    parts = [part for _, part in iterate_models(model)]
    assert [layer for layer, _ in units] == [layer for part in parts for layer in part.transformer.layers]
    assert [held for _, held in units] == [[each] for part in parts for each in part.mixins["prefix"].layers]
