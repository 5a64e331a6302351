"""RoBERTa: published sizes, positions counted over real tokens (cached too), dropout as the reference places it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel, RobertaConfig

import swissarmy as sat
from swissarmy.core.errors import HookCallError
from swissarmy.models._family import build_model
from swissarmy.models.roberta import FAMILY

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 50,
    "max_position_embeddings": 18,
    "type_vocab_size": 1,
    "initializer_range": 0.2,
}
IDS = torch.randint(2, 50, (6, 9), generator=torch.Generator().manual_seed(0))


def reference(architecture: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, architecture)(RobertaConfig(**{**TINY, **changes})).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_roberta_gives_the_same_logits_cached_and_uncached(tmp_path: Path, padded: bool) -> None:
    reference("RobertaForCausalLM", is_decoder=True).save_pretrained(tmp_path / "model")
    model = sat.load(tmp_path / "model")
    real = torch.arange(9)[None] >= torch.tensor([0, 1, 2, 3, 5, 0])[:, None] * int(padded)
    ids = torch.where(real, IDS, 1)
    with torch.no_grad():
        whole = model(ids, padding_mask=real)[0]
        model.add_mixin("cache", sat.CachedAutoRegressiveMixin())
        mems, pieces, start = sat.KVCache(2), [], 0
        for stop in (4, 5, 9):
            pieces.append(model(ids[:, start:stop], padding_mask=real[:, :stop], mems=mems)[0])
            start = stop
    torch.testing.assert_close(torch.cat(pieces, dim=1)[real], whole[real])


def test_more_tokens_than_positions_are_an_error() -> None:
    model = build_model({"model_type": "roberta", **TINY})
    model(torch.full((1, 16), 5))
    with pytest.raises(HookCallError, match="17 tokens, and the model has 16 positions"):
        model(torch.full((1, 17), 5))


def test_multiple_choice_takes_the_choices_as_rows(tmp_path: Path) -> None:
    theirs = reference("RobertaForMultipleChoice")
    theirs.save_pretrained(tmp_path / "choices")
    with torch.no_grad():
        ours = sat.load(tmp_path / "choices")(IDS)[0].view(2, 3)
    torch.testing.assert_close(ours, theirs(IDS.view(2, 3, 9)).logits)


@pytest.mark.parametrize("architecture", FAMILY.architectures)
def test_dropout_falls_where_the_reference_has_it(tmp_path: Path, architecture: str) -> None:
    theirs = reference(architecture, classifier_dropout=0.4)
    theirs.save_pretrained(tmp_path / "model")
    model = sat.load(tmp_path / "model").train()
    ids = IDS[:, None] if architecture == "RobertaForMultipleChoice" else IDS
    torch.manual_seed(7)
    expected = theirs.train()(ids).to_tuple()[:2]
    torch.manual_seed(7)
    result = model(IDS)[0]
    if architecture == "RobertaForQuestionAnswering":
        result = (result[..., 0], result[..., 1])
    for ours, reference_output in zip(result if isinstance(result, tuple) else (result,), expected, strict=False):
        torch.testing.assert_close(ours, reference_output)
