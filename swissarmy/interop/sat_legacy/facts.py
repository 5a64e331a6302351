"""What an old checkpoint is: its arguments where it has them, and what the shapes of its tensors say."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, final, get_args

from swissarmy.core.errors import CheckpointError, ConfigError, nearest
from swissarmy.interop.sat_legacy.merge import MergedSource

Order = Literal["pre", "post", "sandwich"]
CrossNorms = Literal["early", "late"]
ArgumentName = Literal[
    "activation", "bos_token_id", "causal", "eos_token_id", "hidden_size", "image_size", "layernorm_epsilon",
    "layernorm_order", "max_sequence_length", "model_class", "model_parallel_size", "num_attention_heads", "num_layers",
    "num_multi_query_heads", "pad_token_id", "patch_size", "post_len", "post_ln", "pre_len", "rope_theta",
    "sandwich_ln", "vocab_size",
]  # fmt: skip
"""Old arguments that a migration reads; it takes the other sizes from the tensors."""

DECODER: Final = "dec_"
"""What the arguments of a decoder begin with, where they are not those of its encoder."""
TEXT: Final = "text_"
"""The same for the text tower beside a vision tower."""

T = TypeVar("T")
_FIRST = "layers.0."
_LAYER = re.compile(r"layers\.(\d{1,9})\.")


@final
@dataclass(frozen=True)
class Arguments:
    """The arguments of `model_config.json`, read by name and type."""

    values: Mapping[str, Any]
    where: str

    def get(self, name: ArgumentName, kind: type[T], default: T) -> T:
        """One of them, or the default where it is absent or null.

        Raises:
            ConfigError: It is of another type.
        """
        value = self.values.get(name)
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"{self.where}: {name}={value!r} is not {kind.__name__}")
        return value

    def need(self, name: ArgumentName) -> int:
        """A size that no tensor's shape tells.

        Raises:
            ConfigError: It is absent.
        """
        value = self.get(name, int, 0)
        if value < 1:
            raise ConfigError(f"{self.where}: {name} is missing, and no tensor's shape tells it: say --set {name}=N")
        return value

    def for_part(self, prefix: str) -> "Arguments":
        """The arguments of one part of a model: those that begin with its prefix override the common ones."""
        own = {
            name.removeprefix(prefix): value
            for name, value in self.values.items()
            if prefix and name.startswith(prefix) and value is not None
        }
        return Arguments({**self.values, **own}, self.where)


@final
@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    """Sizes and choices of one Transformer in a checkpoint."""

    prefix: str
    """What its names start with: the empty string, or a part of a model such as `encoder.`."""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    """Without padding."""
    vocab_rows: int
    """With it."""
    num_positions: int
    """0 where there is no table of positions."""
    max_sequence_length: int
    order: Order
    epsilon: float | None
    """`None` where nothing says it: the release's default holds."""
    query_key_value_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    norm_bias: bool
    """Layer norms have biases and RMS norms have none."""
    final_norm: bool
    gated: bool
    """Whether the backbone's own MLP has a gate."""
    cross_attention: bool


def shape_of(source: MergedSource, name: str, *, dims: int = 2) -> tuple[int, ...]:
    """The shape of a tensor that is a matrix, or has so many dimensions.

    Raises:
        CheckpointError: It is not there, is empty, or has others.
    """
    shape = tuple(source.shape(name))
    if len(shape) != dims or 0 in shape:
        raise CheckpointError(
            f"{source.where(name)}: {name} is {list(shape)}, and must have {dims} dimensions, none of them empty"
        )
    return shape


def check_argument_name(name: str) -> None:
    """Refuse what no migration reads, such as a slip of the pen.

    Raises:
        ConfigError: There is no such argument.
    """
    known = get_args(ArgumentName)
    if name.removeprefix(DECODER).removeprefix(TEXT) not in known:
        raise ConfigError(f"a migration reads no argument '{name}'.{nearest(name, known)} It reads: {', '.join(known)}")


