"""The parameters of one layer, and the one place where a layer is called.

Shapes: b batch, s positions, h hidden size, d head size.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.hooks import RESERVED, HookTable
from swissarmy.core.outputs import Outputs
from swissarmy.nn.linear import Linear
from swissarmy.nn.masks import Mask
from swissarmy.nn.mlp import MLP
from swissarmy.nn.norms import make_norm


class LayerResult(NamedTuple):
    """What a layer gives: its hidden states `[b, s, h]`, and what its hooks handed on."""

    hidden_states: Tensor
    output_this_layer: Outputs
    output_cross_layer: Outputs


@final
class Attention(nn.Module):
    """The projections of an attention block; `source_size` is the width that keys and values are made from."""

    def __init__(self, config: TransformerConfig, source_size: int) -> None:
        """Make query, key, value and output projections."""
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.kv_heads
        self.scale = config.attention_scale
        q_size, kv_size = self.num_heads * config.head_size, self.num_kv_heads * config.head_size
        self.query = Linear(config.hidden_size, q_size, bias=config.query_key_value_bias)
        self.key = Linear(source_size, kv_size, bias=config.query_key_value_bias)
        self.value = Linear(source_size, kv_size, bias=config.query_key_value_bias)
        self.output = Linear(q_size, config.hidden_size, bias=config.attention_output_bias)
        self.dropout = nn.Dropout(config.attention_dropout)


@final
class Residual(nn.Module):
    """Around a sublayer: its normalisations, dropout, drop-path and the residual sum."""

    def __init__(self, config: TransformerConfig, drop_path: float) -> None:
        """Make what `norm_placement` asks for."""
        super().__init__()
        placement, size = config.norm_placement, config.hidden_size
        before, after = placement != "post", placement != "pre"
        self.input_norm = make_norm(config.norm, size, config.norm_epsilon) if before else None
        self.output_norm = make_norm(config.norm, size, config.norm_epsilon) if after else None
        self.norm_the_sum = placement != "sandwich"
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.drop_path = drop_path

    def prepare(self, hidden_states: Tensor) -> Tensor:
        """What the sublayer is given, `[b, s, h]`."""
        return hidden_states if self.input_norm is None else self.input_norm(hidden_states)

    def add(self, hidden_states: Tensor, change: Tensor) -> Tensor:
        """The residual stream after the sublayer's `change`, `[b, s, h]`."""
        if self.output_norm is None:
            return hidden_states + self._drop(change)
        if self.norm_the_sum:
            summed: Tensor = self.output_norm(hidden_states + self._drop(change))
            return summed
        return hidden_states + self._drop(self.output_norm(change))

    def _drop(self, change: Tensor) -> Tensor:
        """Dropout, then skipping the sublayer for whole rows (Huang et al. 2016)."""
        if not self.training:
            return change
        change = self.dropout(change) if self.dropout.p else change
        if self.drop_path == 0.0:
            return change
        kept = torch.rand(change.shape[0], 1, 1, device=change.device) >= self.drop_path
        return change * kept / (1.0 - self.drop_path)


@final
class TransformerLayer(nn.Module):
    """One layer: attention, perhaps cross-attention, MLP, each inside its residual."""

    def __init__(self, config: TransformerConfig, layer_id: int) -> None:
        """Make the parameters; what happens to them is up to the hooks."""
        super().__init__()
        drop_path = config.drop_path * layer_id / max(config.num_layers - 1, 1)
        self.layer_id = layer_id
        self.attention = Attention(config, config.hidden_size)
        self.attention_residual = Residual(config, drop_path)
        self.cross_attention: Attention | None = None
        self.cross_attention_residual: Residual | None = None
        if config.cross_attention:
            self.cross_attention = Attention(config, config.encoder_hidden_size or config.hidden_size)
            self.cross_attention_residual = Residual(config, drop_path)
        self.mlp = MLP(
            config.hidden_size,
            config.mlp_size,
            activation=config.activation,
            gated=config.gated_mlp,
            bias=config.mlp_bias,
        )
        self.mlp_residual = Residual(config, drop_path)

    def forward(self, hidden_states: Tensor, mask: Mask, hooks: HookTable, kw_args: Mapping[str, Any]) -> LayerResult:
        """Run the `layer_forward` hook with fresh records for what it hands on.

        The records are made here and returned, so that recomputing the layer for its gradient neither
        repeats an output nor loses its graph.
        """
        this_layer, cross_layer = (
            Outputs.empty("output_this_layer"),
            Outputs.empty("output_cross_layer", reserved=RESERVED),
        )
        hidden_states = hooks.layer_forward(
            hidden_states,
            mask,
            **kw_args,
            layer_id=self.layer_id,
            layer=self,
            output_this_layer=this_layer,
            output_cross_layer=cross_layer,
        )
        return LayerResult(hidden_states, this_layer, cross_layer)
