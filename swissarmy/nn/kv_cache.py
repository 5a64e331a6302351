"""`KVCache`: what decoding remembers, outside the modules.

Shapes: b batch, h key-value heads, t positions remembered, d head size.
"""

from typing import Self, final

import torch
from torch import Tensor

from swissarmy.core.errors import HookCallError


@final
class KVCache:
    """The keys and values of every layer, in buffers that are allocated once and grow by doubling.

    `update` appends and returns all; `reorder`, `trim` and `keep_newest` change what is remembered. The
    projections of an encoder's output, computed once for a whole generation, are remembered by name.
    """

    def __init__(self, num_layers: int, *, capacity: int = 0) -> None:
        """Make an empty cache.

        Args:
            num_layers: How many layers will write to it.
            capacity: How many positions to make room for at the first write.
        """
        self.num_layers, self.capacity = num_layers, capacity
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._lengths = [0] * num_layers
        self.constants: dict[tuple[int, str], Tensor] = {}

    def __len__(self) -> int:
        """How many positions are remembered; a layer without attention of its own may remember none."""
        return max(self._lengths)

    @property
    def nbytes(self) -> int:
        """The bytes held, room to grow included."""
        held = [*self._keys, *self._values, *self.constants.values()]
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def update(self, layer_id: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values, each `[b, h, s, d]`, and return all of them, `[b, h, t, d]`."""
        start = self._lengths[layer_id]
        stop = start + k.shape[2]
        keys = self._room(self._keys, layer_id, k, stop)
        values = self._room(self._values, layer_id, v, stop)
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        self._lengths[layer_id] = stop
        return keys[:, :, :stop], values[:, :, :stop]

    def reorder(self, rows: Tensor) -> None:
        """Make row `i` what row `rows[i]` was (`rows`: `[new batch]`), for beams; rows may repeat."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().flatten()
        for buffers in (self._keys, self._values):
            for layer_id, (buffer, length) in enumerate(zip(buffers, self._lengths, strict=True)):
                if buffer is not None and len(buffer) == len(rows):  # only what changes, and only what is written
                    buffer[moved, :, :length] = buffer[rows[moved], :, :length]
                elif buffer is not None:
                    buffers[layer_id] = buffer.index_select(0, rows)
        self.constants = {key: tensor.index_select(0, rows) for key, tensor in self.constants.items()}

    def trim(self, num_positions: int) -> None:
        """Forget the newest positions."""
        if not 0 <= num_positions <= len(self):
            raise HookCallError(f"cannot forget {num_positions} positions: the cache holds {len(self)}.")
        self._shorten(num_positions)

    def keep_newest(self, num_positions: int) -> None:
        """Forget all but the newest positions; fewer than that are all kept."""
        if num_positions < 0:
            raise HookCallError(f"cannot keep {num_positions} positions: the number must not be negative.")
        forgotten = max(len(self) - num_positions, 0)
        if forgotten:
            for buffers in (self._keys, self._values):
                for buffer, length in zip(buffers, self._lengths, strict=True):
                    if buffer is not None:
                        buffer[:, :, : length - forgotten] = buffer[:, :, forgotten:length].clone()
            self._shorten(forgotten)

    def to_mems(self) -> Tensor:
        """Everything remembered as one tensor `[num_layers, b, t, 2 * h * d]`, keys then values."""
        layers: list[Tensor | None] = []
        for keys, values in zip(self._keys, self._values, strict=True):
            if keys is None or values is None:
                layers.append(None)
                continue
            flat = [part[:, :, : len(self)].transpose(1, 2).flatten(2) for part in (keys, values)]
            layers.append(torch.cat(flat, dim=-1))
        written = next((layer for layer in layers if layer is not None), None)
        if written is None:
            raise HookCallError("the cache is empty: no layer has written to it yet.")
        return torch.stack([torch.zeros_like(written) if layer is None else layer for layer in layers])

    @classmethod
    def from_mems(cls, mems: Tensor, *, num_key_value_heads: int, capacity: int = 0) -> Self:
        """A cache that continues from `to_mems()`'s tensor."""
        if mems.dim() != 4 or mems.shape[3] % (2 * num_key_value_heads):
            raise HookCallError(
                f"mems has shape {list(mems.shape)}; with {num_key_value_heads} key-value heads it is "
                f"[num_layers, batch, positions, 2 * {num_key_value_heads} * head_dim]."
            )
        cache = cls(mems.shape[0], capacity=max(capacity, mems.shape[2]))
        for layer_id, layer in enumerate(mems):
            k, v = layer.unflatten(-1, (2, num_key_value_heads, -1)).permute(2, 0, 3, 1, 4)
            cache.update(layer_id, k, v)
        return cache

    def _room(self, buffers: list[Tensor | None], layer_id: int, new: Tensor, needed: int) -> Tensor:
        """The layer's buffer, made or doubled so that `needed` positions fit."""
        buffer = buffers[layer_id]
        if buffer is not None and buffer.shape[0] != new.shape[0]:
            raise HookCallError(
                f"the cache holds a batch of {buffer.shape[0]} and this call has {new.shape[0]}: use a new cache."
            )
        if buffer is None or buffer.shape[2] < needed:
            b, h, _, d = new.shape
            size = max(needed, self.capacity) if buffer is None else max(needed, 2 * buffer.shape[2])
            grown = new.new_empty(b, h, size, d)
            if buffer is not None:
                length = self._lengths[layer_id]
                grown[:, :, :length] = buffer[:, :, :length]
            buffers[layer_id] = buffer = grown
        return buffer

    def _shorten(self, num_positions: int) -> None:
        """Layers that were never written to stay at length zero."""
        self._lengths = [max(length - num_positions, 0) for length in self._lengths]
