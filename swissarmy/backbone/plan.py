"""Which dimension of each parameter several processes share (tensor parallelism), declared once for every family.

Query, key, value, `up` and `gate` are shared by their outputs: heads, or the width of the MLP. The projections behind
them are shared by their inputs, so that their results are sums over the processes, and what stands between the two
needs no communication (Shoeybi et al. 2019). The word embedding and the head are shared by tokens. A mixin declares
its own parameters in `shared_dims`; what nobody declares is whole on every process.
"""

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from torch import nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import BaseModel, Model, iterate_models
from swissarmy.core.mixin import SharedDim

BACKBONE: Final[Mapping[str, SharedDim]] = {
    "word_embeddings.weight": SharedDim(0, "vocabulary"),
    "layers.*attention.query.*": SharedDim(0, "heads"),
    "layers.*attention.key.*": SharedDim(0, "heads"),
    "layers.*attention.value.*": SharedDim(0, "heads"),
    "layers.*attention.output.weight": SharedDim(1, "heads"),
    "layers.*.mlp.up.*": SharedDim(0, "width"),
    "layers.*.mlp.gate.*": SharedDim(0, "width"),
    "layers.*.mlp.down.weight": SharedDim(1, "width"),
    "lm_head.weight": SharedDim(0, "vocabulary"),
}
"""The backbone's parameters that are shared, by pattern; biases of results that are sums are whole."""


def shared_dims(model: Model, *, shard_vocabulary: bool = True) -> dict[str, int]:
    """The parameters that are shared, by every one of their names in the model, and the dimension of each.

    Args:
        model: A plain model, or one of parts.
        shard_vocabulary: Whether dimensions that count tokens are shared too.
    """
    return {
        f"{prefix}{name}": shared.dim
        for prefix, part in iterate_models(model)
        for name, _ in part.named_parameters(remove_duplicate=False)
        if (shared := _declared(name, part)) is not None and (shard_vocabulary or shared.of != "vocabulary")
    }


def divisibility_problems(
    configs: Sequence[TransformerConfig], size: int, *, shard_vocabulary: bool = True
) -> Iterator[str]:
    """What `size` processes cannot share evenly, in one line with the sizes that could."""
    counts = [count for config in configs for count in _counts(config, shard_vocabulary).items()]
    odd = dict.fromkeys(f"{name}={count}" for name, count in counts if count % size)
    if odd:
        valid = " or ".join(map(str, divisors(math.gcd(*(count for _, count in counts)))))
        cure = "; shard_vocabulary=False leaves the vocabulary whole" if shard_vocabulary else ""
        yield f"tensor_parallel={size} does not divide {', '.join(odd)}: it can be {valid}{cure}"


def divisors(number: int) -> list[int]:
    """What divides a number evenly, from 1 on."""
    return [each for each in range(1, number + 1) if number % each == 0]


def layer_units(model: Model) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Each layer of each part, and what the mixins hold for it: the units in which parameters come and go."""
    for _, part in iterate_models(model):
        held = [mixin._modules.get("layers") for mixin in part.mixins.values()]
        lists = [layers for layers in held if isinstance(layers, nn.ModuleList)]
        for layer_id, layer in enumerate(part.transformer.layers):
            yield layer, [layers[layer_id] for layers in lists]


def _declared(name: str, part: BaseModel) -> SharedDim | None:
    """What is declared of a parameter of a plain model."""
    owner, _, rest = name.partition(".")
    if owner == "transformer":
        return _first_match(rest, BACKBONE)
    if owner == "mixins":
        mixin, _, rest = rest.partition(".")
        return _first_match(rest, part.get_mixin(mixin).shared_dims)
    return None


def _first_match(name: str, declared: Mapping[str, SharedDim]) -> SharedDim | None:
    return next((shared for pattern, shared in declared.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _counts(config: TransformerConfig, shard_vocabulary: bool) -> dict[str, int]:
    """What is shared, and how much of it there is."""
    counts = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_size,
    }
    return counts | {"vocab_size": config.vocab_size} if shard_vocabulary and config.vocab_size else counts
