"""Families of text models, and the list of all: what their old checkpoints hold, and what that becomes.

A layout gives a `config.json` for the family's own file in `models/`, and rules from old names to our parameters; the
family's weight map then names the tensors of the folder that is written.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from swissarmy.core.errors import ConfigError, nearest
from swissarmy.core.weight_map import Rule, WeightMap, same
from swissarmy.interop.sat_legacy.facts import DECODER, Arguments, BackboneFacts, shape_of
from swissarmy.interop.sat_legacy.layout import (
    BIASES,
    DEFAULT_EPSILON,
    POSITIONS,
    WORDS,
    Checkpoint,
    Found,
    backbone_rules,
    token_ids,
)
from swissarmy.interop.sat_legacy.vision import vit

_ENCODER_ZEROS = re.compile(rf"mixins\.token-types\.table\.weight|{BIASES.pattern}")


def bert(checkpoint: Checkpoint) -> Found:
    """BERT: layer norms after each sublayer, token types, a masked-LM head."""
    facts = checkpoint.facts(order="post")
    types = "mixins.bert-type.type_embeddings.weight"
    num_types = shape_of(checkpoint.source, types)[0] if checkpoint.has(types) else 1
    config = {"model_type": "bert", **_encoder_config(checkpoint, facts), "type_vocab_size": num_types}
    head = "BertForMaskedLM" if checkpoint.has("mixins.bert-final.") else "BertModel"
    return _encoder(checkpoint, facts, config, head)


def roberta(checkpoint: Checkpoint) -> Found:
    """RoBERTa: BERT's layout without token types, which its reference has and leaves at zero."""
    facts = checkpoint.facts(order="post")
    config = {"model_type": "roberta", **_encoder_config(checkpoint, facts), "type_vocab_size": 1, "pad_token_id": 1}
    head = "RobertaForMaskedLM" if checkpoint.has("mixins.bert-final.") else "RobertaModel"
    return _encoder(checkpoint, facts, config, head)


def gpt2(checkpoint: Checkpoint) -> Found:
    """GPT-2: learned positions, and a head that is the word embedding unless it was trained apart."""
    facts, head = checkpoint.facts(), "mixins.gpt2-final.lm_head.weight"
    tied = checkpoint.ties(head)
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": facts.vocab_size,
        "n_positions": facts.num_positions,
        "n_embd": facts.hidden_size,
        "n_layer": facts.num_layers,
        "n_head": facts.num_attention_heads,
        "n_inner": facts.intermediate_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": facts.epsilon or DEFAULT_EPSILON,
        "tie_word_embeddings": tied,
        **token_ids(checkpoint.arguments),
    }
    weights = WeightMap(
        rules=(*backbone_rules(facts), _positions(), same(head, "transformer.lm_head.weight")),
        ignored=("mixins.gpt2-attn.bias",),
        duplicates={head: WORDS} if tied else {},
    )
    return Found(config=config, weights=weights)


def llama(checkpoint: Checkpoint) -> Found:
    """LLaMA: RMS norms, rotary positions, a gate that was a mixin before it was the backbone's own."""
    facts, head = checkpoint.facts(), "mixins.lm.lm_head.weight"
    tied, arguments = checkpoint.ties(head), checkpoint.arguments
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": facts.vocab_size,
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.intermediate_size,
        "num_hidden_layers": facts.num_layers,
        "num_attention_heads": facts.num_attention_heads,
        "num_key_value_heads": facts.num_key_value_heads,
        "head_dim": facts.head_dim,
        "max_position_embeddings": facts.max_sequence_length,
        "hidden_act": "silu",
        "rms_norm_eps": facts.epsilon or DEFAULT_EPSILON,
        "rope_theta": arguments.get("rope_theta", float, 10000.0),
        "attention_bias": facts.query_key_value_bias,
        "mlp_bias": facts.mlp_bias,
        "tie_word_embeddings": tied,
        **token_ids(arguments),
    }
    weights = WeightMap(
        rules=(
            *backbone_rules(facts),
            same("mixins.mlp.gate_proj.{i}.{p}", "transformer.layers.{i}.mlp.gate.{p}"),
            same(head, "transformer.lm_head.weight"),
        ),
        ignored=("mixins.rotary.{rest}",),
        duplicates={head: WORDS} if tied else {},
    )
    return Found(config=config, weights=weights)


