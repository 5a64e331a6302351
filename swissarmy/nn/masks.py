"""Which key each query sees, as small immutable types.

Shapes: b batch, h heads, q queries, k keys. The last query stands at the last key, so one mask serves
training (q = k), decoding with a cache (q < k), and keys put in front by `with_prefix`.
A mask is a rule over indices; the same rule builds the dense tensor and drives flex attention. The
kernel chooses its path by the mask's type; nothing ever reads a mask's values back.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, Self, final

import torch
from torch import Tensor

from swissarmy.core.errors import HookCallError


@dataclass(frozen=True, eq=False)
class Mask(ABC):
    """A rule that says which key is visible to which query."""

    @abstractmethod
    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query `q` sees key `k`: index tensors that broadcast, `q` on the scale of the keys.

        `b` and `h` are below `batch_size` and `num_heads`, or anything where these are 1.
        """

    def check(self, q_len: int, k_len: int) -> None:
        """Refuse sizes that the mask's own tensors do not fit.

        Raises:
            HookCallError: A tensor covers another number of queries or keys.
        """
        del q_len, k_len

    @property
    def prefix_length(self) -> int:
        """How many keys `with_prefix` put in front."""
        return 0

    @property
    def batch_size(self) -> int:
        """How many rows the rule tells apart; 1 when it is the same for all."""
        return 1

    @property
    def num_heads(self) -> int:
        """How many heads the rule tells apart; 1 when it is the same for all."""
        return 1

    def with_prefix(self, num_keys: int) -> "Mask":
        """The mask after `num_keys` keys, visible to every query, were put in front of the others."""
        return WithPrefix(self, num_keys)

    def implies(self, other: "Mask") -> bool:
        """Whether all that this mask shows `other` shows too, known from the types alone."""
        return isinstance(other, Full)

    def __and__(self, other: "Mask") -> "Mask":
        if self.implies(other):
            return self
        return other if other.implies(self) else Both(self, other)

    def to(self, device: torch.device) -> Self:
        """The same mask with its tensors on `device`."""
        return replace(self, **{field.name: _moved(getattr(self, field.name), device) for field in fields(self)})

    def dense(self, q_len: int, k_len: int, device: torch.device | None = None) -> Tensor:
        """The mask as a bool tensor `[b or 1, h or 1, q_len, k_len]`, 1 = visible.

        `device` defaults to the device of the mask's own tensors, or the default device.
        """
        self.check(q_len, k_len)
        device = device or self.device
        q = torch.arange(k_len - q_len, k_len, device=device).view(1, 1, q_len, 1)
        k = torch.arange(k_len, device=device).view(1, 1, 1, k_len)
        b = torch.arange(self.batch_size, device=device).view(-1, 1, 1, 1)
        h = torch.arange(self.num_heads, device=device).view(1, -1, 1, 1)
        shape = (self.batch_size, self.num_heads, q_len, k_len)
        return self.visible(b, h, q, k).expand(shape)

    @property
    def device(self) -> torch.device | None:
        """Where the mask's tensors live, `None` when it has none."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Mask) and value.device is not None:
                return value.device
        return None


@final
@dataclass(frozen=True, eq=False)
class Full(Mask):
    """Every query sees every key."""

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q == q) & (k == k)


@final
@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """A query sees its own key and those before it."""

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q


@final
@dataclass(frozen=True, eq=False)
class SlidingWindow(Mask):
    """A query sees the last `window` keys up to its own."""

    window: int

    def __post_init__(self) -> None:
        """Refuse a window in which a query would not see its own key."""
        if self.window < 1:
            raise HookCallError(f"SlidingWindow({self.window}): the window must be at least 1 key.")

    def implies(self, other: Mask) -> bool:
        """A window is causal, and lies inside every wider one."""
        if isinstance(other, SlidingWindow):
            return self.window <= other.window
        return isinstance(other, Causal | Full)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k > q - self.window)


@final
@dataclass(frozen=True, eq=False)
class PrefixLM(Mask):
    """Causal, but the first `lengths[b]` keys of each row are visible to every query (`[b]`, int)."""

    lengths: Tensor

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) | (k < _at(self.lengths, k.device, b))


@final
@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Only keys that are real are visible (`keep`: `[b, k]`, 1 = a real token, 0 = padding)."""

    keep: Tensor

    @property
    def batch_size(self) -> int:
        return self.keep.shape[0]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _at(self.keep, k.device, b, k).bool() & (q == q)

    def check(self, q_len: int, k_len: int) -> None:
        if self.keep.shape[-1] != k_len:
            raise HookCallError(
                f"padding_mask has {self.keep.shape[-1]} columns and there are {k_len} keys: "
                "it is [batch, keys], with those in the cache counted, 1 = a real token."
            )


@final
@dataclass(frozen=True, eq=False)
class Documents(Mask):
    """Tokens see only their own document (`ids`: `[b, k]`, equal inside a document)."""

    ids: Tensor

    @property
    def batch_size(self) -> int:
        return self.ids.shape[0]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return _at(self.ids, k.device, b, q) == _at(self.ids, k.device, b, k)

    def check(self, q_len: int, k_len: int) -> None:
        if self.ids.shape[-1] != k_len:
            raise HookCallError(
                f"Documents has {self.ids.shape[-1]} ids a row and there are {k_len} keys: it is [batch, keys], with "
                "those in the cache counted."
            )


