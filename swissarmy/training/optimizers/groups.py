"""Parameters in groups that an optimizer treats alike, by what each of them is."""

from collections.abc import Collection
from typing import Any, Literal

from torch import Tensor, nn

from swissarmy.nn.norms import RMSNorm

WeightDecaySkip = Literal["bias", "norm", "embedding"]
Role = Literal["bias", "norm", "embedding", "matrix", "other"]


def parameter_groups(
    model: nn.Module, weight_decay: float, *, skips: Collection[WeightDecaySkip] = (), with_muon: bool = False
) -> list[dict[str, Any]]:
    """The parameters that train, a shared one once, in the model's order.

    Args:
        model: Its parameters may bear the marks `lr_scale` and `no_weight_decay`.
        weight_decay: Of those that decay.
        skips: Roles that do not; a parameter that several modules share has the roles of all.
        with_muon: Whether the matrices of layers are groups of their own; those of mixins are not among them.

    Returns:
        Groups with `params` as pairs of name and parameter, `weight_decay`, `lr_scale` and `muon`.
    """
    groups: dict[tuple[bool, float, float], list[tuple[str, nn.Parameter]]] = {}
    roles = _roles(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = roles[parameter].isdisjoint(skips) and not getattr(parameter, "no_weight_decay", False)
            by_muon = with_muon and roles[parameter] == {"matrix"}
            key = (by_muon, weight_decay if decays else 0.0, float(getattr(parameter, "lr_scale", 1.0)))
            groups.setdefault(key, []).append((name, parameter))
    return [
        {"params": named, "muon": by_muon, "weight_decay": decay, "lr_scale": scale}
        for (by_muon, decay, scale), named in groups.items()
    ]


def _roles(model: nn.Module) -> dict[Tensor, set[Role]]:
    """What each parameter is, in every module that has it."""
    roles: dict[Tensor, set[Role]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            roles.setdefault(parameter, set()).add(_role(path, module, name, parameter))
    return roles


def _role(path: str, module: nn.Module, name: str, parameter: Tensor) -> Role:
    """A vector that is no norm's counts as a bias."""
    if isinstance(module, nn.LayerNorm | RMSNorm):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if name == "bias" or parameter.dim() < 2:
        return "bias"
    places = path.split(".")
    is_of_layer = "layers" in places and "mixins" not in places
    return "matrix" if is_of_layer and isinstance(module, nn.Linear) and parameter.dim() == 2 else "other"
