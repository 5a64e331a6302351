"""Rotary positions (Su et al. 2021), with every kind of scaling that Hugging Face configs name.

Changes: rotates queries and keys by an angle that grows with the position.
Hooks: `position_embedding_forward` (wraps: the angles, once a call), `attention_fn` (wraps, stage `transform`).
Parameters: none.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self, final

from torch import Tensor

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin
from swissarmy.nn.rotary import RopeParameters, RotaryFrequencies, rotate


@final
class RotaryMixin(BaseMixin):
    """Rotary embedding; layers may differ in their parameters (Gemma 3)."""

    def __init__(
        self,
        head_dim: int,
        max_positions: int,
        parameters: Sequence[RopeParameters | Mapping[str, Any]] = (RopeParameters(),),
        *,
        parameters_of_layer: Sequence[int] | None = None,
        interleaved: bool = False,
    ) -> None:
        """Make the frequencies.

        Args:
            head_dim: The size of a head.
            max_positions: The model's maximum length.
            parameters: One or several sets of rope parameters, or of their fields.
            parameters_of_layer: For each layer, which of them it uses; the first for all when omitted.
            interleaved: Whether a pair is two neighbouring dimensions (GPT-J, GLM) or one of each half (LLaMA).
        """
        super().__init__()
        sets = [each if isinstance(each, RopeParameters) else RopeParameters.from_dict(each) for each in parameters]
        self.frequencies = [RotaryFrequencies(each, head_dim, max_positions) for each in sets]
        self.parameters_of_layer = parameters_of_layer
        self.interleaved = interleaved

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        sets = [each.parameters.to_dict().items() for each in self.frequencies]
        return {
            "parameters": [{name: value for name, value in fields if value is not None} for fields in sets],
            "parameters_of_layer": None if self.parameters_of_layer is None else list(self.parameters_of_layer),
            "interleaved": self.interleaved,
        }

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """For the model's heads and length."""
        return cls(config.head_size, config.max_sequence_length, **options)

    @non_conflict
    def position_embedding_forward(self, position_ids: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor | None:
        """Compute the angles of this call, for every layer to find."""
        tables = [frequencies(position_ids, interleaved=self.interleaved) for frequencies in self.frequencies]
        kw_args["output_cross_layer"]["rotary_tables"] = tables
        positions: Tensor | None = old_impl(position_ids, **kw_args)
        return positions

    @non_conflict(stage="transform")
    def attention_fn(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        dropout_fn: Any,
        cross_attention: bool = False,
        *,
        old_impl: Hook,
        **kw_args: Any,
    ) -> Tensor:
        """Rotate q `[b, heads, s, d]` and k `[b, kv_heads, s, d]`."""
        if not cross_attention:
            which = 0 if self.parameters_of_layer is None else self.parameters_of_layer[kw_args["layer_id"]]
            cos, sin = (table.to(q.dtype) for table in kw_args["rotary_tables"][which])
            q, k = (rotate(x, cos, sin, interleaved=self.interleaved) for x in (q, k))
        context: Tensor = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return context
