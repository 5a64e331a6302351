"""GPT-2 (Radford et al. 2019): the plain causal backbone with learned positions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import WeightMap, joined, same, transposed
from swissarmy.mixins.heads import ClassificationHeadMixin, NoHeadMixin
from swissarmy.mixins.learned_positions import LearnedPositionsMixin
from swissarmy.models._family import Family, FamilyConfig, Preset, with_parts


@final
@dataclass(frozen=True, kw_only=True)
class GPT2Config(FamilyConfig):
    """`config.json` of GPT-2."""

    ignored = frozenset(
        {
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
            "n_ctx",
            "reorder_and_upcast_attn",
            "predict_special_tokens",
        }
    )
    renamed: ClassVar[Mapping[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    classifier_dropout: float | None = None
    hidden_dropout: float | None = None
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False


def build(config: GPT2Config) -> BaseModel:
    """The backbone, positions, and the head of the architecture."""
    backbone = TransformerConfig(
        num_layers=config.n_layer,
        hidden_size=config.n_embd,
        num_attention_heads=config.n_head,
        intermediate_size=config.n_inner,
        vocab_size=config.vocab_size,
        max_sequence_length=config.n_positions,
        activation=config.activation_function,
        attention_scale=None if config.scale_attn_weights else 1.0,
        norm_epsilon=config.layer_norm_epsilon,
        tie_word_embeddings=config.tie_word_embeddings or config.architecture != "GPT2LMHeadModel",
        embedding_dropout=config.embd_pdrop,
        attention_dropout=config.attn_pdrop,
        hidden_dropout=config.resid_pdrop,
        initializer_range=config.initializer_range,
    )
    positions = LearnedPositionsMixin(config.n_positions, config.n_embd)
    return with_parts(backbone, {"positions": positions, **_head(config)})


def _head(config: GPT2Config) -> dict[str, BaseMixin]:
    def classifier(pooling: Literal["last", "tokens"], labels: int, bias: bool, dropout: float) -> BaseMixin:
        return ClassificationHeadMixin(
            config.n_embd, labels, pooling=pooling, bias=bias, dropout=dropout, padding_id=config.pad_token_id
        )

    token_dropout = next((x for x in (config.classifier_dropout, config.hidden_dropout) if x is not None), 0.1)
    match config.architecture:
        case "GPT2LMHeadModel":
            return {}
        case "GPT2ForSequenceClassification":
            return {"head": classifier("last", config.num_labels, False, 0.0)}
        case "GPT2ForTokenClassification":
            return {"head": classifier("tokens", config.num_labels, True, token_dropout)}
        case "GPT2ForQuestionAnswering":
            return {"head": classifier("tokens", 2, True, 0.0)}
        case _:
            return {"head": NoHeadMixin()}


def weights(config: GPT2Config) -> WeightMap:
    """Their linear layers are convolutions of width one: the other way round, query, key and value in one."""
    base = "" if config.architecture == "GPT2Model" else "transformer."
    theirs, ours = f"{base}h.{{i}}", "transformer.layers.{i}"
    attention = [f"{ours}.attention.{name}.{{p}}" for name in ("query", "key", "value")]
    classifier = {"GPT2ForSequenceClassification": "score", "GPT2ForQuestionAnswering": "qa_outputs"}
    return WeightMap(
        prefix="transformer.",
        rules=(
            same(f"{base}wte.weight", "transformer.word_embeddings.weight"),
            same(f"{base}wpe.weight", "mixins.positions.table.weight"),
            same(f"{theirs}.ln_1.{{p}}", f"{ours}.attention_residual.input_norm.{{p}}"),
            joined(f"{theirs}.attn.c_attn.{{p}}", attention, transpose=True),
            transposed(f"{theirs}.attn.c_proj.weight", f"{ours}.attention.output.weight"),
            same(f"{theirs}.attn.c_proj.bias", f"{ours}.attention.output.bias"),
            same(f"{theirs}.ln_2.{{p}}", f"{ours}.mlp_residual.input_norm.{{p}}"),
            transposed(f"{theirs}.mlp.c_fc.weight", f"{ours}.mlp.up.weight"),
            same(f"{theirs}.mlp.c_fc.bias", f"{ours}.mlp.up.bias"),
            transposed(f"{theirs}.mlp.c_proj.weight", f"{ours}.mlp.down.weight"),
            same(f"{theirs}.mlp.c_proj.bias", f"{ours}.mlp.down.bias"),
            same(f"{base}ln_f.{{p}}", "transformer.final_norm.{p}"),
            same("lm_head.weight", "transformer.lm_head.weight"),
            same(f"{classifier.get(config.architecture, 'classifier')}.{{p}}", "mixins.head.classifier.{p}"),
        ),
        ignored=(f"{base}h.{{i}}.attn.bias", f"{base}h.{{i}}.attn.masked_bias"),
        duplicates={"lm_head.weight": f"{base}wte.weight"} if config.tie_word_embeddings else {},
    )


FAMILY = Family(
    config=GPT2Config,
    architectures=(
        "GPT2LMHeadModel",
        "GPT2Model",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2ForQuestionAnswering",
    ),
    build=build,
    weights=weights,
    presets={
        "gpt2": Preset(config={}, parameters=124_439_808),
        "gpt2-medium": Preset(config={"n_layer": 24, "n_embd": 1024, "n_head": 16}, parameters=354_823_168),
        "gpt2-large": Preset(config={"n_layer": 36, "n_embd": 1280, "n_head": 20}, parameters=774_030_080),
        "gpt2-xl": Preset(config={"n_layer": 48, "n_embd": 1600, "n_head": 25}, parameters=1_557_611_200),
    },
)
