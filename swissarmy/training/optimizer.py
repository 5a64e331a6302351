"""Which optimizer a run uses, and over which groups of parameters."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from swissarmy.core.errors import ConfigError, require_extra
from swissarmy.training.gradients import scale_gradients
from swissarmy.training.optimizers.adafactor import Adafactor
from swissarmy.training.optimizers.groups import WeightDecaySkip, parameter_groups
from swissarmy.training.optimizers.muon import MuonAdamW
from swissarmy.training.own_part import kept
from swissarmy.training.schedule import LearningRateOptions

OptimizerName = Literal["adamw", "muon", "adafactor", "adamw_8bit", "schedule_free"]


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(LearningRateOptions):
    """How gradients become changes of the weights."""

    optimizer: OptimizerName = "adamw"
    """`adamw` (fused), `muon` (matrices of layers; AdamW for the rest), `adafactor` (least memory; `lr` is relative
    to the size of the weights, such as 1e-2), `adamw_8bit` (extra `low_memory`), `schedule_free` (extra
    `schedule_free`; it goes with `lr_decay_style: constant`)."""
    betas: tuple[float, ...] = (0.9, 0.95)
    """How slowly AdamW's two averages forget: of the gradient, and of its square."""
    eps: float = 1e-8
    """What AdamW adds to the root of the second average."""
    weight_decay: float = 0.1
    """Decoupled decay, times the learning rate; none where a parameter's attribute `no_weight_decay` is true."""
    weight_decay_skips: tuple[WeightDecaySkip, ...] = ("bias", "norm", "embedding")
    """Kinds of parameters that do not decay."""
    clip_grad_norm: float | None = 1.0
    """The longest gradient, over all parameters together; `None` to leave it."""
    ema_decay: float | None = None
    """Keep an average of the weights that forgets so slowly, such as 0.999, and evaluate and save with it."""

    def problems(self) -> Iterator[str]:
        """Numbers out of range."""
        if not 0 < self.lr < math.inf:
            yield f"lr={self.lr} must be a positive number."
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas={self.betas} must be two numbers from 0 to below 1."
        if not 0 < self.eps < math.inf:
            yield f"eps={self.eps} must be a positive number."
        if not 0 <= self.weight_decay < math.inf:
            yield f"weight_decay={self.weight_decay} must be a number that is not negative."
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            yield f"clip_grad_norm={self.clip_grad_norm} must be positive, or null for no clipping."
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            yield f"ema_decay={self.ema_decay} must be between 0 and 1, or null for no average."


def make_optimizer(model: nn.Module, options: OptimizerOptions) -> Optimizer:
    """The optimizer of the parameters that train, sharded or not.

    Its groups differ in weight decay, in `lr_scale`, and for Muon in who steps; each names its parameters
    (`param_names`). State is `optimizer.state[parameter]`, whatever the optimizer. A `schedule_free` one has modes:
    see `weights_to_evaluate`.

    Raises:
        ConfigError: Nothing trains.
        MissingExtraError: The optimizer's extra is not installed.
    """
    groups = parameter_groups(
        model, options.weight_decay, skips=options.weight_decay_skips, with_muon=options.optimizer == "muon"
    )
    if not groups:
        raise ConfigError("no parameter trains: every requires_grad is false.")
    optimizer = _MAKERS[options.optimizer](groups, options)
    set_learning_rate(optimizer, options.lr)
    return optimizer


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group its share of a learning rate."""
    for group in optimizer.param_groups:
        scaled = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):  # torchao's compiled step takes a tensor, and keeps it
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def take_step(optimizer: Optimizer, factor: float) -> None:
    """Step along the gradients times `factor`, and let go of them.

    The fused AdamW multiplies while it steps; otherwise the gradients are multiplied first. Its factor is a float32,
    too coarse for float64 parameters.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
    is_fused = isinstance(optimizer, AdamW) and all(each.dtype != torch.float64 for each in parameters)
    if is_fused and parameters and factor > 0:
        optimizer.grad_scale = torch.tensor(1 / factor, device=parameters[0].device)  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.grad_scale = None  # type: ignore[attr-defined]
    else:
        scale_gradients(parameters, factor)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def weights_to_evaluate(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the model has the weights to evaluate: those of a schedule-free optimizer are not the ones it trains
    with, which come back to the bit; others have one set only."""
    if not isinstance(optimizer, SwitchingOptimizer):
        yield
        return
    with kept(parameter for group in optimizer.param_groups for parameter in group["params"]):
        take_weights_to_evaluate(optimizer)
        try:
            yield
        finally:
            optimizer.train()


def take_weights_to_evaluate(optimizer: Optimizer) -> None:
    """Give the model those weights for good: no step follows."""
    if isinstance(optimizer, SwitchingOptimizer):
        optimizer.eval()


@runtime_checkable
class SwitchingOptimizer(Protocol):
    """One that evaluates with other weights than it trains with."""

    param_groups: list[dict[str, Any]]

    def train(self) -> None: ...

    def eval(self) -> None: ...


def _adamw(groups: list[dict[str, Any]], options: OptimizerOptions) -> Optimizer:
    """Its averages exist from the start: what does not fit fails at once, and what a step lets go of leaves no holes
    between them (a tenth of GPT-2's memory on a CPU)."""
    optimizer = AdamW(groups, lr=options.lr, betas=_pair(options.betas), eps=options.eps, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **averages}
    return optimizer


def _muon(groups: list[dict[str, Any]], options: OptimizerOptions) -> Optimizer:
    return MuonAdamW(groups, lr=options.lr, betas=_pair(options.betas), eps=options.eps)


def _adafactor(groups: list[dict[str, Any]], options: OptimizerOptions) -> Optimizer:
    return Adafactor(groups, lr=options.lr)


def _adamw_8bit(groups: list[dict[str, Any]], options: OptimizerOptions) -> Optimizer:
    torchao = require_extra("torchao.optim", extra="low_memory", purpose="optimizer: adamw_8bit")
    optimizer: Optimizer = torchao.AdamW8bit(groups, lr=options.lr, betas=_pair(options.betas), eps=options.eps)
    return optimizer


def _schedule_free(groups: list[dict[str, Any]], options: OptimizerOptions) -> Optimizer:
    """Defazio et al. 2024."""
    library = require_extra("schedulefree", extra="schedule_free", purpose="optimizer: schedule_free")
    optimizer: Optimizer = library.AdamWScheduleFree(groups, lr=options.lr, betas=_pair(options.betas), eps=options.eps)
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _pair(betas: tuple[float, ...]) -> tuple[float, float]:
    return betas[0], betas[1]


_MAKERS: Mapping[OptimizerName, Callable[[list[dict[str, Any]], OptimizerOptions], Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "adafactor": _adafactor,
    "adamw_8bit": _adamw_8bit,
    "schedule_free": _schedule_free,
}
