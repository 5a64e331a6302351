"""GPT-2 in plain PyTorch, written by hand: the yardstick for "a mixin costs nothing".

Pre-LN, learned positions, tanh GELU, tied head, no dropout. Query, key and value are separate projections, as in
the library's backbone, so that the two differ in the hook machinery alone.

Shapes: b batch, s positions of this call, t positions so far, h hidden size, n heads, d = h / n, v vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Cache:
    """Keys and values of every layer, `[b, n, capacity, d]` each, of which the first `length` positions are set."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int = 0


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.heads = heads
        self.query = linear(hidden, hidden)
        self.key = linear(hidden, hidden)
        self.value = linear(hidden, hidden)
        self.output = linear(hidden, hidden)

    def forward(self, x: torch.Tensor, cache: Cache | None, layer: int) -> torch.Tensor:
        """`[b, s, h]` to `[b, s, h]`; with a cache, over what it holds and `x`, which it then holds too."""
        q, k, v = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        if cache is not None:
            end = cache.length + x.shape[1]
            cache.keys[layer][:, :, cache.length : end] = k
            cache.values[layer][:, :, cache.length : end] = v
            if cache.length:
                k, v = cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end]
        # a prompt has no earlier keys, and the one query of a step sees every key: no mask is needed
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        merged: torch.Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return merged

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attention = Attention(hidden, heads, linear)
        self.mlp_norm = nn.LayerNorm(hidden)
        self.up = linear(hidden, 4 * hidden)
        self.down = linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor, cache: Cache | None, layer: int) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cache, layer)
        hidden: torch.Tensor = self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))
        return x + hidden


class HandwrittenGPT2(nn.Module):
    """GPT-2 with `layers` layers of `heads` heads; the head is the transposed word embedding.

    Parameters: `word_embedding`, `position_embedding`, `final_norm`, and for each of `layers.{i}`
    `attention_norm`, `attention.query|key|value|output`, `mlp_norm`, `up`, `down`. Projections are `linear`'s, and the
    head's product is `product`: those of plain PyTorch, or the library's, to tell the hooks from the products.
    """

    def __init__(
        self,
        vocab_size: int,
        max_positions: int,
        hidden: int,
        layers: int,
        heads: int,
        *,
        linear: type[nn.Linear] = nn.Linear,
        product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.linear,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden size {hidden} is not a multiple of {heads} heads")
        self.word_embedding = nn.Embedding(vocab_size, hidden)
        self.position_embedding = nn.Embedding(max_positions, hidden)
        self.layers = nn.ModuleList(Layer(hidden, heads, linear) for _ in range(layers))
        self.final_norm = nn.LayerNorm(hidden)
        self.product = product
        self.apply(_initialise)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[b, s, v]` for token ids `[b, s]`."""
        return self._run(ids, None)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor, capacity: int | None = None) -> tuple[torch.Tensor, Cache]:
        """Logits `[b, s, v]` of a prompt `[b, s]`, and its cache with room for `capacity` positions.

        Without `capacity` there is room for as many positions as the model has.

        Raises:
            ValueError: the prompt is longer than `capacity`.
        """
        capacity = capacity or self.position_embedding.num_embeddings
        if ids.shape[1] > capacity:
            raise ValueError(f"a prompt of {ids.shape[1]} tokens does not fit into a cache of {capacity}")
        cache = self._empty_cache(ids.shape[0], capacity)
        return self._run(ids, cache), cache

    @torch.inference_mode()
    def decode(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits `[b, 1, v]` of the next token `[b, 1]`; `cache` grows by it.

        Raises:
            ValueError: more than one token, or the cache is full.
        """
        if ids.shape[1] != 1 or cache.length >= cache.keys[0].shape[2]:
            raise ValueError(f"one token at a time into a cache with room, not {list(ids.shape)} at {cache.length}")
        return self._run(ids, cache)

    def _run(self, ids: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.word_embedding(ids) + self.position_embedding(positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, cache, index)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.product(self.final_norm(x), self.word_embedding.weight)

    def _empty_cache(self, batch: int, capacity: int) -> Cache:
        weight = self.word_embedding.weight
        heads = [layer.attention.heads for layer in self.layers if isinstance(layer, Layer)]
        shapes = [(batch, n, capacity, weight.shape[1] // n) for n in heads]
        return Cache([weight.new_empty(shape) for shape in shapes], [weight.new_empty(shape) for shape in shapes])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
