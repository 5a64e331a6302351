"""Prefix-tuning (Li & Liang 2021; P-tuning v2, Liu et al. 2022): trained keys and values before all others.

Changes: every query of self-attention also sees `prefix_len` trained positions, in each layer. With `encoder_size` an
MLP makes them from trained embeddings, which trains more evenly; `fold()` gives the plain form of what it learned.
Hooks: `attention_fn` (wraps, stage `extend`), `position_embedding_forward` (wraps: the MLP's hidden layer).
Parameters: `layers.{i}.key` and `layers.{i}.value`, `[kv_heads, prefix_len, head_dim]`; heads are dimension 0. With an
MLP `encoder.embedding.weight` `[prefix_len, encoder_size]`, `encoder.hidden.*`, and `layers.{i}.key.*`,
`layers.{i}.value.*`, which project to keys and values.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.config import report, size_problems
from swissarmy.core.errors import HookDefinitionError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin, SharedDim
from swissarmy.nn.masks import Mask


@final
class Prefix(nn.Module):
    """The trained keys and values of one layer."""

    def __init__(self, num_heads: int, prefix_len: int, head_dim: int) -> None:
        """Start with small random values."""
        super().__init__()
        self.key = nn.Parameter(torch.randn(num_heads, prefix_len, head_dim) * 0.02)
        self.value = nn.Parameter(torch.randn(num_heads, prefix_len, head_dim) * 0.02)

    def forward(self, k: Tensor, v: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Put them before k and v, `[b, kv_heads, t, d]` to `[b, kv_heads, prefix_len + t, d]`."""
        del hidden
        return _before(self.key, k), _before(self.value, v)


@final
class ProjectedPrefix(nn.Module):
    """The last layer of the MLP, as far as it makes the keys and values of one layer."""

    def __init__(self, num_heads: int, encoder_size: int, head_dim: int) -> None:
        """Make both projections."""
        super().__init__()
        self.num_heads = num_heads
        self.key = nn.Linear(encoder_size, num_heads * head_dim)
        self.value = nn.Linear(encoder_size, num_heads * head_dim)

    def forward(self, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values made from `hidden` `[prefix_len, encoder_size]` before k and v."""
        key, value = self.project(hidden)
        return _before(key, k), _before(value, v)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each `[kv_heads, prefix_len, head_dim]`."""
        key, value = (each.unflatten(1, (self.num_heads, -1)) for each in (self.key(hidden), self.value(hidden)))
        return key.transpose(0, 1), value.transpose(0, 1)


@final
class PrefixEncoder(nn.Module):
    """Trained embeddings and the first layer of the MLP, which all layers share."""

    def __init__(self, prefix_len: int, size: int) -> None:
        """Make embeddings and projection."""
        super().__init__()
        self.embedding = nn.Embedding(prefix_len, size)
        self.hidden = nn.Linear(size, size)

    def forward(self) -> Tensor:
        """`[prefix_len, size]`."""
        return torch.tanh(self.hidden(self.embedding.weight))


@final
class PrefixTuningMixin(BaseMixin):
    """Trained keys and values in front of every layer's own."""

    shared_dims: ClassVar[Mapping[str, SharedDim]] = {
        f"layers.*.{each}": SharedDim(0, "heads") for each in ("key", "value")
    }

    def __init__(
        self,
        num_layers: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        prefix_len: int = 16,
        encoder_size: int | None = None,
        shift_positions: bool = False,
    ) -> None:
        """Make a prefix for each layer.

        Args:
            num_layers: How many layers the model has.
            num_key_value_heads: How many heads have keys and values.
            head_dim: The size of a head.
            prefix_len: How many positions everyone sees besides.
            encoder_size: The width of the MLP that makes the prefix; none when `None`.
            shift_positions: Whether the tokens' positions begin after the prefix, as PEFT counts, and not at 0. Biases
                by distance (T5, ALiBi) know no distance to a prefix either way.

        Raises:
            ConfigError: Sizes that are none.
        """
        super().__init__()
        encoder = {} if encoder_size is None else {"encoder_size": encoder_size}
        report(f"{type(self).__name__}:", size_problems(prefix_len=prefix_len, **encoder))
        self.prefix_len, self.encoder_size, self.shift_positions = prefix_len, encoder_size, shift_positions
        self.encoder = None if encoder_size is None else PrefixEncoder(prefix_len, encoder_size)
        self.layers = nn.ModuleList(
            Prefix(num_key_value_heads, prefix_len, head_dim)
            if encoder_size is None
            else ProjectedPrefix(num_key_value_heads, encoder_size, head_dim)
            for _ in range(num_layers)
        )

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's layers and heads."""
        return cls(config.num_layers, config.kv_heads, config.head_size, **options)

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {
            "prefix_len": self.prefix_len,
            "encoder_size": self.encoder_size,
            "shift_positions": self.shift_positions,
        }

    @property
    def positions_before(self) -> int:
        """The prefix's own, where tokens count from after it."""
        return self.prefix_len if self.shift_positions else 0

    @torch.no_grad()
    def fold(self) -> "PrefixTuningMixin":
        """The plain prefix that does the same, for inference: without the MLP, as P-tuning v2 keeps it.

        Raises:
            HookDefinitionError: There is no MLP.
        """
        if self.encoder is None:
            raise HookDefinitionError("this prefix has no encoder_size: it is plain already.")
        hidden, first = self.encoder(), self.layers[0]
        assert isinstance(first, ProjectedPrefix)
        heads, width = first.num_heads, first.key.out_features // first.num_heads
        plain = PrefixTuningMixin(
            len(self.layers), heads, width, prefix_len=self.prefix_len, shift_positions=self.shift_positions
        ).to(hidden)
        for layer, folded in zip(self.layers, plain.layers, strict=True):
            assert isinstance(layer, ProjectedPrefix)
            assert isinstance(folded, Prefix)
            for target, made in zip((folded.key, folded.value), layer.project(hidden), strict=True):
                target.copy_(made)
        return plain

    @non_conflict
    def position_embedding_forward(self, position_ids: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor | None:
        """Hand the MLP's hidden layer to all layers."""
        if self.encoder is not None:
            kw_args["output_cross_layer"]["prefix_hidden"] = self.encoder()
        positions: Tensor | None = old_impl(position_ids, **kw_args)
        return positions

    @non_conflict(stage="extend")
    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        dropout_fn: Any,
        cross_attention: bool = False,
        *,
        old_impl: Hook,
        **kw_args: Any,
    ) -> Tensor:
        """Let every query see the prefix."""
        if not cross_attention:
            hidden = None if self.encoder is None else kw_args["prefix_hidden"]
            k, v = self.layers[kw_args["layer_id"]](k, v, hidden)
            mask = mask.with_prefix(self.prefix_len)
        context: Tensor = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return context


def _before(prefix: Tensor, keys: Tensor) -> Tensor:
    """A prefix `[kv_heads, prefix_len, d]` before keys or values `[b, kv_heads, t, d]`."""
    return torch.cat((prefix.to(keys.dtype).expand(keys.shape[0], -1, -1, -1), keys), dim=2)
