"""Adafactor (Shazeer & Stern 2018): of a matrix's squared gradient it keeps the means of rows and columns only.

The formulas, the constants and the names of the state are those of `torch.optim.Adafactor`, which can neither be
sharded nor step without waiting for the device at every parameter.
"""

import math
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

DECAY = -0.8
"""The averages forget with the step's number to this power."""
LEAST_SCALE = 1e-3
"""A step is relative to the size of the parameter, or to this where that is smaller."""


@final
class Adafactor(torch.optim.Optimizer):
    """State of a parameter: `step`; `row_var` and `col_var` of matrices, `variance` of vectors.

    A step is at most the learning rate times the root mean square of the parameter, on average over its elements.
    """

    def __init__(self, groups: Iterable[Any], *, lr: float, weight_decay: float = 0.0) -> None:
        """Take over the groups."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        assert closure is None, "the loss is computed once a step"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, group["lr"], group["weight_decay"])

    def _step_of(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        state.setdefault("step", torch.tensor(0.0)).add_(1)
        number = state["step"].item()  # kept on the CPU, so nothing waits
        size = _root_mean_square(parameter).clamp(min=LEAST_SCALE)
        parameter.mul_(1 - lr * weight_decay)
        least = torch.finfo(parameter.dtype).eps
        moment = (_factored if gradient.dim() > 1 else _whole)(gradient, state, number**DECAY, least)
        change = moment.clamp_(min=least**2).rsqrt_().mul_(gradient)
        length = _root_mean_square(change).clamp(min=1.0)
        parameter.sub_(change.mul_(size / length * min(lr, 1 / math.sqrt(number))))


def _factored(gradient: Tensor, state: dict[str, Tensor], weight: float, least: float) -> Tensor:
    """The averaged square `[..., m, n]`, from averages of rows `[..., m, 1]` and columns `[..., 1, n]`."""
    rows = _average(state, "row_var", _mean_square(gradient, -1), weight)
    columns = _average(state, "col_var", _mean_square(gradient, -2), weight)
    return rows / _settled(rows.mean(-2, keepdim=True)).clamp(min=least) * columns


def _whole(gradient: Tensor, state: dict[str, Tensor], weight: float, least: float) -> Tensor:
    return _average(state, "variance", gradient.square(), weight).clone()


def _average(state: dict[str, Tensor], name: str, value: Tensor, weight: float) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(value)
    return state[name].lerp_(value, weight)


def _mean_square(x: Tensor, dim: int) -> Tensor:
    """Through the norm, which takes no second tensor of this size."""
    return _settled(torch.linalg.vector_norm(x, dim=dim, keepdim=True)).square() / x.shape[dim]


def _root_mean_square(x: Tensor) -> Tensor:
    return _settled(torch.linalg.vector_norm(x)) / math.sqrt(x.numel())


def _settled(x: Tensor) -> Tensor:
    """With what ranks still have to add up added up."""
    if not isinstance(x, DTensor):
        return x
    return x.redistribute(placements=[Replicate() if isinstance(each, Partial) else each for each in x.placements])
