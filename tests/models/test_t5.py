"""T5: published sizes, cached decoding with and without prefixes, dropout and new weights, checkpoints of all ages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, T5Config

import swissarmy as sat
from swissarmy.backbone.encoder_decoder import EncoderDecoderModel
from swissarmy.core.errors import ConfigError, HookCallError, HookDefinitionError
from swissarmy.models._family import build_model
from swissarmy.models.t5 import FAMILY

TINY = {
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "vocab_size": 50,
    "decoder_start_token_id": 0,
}
VERSION_1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SOURCE = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(3, 50, (3, 8), generator=torch.Generator().manual_seed(1))
REAL = torch.arange(9)[None] < torch.tensor([9, 6, 4])[:, None]


def reference(architecture: str = "T5ForConditionalGeneration", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, architecture)(T5Config(**{**TINY, **changes})).eval()


def model_of(**changes: Any) -> EncoderDecoderModel:
    torch.manual_seed(0)
    model = build_model({"model_type": "t5", **TINY, **changes}).double().eval()
    assert isinstance(model, EncoderDecoderModel)
    return model


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", **config}))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(SOURCE, decoder_input_ids=TARGET, **inputs)[0]
    return result


def decoded(model: EncoderDecoderModel, **source: Any) -> Tensor:
    """Three tokens at once, then one at a time."""
    with torch.no_grad():
        decoder, kw_args = model.for_decoding(input_ids=SOURCE, **source)
        mems = sat.KVCache(decoder.config.num_layers)
        pieces = [decoder(piece, mems=mems, **kw_args)[0] for piece in TARGET.split([3, 1, 1, 1, 1, 1], dim=1)]
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("changes", [{}, VERSION_1_1, {"relative_attention_num_buckets": 6}])
@pytest.mark.parametrize("source", [{}, {"padding_mask": REAL}, {"padding_mask": REAL.flip(1)}])
def test_the_decoder_gives_the_same_logits_cached_and_uncached(
    changes: dict[str, Any], source: dict[str, Tensor]
) -> None:
    model = model_of(**changes)
    whole = logits(model, **source)
    model.add_mixin("cache", sat.CachedAutoRegressiveMixin.for_model(model))
    assert [name for name in model.parts if "cache" in model.part(name).mixins] == ["decoder"]
    torch.testing.assert_close(logits(model, **source), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(decoded(model, **source), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cache_first", [True, False])
def test_a_prefix_in_both_parts_gives_the_same_logits_cached_and_uncached_in_either_order(cache_first: bool) -> None:
    model = model_of()
    plain = logits(model, padding_mask=REAL)
    torch.manual_seed(1)
    prefixes = sat.PrefixTuningMixin.for_model(model, prefix_len=4)
    assert list(prefixes) == ["encoder", "decoder"]
    for prefix in prefixes.values():
        for parameter in prefix.parameters():
            torch.nn.init.normal_(parameter)
    added = {"cache": sat.CachedAutoRegressiveMixin(), "prefix": prefixes}
    for name in added if cache_first else reversed(added):
        model.add_mixin(name, added[name])
    whole = logits(model, padding_mask=REAL)
    assert (whole - plain).abs().max() > 1e-3
    torch.testing.assert_close(decoded(model, padding_mask=REAL), whole, rtol=0, atol=1e-10)
    model.del_mixin("prefix")
    model.del_mixin("cache")
    assert torch.equal(logits(model, padding_mask=REAL), plain)


def test_a_prefix_in_one_part_changes_that_part_only() -> None:
    model = model_of()
    plain = model.encode(SOURCE)
    model.add_mixin("prefix", sat.PrefixTuningMixin.for_model(model), part="decoder")
    assert torch.equal(model.encode(SOURCE), plain)
    model.add_mixin("cache", sat.CachedAutoRegressiveMixin(), part="decoder")
    torch.testing.assert_close(decoded(model), logits(model), rtol=0, atol=1e-10)


def test_adding_to_a_part_that_a_mixin_does_not_suit_says_which_it_suits() -> None:
    model = model_of()
    with pytest.raises(HookDefinitionError, match="'cache' is not for part 'encoder'; it is for: decoder"):
        model.add_mixin("cache", sat.CachedAutoRegressiveMixin.for_model(model), part="encoder")
    with pytest.raises(HookDefinitionError, match="'nothing' suits no part"):
        model.add_mixin("nothing", {})


@pytest.mark.parametrize("changes", [{}, VERSION_1_1])
@pytest.mark.parametrize("architecture", FAMILY.architectures)
def test_dropout_falls_where_the_reference_has_it(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    theirs = reference(architecture, classifier_dropout=0.4, dropout_rate=0.3, **changes)
    theirs.save_pretrained(tmp_path / "model")
    model = sat.load(tmp_path / "model").train()
    ids = torch.cat((SOURCE, torch.ones(3, 1, dtype=torch.long)), dim=1)
    targets = {"decoder_input_ids": TARGET} if architecture in ("T5ForConditionalGeneration", "T5Model") else {}
    torch.manual_seed(7)
    expected = theirs.train()(ids, **targets).to_tuple()[:2]
    torch.manual_seed(7)
    result = model(ids, **targets)[0]
    if architecture == "T5ForQuestionAnswering":
        torch.testing.assert_close(result, torch.stack(expected, dim=-1))
    else:
        torch.testing.assert_close(result, expected[0])


def test_new_weights_spread_as_the_reference_has_them() -> None:
    sizes = {**TINY, "d_model": 128, "d_kv": 40, "d_ff": 200, "vocab_size": 300, "initializer_factor": 0.7}
    model = build_model({"model_type": "t5", **sizes, "relative_attention_num_buckets": 128})
    theirs = dict(reference(**sizes, relative_attention_num_buckets=128).named_parameters())
    parameters = dict(model.named_parameters())
    for entry in FAMILY.weights(model.source.config).entries(parameters):
        if theirs[entry.theirs].dim() > 1:
            ratio = parameters[entry.ours[0]].std() / theirs[entry.theirs].std()
            assert 0.85 < ratio < 1.15, entry.theirs


def test_a_checkpoint_of_an_old_version_loads_with_its_repeated_and_its_unused_tensors(tmp_path: Path) -> None:
    theirs = reference()
    tensors = theirs.state_dict()
    assert {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"} < set(tensors)
    unused = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(32, 4)}
    fields = {"output_past": True, "n_positions": 512, "task_specific_params": {"summarization": {"num_beams": 4}}}
    model = sat.load(write(tmp_path / "old", {**TINY, **fields}, {**tensors, **unused}))
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(SOURCE, decoder_input_ids=TARGET).logits)


def test_a_published_1_1_has_a_head_of_its_own_which_transformers_reads_back(tmp_path: Path) -> None:
    theirs = reference(**VERSION_1_1)
    tensors = {**theirs.state_dict(), "lm_head.weight": torch.randn(50, 32)}
    model = sat.load(write(tmp_path / "hub", {**TINY, **VERSION_1_1}, tensors))
    model.save_pretrained(tmp_path / "ours")
    restored = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    restored.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["tie_word_embeddings"] is True
    with torch.no_grad():
        expected = restored(SOURCE, decoder_input_ids=TARGET).logits
    torch.testing.assert_close(logits(model), expected)
    torch.testing.assert_close(logits(sat.load(tmp_path / "theirs")), expected)


def test_a_1_1_saved_without_a_head_starts_with_the_word_embedding_as_its_head(tmp_path: Path) -> None:
    theirs = reference(**VERSION_1_1)
    theirs.save_pretrained(tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    model = sat.load(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(SOURCE, decoder_input_ids=TARGET).logits)


@pytest.mark.parametrize("changes", [{}, VERSION_1_1])
def test_the_encoder_of_a_whole_checkpoint_loads_alone(tmp_path: Path, changes: dict[str, Any]) -> None:
    tensors = {**reference(**changes).state_dict()}
    del tensors["shared.weight"]
    folder = write(tmp_path / "model", {**TINY, **changes}, {**tensors, "lm_head.weight": torch.randn(50, 32)})
    encoder = sat.load(folder, overrides={"architectures": ["T5EncoderModel"]})
    with torch.no_grad():
        expected = reference(**changes).get_encoder()(SOURCE, attention_mask=REAL.long()).last_hidden_state
        torch.testing.assert_close(encoder(SOURCE, padding_mask=REAL)[0], expected)


def test_a_classifier_needs_the_source_to_see_where_it_ends() -> None:
    model = model_of(architectures=["T5ForSequenceClassification"])
    encoded = model.encode(SOURCE)
    with pytest.raises(HookCallError, match="give input_ids"):
        model(decoder_input_ids=SOURCE, encoder_outputs=encoded)
    assert model(SOURCE, encoder_outputs=encoded)[0].shape == (3, 2)


def test_a_model_that_writes_needs_its_target() -> None:
    with pytest.raises(HookCallError, match="decoder_input_ids"):
        model_of()(SOURCE)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"feed_forward_proj": "wide-gelu"}, "feed_forward_proj='wide-gelu' is neither"),
        ({"architectures": ["T5ForSequenceClassification"], "eos_token_id": [1, 2]}, "must be one id"),
        ({"num_layer": 3}, "Did you mean 'num_layers'"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build_model({"model_type": "t5", **changes})
