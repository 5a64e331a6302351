"""What can be said of a model's arguments from types and shapes alone."""

from torch import Tensor

from swissarmy.backbone.config import TransformerConfig
from swissarmy.core.errors import HookCallError
from swissarmy.nn.kv_cache import KVCache


def check_inputs(
    input_ids: Tensor | None, mems: KVCache | None, logits_to_keep: int | None, config: TransformerConfig
) -> None:
    """Refuse arguments of a call that cannot be what they are called.

    Raises:
        HookCallError: Token ids, a cache or a number that is none.
    """
    if input_ids is not None:
        if not isinstance(input_ids, Tensor):
            raise HookCallError(f"input_ids is a {type(input_ids).__name__}; it is a tensor [b, s] of token ids.")
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise HookCallError(f"input_ids is {input_ids.dtype} {list(input_ids.shape)}; it is [b, s], of token ids.")
    if mems is not None and not (isinstance(mems, KVCache) and mems.num_layers == config.num_layers):
        have = f"a cache of {mems.num_layers} layers" if isinstance(mems, KVCache) else f"a {type(mems).__name__}"
        raise HookCallError(
            f"mems is {have}; this model needs sat.KVCache({config.num_layers}), or KVCache.from_mems(tensor, ...)."
        )
    if logits_to_keep is not None and logits_to_keep < 1:
        raise HookCallError(f"logits_to_keep={logits_to_keep} must be at least 1; leave it out to keep all.")
