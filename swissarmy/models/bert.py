"""BERT (Devlin et al. 2019): a bidirectional encoder, normalised after each sublayer, with learned positions."""

from dataclasses import dataclass
from typing import final

from swissarmy.backbone.model import BaseModel
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import WeightMap, same
from swissarmy.mixins.heads import NoHeadMixin, PoolerMixin, PreTrainingHeadMixin
from swissarmy.models._encoder import (
    HEAD,
    EncoderConfig,
    base_prefix,
    build_encoder,
    encoder_weights,
    lm_head,
    lm_rules,
    pooled_classifier,
    token_classifier,
)
from swissarmy.models._family import Family, Preset


@final
@dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """`config.json` of BERT."""

    vocab_size: int = 30522
    pad_token_id: int | None = 0


def build(config: BertConfig) -> BaseModel:
    """The encoder with the head of the architecture."""
    return build_encoder(config, _head(config), vocab_size=config.vocab_size)


def _head(config: BertConfig) -> BaseMixin:
    match config.task:
        case "ForMaskedLM" | "LMHeadModel":
            return lm_head(config, config.vocab_size, config.hidden_act)
        case "ForPreTraining":
            next_sentence = pooled_classifier(config, 2, dropout=0.0)
            return PreTrainingHeadMixin(lm_head(config, config.vocab_size, config.hidden_act), next_sentence)
        case "ForNextSentencePrediction":
            return pooled_classifier(config, 2, dropout=0.0)
        case "ForSequenceClassification":
            return pooled_classifier(config, config.num_labels, dropout=config.head_dropout)
        case "ForMultipleChoice":
            return pooled_classifier(config, 1, dropout=config.head_dropout)
        case "ForTokenClassification":
            return token_classifier(config, config.num_labels, dropout=config.head_dropout)
        case "ForQuestionAnswering":
            return token_classifier(config, 2, dropout=0.0)
        case _:
            return PoolerMixin(config.hidden_size) if config.add_pooling_layer else NoHeadMixin()


def weights(config: BertConfig) -> WeightMap:
    """The encoder's names, and those of each task's head."""
    names = {"dense": "cls.predictions.transform.dense", "norm": "cls.predictions.transform.LayerNorm"}
    pooler, predictions = f"{base_prefix(config)}pooler.dense.{{p}}", "cls.predictions"
    lm = lm_rules(config, **names, output=predictions)
    classifier = same("classifier.{p}", f"{HEAD}.classifier.{{p}}")
    pooled = same(pooler, f"{HEAD}.dense.{{p}}")
    return encoder_weights(
        config,
        lm_output=predictions,
        heads={
            "Model": (pooled,),
            "LMHeadModel": lm,
            "ForMaskedLM": lm,
            "ForPreTraining": (
                *lm_rules(config, **names, output=predictions, ours=f"{HEAD}.predictions"),
                same(pooler, f"{HEAD}.next_sentence.dense.{{p}}"),
                same("cls.seq_relationship.{p}", f"{HEAD}.next_sentence.classifier.{{p}}"),
            ),
            "ForNextSentencePrediction": (
                pooled,
                same("cls.seq_relationship.{p}", f"{HEAD}.classifier.{{p}}"),
            ),
            "ForSequenceClassification": (pooled, classifier),
            "ForMultipleChoice": (pooled, classifier),
            "ForTokenClassification": (classifier,),
            "ForQuestionAnswering": (same("qa_outputs.{p}", f"{HEAD}.classifier.{{p}}"),),
        },
    )


FAMILY = Family(
    config=BertConfig,
    architectures=(
        "BertForMaskedLM",
        "BertModel",
        "BertForPreTraining",
        "BertLMHeadModel",
        "BertForNextSentencePrediction",
        "BertForSequenceClassification",
        "BertForMultipleChoice",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
    ),
    build=build,
    weights=weights,
    presets={
        "bert-base-uncased": Preset(config={}, parameters=109_514_298),
        "bert-base-cased": Preset(config={"vocab_size": 28996}, parameters=108_340_804),
        "bert-large-uncased": Preset(
            config={
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
            },
            parameters=335_174_458,
        ),
    },
)
