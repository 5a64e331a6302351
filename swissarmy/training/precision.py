"""The precision of a run: what products are computed in, and how float16 gradients are kept from vanishing.

Weights that train stay in float32 (Micikevicius et al. 2018): a change of one part in a thousand would be lost on a
bfloat16. Products run in the lower precision by autocast; sharded weights travel in it already.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from swissarmy.core.config import Config

Precision = Literal["fp32", "bf16", "fp16"]
_REDUCED: Mapping[Precision | None, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

SMALLEST_SCALE = 2.0**-16
"""Overflows at this scale are no matter of scale."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(Config):
    """What numbers a run computes with; weights and optimizer state are float32 with all of these."""

    precision: Precision | None = None
    """`bf16` and `fp16` for the products of forward and backward, `fp32` for everything; `null`: as the model is."""


def prepare_weights(model: nn.Module, options: PrecisionOptions) -> None:
    """Bring the weights to float32, in place: all for `fp32`, otherwise those that train; for `null` none."""
    for parameter in model.parameters():
        if options.precision == "fp32" or (options.precision is not None and parameter.requires_grad):
            parameter.data = parameter.data.float()
    if options.precision == "fp32":
        for buffer in model.buffers():
            buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data


def autocast(options: PrecisionOptions, device_type: str) -> AbstractContextManager[Any]:
    """A context for the forward pass in which products run in the precision asked for."""
    dtype = _REDUCED.get(options.precision)
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype)


def mixed_precision_policy(options: PrecisionOptions) -> MixedPrecisionPolicy:
    """For `fully_shard`: weights are gathered in the precision asked for, gradients summed in float32.

    Inputs of layers are left alone: rotary angles and masks travel with them and need their precision. `autocast` sees
    to the products.
    """
    dtype = _REDUCED.get(options.precision)
    if dtype is None:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


@final
class LossScaler:
    """Multiplies the loss so that float16 gradients do not vanish, by as much as they bear without overflowing.

    The scale halves when a gradient was not finite, and doubles after many steps without; whether it was is in what
    the loop reads at every step anyway, so nothing waits. The loss is a sum and no mean, so the scale that it bears is
    smaller than is usual, and below 1 for very large windows. Except for `fp16` it is 1 and stays.
    """

    def __init__(self, options: PrecisionOptions, *, initial: float = 2.0**8, growth_interval: int = 2000) -> None:
        """Start at `initial`; `growth_interval` is in steps."""
        self.enabled = options.precision == "fp16"
        self.scale = initial if self.enabled else 1.0
        self.growth_interval, self.steps_since_change = growth_interval, 0

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call `backward` on."""
        return loss * self.scale if self.enabled else loss

    @property
    def is_searching(self) -> bool:
        """Whether the scale may still fall, so that an overflow says nothing of the run."""
        return self.enabled and self.scale > SMALLEST_SCALE

    def update(self, *, overflowed: bool) -> None:
        """After each window: whether any rank's gradients were not finite."""
        if not self.enabled:
            return
        self.steps_since_change += 1
        if overflowed:
            self.scale, self.steps_since_change = max(self.scale / 2, SMALLEST_SCALE), 0
        elif self.steps_since_change == self.growth_interval:
            self.scale, self.steps_since_change = self.scale * 2, 0

    def state_dict(self) -> dict[str, float]:
        """Plain numbers; none where the scale is 1 and stays."""
        if not self.enabled:
            return {}
        return {"scale": self.scale, "steps_since_change": self.steps_since_change}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue; a state of another precision changes nothing."""
        if self.enabled and "scale" in state:
            self.scale, self.steps_since_change = float(state["scale"]), int(state["steps_since_change"])
