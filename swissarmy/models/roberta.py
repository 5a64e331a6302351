"""RoBERTa (Liu et al. 2019): BERT's encoder, with positions counted over real tokens only and heads of its own."""

from dataclasses import dataclass
from typing import final

from swissarmy.backbone.model import BaseModel
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import WeightMap, same
from swissarmy.mixins.heads import ClassificationHeadMixin, NoHeadMixin, PoolerMixin
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
class RobertaConfig(EncoderConfig):
    """`config.json` of RoBERTa."""

    vocab_size: int = 50265
    pad_token_id: int = 1


def build(config: RobertaConfig) -> BaseModel:
    """The encoder with the head of the architecture."""
    return build_encoder(config, _head(config), vocab_size=config.vocab_size, position_offset=config.pad_token_id)


def _head(config: RobertaConfig) -> BaseMixin:
    match config.task:
        case "ForMaskedLM" | "ForCausalLM":
            return lm_head(config, config.vocab_size, "gelu")
        case "ForSequenceClassification":
            return ClassificationHeadMixin(
                config.hidden_size, config.num_labels, activation="tanh", dropout=config.head_dropout
            )
        case "ForMultipleChoice":
            return pooled_classifier(config, 1, dropout=config.hidden_dropout_prob)
        case "ForTokenClassification":
            return token_classifier(config, config.num_labels, dropout=config.head_dropout)
        case "ForQuestionAnswering":
            return token_classifier(config, 2, dropout=0.0)
        case _:
            return PoolerMixin(config.hidden_size) if config.add_pooling_layer else NoHeadMixin()


def weights(config: RobertaConfig) -> WeightMap:
    """The encoder's names, and those of each task's head."""
    lm = lm_rules(config, dense="lm_head.dense", norm="lm_head.layer_norm", output="lm_head")
    classifier = same("classifier.{p}", f"{HEAD}.classifier.{{p}}")
    pooled = same(f"{base_prefix(config)}pooler.dense.{{p}}", f"{HEAD}.dense.{{p}}")
    return encoder_weights(
        config,
        lm_output="lm_head",
        heads={
            "Model": (pooled,),
            "ForMaskedLM": lm,
            "ForCausalLM": lm,
            "ForSequenceClassification": (
                same("classifier.dense.{p}", f"{HEAD}.dense.{{p}}"),
                same("classifier.out_proj.{p}", f"{HEAD}.classifier.{{p}}"),
            ),
            "ForMultipleChoice": (pooled, classifier),
            "ForTokenClassification": (classifier,),
            "ForQuestionAnswering": (same("qa_outputs.{p}", f"{HEAD}.classifier.{{p}}"),),
        },
    )


PUBLISHED = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}

FAMILY = Family(
    config=RobertaConfig,
    architectures=(
        "RobertaForMaskedLM",
        "RobertaModel",
        "RobertaForCausalLM",
        "RobertaForSequenceClassification",
        "RobertaForMultipleChoice",
        "RobertaForTokenClassification",
        "RobertaForQuestionAnswering",
    ),
    build=build,
    weights=weights,
    presets={
        "roberta-base": Preset(config=PUBLISHED, parameters=124_697_433),
        "roberta-large": Preset(
            config=PUBLISHED
            | {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
            },
            parameters=355_412_057,
        ),
    },
)
