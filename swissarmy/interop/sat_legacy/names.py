"""What three generations of old checkpoints call the same tensor.

1. Mixins by position (`mixins.0.…`), and before that word embeddings at the root.
2. Mixins by name.
3. The same, with gated MLPs, experts and multi-query attention.

The names of the second are taken for canonical.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from swissarmy.core.errors import CheckpointError

Generation = Literal[1, 2, 3]

LIKELY_MIXINS: Mapping[str, str] = {
    "lm_head.dense": "bert-final or roberta-final",
    "lm_head.decoder": "bert-final or roberta-final",
    "lm_head.weight": "gpt2-final, lm, t5-final or chatglm-final",
    "type_embeddings": "bert-type",
    "bias": "gpt2-attn",
    "block_position_embeddings": "block_position_embedding",
    "relative_attention_bias": "t5-attention",
    "gated_h_to_4h_list": "gated-mlp",
    "gate_proj": "mlp",
    "rotary_emb": "rotary",
    "proj": "patch_embedding",
    "prefix": "prefix-tuning",
    "classifier": "cls",
}
"""The names that later releases gave to mixins whose parameters begin like this, for messages."""

KNOWN_POSITIONS: Mapping[tuple[int, str], str] = {
    (0, "position_embeddings"): "extra_position_embedding",
    (1, "query_key_value"): "attention_plus",
    (1, "dense"): "attention_plus",
}
"""Positional mixins of CogView and CogView2, told by their place and by what their parameters are called."""

_POSITIONAL = re.compile(r"(?P<before>(?:.*\.)?mixins\.)(?P<index>\d+)\.(?P<parameter>.+)")
_ROOT = re.compile(r"(word_embeddings|position_embeddings|layers|final_layernorm)\.")
_ADAPTED = re.compile(r"(?P<part>(?:.*\.)?)transformer\.(?P<layer>layers\..*)\.(original|matrix_[AB])\.(?P<rest>\w+)")
_OTHER_NAMES = {"roberta-final": "bert-final"}
_THIRD = re.compile(r".*\.mlp\.dense_(h_to_4h_gate|(h_to_4h|4h_to_h|h_to_4h_gate)_\d+)\.")


def canonical_names(names: Iterable[str], positions: Mapping[int, str], place: str) -> dict[str, str]:
    """Each stored name by its canonical one.

    Args:
        names: As stored.
        positions: The caller's names for mixins by position.
        place: Where they are stored, for messages.

    Raises:
        CheckpointError: A positional mixin without a name, or two tensors with one name.
    """
    names = list(names)
    wrapped = all(name.startswith("module.") for name in names)  # as data parallelism leaves them
    prefix = "module." if wrapped else ""
    found: dict[str, str] = {}
    unnamed: dict[int, list[str]] = {}
    for name in names:
        canonical = _canonical(name.removeprefix(prefix), positions, unnamed)
        if canonical in found:
            raise CheckpointError(f"{place}: {name!r} and {found[canonical]!r} are both '{canonical}'")
        found[canonical] = name
    if unnamed:
        raise CheckpointError(_explain(unnamed, place))
    return found


def generation(stored: Iterable[str], *, multi_query: bool) -> Generation:
    """Which generation a checkpoint is of, by the names in it."""
    names = list(stored)
    if any(_POSITIONAL.fullmatch(name) or _ROOT.match(name) for name in names):
        return 1
    return 3 if multi_query or any(_THIRD.match(name) for name in names) else 2


def parse_positions(pairs: Iterable[str]) -> dict[int, str]:
    """`["0=extra_position_embedding", ...]` as a mapping.

    Raises:
        CheckpointError: A pair is not `INDEX=NAME`, or an index is named twice.
    """
    positions: dict[int, str] = {}
    for pair in pairs:
        index, equals, name = pair.partition("=")
        if not index.isdecimal() or not equals or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name.isdecimal():
            raise CheckpointError(
                f"{pair!r} maps no positional mixin: write INDEX=NAME, such as 0=extra_position_embedding; a name has "
                "letters, digits, '_' and '-'"
            )
        if int(index) in positions:
            raise CheckpointError(f"positional mixin {index} is named twice: {positions[int(index)]!r} and {name!r}")
        positions[int(index)] = name
    return positions


def _canonical(name: str, positions: Mapping[int, str], unnamed: dict[int, list[str]]) -> str:
    if _ROOT.match(name):
        return f"transformer.{name}"
    adapted = _ADAPTED.fullmatch(name)
    if adapted is not None:  # LoRA put itself in a layer's place; what it wrapped keeps the layer's name
        part, layer, rest = adapted["part"], adapted["layer"], adapted["rest"]
        is_original = adapted[3] == "original"
        return f"{part}transformer.{layer}.{rest}" if is_original else f"{part}mixins.lora.{layer}.{adapted[3]}.{rest}"
    match = _POSITIONAL.fullmatch(name)
    if match is not None:
        index, parameter = int(match["index"]), match["parameter"]
        mixin = positions.get(index) or KNOWN_POSITIONS.get((index, parameter.split(".")[0]))
        if mixin is None:
            unnamed.setdefault(index, []).append(parameter)
            return name
        name = f"{match['before']}{mixin}.{parameter}"
    for old, new in _OTHER_NAMES.items():
        name = name.replace(f"mixins.{old}.", f"mixins.{new}.")
    return name


def _explain(unnamed: Mapping[int, list[str]], place: str) -> str:
    lines = []
    for index, parameters in sorted(unnamed.items()):
        shown = ", ".join(parameters[:4]) + (", ..." if len(parameters) > 4 else "")
        likely = next(
            (name for start, name in LIKELY_MIXINS.items() if f"{parameters[0]}.".startswith(f"{start}.")), ""
        )
        lines.append(f"mixins.{index}: {shown}" + (f" (later called {likely})" if likely else ""))
    cure = " ".join(f"{index}=NAME" for index in sorted(unnamed))
    return "\n  - ".join([f"{place} has mixins by position that no map names; say --map {cure}:", *lines])
