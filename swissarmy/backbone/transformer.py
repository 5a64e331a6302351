"""The stack: embeddings, layers, final norm. It holds parameters and runs hooks; it keeps no state of a call."""

from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.layer import TransformerLayer
from swissarmy.backbone.recomputation import recomputed
from swissarmy.core.errors import HookCallError
from swissarmy.core.hooks import RESERVED, HookTable
from swissarmy.core.outputs import Outputs, clash
from swissarmy.nn.kv_cache import KVCache
from swissarmy.nn.linear import Linear
from swissarmy.nn.masks import Mask
from swissarmy.nn.norms import make_norm
from swissarmy.nn.starting_values import start_normal


class StackResult(NamedTuple):
    """Normalised hidden states `[b, s, h]`, what each layer's hooks left for the caller, and the final `kw_args`."""

    hidden_states: Tensor
    outputs_per_layers: tuple[dict[str, Any], ...]
    kw_args: dict[str, Any]


@final
class Transformer(nn.Module):
    """The backbone: its parameters, and the walk of hidden states through the hooks."""

    def __init__(self, config: TransformerConfig) -> None:
        """Make the parameters, initialised as the configuration says."""
        super().__init__()
        self.config = config
        self.word_embeddings = (
            nn.Embedding(config.vocab_size, config.hidden_size, config.padding_id) if config.vocab_size else None
        )
        self.embedding_norm = self._norm() if config.embedding_norm else None
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(TransformerLayer(config, layer_id) for layer_id in range(config.num_layers))
        self.final_norm = self._norm() if config.final_norm else None
        tied = config.tie_word_embeddings or not config.vocab_size
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give every weight its starting value."""
        start_normal(self, self.config.initializer_range)
        if self.config.scale_residual_init:
            shrink = (2 * self.config.num_layers) ** -0.5
            for name, parameter in self.named_parameters():
                if name.endswith(("attention.output.weight", "mlp.down.weight")):
                    with torch.no_grad():
                        parameter.mul_(shrink)

    def forward(
        self,
        position_ids: Tensor | None,
        mask: Mask,
        hooks: HookTable,
        kw_args: dict[str, Any],
        *,
        checkpoint_every: int = 0,
        checkpoint_selective: bool = False,
    ) -> StackResult:
        """Embed, run every layer, normalise.

        Args:
            position_ids: `[b or 1, s]`, or `None` to count from the end of the cache.
            mask: What each layer starts from.
            hooks: The resolved hooks of the model that calls.
            kw_args: What every hook is given: `input_ids`, `padding_mask`, `mems`, and the caller's keywords.
            checkpoint_every: Recompute every n-th layer in the backward pass instead of keeping it; 0 for none.
            checkpoint_selective: Keep the results of products and attention, and recompute the rest.
        """
        kw_args = {**kw_args, "transformer": self, "hooks": hooks}
        hidden_states, for_all_layers = self._embed(position_ids, hooks, kw_args)
        kw_args = _merged(kw_args, for_all_layers, Outputs.empty("the call's keyword"))
        layer_kw_args, outputs_per_layers = kw_args, []
        recompute = checkpoint_every > 0 and kw_args["mems"] is None and torch.is_grad_enabled()
        for layer_id, layer in enumerate(self.layers):
            if recompute and layer_id % checkpoint_every == 0:
                hidden_states, this_layer, cross_layer = recomputed(
                    layer, hidden_states, mask, hooks, layer_kw_args, selective=checkpoint_selective
                )
            else:
                hidden_states, this_layer, cross_layer = layer(hidden_states, mask, hooks, layer_kw_args)
            outputs_per_layers.append(this_layer.content)
            layer_kw_args = _merged(kw_args, cross_layer, for_all_layers)
        if self.final_norm is not None:
            hidden_states = self.final_norm(hidden_states)
        return StackResult(hidden_states, tuple(outputs_per_layers), layer_kw_args)

    def _embed(self, given: Tensor | None, hooks: HookTable, kw_args: dict[str, Any]) -> tuple[Tensor, Outputs]:
        """The sum of the embeddings, `[b, s, h]`, and what the embedding hooks hand to every layer."""
        outputs = Outputs.empty("output_cross_layer", reserved=RESERVED)
        context = {**kw_args, "given_position_ids": given, "output_cross_layer": outputs, "cross_layer_output": outputs}
        input_ids = context.pop("input_ids")
        hidden_states: Tensor = hooks.word_embedding_forward(input_ids, **context)
        position_ids = _count(hidden_states, kw_args["mems"]) if given is None else given
        counted = position_ids + kw_args["positions_before"] if kw_args["positions_before"] else position_ids
        positions = hooks.position_embedding_forward(counted, input_ids=input_ids, **context)
        kw_args["position_ids"] = position_ids
        if positions is not None:
            if positions.shape[0] not in (1, len(hidden_states)) or positions.shape[1] != hidden_states.shape[1]:
                raise HookCallError(
                    f"position_embedding_forward gave {list(positions.shape)} for word embeddings "
                    f"{list(hidden_states.shape)}; model.explain() says which mixins answer it."
                )
            hidden_states = hidden_states + positions
        if self.embedding_norm is not None:
            hidden_states = self.embedding_norm(hidden_states)
        if self.training and self.embedding_dropout.p:
            hidden_states = self.embedding_dropout(hidden_states)
        return hidden_states, outputs

    def _norm(self) -> nn.Module:
        return make_norm(self.config.norm, self.config.hidden_size, self.config.norm_epsilon)


def _count(hidden_states: Tensor, mems: KVCache | None) -> Tensor:
    """Positions `[1, s]` that go on from what the cache remembers."""
    first = 0 if mems is None else len(mems)
    return torch.arange(first, first + hidden_states.shape[1], device=hidden_states.device)[None]


def _merged(kw_args: dict[str, Any], outputs: Outputs, earlier: Outputs) -> dict[str, Any]:
    """`kw_args` with what hooks handed on; a key that is already there is an error naming both writers."""
    if not outputs.content:
        return kw_args
    for key, writer in outputs.writers.items():
        if key in kw_args:
            raise clash(f"kw_args['{key}']", earlier.writers.get(key, "the caller"), writer)
    return {**kw_args, **outputs.content}