def t5(checkpoint: Checkpoint) -> Found:
    """T5: two stacks with shared word embeddings, relative positions, and in version 1.1 a gate and an own head."""
    encoder, decoder = checkpoint.facts(prefix="encoder."), checkpoint.facts(prefix="decoder.", arguments=DECODER)
    words, head = f"encoder.{WORDS}", "decoder.mixins.t5-final.lm_head.weight"
    tied, gated = not checkpoint.has(head), checkpoint.has("encoder.mixins.gated-mlp.")
    table = "mixins.t5-attention.relative_attention_bias.weight"
    config = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": encoder.vocab_size,
        "n_positions": encoder.max_sequence_length,
        "d_model": encoder.hidden_size,
        "d_kv": encoder.head_dim,
        "d_ff": encoder.intermediate_size,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": decoder.num_layers,
        "num_heads": encoder.num_attention_heads,
        "relative_attention_num_buckets": shape_of(checkpoint.source, f"encoder.{table}")[0],
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "layer_norm_epsilon": encoder.epsilon or 1e-6,  # the default of its own norm, unlike that of the others
        "tie_word_embeddings": tied,
        "decoder_start_token_id": 0,
        **token_ids(checkpoint.arguments),
    }
    rules: list[Rule] = []
    for part, facts in (("encoder", encoder), ("decoder", decoder)):
        ours = f"parts.{part}."
        rules += [same(f"{part}.{table}", f"{ours}mixins.positions.table.weight")]
        rules += backbone_rules(facts, ours=ours, cross_norms=checkpoint.cross_norms, activated_up=gated)
        rules += [
            same(
                f"{part}.mixins.gated-mlp.gated_h_to_4h_list.{{i}}.{{p}}",
                f"{ours}transformer.layers.{{i}}.mlp.up.{{p}}",
            )
        ]
    rules += [same(head, "parts.decoder.transformer.lm_head.weight")]
    weights = WeightMap(rules=tuple(rules), duplicates={f"decoder.{WORDS}": words})
    return Found(config=config, weights=weights)


LAYOUTS: Mapping[str, Callable[[Checkpoint], Found]] = {
    "bert": bert,
    "roberta": roberta,
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "vit": vit,
}
"""The families that have a file of their own here, by `model_type`; all others become generic backbones."""

GENERIC: Final = (
    "gpt_neo", "glm", "glm_130b", "chatglm", "chatglm2", "chatglm3", "chatglm4", "mixtral", "clip", "eva_clip",
    "generic",
)  # fmt: skip
"""Old families that become generic backbones; the last stands for any other."""

MODEL_CLASSES: Mapping[str, str] = {
    "BertModel": "bert",
    "RobertaModel": "roberta",
    "GPT2Model": "gpt2",
    "LLaMAModel": "llama",
    "T5Model": "t5",
    "ViTModel": "vit",
    "GPTNeoModel": "gpt_neo",
    "GLMModel": "glm",
    "GLM130B": "glm_130b",
    "ChatGLMModel": "chatglm",
    "ChatGLM2Model": "chatglm2",
    "ChatGLM3Model": "chatglm3",
    "ChatGLM4Model": "chatglm4",
    "MixtralModel": "mixtral",
    "CLIP": "clip",
    "EVA2CLIPModel": "eva_clip",
}
"""Families by the class that `model_config.json` names; any other class is the user's own."""


def find_family(family: str | None, arguments: Arguments) -> str:
    """The old family, from the caller or from `model_class`.

    Raises:
        ConfigError: Neither says it, or there is no such family.
    """
    known = (*LAYOUTS, *GENERIC)
    if family is None:
        model_class = arguments.get("model_class", str, "")
        if not model_class:
            raise ConfigError(
                f"{arguments.where}: no model_class says what this is: say --family, one of {', '.join(known)}"
            )
        return MODEL_CLASSES.get(model_class, "generic")
    if family not in known:
        raise ConfigError(
            f"--family {family}: there is no such family.{nearest(family, known)} They are: {', '.join(known)}"
        )
    return family


def _positions() -> Rule:
    return same(POSITIONS, "mixins.positions.table.weight")


def _encoder_config(checkpoint: Checkpoint, facts: BackboneFacts) -> dict[str, Any]:
    return {
        "vocab_size": facts.vocab_size,
        "hidden_size": facts.hidden_size,
        "num_hidden_layers": facts.num_layers,
        "num_attention_heads": facts.num_attention_heads,
        "intermediate_size": facts.intermediate_size,
        "hidden_act": "gelu",
        "max_position_embeddings": facts.num_positions,
        "layer_norm_eps": facts.epsilon or DEFAULT_EPSILON,
        **token_ids(checkpoint.arguments),
    }


def _encoder(checkpoint: Checkpoint, facts: BackboneFacts, config: dict[str, Any], architecture: str) -> Found:
    head, ours = "mixins.bert-final.lm_head", "mixins.head"
    tied = checkpoint.ties(f"{head}.decoder.weight")
    config |= {"architectures": [architecture], "tie_word_embeddings": tied}
    if not checkpoint.has(head):
        config["add_pooling_layer"] = False  # SAT's base models end with the last norm
    weights = WeightMap(
        rules=(
            *backbone_rules(facts),
            _positions(),
            same("mixins.bert-type.type_embeddings.weight", "mixins.token-types.table.weight"),
            same(f"{head}.dense.{{p}}", f"{ours}.dense.{{p}}"),
            same(f"{head}.layer_norm.{{p}}", f"{ours}.norm.{{p}}"),
            same(f"{head}.decoder.bias", f"{ours}.bias"),
            same(f"{head}.decoder.weight", f"{ours}.decoder.weight"),
        ),
        duplicates={f"{head}.decoder.weight": WORDS} if tied else {},
    )
    return Found(config=config, weights=weights, zeros=_ENCODER_ZEROS)
