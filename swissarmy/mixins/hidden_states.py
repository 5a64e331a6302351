"""Hidden states for the caller: `outputs_per_layers[i]["hidden_states"]` is what layer i gives, `[b, s, h]`.

Hooks: `layer_forward` (wraps). Parameters: none.
"""

from typing import Any, final

from torch import Tensor

from swissarmy.core.hooks import Hook, non_conflict
from swissarmy.core.mixin import BaseMixin


@final
class HiddenStatesMixin(BaseMixin):
    """Every layer's output, before the final norm; layer 0 also hands on its input, as `embeddings`."""

    keeps_outputs = True

    @non_conflict
    def layer_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        """Run the layer and leave its result for the caller."""
        if kw_args["layer_id"] == 0:
            kw_args["output_this_layer"]["embeddings"] = hidden_states
        result: Tensor = old_impl(hidden_states, mask, **kw_args)
        kw_args["output_this_layer"]["hidden_states"] = result
        return result
