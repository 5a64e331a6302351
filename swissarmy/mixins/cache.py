"""The key-value cache: a model written for teacher forcing decodes one token at a time.

Changes: with `mems=KVCache(...)` in the call, keys and values of earlier calls are put before the new ones;
projections of an encoder's output are computed once. Without `mems` it does nothing.
Hooks: `attention_fn` (wraps, stage `cache`), `cross_attention_forward` (wraps).
Parameters: none; the state is the caller's.
"""

from dataclasses import replace
from typing import Any, final

from torch import Tensor, nn

from swissarmy.core.hooks import Hook, HookTable, non_conflict
from swissarmy.core.mixin import BaseMixin

ENCODER_PROJECTIONS = ("cross_attention.key", "cross_attention.value")


@final
class CachedAutoRegressiveMixin(BaseMixin):
    """Incremental decoding for any causal or encoder-decoder model."""

    keeps_outputs = True

    @classmethod
    def suits(cls, config: Any) -> bool:
        """Only a causal part decodes."""
        return bool(config.causal)

    @non_conflict(stage="cache")
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
        """Attend to what is remembered too, and remember the new keys and values."""
        mems = kw_args["mems"]
        if mems is not None and not cross_attention:
            k, v = mems.update(kw_args["layer_id"], k, v)
        context: Tensor = old_impl(q, k, v, mask, dropout_fn, cross_attention=cross_attention, **kw_args)
        return context

    @non_conflict
    def cross_attention_forward(
        self,
        hidden_states: Tensor,
        cross_attention_mask: Any,
        encoder_outputs: Tensor,
        *,
        old_impl: Hook,
        **kw_args: Any,
    ) -> Tensor:
        """Project the encoder's output in the first step only, whatever mixins take part in the projection."""
        if kw_args["mems"] is not None:
            kw_args["hooks"] = _remembering(kw_args["hooks"])
        attended: Tensor = old_impl(hidden_states, cross_attention_mask, encoder_outputs, **kw_args)
        return attended


def _remembering(hooks: HookTable) -> HookTable:
    """The same hooks, except that projections of the encoder's output are computed once."""

    def remembered(x: Tensor, linear: nn.Module, name: str, **kw_args: Any) -> Tensor:
        if name not in ENCODER_PROJECTIONS:
            projected: Tensor = hooks.linear_forward(x, linear, name, **kw_args)
            return projected
        constants, key = kw_args["mems"].constants, (kw_args["layer_id"], name)
        if key not in constants:
            constants[key] = hooks.linear_forward(x, linear, name, **kw_args)
        constant: Tensor = constants[key]
        return constant

    return replace(hooks, linear_forward=remembered)


CachedAutoregressiveMixin = CachedAutoRegressiveMixin
