"""Three generations of names become one."""

import pytest

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.sat_legacy.names import canonical_names, generation, parse_positions


def test_mixins_by_position_take_the_names_that_the_caller_gives() -> None:
    names = ["mixins.0.w", "mixins.1.layers.0.weight", "decoder.mixins.1.b", "transformer.layers.0.w"]
    found = canonical_names(names, {0: "first", 1: "second"}, "x")
    assert list(found) == ["mixins.first.w", "mixins.second.layers.0.weight", "decoder.mixins.second.b", names[3]]
    assert found["mixins.first.w"] == "mixins.0.w"


def test_the_mixins_of_cogview_are_known_by_place_and_parameters() -> None:
    names = ["mixins.0.position_embeddings.weight", "mixins.1.query_key_value.3.weight", "mixins.1.dense.3.bias"]
    assert list(canonical_names(names, {}, "x")) == [
        "mixins.extra_position_embedding.position_embeddings.weight",
        "mixins.attention_plus.query_key_value.3.weight",
        "mixins.attention_plus.dense.3.bias",
    ]


def test_an_unmapped_index_is_an_error_with_its_parameters_and_the_cure() -> None:
    with pytest.raises(CheckpointError) as caught:
        canonical_names(["mixins.0.a.weight", "mixins.2.lora_A", "mixins.2.b"], {0: "x"}, "old.pt")
    message = str(caught.value)
    assert "old.pt has mixins by position that no map names; say --map 2=NAME" in message
    assert "mixins.2: lora_A, b" in message
    assert "mixins.0" not in message


def test_an_unmapped_index_is_explained_by_what_its_parameters_were_later_part_of() -> None:
    with pytest.raises(CheckpointError) as caught:
        canonical_names(["mixins.0.lm_head.dense.weight", "mixins.1.type_embeddings.weight", "mixins.2.w"], {}, "file")
    message = str(caught.value)
    assert "lm_head.dense.weight (later called bert-final or roberta-final)" in message
    assert "type_embeddings.weight (later called bert-type)" in message
    assert message.endswith("mixins.2: w")


def test_word_embeddings_at_the_root_move_to_the_transformer() -> None:
    names = ["word_embeddings.weight", "transformer.layers.0.w", "final_layernorm.bias"]
    assert list(canonical_names(names, {}, "x")) == [
        "transformer.word_embeddings.weight",
        "transformer.layers.0.w",
        "transformer.final_layernorm.bias",
    ]


def test_a_wrapper_for_data_parallelism_is_taken_off() -> None:
    assert list(canonical_names(["module.transformer.a", "module.mixins.x.b"], {}, "x")) == [
        "transformer.a",
        "mixins.x.b",
    ]


def test_two_tensors_with_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"are both 'transformer\.word_embeddings\.weight'"):
        canonical_names(["word_embeddings.weight", "transformer.word_embeddings.weight"], {}, "x")


def test_a_layer_that_lora_wrapped_keeps_its_name() -> None:
    layer = "transformer.layers.3.attention.dense"
    names = [f"{layer}.original.weight", f"{layer}.matrix_A.0", f"{layer}.matrix_B.0"]
    assert list(canonical_names(names, {}, "x")) == [
        f"{layer}.weight",
        "mixins.lora.layers.3.attention.dense.matrix_A.0",
        "mixins.lora.layers.3.attention.dense.matrix_B.0",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mixins.0.w", 1),
        ("word_embeddings.weight", 1),
        ("mixins.lm.lm_head.weight", 2),
        ("transformer.layers.0.mlp.dense_h_to_4h.weight", 2),
        ("transformer.layers.0.mlp.dense_h_to_4h_gate.weight", 3),
        ("transformer.layers.0.mlp.dense_4h_to_h_7.weight", 3),
        ("transformer.layers.0.mlp.dense_h_to_4h_gate_1.weight", 3),
    ],
)
def test_names_tell_the_generation(name: str, expected: int) -> None:
    assert generation([name], multi_query=False) == expected


def test_multi_query_attention_is_of_the_third_generation() -> None:
    assert generation(["transformer.a"], multi_query=True) == 3


@pytest.mark.parametrize("pair", ["0", "0=", "=x", "a=b", "-1=x", "0=a.b", "0=../x", "0=1"])
def test_a_pair_that_maps_nothing_is_refused(pair: str) -> None:
    with pytest.raises(CheckpointError, match="write INDEX=NAME"):
        parse_positions([pair])


def test_an_index_is_named_once() -> None:
    assert parse_positions(["0=a", "12=b"]) == {0: "a", 12: "b"}
    with pytest.raises(CheckpointError, match="named twice: 'a' and 'b'"):
        parse_positions(["0=a", "0=b"])
