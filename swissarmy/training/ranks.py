"""The processes of a run: who they are, what they add up, and what they must agree on."""

import os
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh

from swissarmy.core.config import report
from swissarmy.core.errors import ConfigError, sendable
from swissarmy.training.parallel.mesh import ParallelOptions, make_mesh

T = TypeVar("T")
_CPU = torch.device("cpu")


@final
@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run; alone by default."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = _CPU
    """Where this process computes."""
    data_rank: int = 0
    """Which slice of each global batch it reads."""
    data_size: int = 1
    """Of how many slices; processes that share products read the same one."""
    mesh: DeviceMesh | None = None
    """All of them by their axes; `None` for a process alone."""
    counts: bool = True
    """Whether its sums count; of those that compute the same, the first one's do."""
    group: dist.ProcessGroup | None = None
    """What they speak through; `None`: torch's default group."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    @property
    def number_type(self) -> torch.dtype:
        """What sums are added up in."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def sum(self, numbers: Tensor) -> list[float]:
        """Add up a vector over all ranks, and read it: the one moment of a step at which the host waits."""
        if self.world_size > 1:
            dist.all_reduce(numbers, group=self.group)
        return numbers.tolist()

    def gather(self, value: T) -> list[T]:
        """What each rank has, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_first(self, action: Callable[[], T]) -> T:
        """Do something on the first rank only; its result, or its error, is everybody's.

        Raises:
            Exception: What `action` raised.
        """
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = action()
            except Exception as error:  # noqa: BLE001 - raised again below, on every rank
                outcome[1] = error
        if self.world_size > 1:
            own = outcome[1]
            outcome[1] = None if own is None else sendable(own)
            dist.broadcast_object_list(outcome, src=0, group=self.group)
            outcome[1] = own or outcome[1]
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def together(self, action: Callable[[], T]) -> T:
        """Do something on every rank that may fail on some of them; nobody waits for those.

        Raises:
            Exception: What `action` raised here.
            ConfigError: It failed on other ranks, with what they say.
        """
        result, error = None, None
        try:
            result = action()
        except Exception as caught:  # noqa: BLE001 - raised again below, when the others know
            error = caught
        errors = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        report("other ranks failed:", [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None])
        return typing.cast(T, result)

    def check_agreement(self, what: str, own: Mapping[str, Any]) -> None:
        """Refuse ranks that were started with different values: they would wait for each other, or train nonsense.

        Raises:
            ConfigError: On every rank, with each value that differs and who has it.
        """
        first, *others = self.gather({name: repr(value) for name, value in own.items()})
        differing = {
            f"{name} is {first.get(name, 'absent')} on rank 0 and {other.get(name, 'absent')} on rank {rank}"
            for rank, other in enumerate(others, 1)
            for name in dict.fromkeys([*first, *other])
            if first.get(name) != other.get(name)
        }
        report(f"the ranks do not agree on {what}:", sorted(differing))


@contextmanager
def joined_ranks(options: ParallelOptions) -> Iterator[Ranks]:
    """The ranks of this run: those of a group that is there, those that `torchrun` started, or this process alone.

    A group that is made here is left at the end; one that was there stays.

    Raises:
        ConfigError: The sizes of `options` do not multiply to the number of processes.
    """
    is_ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    device = _device(distributed=is_ours or dist.is_initialized())
    if is_ours:
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
        backend = dist.get_default_backend_for_device(device)
        timeout = timedelta(seconds=options.distributed_timeout)
        dist.init_process_group(backend, timeout=timeout, **_meeting_place(timeout))
    try:
        yield _ranks(options, device)
    finally:
        if is_ours:
            dist.destroy_process_group()


def _meeting_place(timeout: timedelta) -> dict[str, Any]:
    """Where processes find each other: torch knows, but after a restart by `torchrun` on one machine.

    The launcher's store still holds what the processes of the attempt before wrote there, and torch would try to reach
    them (pytorch#135712). On several machines nothing tells attempts apart that all processes know: there the launcher
    must be started with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    world_size = int(os.environ["WORLD_SIZE"])
    if attempt == "0" or not is_shared or os.environ.get("LOCAL_WORLD_SIZE") != str(world_size):
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    return {
        "store": PrefixStore(f"attempt-{attempt}", store),
        "rank": int(os.environ["RANK"]),
        "world_size": world_size,
    }


def _device(*, distributed: bool) -> torch.device:
    """The accelerator of this process, or the CPU where there is none, or where the group's backend knows no other."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or (dist.is_initialized() and dist.get_backend() == "gloo"):
        return _CPU
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")) if distributed else 0)


def _ranks(options: ParallelOptions, device: torch.device) -> Ranks:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        _check_alone(options)
        return Ranks(device=device)
    mesh = make_mesh(options, device.type)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return Ranks(
        rank=rank,
        world_size=world_size,
        device=device,
        data_rank=rank // options.sharing_size,
        data_size=world_size // options.sharing_size,
        mesh=mesh,
        counts=rank % options.sharing_size == 0,
    )


def _check_alone(options: ParallelOptions) -> None:
    """Refuse a process alone where several are asked for.

    Raises:
        ConfigError: With how to start them.
    """
    wanted = options.shard * options.sharing_size * (options.data or 1)
    if wanted > 1:
        raise ConfigError(
            f"the sizes of the run multiply to {wanted} processes, and there is one: start it with "
            f"`torchrun --nproc-per-node {wanted} ...`."
        )
