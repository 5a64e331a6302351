"""Mixture of experts (Shazeer et al. 2017; Mixtral, Jiang et al. 2024): several MLPs, a few of them for each token.

Changes: replaces the backbone's MLP; a router picks `top_k` experts and weighs their results.
Hooks: `mlp_forward` (replaces), `routing_forward` (replaceable: another mixin may route otherwise).
Parameters: `layers.{i}.router.weight` `[experts, h]`, `layers.{i}.experts.{e}.{up,down,gate}`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.config import TransformerConfig
from swissarmy.backbone.model import Model
from swissarmy.backbone.projections import plain_models, projections_of
from swissarmy.backbone.targets import TargetedMixin
from swissarmy.core.errors import HookConflictError
from swissarmy.core.hooks import replaceable
from swissarmy.core.mixin import BaseMixin, MixinHost, SharedDim
from swissarmy.nn.mlp import MLP


@final
class Experts(nn.Module):
    """The router and the experts of one layer."""

    def __init__(self, num_experts: int, config: TransformerConfig) -> None:
        """Make a router and as many MLPs as the backbone's layers have one of."""
        super().__init__()
        self.router = nn.Linear(config.hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(
            MLP(
                config.hidden_size,
                config.mlp_size,
                activation=config.activation,
                gated=config.gated_mlp,
                bias=config.mlp_bias,
            )
            for _ in range(num_experts)
        )

    def forward(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor, kw_args: dict[str, Any]) -> Tensor:
        """Weighted sum of the chosen experts: tokens `[n, h]`, weights and expert_ids `[n, top_k]`."""
        result = torch.zeros_like(tokens)
        for expert_id, expert in enumerate(self.experts):

            def project(x: Tensor, linear: nn.Linear, name: str, prefix: str = f"experts.{expert_id}") -> Tensor:
                projected: Tensor = kw_args["hooks"].linear_forward(x, linear, f"{prefix}.{name}", **kw_args)
                return projected

            share = (weights * (expert_ids == expert_id)).sum(-1, keepdim=True)
            result = result + share * expert(tokens, project)
        return result


@final
class MixtureOfExpertsMixin(BaseMixin):
    """Experts in place of the MLP, in every layer. Every expert sees every token: exact, for small models."""

    shared_dims: ClassVar[Mapping[str, SharedDim]] = {
        "layers.*.experts.*.up.*": SharedDim(0, "width"),
        "layers.*.experts.*.gate.*": SharedDim(0, "width"),
        "layers.*.experts.*.down.weight": SharedDim(1, "width"),
    }

    def __init__(self, config: TransformerConfig, *, num_experts: int = 8, top_k: int = 2) -> None:
        """Make the experts of every layer."""
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.layers = nn.ModuleList(Experts(num_experts, config) for _ in range(config.num_layers))

    @classmethod
    def for_model(cls, model: MixinHost, **options: Any) -> Any:
        """Experts of the size of the model's MLP; for a model of parts, for each.

        Raises:
            HookConflictError: A mixin changes the projections of the MLP already, which would have no part in anything.
        """
        assert isinstance(model, Model)
        for part in plain_models(model).values():
            inside = [each for each in projections_of(part) if each.name.startswith("mlp.")]
            for name, mixin in part.mixins.items():
                if isinstance(mixin, TargetedMixin) and any(mixin.change_at(each) is not None for each in inside):
                    raise HookConflictError(
                        f"experts take the place of the MLP, whose projections '{name}' changes: add the experts "
                        f"first, and then '{name}', which finds their projections as 'experts.*'."
                    )
        return super().for_model(model, **options)

    @classmethod
    def for_config(cls, config: TransformerConfig, **options: Any) -> Self:
        """Experts of the size of the model's MLP."""
        return cls(config, **options)

    @property
    def saved_options(self) -> dict[str, Any]:
        """What it was made with."""
        return {"num_experts": self.num_experts, "top_k": self.top_k}

    @replaceable
    def routing_forward(self, hidden_states: Tensor, **kw_args: Any) -> tuple[Tensor, Tensor]:
        """Tokens `[n, h]` to weights, which sum to one, and expert ids, each `[n, top_k]`."""
        scores = self.layers[kw_args["layer_id"]].router(hidden_states).float().softmax(dim=-1)
        weights, expert_ids = scores.topk(self.top_k, dim=-1)
        return (weights / weights.sum(-1, keepdim=True)).type_as(hidden_states), expert_ids

    def mlp_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        """`[b, s, h]` to `[b, s, h]`, through the experts that the router chose."""
        tokens = hidden_states.flatten(0, 1)
        weights, expert_ids = kw_args["hooks"].routing_forward(tokens, **kw_args)
        mixed: Tensor = self.layers[kw_args["layer_id"]](tokens, weights, expert_ids, kw_args)
        return mixed.view_as(hidden_states)