@final
@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A plain tensor, `[q, k]` or `[b or 1, heads or 1, q, k]`, 1 = visible; any pattern at all."""

    tensor: Tensor

    def __post_init__(self) -> None:
        """Give a `[q, k]` tensor its batch and head dimensions."""
        if self.tensor.dim() not in (2, 4):
            raise HookCallError(
                f"attention_mask has shape {list(self.tensor.shape)}; it is [q, k] or [b|1, heads|1, q, k]."
            )
        if self.tensor.dim() == 2:
            object.__setattr__(self, "tensor", self.tensor[None, None])

    @property
    def batch_size(self) -> int:
        return self.tensor.shape[0]

    @property
    def num_heads(self) -> int:
        return self.tensor.shape[1]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        first_query = self.tensor.shape[3] - self.tensor.shape[2]
        return _at(self.tensor, k.device, b, h, (q - first_query).clamp(min=0), k).bool()

    def check(self, q_len: int, k_len: int) -> None:
        if self.tensor.shape[2:] != (q_len, k_len):
            raise HookCallError(
                f"attention_mask has shape {list(self.tensor.shape)} for {q_len} queries and {k_len} keys; it is "
                "[q, k] or [b|1, heads|1, q, k]. A mask of padded tokens, [b, k], is padding_mask=..."
            )

    def dense(self, q_len: int, k_len: int, device: torch.device | None = None) -> Tensor:
        self.check(q_len, k_len)
        return self.tensor.bool().to(device)


@final
@dataclass(frozen=True, eq=False)
class Both(Mask):
    """Visible where both masks say so."""

    left: Mask
    right: Mask

    @property
    def prefix_length(self) -> int:
        return max(self.left.prefix_length, self.right.prefix_length)

    @property
    def batch_size(self) -> int:
        return max(self.left.batch_size, self.right.batch_size)

    @property
    def num_heads(self) -> int:
        return max(self.left.num_heads, self.right.num_heads)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.left.visible(b, h, q, k) & self.right.visible(b, h, q, k)

    def check(self, q_len: int, k_len: int) -> None:
        self.left.check(q_len, k_len)
        self.right.check(q_len, k_len)

    def dense(self, q_len: int, k_len: int, device: torch.device | None = None) -> Tensor:
        device = device or self.device
        return self.left.dense(q_len, k_len, device) & self.right.dense(q_len, k_len, device)


@final
@dataclass(frozen=True, eq=False)
class WithPrefix(Mask):
    """`inner`, after `num_keys` keys that every query sees were put in front."""

    inner: Mask
    num_keys: int

    @property
    def prefix_length(self) -> int:
        return self.num_keys + self.inner.prefix_length

    @property
    def batch_size(self) -> int:
        return self.inner.batch_size

    @property
    def num_heads(self) -> int:
        return self.inner.num_heads

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        inside = self.inner.visible(b, h, q - self.num_keys, (k - self.num_keys).clamp(min=0))
        return (k < self.num_keys) | inside

    def check(self, q_len: int, k_len: int) -> None:
        self.inner.check(q_len, k_len - self.num_keys)

    def dense(self, q_len: int, k_len: int, device: torch.device | None = None) -> Tensor:
        inner = self.inner.dense(q_len, k_len - self.num_keys, device)
        return torch.nn.functional.pad(inner, (self.num_keys, 0), value=True)


@final
@dataclass(frozen=True, eq=False)
class Rows(Mask):
    """Some of the queries that `inner` is about: those that `behind` others follow, of `total`."""

    inner: Mask
    total: int
    behind: int

    @property
    def prefix_length(self) -> int:
        return self.inner.prefix_length

    @property
    def batch_size(self) -> int:
        return self.inner.batch_size

    @property
    def num_heads(self) -> int:
        return self.inner.num_heads

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.inner.visible(b, h, q - self.behind, k)

    def check(self, q_len: int, k_len: int) -> None:
        self.inner.check(self.total, k_len)


def as_mask(value: Mask | Tensor | int | None) -> Mask:
    """A mask from what a caller may give: a mask, a tensor with 1 = visible, `None` (full) or -1 (causal)."""
    if value is None:
        return Full()
    if isinstance(value, Mask):
        return value
    if isinstance(value, Tensor):
        return Dense(value)
    if isinstance(value, int) and not isinstance(value, bool) and value == -1:
        return Causal()
    raise HookCallError(
        f"attention_mask={value!r} is no mask: give None (full), -1 (causal), a mask such as sat.SlidingWindow(128), "
        "or a tensor [q, k] or [b|1, heads|1, q, k] with 1 = visible."
    )


def _at(tensor: Tensor, device: torch.device, *indices: Tensor) -> Tensor:
    """The elements at these indices, on `device`; a dimension of size one serves every index."""
    fitted = [torch.zeros_like(i) if size == 1 else i for i, size in zip(indices, tensor.shape, strict=True)]
    return tensor.to(device)[tuple(fitted)]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor | Mask) else value
