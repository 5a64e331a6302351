"""Distances between queries and keys, and biases on attention scores made from them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swissarmy.nn.masks import Mask


def relative_position(q_len: int, k_len: int, device: torch.device) -> Tensor:
    """Key position minus query position, `[q, k]`; the last query stands at the last key."""
    queries = torch.arange(k_len - q_len, k_len, device=device)
    return torch.arange(k_len, device=device)[None, :] - queries[:, None]


def relative_position_bucket(distance: Tensor, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """T5's buckets (Raffel et al. 2020): one for each small distance, logarithmic beyond, `[q, k]` to `[q, k]`."""
    offset: Tensor | int = 0
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def add_bias(kw_args: dict[str, Any], bias: Tensor, mask: Mask) -> None:
    """Add `bias` `[b|1, heads|1, q, k]` to what `attention_fn` will add to the scores; prefix keys get zero."""
    bias = F.pad(bias, (mask.prefix_length, 0)) if mask.prefix_length else bias
    earlier = kw_args.get("attention_bias")
    kw_args["attention_bias"] = bias if earlier is None else earlier + bias
