"""What LLaMA and the decoders that followed it share: names of tensors, and heads by architecture."""

from collections.abc import Sequence

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.mixin import BaseMixin
from swissarmy.core.weight_map import Rule, WeightMap, same
from swissarmy.mixins.heads import ClassificationHeadMixin, NoHeadMixin
from swissarmy.models._family import FamilyConfig

LAYER = "transformer.layers.{i}"


def base_prefix(config: FamilyConfig) -> str:
    """What their names start with: nothing in a checkpoint of the base model."""
    if config.architecture.endswith("ForQuestionAnswering"):
        return "transformer."
    return "model." if "For" in config.architecture else ""


def decoder_head(config: FamilyConfig, backbone: TransformerConfig, *, dropout: float | None) -> dict[str, BaseMixin]:
    """The mixin for what the architecture's name ends with; a causal LM needs none."""

    def classifier(labels: int, **options: object) -> dict[str, BaseMixin]:
        head = ClassificationHeadMixin.for_config(
            backbone, num_labels=labels, padding_id=config.pad_token_id, **options
        )
        return {"head": head}

    match config.architecture.partition("For")[2]:
        case "CausalLM":
            return {}
        case "SequenceClassification":
            return classifier(config.num_labels, pooling="last", bias=False)
        case "TokenClassification":
            return classifier(config.num_labels, pooling="tokens", dropout=0.1 if dropout is None else dropout)
        case "QuestionAnswering":
            return classifier(2, pooling="tokens")
        case _:
            return {"head": NoHeadMixin()}


def decoder_weights(config: FamilyConfig, *, norms: Sequence[Rule]) -> WeightMap:
    """The map of a LLaMA-like decoder; `norms` are the rules of its norms inside a layer."""
    base = base_prefix(config)
    theirs = f"{base}layers.{{i}}"
    head = "qa_outputs" if config.architecture.endswith("ForQuestionAnswering") else "score"
    return WeightMap(
        prefix=base or "model.",
        rules=(
            same(f"{base}embed_tokens.weight", "transformer.word_embeddings.weight"),
            *norms,
            same(f"{theirs}.self_attn.q_proj.{{p}}", f"{LAYER}.attention.query.{{p}}"),
            same(f"{theirs}.self_attn.k_proj.{{p}}", f"{LAYER}.attention.key.{{p}}"),
            same(f"{theirs}.self_attn.v_proj.{{p}}", f"{LAYER}.attention.value.{{p}}"),
            same(f"{theirs}.self_attn.o_proj.{{p}}", f"{LAYER}.attention.output.{{p}}"),
            same(f"{theirs}.mlp.gate_proj.{{p}}", f"{LAYER}.mlp.gate.{{p}}"),
            same(f"{theirs}.mlp.up_proj.{{p}}", f"{LAYER}.mlp.up.{{p}}"),
            same(f"{theirs}.mlp.down_proj.{{p}}", f"{LAYER}.mlp.down.{{p}}"),
            same(f"{base}norm.weight", "transformer.final_norm.weight"),
            same("lm_head.weight", "transformer.lm_head.weight"),
            same(f"{head}.{{p}}", "mixins.head.classifier.{p}"),
        ),
        ignored=(f"{theirs}.self_attn.rotary_emb.inv_freq", f"{base}rotary_emb.inv_freq"),
        duplicates={"lm_head.weight": f"{base}embed_tokens.weight"} if config.tie_word_embeddings else {},
    )
