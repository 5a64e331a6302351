"""Every family: a model, its old checkpoint in each generation and split, and the same logits after migration."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import swissarmy as sat
from swissarmy.core.errors import CheckpointError, ConfigError
from swissarmy.interop.sat_legacy.migrate import migrate
from swissarmy.interop.sat_legacy.plan import Options, open_legacy
from swissarmy.testing import tiny_inputs, tiny_model
from tests.interop.sat_legacy import legacy

Write = Callable[..., tuple[legacy.State, dict[str, Any]]]
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

CASES: dict[str, tuple[str, Write, dict[str, Any], dict[str, Any]]] = {
    # name: family, how it was written, what the model's config changes, what the writer is told
    "gpt2": ("gpt2", legacy.gpt2, {}, {}),
    "gpt2 with a head of its own": ("gpt2", legacy.gpt2, {"tie_word_embeddings": False}, {}),
    "bert": ("bert", legacy.bert, {}, {}),
    "bert untied": ("bert", legacy.bert, {"tie_word_embeddings": False}, {}),
    "roberta": ("roberta", legacy.roberta, {"type_vocab_size": 1}, {}),
    "llama": ("llama", legacy.llama, {"num_key_value_heads": 4}, {}),
    "llama 0.4, grouped": ("llama", legacy.llama, {}, {"gate": "backbone"}),
    "t5": ("t5", legacy.t5, {}, {}),
    "t5 v1.1": ("t5", legacy.t5, V1_1, {}),
    "vit": ("vit", legacy.vit, {}, {}),
    "vit 0.1.9": ("vit", legacy.vit, {}, {"named": True}),
}
RANKS = {"llama 0.4, grouped": (1, 2)}  # it has two heads for keys and values
POSITIONS = {"gpt2": ["gpt2-final", "gpt2-attn"], "bert": ["bert-final", "bert-type"], "llama": ["rotary", "lm", "mlp"]}


def make(case: str) -> tuple[Any, legacy.State, dict[str, Any]]:
    """A model, its old state dict with padding, and its `model_config.json`."""
    family, write, changes, told = CASES[case]
    model = tiny_model(family, **changes)
    if family == "roberta":  # SAT had no token types
        with torch.no_grad():
            model.get_mixin("token-types").table.weight.zero_()
    state, config = write(model, **told)
    return model, state if family == "vit" else legacy.pad_vocabulary(state), config


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs)[0]
    return found


def same_logits(folder: Path, model: Any) -> None:
    inputs = tiny_inputs(model)
    assert torch.equal(logits(sat.load(folder), inputs), logits(model, inputs))


def queries(case: str) -> int:
    return 2 if "grouped" in case else 1


@pytest.mark.parametrize(("case", "ranks"), [(case, n) for case in CASES for n in RANKS.get(case, (1, 2, 4))])
def test_a_migrated_model_gives_the_same_logits(tmp_path: Path, case: str, ranks: int) -> None:
    model, state, config = make(case)
    shares = legacy.split(state, ranks, queries=queries(case))
    done = migrate(legacy.write(tmp_path / "old", shares, config), tmp_path / "new")
    same_logits(tmp_path / "new", model)
    assert (done.model_type, done.ranks, done.iteration) == (CASES[case][0], ranks, 1000)
    assert done.generation == (3 if "0.4" in case else 2)
    assert done.mixins == {}
    assert done.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", ["gpt2", "bert", "llama"])
def test_the_first_generation_gives_the_same_logits_with_its_mixins_named(
    tmp_path: Path, case: str, ranks: int
) -> None:
    model, state, config = make(case)
    order = {name: index for index, name in enumerate(POSITIONS[case])}
    state = legacy.first_generation(state, order)
    assert "word_embeddings.weight" in state
    assert any(name.startswith("mixins.0.") for name in state)
    old = legacy.write(tmp_path / "old", legacy.split(state, ranks), config, zip_file=False)
    with pytest.raises(CheckpointError, match="say --map 0=NAME"):
        migrate(old, tmp_path / "new")
    done = migrate(old, tmp_path / "new", Options(positions={index: name for name, index in order.items()}))
    assert done.generation == 1
    same_logits(tmp_path / "new", model)


@pytest.mark.parametrize("case", list(CASES))
def test_transformers_reads_what_was_migrated(tmp_path: Path, case: str) -> None:
    model, state, config = make(case)
    migrate(legacy.write(tmp_path / "old", [state], config), tmp_path / "new")
    architecture = model.source.config.architecture
    theirs = getattr(transformers, architecture).from_pretrained(tmp_path / "new").eval()
    inputs = tiny_inputs(model)
    with torch.no_grad():
        found = theirs(**inputs).logits
    torch.testing.assert_close(found, logits(model, inputs), rtol=1e-4, atol=1e-4)


def test_half_precision_stays_as_it_was(tmp_path: Path) -> None:
    model, state, config = make("gpt2")
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    migrate(legacy.write(tmp_path / "old", legacy.split(half, 2), config), tmp_path / "new")
    assert sat.load(tmp_path / "new").dtype is torch.float16
    assert torch.equal(
        sat.load(tmp_path / "new").transformer.final_norm.weight, model.transformer.final_norm.weight.half()
    )


def test_decoder_norms_of_late_releases_are_taken_in_their_order(tmp_path: Path) -> None:
    model = tiny_model("t5")
    state, config = legacy.t5(model, late=True)
    old = legacy.write(tmp_path / "old", [state], config)
    migrate(old, tmp_path / "early")
    migrate(old, tmp_path / "late", Options(cross_norms="late"))
    same_logits(tmp_path / "late", model)
    inputs = tiny_inputs(model)
    assert not torch.equal(logits(sat.load(tmp_path / "early"), inputs), logits(model, inputs))


def test_the_heads_of_t5_biases_may_be_split_too(tmp_path: Path) -> None:
    model, state, config = make("t5")
    migrate(legacy.write(tmp_path / "old", legacy.split(state, 2, split_heads=True), config), tmp_path / "new")
    same_logits(tmp_path / "new", model)


# Padding, ties, and what is not there


def test_padding_of_the_vocabulary_is_cut_or_kept(tmp_path: Path) -> None:
    model, state, config = make("gpt2")
    old = legacy.write(tmp_path / "old", legacy.split(state, 2), config)
    assert migrate(old, tmp_path / "cut").vocabulary == (128, 61)
    assert migrate(old, tmp_path / "kept", Options(keep_padding=True)).vocabulary == (128, 128)
    inputs = tiny_inputs(model)
    kept = logits(sat.load(tmp_path / "kept"), inputs)
    assert kept.shape[-1] == 128
    torch.testing.assert_close(kept[..., :61], logits(model, inputs), rtol=1e-5, atol=1e-5)
    assert migrate(old, tmp_path / "fewer", Options(vocab_size=50)).vocabulary == (128, 50)


def test_more_tokens_than_there_are_rows_is_an_error(tmp_path: Path) -> None:
    _, state, config = make("gpt2")
    old = legacy.write(tmp_path / "old", [state], config)
    with pytest.raises(ConfigError, match="--vocab-size is 200, and the word embeddings have 128 rows"):
        migrate(old, tmp_path / "new", Options(vocab_size=200))


def test_a_tied_head_is_recognised_by_its_storage_or_by_its_numbers(tmp_path: Path) -> None:
    _, state, config = make("gpt2")
    head = "mixins.gpt2-final.lm_head.weight"
    assert migrate(legacy.write(tmp_path / "one", [state], config), tmp_path / "a").tied == (head,)
    state[head] = state[head].clone()
    assert migrate(legacy.write(tmp_path / "two", [state], config), tmp_path / "b").tied == (head,)
    state[head] = state[head] + 1
    assert migrate(legacy.write(tmp_path / "three", [state], config), tmp_path / "c").tied == ()
    assert sat.load(tmp_path / "c").transformer.lm_head is not None


def test_a_head_that_is_not_there_is_the_word_embedding(tmp_path: Path) -> None:
    model, state, config = make("gpt2")
    del state["mixins.gpt2-final.lm_head.weight"]
    migrate(legacy.write(tmp_path / "old", [state], config), tmp_path / "new")
    same_logits(tmp_path / "new", model)


def test_what_old_models_lacked_is_zero_and_what_is_computed_is_dropped(tmp_path: Path) -> None:
    _, state, config = make("roberta")
    done = migrate(legacy.write(tmp_path / "roberta", [state], config), tmp_path / "a")
    assert done.zeros == ("mixins.token-types.table.weight",)
    _, state, config = make("llama")
    done = migrate(legacy.write(tmp_path / "llama", [state], config), tmp_path / "b")
    assert done.dropped == ("mixins.rotary.rotary_emb.inv_freq",)


def test_biases_that_a_release_left_out_are_zero(tmp_path: Path) -> None:
    model, state, config = make("gpt2")
    out = [name for name in state if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias"))]
    for name in out:
        del state[name]
    with torch.no_grad():
        for layer in model.transformer.layers:
            layer.attention.output.bias.zero_()
            layer.mlp.down.bias.zero_()
    done = migrate(legacy.write(tmp_path / "old", [state], config), tmp_path / "new")
    assert len(done.zeros) == len(out) == 4
    same_logits(tmp_path / "new", model)


def test_a_bias_that_only_some_layers_have_is_missing_in_the_others(tmp_path: Path) -> None:
    _, state, config = make("gpt2")
    del state["transformer.layers.1.attention.dense.bias"]
    with pytest.raises(CheckpointError, match=r"missing: transformer\.layers\.1\.attention\.dense\.bias"):
        migrate(legacy.write(tmp_path / "old", [state], config), tmp_path / "new")


def test_a_base_model_with_a_head_of_the_users_keeps_the_heads_weights(tmp_path: Path) -> None:
    model, state, config = make("bert")
    state = {name: tensor for name, tensor in state.items() if "bert-final" not in name}
    state["mixins.classification_head.layers.0.weight"] = torch.randn(3, 32)
    done = migrate(legacy.write(tmp_path / "old", [state], config), tmp_path / "new")
    assert done.mixins == {"mixins.classification_head": 96}

    with pytest.raises(CheckpointError, match=r"unexpected: mixins\.classification_head\.layers\.0\.weight"):
        sat.load(tmp_path / "new")
    loaded = sat.load(tmp_path / "new", allow_missing=["mixins.classification_head.*"])
    assert logits(loaded, tiny_inputs(model)).shape[-1] == 32


# Contradictions


def test_a_layer_without_a_tensor_is_reported_with_the_nearest_name(tmp_path: Path) -> None:
    _, state, config = make("gpt2")
    for layer in range(2):
        tensor = state.pop(f"transformer.layers.{layer}.mlp.dense_4h_to_h.weight")
        state[f"transformer.layers.{layer}.mlp.dense_4h_to_hh.weight"] = tensor
    with pytest.raises(CheckpointError) as caught:
        migrate(legacy.write(tmp_path / "old", [state], config), tmp_path / "new")
    message = str(caught.value)
    assert "missing: transformer.layers.{0..1}.mlp.dense_4h_to_h.weight. Did you mean" in message
    assert "unexpected: transformer.layers.{0..1}.mlp.dense_4h_to_hh.weight. Did you mean" in message
    assert not (tmp_path / "new").exists()


def test_a_tensor_of_the_wrong_size_is_reported_with_both(tmp_path: Path) -> None:
    _, state, config = make("gpt2")
    state["transformer.final_layernorm.weight"] = torch.ones(31)
    with pytest.raises(CheckpointError, match=r"final_layernorm\.weight: have \[31\], want \[32\]"):
        migrate(legacy.write(tmp_path / "old", [state], config), tmp_path / "new")


@pytest.mark.parametrize(("old", "new"), [("layers.1.", "layers.999999999."), ("layers.0.", "layers.2.")])
def test_a_layer_that_is_not_there_is_named_and_no_billion_of_them_is_built(tmp_path: Path, old: str, new: str) -> None:
    _, state, config = make("gpt2")
    state = {name.replace(old, new): tensor for name, tensor in state.items()}
    if old == "layers.0.":
        with pytest.raises(ConfigError, match=r"has no transformer\.layers\.0\.attention"):
            migrate(legacy.write(tmp_path / "old", [state], config), tmp_path / "new")
    else:
        with pytest.raises(ConfigError, match="has layers up to 999999999 and lacks layer 1"):
            migrate(legacy.write(tmp_path / "old", [state], config), tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 3}, "num_layers is 3, and the tensors have 2"),
        ({"hidden_size": 64}, "hidden_size is 64, and the tensors have 32"),
        ({"num_attention_heads": None}, "num_attention_heads is missing, and no tensor's shape tells it"),
        ({"num_attention_heads": 5}, "query_key_value has 96 rows, no multiple of 5 heads"),
        ({"num_attention_heads": "4"}, "num_attention_heads='4' is not int"),
        ({"layernorm_order": "after"}, "layernorm_order='after' is not one of pre, post, sandwich"),
    ],
)
def test_arguments_that_the_tensors_contradict_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    _, state, config = make("gpt2")
    with pytest.raises(ConfigError, match=r"model_config\.json") as caught:
        migrate(legacy.write(tmp_path / "old", [state], config | change), tmp_path / "new")
    assert says in str(caught.value)


@pytest.mark.parametrize("case", ["gpt2", "t5", "vit 0.1.9"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_tensors_of_any_other_shape_are_refused_as_such(tmp_path: Path, case: str, ranks: int) -> None:
    _, state, config = make(case)
    for number, name in enumerate(name for name in state if "layers.1." not in name):
        for shape in ((), (4,), (0, 4), (2, 2, 2)):
            changed = state | {name: torch.ones(shape)}
            old = legacy.write(tmp_path / f"{number} {len(shape)}", [changed] * ranks, config)
            with contextlib.suppress(CheckpointError, ConfigError):  # a buffer that nothing reads is none's concern
                open_legacy(old)


@pytest.mark.parametrize(("size", "fits"), [(16, True), ([16, 16], True), (["a", 1], False), ("big", False)])
def test_the_size_of_images_is_a_number_or_two(tmp_path: Path, size: object, fits: bool) -> None:
    model, state, config = make("vit")
    old = legacy.write(tmp_path / "old", [state], config | {"image_size": size})
    if fits:
        migrate(old, tmp_path / "new")
        same_logits(tmp_path / "new", model)
    else:
        with pytest.raises(ConfigError, match=r"image_size=.* is not \[height, width\]"):
            migrate(old, tmp_path / "new")


def test_without_a_config_the_family_and_its_heads_are_asked_for_and_suffice(tmp_path: Path) -> None:
    model, state, _ = make("gpt2")
    old = legacy.write(tmp_path / "old", [state], None)
    with pytest.raises(ConfigError, match="say --family, one of bert, roberta, gpt2"):
        migrate(old, tmp_path / "new")
    with pytest.raises(ConfigError, match=r"there is no such family\. Did you mean 'gpt2'"):
        migrate(old, tmp_path / "new", Options(family="gpt-2"))
    with pytest.raises(ConfigError, match="say --set num_attention_heads=N"):
        migrate(old, tmp_path / "new", Options(family="gpt2"))
    migrate(old, tmp_path / "new", Options(family="gpt2", arguments={"num_attention_heads": 4}, vocab_size=61))
    same_logits(tmp_path / "new", model)


# Reading straight into a run of several ranks


@pytest.mark.parametrize("case", ["gpt2", "llama 0.4, grouped", "t5"])
def test_each_rank_reads_its_slice_of_every_parameter(tmp_path: Path, case: str) -> None:
    model, state, config = make(case)
    shares = legacy.split(state, 2, queries=queries(case))
    checkpoint = open_legacy(legacy.write(tmp_path / "old", shares, config))
    (part,) = checkpoint.parts
    parameters = dict(model.named_parameters())
    assert set(part.parameters.names()) == set(parameters)
    for name, parameter in parameters.items():
        assert part.parameters.shape(name) == parameter.shape
        for dim in range(parameter.dim()):
            size = parameter.shape[dim] // 4
            for rank in range(4):
                found = part.parameters.read_slice(name, dim, rank * size, (rank + 1) * size)
                assert torch.equal(found, parameter.narrow(dim, rank * size, size)), (name, dim, rank)
                assert found.is_contiguous()
