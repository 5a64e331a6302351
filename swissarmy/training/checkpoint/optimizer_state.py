"""An optimizer's state by the names of parameters, whichever optimizer it is and however it is sharded."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from swissarmy.training.own_part import own_part

PREFIX: Final = "optimizer."
PER_RANK: Final = re.compile(r"\.rank-\d{5,}(\.|$)")
"""In names of tensors that one rank alone has."""
PART_OF_STATE: Final = re.compile(r"^optimizer\..*\.(codes|scale|qmap)$")
"""Names of what torchao's state in eight bits is made of."""
_FROM_CONFIG: Final = frozenset({"lr", "initial_lr", "betas", "eps", "weight_decay", "lr_scale", "momentum"})
"""Fields of a group that the config of the run decides, when it is resumed too."""


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of the state, as `optimizer.<parameter>.<field>`."""
    return {
        full_name: part
        for name, state in _named_state(model, optimizer)
        for field, value in state.items()
        if isinstance(value, Tensor)
        for full_name, part in _parts(f"{PREFIX}{name}.{field}", value)
    }


def optimizer_values(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The numbers of the state: of parameters and of groups, a group by the name of its first parameter."""
    states = {
        name: {field: value for field, value in state.items() if isinstance(value, int | float)}
        for name, state in _named_state(model, optimizer)
    }
    names = _names(model)
    groups = {names[group["params"][0]]: _own_numbers(group) for group in optimizer.param_groups}
    return {
        "parameters": {name: numbers for name, numbers in states.items() if numbers},
        "groups": {name: numbers for name, numbers in groups.items() if numbers},
    }


def begin_state(model: nn.Module, optimizer: Optimizer, stored: Collection[str]) -> None:
    """Give a new optimizer the state that it would have after a step, to be overwritten; weights stay.

    Most make a parameter's state when they first change it, so they are let, by a length of zero along gradients of
    zero. Parameters that had no state when the names in `stored` were saved have none then.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            parameter.grad = None if optimizer.state.get(parameter) else torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, name in _names(model).items():
        if not any(each.startswith(f"{PREFIX}{name}.") for each in stored):
            optimizer.state.pop(parameter, None)


def load_optimizer_values(model: nn.Module, optimizer: Optimizer, values: Mapping[str, Any]) -> None:
    """Take over what `optimizer_values` gave."""
    names = _names(model)
    parameters = {name: parameter for parameter, name in names.items()}
    for name, numbers in values["parameters"].items():
        optimizer.state[parameters[name]].update(numbers)
    for group in optimizer.param_groups:
        group.update(values["groups"].get(names[group["params"][0]], {}))


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def _named_state(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for parameter, name in _names(model).items():
        if parameter in optimizer.state:
            yield name, optimizer.state[parameter]


def _own_numbers(group: Mapping[str, Any]) -> dict[str, float]:
    """What the optimizer counts in a group, such as its steps."""
    return {
        name: value
        for name, value in group.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _FROM_CONFIG
    }


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor; or, where it is made of others (8-bit state: codes and scales), each rank's own of those."""
    local = own_part(tensor)
    if not is_traceable_wrapper_subclass(local):
        yield name, tensor.detach()
        return
    rank = f".rank-{dist.get_rank():05d}" if isinstance(tensor, DTensor) else ""
    for attribute in local.__tensor_flatten__()[0]:
        yield from _parts(f"{name}{rank}.{attribute}", getattr(local, attribute))
