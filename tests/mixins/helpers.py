"""What tests of methods that add something to a model share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import swissarmy as sat
from swissarmy.core.hooks import Hook
from swissarmy.testing import tiny_inputs


def randomise(mixin: Any, *, seed: int = 5) -> Any:
    """The same mixin, or those of a model's parts, with every parameter random."""
    generator = torch.Generator().manual_seed(seed)
    for each in mixin.values() if isinstance(mixin, dict) else [mixin]:
        for parameter in each.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
    return mixin


def outputs(model: Any, **kw_args: Any) -> Tensor:
    """What a model makes of its tiny inputs."""
    inputs = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in kw_args.items()}
    result: Tensor = model(**(inputs or tiny_inputs(model)))[0]
    return result


def reloaded(model: Any, folder: Path) -> Any:
    """The model as it comes back from a file."""
    model.save_pretrained(folder / "model")
    return sat.load(folder / "model")


class Watch(sat.BaseMixin):
    """Keeps what the sublayers inside it are given and give, by name and layer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    @sat.non_conflict
    def attention_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        result: Tensor = old_impl(hidden_states, mask)
        self.seen["attention", kw_args["layer_id"]] = hidden_states, result
        return result

    @sat.non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        result: Tensor = old_impl(hidden_states)
        self.seen["mlp", kw_args["layer_id"]] = hidden_states, result
        return result


def watched(model: sat.BaseModel, mixin: sat.BaseMixin, **inputs: Any) -> tuple[Watch, Watch]:
    """What sublayers give inside and outside a mixin that is added to a model."""
    inner, outer = Watch(), Watch()
    model.add_mixin("inner", inner).add_mixin("mixin", mixin).add_mixin("outer", outer)
    model(**inputs)
    return inner, outer
