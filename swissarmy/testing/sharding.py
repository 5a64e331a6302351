"""The part of the contract that takes two processes: a model spread over them computes what one computes alone."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from swissarmy.backbone.model import Model
from swissarmy.mixins.mixture_of_experts import MixtureOfExpertsMixin
from swissarmy.mixins.qk_norm import QKNormMixin
from swissarmy.testing.contract import Addition, backward, inputs_of, mixed
from swissarmy.testing.distributed import run_distributed
from swissarmy.training.parallel.mesh import ParallelOptions, make_mesh
from swissarmy.training.parallel.parallelize import parallelize
from swissarmy.training.parallel.shared_samples import plain_tensors_are_whole

SHARDED_CHECKS: Final[Mapping[str, ParallelOptions]] = {
    "FSDP2 x 2": ParallelOptions(shard=2),
    "TP x 2": ParallelOptions(tensor_parallel=2, shard_vocabulary=False),
    "CP x 2": ParallelOptions(context_parallel=2),
}
"""Plans for two processes; the vocabulary of the tiny models is odd."""

IN_FLOAT32: Final[Mapping[object, float]] = {
    "llama": 1e-6,
    "t5": 1e-6,
    "gemma3_text": 1e-4,
    MixtureOfExpertsMixin: 1e-4,
    QKNormMixin: 1e-6,
}
"""What computes in float32 inside a float64 model, as the published implementations do, and how far sums that differ in
their last bit may go apart there: statistics of RMS norms; Gemma's weights of norms, and routers."""

Case = tuple[str, Sequence[Addition]]
"""A family, and what is added to it."""


def check_sharded(check: str, cases: Sequence[Case], timeout: float = 600.0) -> list[str | None]:
    """Loss and gradients of each case on two processes against one; starting them costs seconds, a case little.

    Args:
        check: A name in `SHARDED_CHECKS`.
        cases: What to try.
        timeout: Seconds for all of them.

    Returns:
        For each case what is wrong, or `None`.
    """
    first, second = run_distributed(_problems, 2, check, cases, timeout=timeout)
    return [one or other for one, other in zip(first, second, strict=True)]


def _problems(rank: int, world_size: int, check: str, cases: Sequence[Case]) -> list[str | None]:
    options, found = SHARDED_CHECKS[check], list[str | None]()
    mesh = make_mesh(options, "cpu")  # one for all: each has connections of its own, and a process may open few
    for family, additions in cases:
        try:
            _compare(options, mesh, family, additions)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this case's problem; all ranks meet it
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append(None)
    return found


def _compare(options: ParallelOptions, mesh: DeviceMesh, family: str, additions: Sequence[Addition]) -> None:
    """Raise `AssertionError` where this process sees another loss or gradient than alone."""
    # with larger weights T5's unscaled attention saturates, and gradients are what rounding leaves of a difference
    alone, spread = (mixed(family, additions, scale=2.0)[0] for _ in range(2))
    inputs = inputs_of(alone)
    expected = _total(alone, inputs)
    backward(expected)
    parallelize(spread, options, mesh)
    rows = {name: value.chunk(options.shard)[mesh["shard"].get_local_rank()] for name, value in inputs.items()}
    with plain_tensors_are_whole():
        loss = _total(spread, rows)
        backward(loss)
    total = loss.detach().clone()
    if options.shard > 1:
        dist.all_reduce(total)
    tolerance = max(IN_FLOAT32.get(each, 1e-9) for each in (family, *(addition.kind for addition in additions)))
    _assert_equal(total, expected.detach(), "the loss", tolerance)
    # what is zero but for rounding, as the gradient of a key's bias, is measured by what it was rounded from
    floor = 1e-3 * max(each.grad.abs().max().item() for each in alone.parameters() if each.grad is not None)
    for (name, one), (other, many) in zip(alone.named_parameters(), spread.named_parameters(), strict=True):
        assert name == other, f"'{name}' is called '{other}'"
        if one.grad is not None:
            _assert_equal(_whole(many.grad), one.grad, f"the gradient of '{name}'", tolerance, floor)


def _assert_equal(many: Tensor | None, one: Tensor, what: str, tolerance: float, floor: float = 0.0) -> None:
    """Equal, but for a share of the largest number in it."""
    assert many is not None, f"{what} is missing"
    difference = (many - one).abs().max().item() / max(one.abs().max().item(), floor, 1e-30)
    assert difference <= tolerance, f"{what} differs by {difference:.1e} of its largest number"


def _total(model: Model, inputs: Mapping[str, Tensor]) -> Tensor:
    total: Tensor = model(**inputs)[0].square().sum()
    return total


def _whole(gradient: Tensor | None) -> Tensor | None:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
