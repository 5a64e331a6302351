"""LoReFT (Wu et al. 2024): a trained edit of hidden states in a low-rank subspace, `h + R^T (W h + b - R h)`.

The rows of R are orthonormal, so that only the r directions that they span change. Here W starts as R, and the model
starts as it was, to rounding; in the paper both start at random.
Changes: what the chosen layers give, at the first and the last tokens of the prompt. Where prompts end is the keyword
`prompt_lengths` `[b]` of the call, counted as `position_ids` count. Without it the prompt is the whole input of a model
that is not causal, and the first call of a cached generation; a causal model with `last` edits that is called without
a cache has to be told, because the tokens that follow a prompt are no end of it. Of an encoder-decoder, both parts are
given the same keyword: edit the encoder alone (`part="encoder"`) where the ends of sources are meant.
Hooks: `word_embedding_forward` (wraps), `layer_forward` (wraps).
Parameters: `layers.{i}.rotation` `[r, h]`, made orthonormal in each call, `weight` `[r, h]` and `bias` `[r]`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.sublayers import LayersConfig
from swissarmy.core.errors import ConfigError, HookCallError
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin


@final
@dataclass(frozen=True, kw_only=True)
class LoReFTConfig(LayersConfig):
    """The options of `LoReFTMixin.for_model`."""

    rank: int = 4
    """The number of directions that change."""
    first: int = 8
    """How many tokens are edited at the beginning."""
    last: int = 0
    """How many tokens are edited at the end of the prompt."""

    def problems(self) -> Iterator[str]:
        """Sizes that are none."""
        if self.rank < 1:
            yield f"rank={self.rank} must be at least 1"
        if min(self.first, self.last) < 0 or self.first + self.last == 0:
            yield f"first={self.first} and last={self.last} must not be negative, and not both 0"


@final
class Intervention(nn.Module):
    """The edit after one layer."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        """Start with an edit of zero, in directions in which every channel has a part.

        Raises:
            ConfigError: More directions than there are.
        """
        super().__init__()
        if rank > hidden_size:
            raise ConfigError(f"rank={rank}: a width of {hidden_size} has no more directions than that.")
        # Made twice, from sizes alone: neither starts from the other's values, which a model without weights has not.
        self.rotation = nn.Parameter(_cosines(rank, hidden_size))
        self.weight = nn.Parameter(orthonormal(_cosines(rank, hidden_size)))
        self.bias = nn.Parameter(torch.zeros(rank))

    def forward(self, hidden_states: Tensor, edited: Tensor) -> Tensor:
        """Hidden states `[b, s, h]` after the edit where `edited` `[b or 1, s]` is true."""
        directions = orthonormal(self.rotation)
        distance = F.linear(hidden_states, self.weight - directions, self.bias)
        return hidden_states + F.linear(distance, directions.t()) * edited[..., None]


@final
class LoReFTMixin(BaseMixin):
    """Edits of hidden states after the chosen layers; `for_model` takes the options of `LoReFTConfig`."""

    def __init__(self, backbone: TransformerConfig, config: LoReFTConfig) -> None:
        """Make the edits for a backbone of these sizes.

        Raises:
            ConfigError: There is no such layer.
        """
        super().__init__()
        self.config, self.causal = config, backbone.causal
        chosen = config.chosen(backbone.num_layers)
        self.layers = nn.ModuleList(
            Intervention(backbone.hidden_size, config.rank) if layer_id in chosen else nn.Identity()
            for layer_id in range(backbone.num_layers)
        )

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """The model's layers and width."""
        return cls(config, LoReFTConfig.of(options))

    @property
    def saved_options(self) -> dict[str, Any]:
        """The fields of its configuration."""
        return self.config.to_dict()

    @non_conflict
    def word_embedding_forward(
        self, input_ids: Any, *, old_impl: Hook, prompt_lengths: Tensor | None = None, **kw_args: Any
    ) -> Tensor:
        """Tell every layer where prompts end, if the caller did not."""
        embedded: Tensor = old_impl(input_ids, **kw_args)
        if prompt_lengths is None and self.config.last:
            kw_args["output_cross_layer"].setdefault("prompt_lengths", self._count(embedded, kw_args))
        return embedded

    @non_conflict
    def layer_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Run the layer and edit what it gives."""
        result: Tensor = old_impl(hidden_states, mask, **kw_args)
        layer = self.layers[kw_args["layer_id"]]
        if not isinstance(layer, Intervention):
            return result
        edited: Tensor = layer(result, self._edited(kw_args["position_ids"], kw_args.get("prompt_lengths")))
        return edited

    def _edited(self, position_ids: Tensor, prompt_lengths: Tensor | None) -> Tensor:
        """Which tokens are edited, `[b or 1, s]`."""
        places = self._places(position_ids)
        edited = places < self.config.first
        if self.config.last and prompt_lengths is not None:
            ends = prompt_lengths[:, None]
            edited = edited | ((places >= ends - self.config.last) & (places < ends))
        return edited

    def _places(self, position_ids: Tensor) -> Tensor:
        """Where tokens are, `[b or 1, s]`, from `position_ids`, of which some models have two rows.

        A model that is not causal sees whole rows, and may count them from another number than 0 (RoBERTa).
        """
        places = position_ids[:, 0] if position_ids.dim() == 3 else position_ids
        return places if self.causal else places - places.amin(dim=1, keepdim=True)

    def _count(self, embedded: Tensor, kw_args: dict[str, Any]) -> Tensor:
        """The lengths of prompts, `[b or 1]`, from the call; zero in a call that goes on after one.

        Raises:
            HookCallError: Only the caller knows.
        """
        mems, padding_mask, position_ids = (kw_args[key] for key in ("mems", "padding_mask", "given_position_ids"))
        if mems is None and self.causal:
            raise HookCallError(
                f"last={self.config.last} edits the end of the prompt: give prompt_lengths=[b], which are the whole "
                "lengths where nothing follows the prompt."
            )
        if mems is not None and len(mems):
            return torch.zeros(1, dtype=torch.long, device=embedded.device)
        columns = torch.arange(embedded.shape[1], device=embedded.device)[None]
        places: Tensor = columns if position_ids is None else self._places(position_ids)
        if padding_mask is not None:
            places = places.masked_fill(~padding_mask.bool(), -1)
        return places.amax(dim=1) + 1


def orthonormal(rows: Tensor) -> Tensor:
    """The Gram-Schmidt basis of some rows, `[r, h]`, in float32 or better; of the rows' own orientation, so smooth."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    basis, triangle = torch.linalg.qr(wide.t())
    oriented: Tensor = basis * triangle.diagonal().sign()
    return oriented.t().type_as(rows)


def _cosines(rank: int, size: int) -> Tensor:
    """Rows of the discrete cosine transform, `[rank, size]`: orthonormal, and constant only if all others are there."""
    frequencies, places = torch.arange(1, rank + 1) % size, torch.arange(size) + 0.5
    rows: Tensor = torch.cos(frequencies[:, None] * places * (math.pi / size))
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths
