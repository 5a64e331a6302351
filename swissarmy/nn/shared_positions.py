"""Losses of positions that several processes share (context parallelism): each runs the head on its own.

Shapes: b batch, s positions, h hidden size, v vocabulary; c is the largest number of positions of a process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, final

import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from swissarmy.nn.shared_axes import WHOLE, context_size, own_positions, placements, spread, tensor_mesh


@final
@dataclass(frozen=True)
class OwnPositions:
    """This process's positions of hidden states and of what is wanted there, as many on each process."""

    mesh: DeviceMesh
    states: Tensor
    """`[b, c, h]`; zeros where a process has fewer."""
    targets: Tensor
    """`[b, c]`."""
    length: int
    """s."""

    @classmethod
    def of(cls, hidden_states: Tensor, targets: Tensor, ignored: int) -> Self | None:
        """Of `[b, s, h]` and `[b, s]`; `None` where no process has positions of its own."""
        if not isinstance(hidden_states, DTensor) or context_size(hidden_states.device_mesh) == 1:
            return None
        mesh, length = hidden_states.device_mesh, hidden_states.shape[1]
        size = context_size(mesh)
        most = -(-length // size)
        first = own_positions(mesh, length).start
        where = placements(mesh, context=Shard(1))
        states = hidden_states.redistribute(mesh, where).to_local()
        padded = F.pad(targets, (0, most * size - length), value=ignored)
        own = padded[:, first : first + most]
        return cls(mesh, F.pad(states, (0, 0, 0, most - states.shape[1])), own, length)

    def weight(self, weight: Tensor | None) -> Tensor | None:
        """A head's weight `[v, h]`, to whose gradient each process adds a part."""
        if weight is None:
            return None
        found, parts = spread(weight, self.mesh), []
        for each, replicated in zip(found.placements, placements(self.mesh, context=Partial()), strict=True):
            parts.append(replicated if each == WHOLE else each)
        return self._on_tensor_axis(found, tuple(parts))

    def head(self, head: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """A head that takes `[1, m, h]`, as many on each process, and gives `[1, m, v]`."""

        def run(states: Tensor) -> Any:
            where = placements(self.mesh, context=Shard(1))
            logits = head(DTensor.from_local(states, self.mesh, where, run_check=False))
            if not isinstance(logits, DTensor) or logits.dim() != 3:
                return logits
            vocabulary = logits.placements[-1] if logits.placements[-1] == Shard(2) else WHOLE
            where = placements(self.mesh, context=Shard(1), tensor=vocabulary)
            return self._on_tensor_axis(logits.redistribute(self.mesh, where), where)

        return run

    def total(self, own: Tensor) -> Tensor:
        """The sum over the processes."""
        own = own.to_local() if isinstance(own, DTensor) else own
        parts = DTensor.from_local(own, self.mesh, placements(self.mesh, context=Partial()), run_check=False)
        return parts.full_tensor()

    def gathered(self, own: Tensor) -> Tensor:
        """All positions, `[b, s]`, of what is `[b, c]` here."""
        where = placements(self.mesh, context=Shard(1))
        return DTensor.from_local(own, self.mesh, where, run_check=False).full_tensor()[:, : self.length]

    def _on_tensor_axis(self, x: DTensor, parts: Any) -> Tensor:
        """What is here, as processes with the same positions share it."""
        own, mesh = x.to_local(grad_placements=parts), tensor_mesh(self.mesh)
        if mesh is None:
            return own
        return DTensor.from_local(own, mesh, (x.placements[-1],), run_check=False)
