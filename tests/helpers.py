"""Tiny models, configurations and calls that many tests share."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import swissarmy as sat
from swissarmy.core.hooks import Hook
from swissarmy.models._family import build_model
from swissarmy.testing import TINY_CONFIGS


def tiny_config(**changes: Any) -> sat.TransformerConfig:
    """The configuration of a backbone with two layers, 16 wide, without dropout."""
    sizes = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 13,
        "max_sequence_length": 12,
        "initializer_range": 0.3,
    }
    return sat.TransformerConfig(**{**sizes, **changes})


def tiny_model(mixins: Mapping[str, sat.BaseMixin] | None = None, *, seed: int = 0, **changes: Any) -> sat.BaseModel:
    """A backbone with two layers, 16 wide, in evaluation mode and float64."""
    torch.manual_seed(seed)
    return sat.BaseModel(tiny_config(**changes), mixins).double().eval()


def tiny_ids(batch: int = 2, length: int = 5, *, seed: int = 0) -> Tensor:
    """Token ids `[batch, length]` for `tiny_model`."""
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_family_model(model_type: str, architecture: str | None = None, **changes: Any) -> Any:
    """A tiny model of any family, in evaluation mode, with every weight random."""
    torch.manual_seed(0)
    head = {} if architecture is None else {"architectures": [architecture]}
    model = build_model({"model_type": model_type, **TINY_CONFIGS[model_type], **head, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def rewrite_json(path: Path, **changes: Any) -> None:
    """Change some fields of a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def hook_mixin(hook: str, method: Callable[..., Any], *, accepts: tuple[str, ...] = ()) -> sat.BaseMixin:
    """A mixin with one hook method; `method` may be marked by `@sat.non_conflict` or `@sat.replaceable`."""
    return type("OneHookMixin", (sat.BaseMixin,), {hook: method, "accepts": accepts})()


class Scale(sat.BaseMixin):
    """Wraps `mlp_forward` and multiplies what it gives."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([factor]))

    @sat.non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        result: Tensor = old_impl(hidden_states, **kw_args) * self.factor
        return result


class ZeroMLP(sat.BaseMixin):
    """Replaces `mlp_forward` by nothing."""

    def mlp_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


class DefaultMLP(sat.BaseMixin):
    """A replaceable `mlp_forward` that gives what it is given."""

    @sat.replaceable
    def mlp_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        return hidden_states
