"""What a layout is: from an old checkpoint's names and arguments to a configuration and our parameters."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from swissarmy.core.weight_map import Rule, WeightMap, joined, same
from swissarmy.interop.sat_legacy.facts import ArgumentName, Arguments, BackboneFacts, CrossNorms, Order, backbone_facts
from swissarmy.interop.sat_legacy.merge import MergedSource

WORDS: Final = "transformer.word_embeddings.weight"
POSITIONS: Final = "transformer.position_embeddings.weight"
DEFAULT_EPSILON: Final = 1e-5
"""What every release of SAT added to a variance unless it was told otherwise."""

BIASES: Final = re.compile(r".*\.(mlp\.(gate|down)|attention\.output)\.bias")
"""Biases that some releases left out where they kept the others: at zero they are nothing."""

_CUT = re.compile(r".*(word_embeddings\.weight|lm_head\.(decoder\.)?(weight|bias))")


@final
@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a layout looks at."""

    source: MergedSource
    arguments: Arguments
    vocab_size: int | None = None
    """The true number of tokens, where the caller says it."""
    cross_norms: CrossNorms = "early"

    def has(self, start: str) -> bool:
        """Whether some tensor's name starts like this."""
        return any(name.startswith(start) for name in self.source.names())

    def facts(self, *, prefix: str = "", arguments: str = "", order: Order = "pre") -> BackboneFacts:
        """What is known of the Transformer whose names start with `prefix`, and its arguments with `arguments`."""
        own = self.arguments.for_part(arguments)
        return backbone_facts(self.source, own, prefix=prefix, order=order, vocab_size=self.vocab_size)

    def ties(self, head: str, words: str = WORDS) -> bool:
        """Whether a head is the word embedding, or there is no such head and so the word embedding serves."""
        return not self.has(head) or self.source.is_same(head, words)


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """What a layout makes of a checkpoint."""

    config: Mapping[str, Any]
    """The `config.json` of the folder to write."""
    weights: WeightMap
    """From old names to our parameters; `ignored` are buffers, `duplicates` are tied tensors."""
    zeros: re.Pattern[str] = BIASES
    """Our parameters that the old model did not have, and that are nothing at zero."""


def may_be_cut(name: str) -> bool:
    """Whether a tensor has a row for each token, and so perhaps rows of padding."""
    return _CUT.fullmatch(name) is not None


def backbone_rules(
    facts: BackboneFacts, *, ours: str = "", cross_norms: CrossNorms = "early", activated_up: bool = False
) -> list[Rule]:
    """The rules of a backbone.

    Args:
        facts: What is known of it.
        ours: What our names start with.
        cross_norms: Which of two norms is in front of the MLP of a decoder.
        activated_up: Whether the activation is on `dense_h_to_4h` though there is a gate, as where mixins added it.
    """
    theirs, to = f"{facts.prefix}transformer", f"{ours}transformer"
    old, new = f"{theirs}.layers.{{i}}", f"{to}.layers.{{i}}"
    attention = [f"{new}.attention.{name}.{{p}}" for name in ("query", "key", "value")]
    cross = [f"{new}.cross_attention.{name}.{{p}}" for name in ("key", "value")]
    return [
        same(f"{theirs}.word_embeddings.weight", f"{to}.word_embeddings.weight"),
        joined(f"{old}.attention.query_key_value.{{p}}", attention),
        same(f"{old}.attention.dense.{{p}}", f"{new}.attention.output.{{p}}"),
        same(f"{old}.cross_attention.query.{{p}}", f"{new}.cross_attention.query.{{p}}"),
        joined(f"{old}.cross_attention.key_value.{{p}}", cross),
        same(f"{old}.cross_attention.dense.{{p}}", f"{new}.cross_attention.output.{{p}}"),
        same(f"{old}.mlp.dense_h_to_4h.{{p}}", f"{new}.mlp.{'gate' if activated_up else 'up'}.{{p}}"),
        *([same(f"{old}.mlp.dense_h_to_4h_gate.{{p}}", f"{new}.mlp.gate.{{p}}")] if facts.gated else []),
        same(f"{old}.mlp.dense_4h_to_h.{{p}}", f"{new}.mlp.down.{{p}}"),
        *_norm_rules(facts, theirs, to, cross_norms),
    ]


def _norm_rules(facts: BackboneFacts, theirs: str, to: str, cross_norms: CrossNorms) -> list[Rule]:
    """Old layers begin with a norm whatever the order; in order `post` it is the one that ends the layer before."""
    old, new = f"{theirs}.layers.{{i}}", f"{to}.layers.{{i}}"
    if facts.order == "post":
        last = facts.num_layers - 1
        ends = [f"{theirs}.layers.{number + 1}.input_layernorm.{{p}}" for number in range(last)]
        return [
            same(f"{theirs}.layers.0.input_layernorm.{{p}}", f"{to}.embedding_norm.{{p}}"),
            same(f"{old}.post_attention_layernorm.{{p}}", f"{new}.attention_residual.output_norm.{{p}}"),
            same(f"{old}.post_cross_attention_layernorm.{{p}}", f"{new}.cross_attention_residual.output_norm.{{p}}"),
            *(
                same(end, f"{to}.layers.{number}.mlp_residual.output_norm.{{p}}")
                for number, end in enumerate([*ends, f"{theirs}.final_layernorm.{{p}}"])
            ),
        ]
    before_mlp, before_cross = "post_attention_layernorm", "post_cross_attention_layernorm"
    if facts.cross_attention and cross_norms == "early":
        before_mlp, before_cross = before_cross, before_mlp
    return [
        same(f"{old}.input_layernorm.{{p}}", f"{new}.attention_residual.input_norm.{{p}}"),
        same(f"{old}.{before_cross}.{{p}}", f"{new}.cross_attention_residual.input_norm.{{p}}"),
        same(f"{old}.{before_mlp}.{{p}}", f"{new}.mlp_residual.input_norm.{{p}}"),
        same(f"{old}.third_layernorm.{{p}}", f"{new}.attention_residual.output_norm.{{p}}"),
        same(f"{old}.fourth_layernorm.{{p}}", f"{new}.mlp_residual.output_norm.{{p}}"),
        same(f"{theirs}.final_layernorm.{{p}}", f"{to}.final_norm.{{p}}"),
    ]


def token_ids(arguments: Arguments) -> dict[str, int]:
    """Ids of special tokens that were written down; -1 stood for none."""
    names: tuple[ArgumentName, ...] = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name in names if (value := arguments.get(name, int, -1)) >= 0}