def backbone_facts(
    source: MergedSource, arguments: Arguments, *, prefix: str = "", order: Order = "pre", vocab_size: int | None = None
) -> BackboneFacts:
    """What is known of the Transformer whose names start with `prefix`.

    Args:
        source: The tensors.
        arguments: What was written down about them.
        prefix: Of the names, with its dot.
        order: Where neither the arguments nor a name tells where the norms are.
        vocab_size: The true number of tokens; the argument's when omitted, and all rows where that is silent.

    Raises:
        ConfigError: Tensors and arguments contradict each other, or a size is unknown.
    """
    tensors = _Tensors(source, prefix)
    for needed in ("word_embeddings.weight", f"{_FIRST}attention.query_key_value.weight"):
        if not tensors.has(needed):
            raise ConfigError(
                f"{arguments.where}: the checkpoint has no {prefix}transformer.{needed}: it is no Transformer"
            )
    heads, kv_heads, head_dim = _heads(tensors, arguments)
    vocab_rows, hidden_size = tensors.shape("word_embeddings.weight")
    num_positions = tensors.shape("position_embeddings.weight")[0] if tensors.has("position_embeddings.weight") else 0
    facts = BackboneFacts(
        prefix=prefix,
        num_layers=_num_layers(tensors.names, arguments.where),
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=tensors.shape(f"{_FIRST}mlp.dense_h_to_4h.weight")[0],
        vocab_size=vocab_size or arguments.get("vocab_size", int, vocab_rows),
        vocab_rows=vocab_rows,
        num_positions=num_positions,
        max_sequence_length=arguments.get("max_sequence_length", int, num_positions) or 2048,
        order=_order(arguments, sandwich=tensors.has(f"{_FIRST}third_layernorm.weight"), default=order),
        epsilon=arguments.get("layernorm_epsilon", float, 0.0) or None,
        query_key_value_bias=tensors.has(f"{_FIRST}attention.query_key_value.bias"),
        attention_output_bias=tensors.has(f"{_FIRST}attention.dense.bias"),
        mlp_bias=tensors.has(f"{_FIRST}mlp.dense_h_to_4h.bias"),
        norm_bias=tensors.has(f"{_FIRST}input_layernorm.bias"),
        final_norm=tensors.has("final_layernorm.weight"),
        gated=tensors.has(f"{_FIRST}mlp.dense_h_to_4h_gate.weight"),
        cross_attention=tensors.has(f"{_FIRST}cross_attention.query.weight"),
    )
    _check(facts, arguments, asked=vocab_size)
    return facts


@final
class _Tensors:
    """The tensors of one Transformer, by what follows `transformer.` in their names."""

    def __init__(self, source: MergedSource, prefix: str) -> None:
        self._source, self._start = source, f"{prefix}transformer."
        self.names = {name.removeprefix(self._start) for name in source.names() if name.startswith(self._start)}

    def has(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self._source, f"{self._start}{name}")


def _heads(tensors: _Tensors, arguments: Arguments) -> tuple[int, int, int]:
    """How many heads, how many for keys and values, and their size."""
    heads = arguments.need("num_attention_heads")
    kv_heads = arguments.get("num_multi_query_heads", int, 0) or heads
    rows = tensors.shape(f"{_FIRST}attention.query_key_value.weight")[0]
    if rows % (heads + 2 * kv_heads):
        raise ConfigError(
            f"{arguments.where}: query_key_value has {rows} rows, no multiple of {heads} heads and twice {kv_heads} "
            "for keys and values; check num_attention_heads and num_multi_query_heads"
        )
    return heads, kv_heads, rows // (heads + 2 * kv_heads)


def _num_layers(names: Iterable[str], where: str) -> int:
    """How many layers there are; they are numbered from 0 on, without gaps."""
    found = {int(match[1]) for match in (_LAYER.match(name) for name in names) if match is not None}
    gap = next(number for number in range(len(found) + 1) if number not in found)
    if gap < len(found):
        raise ConfigError(f"{where}: the checkpoint has layers up to {max(found)} and lacks layer {gap}")
    return gap


def _order(arguments: Arguments, *, sandwich: bool, default: Order) -> Order:
    match arguments.get("layernorm_order", str, ""):
        case "pre" | "post" | "sandwich" as given:
            return given
        case other if other:
            raise ConfigError(f"{arguments.where}: layernorm_order={other!r} is not one of pre, post, sandwich")
    if arguments.get("post_ln", bool, False):  # before layernorm_order there was one flag for each
        return "post"
    return "sandwich" if sandwich or arguments.get("sandwich_ln", bool, False) else default


def _check(facts: BackboneFacts, arguments: Arguments, *, asked: int | None) -> None:
    """Refuse arguments that the tensors contradict."""
    sizes: Mapping[ArgumentName, int] = {"num_layers": facts.num_layers, "hidden_size": facts.hidden_size}
    for name, found in sizes.items():
        said = arguments.get(name, int, found)
        if said != found:
            raise ConfigError(f"{arguments.where}: {name} is {said}, and the tensors have {found}")
    if not 0 < facts.vocab_size <= facts.vocab_rows:
        what = "--vocab-size" if asked else f"{arguments.where}: vocab_size"
        raise ConfigError(f"{what} is {facts.vocab_size}, and the word embeddings have {facts.vocab_rows} rows")
