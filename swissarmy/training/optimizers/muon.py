"""Muon (Jordan et al. 2024) for the matrices of layers, with AdamW for everything else, as one optimizer.

The step of a matrix is its averaged gradient made orthogonal, scaled so that AdamW's learning rate and decay serve it
too (Liu et al. 2025). `torch.optim.Muon` takes the same step; it rounds to bfloat16, which CPUs are slow at, and knows
no sharded matrices. Here a matrix that is sharded is gathered, made orthogonal whole, and each rank keeps its shard.
"""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that drives singular values to about one as fast as may be (Jordan et al. 2024)."""
ROUNDS = 5


@final
class MuonAdamW(torch.optim.Optimizer):
    """Groups marked `muon: True` hold matrices; the others are AdamW's, fused.

    State of a matrix: `momentum_buffer`; of anything else: `step`, `exp_avg`, `exp_avg_sq`.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
    ) -> None:
        """Take over the groups; each says its `weight_decay`, and whether it is Muon's."""
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "momentum": momentum, "muon": False})
        adamw_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw = torch.optim.AdamW(adamw_groups, betas=betas, eps=eps, fused=True) if adamw_groups else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        assert closure is None, "the loss is computed once a step"
        for group in self.param_groups:
            if group["muon"]:
                self._step_of_matrices(group)
        if self._adamw is not None:  # groups and state are replaced when a state is loaded
            self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
            self._adamw.state = self.state
            self._adamw.step()

    def _step_of_matrices(self, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            direction = orthogonal(parameter.grad.lerp(average, momentum))  # Nesterov's look ahead
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(direction, alpha=-0.2 * lr * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix `[m, n]`, roughly: singular values between about 0.7 and 1.2."""
    if not isinstance(matrix, DTensor):
        return newton_schulz(matrix, _working_dtype(matrix))
    mesh, whole = matrix.device_mesh, matrix.full_tensor()
    direction = newton_schulz(whole, _working_dtype(whole))
    replicated = DTensor.from_local(direction, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, matrix.placements)


def _working_dtype(matrix: Tensor) -> torch.dtype:
    return matrix.dtype if matrix.device.type == "cpu" else torch.bfloat16


def newton_schulz(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Five rounds of an odd polynomial in the matrix, which acts on its singular values alone; in `dtype`.

    Args:
        matrix: `[m, n]`.
        dtype: What to compute in; bfloat16 is enough.
    """
    linear, cubic, quintic = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide.to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return (x.T if wide is not matrix else x).to(matrix.dtype)
