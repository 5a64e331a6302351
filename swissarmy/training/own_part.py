"""What this process has of tensors that several may share."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Inside, tensors may be written to; afterwards they are what they were, to the bit."""
    own = [own_part(each.detach()) for each in tensors]
    before = [each.clone() for each in own]
    try:
        yield
    finally:
        with torch.no_grad():
            for each, value in zip(own, before, strict=True):
                each.copy_(value)
