"""Tensors of many ranks in one folder, through torch's distributed checkpoints: a file each, and no pickle.

torch decides who writes what (a tensor that several ranks have alike is written once) and who reads what. What lies on
disk is ours: a safetensors file per rank, and JSON. A folder gets its name when every rank's file is on disk.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict  # `load` warns when a process is alone
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.safe_write import (
    check_target,
    flush_files,
    hash_files,
    publish,
    sibling,
    write_errors,
    write_manifest,
)
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.interop.safetensors_write import save_safetensors
from swissarmy.training.checkpoint.metadata import FILE as METADATA_FILE
from swissarmy.training.checkpoint.metadata import Place, write_metadata
from swissarmy.training.own_part import own_part
from swissarmy.training.ranks import Ranks

STATE_FILE: Final = "state.json"
T = TypeVar("T")


@final
class Shard:
    """This rank's part of a tensor, in the way in which torch's planner asks for it.

    Args:
        name: Of the whole tensor.
        tensor: The whole tensor, sharded or not.
        copy: Whether to copy the part to the host's memory, so that the tensor may change meanwhile.
    """

    def __init__(self, name: str, tensor: Tensor, *, copy: bool) -> None:
        local = own_part(tensor)
        self.local = local.to("cpu", copy=True) if copy else local
        self._item = _write_item(name, tensor, self.local)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [self._item]


def write_step(target: Path, shards: Mapping[str, Shard], state: str, ranks: Ranks) -> None:
    """Write a folder on every rank of a group; it is there when it is complete.

    Args:
        target: Its name.
        shards: This rank's parts, by the names of their tensors.
        state: The text of its `state.json`; the first rank's counts.
        ranks: Who writes.

    Raises:
        CheckpointError: On every rank, with what went wrong on which; nothing is left behind.
    """
    writer = _Writer(target, state)
    try:
        with _same_error_everywhere(f"{target} was not written"):
            _save_state_dict(
                dict(shards),
                writer,
                process_group=ranks.group,
                no_dist=ranks.world_size == 1,
                planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            )
    finally:
        if ranks.is_first and writer.temporary is not None:
            shutil.rmtree(writer.temporary, ignore_errors=True)


def read_tensors(folder: Path, metadata: Metadata, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Fill tensors, sharded or not, in place; names and shapes are known to be in `metadata`.

    Raises:
        CheckpointError: A file is not what the metadata says.
    """
    with torch.no_grad(), _same_error_everywhere(f"{folder} was not read"):
        _load_state_dict(
            {name: tensor.detach() for name, tensor in sorted(tensors.items())},
            _Reader(folder, metadata),
            process_group=ranks.group,
            no_dist=ranks.world_size == 1,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )


@contextmanager
def _same_error_everywhere(what: str) -> Iterator[None]:
    """torch tells every rank of every failure; the first becomes a CheckpointError."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        where = f" (on rank {rank})" if max(error.failures) > 0 or len(error.failures) > 1 else ""
        if isinstance(cause, CheckpointError):
            raise CheckpointError(f"{cause}{where}") from error
        raise CheckpointError(f"{what}{where}: {type(cause).__name__}: {cause}") from error
    except RuntimeError as error:  # what torch.distributed raises when a process is gone
        raise CheckpointError(f"{what}: the processes lost each other: {error}") from error


def _write_item(name: str, tensor: Tensor, local: Tensor) -> WriteItem:
    sizes, offsets = torch.Size(tensor.shape), torch.Size([0] * tensor.dim())
    if isinstance(tensor, DTensor):
        place = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        sizes, offsets = torch.Size(place[0]), torch.Size(place[1])
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties.create_from_tensor(local),
            size=torch.Size(tensor.shape),
        ),
    )


@final
class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].local


@final
@dataclass(frozen=True)
class _Target:
    """What the first rank tells each rank: where to make which folder."""

    temporary: Path
    name: str


@final
@dataclass(frozen=True)
class _Written:
    """What each rank tells the first one of a chunk."""

    place: Place
    hashes: Mapping[str, object]
    """Of the whole file."""


@final
class _Writer(StorageWriter):
    """Called by torch; methods without a comment are steps of its protocol that need nothing here."""

    def __init__(self, target: Path, state: str) -> None:
        self.target, self.state = target, state
        self.temporary: Path | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank: make the folder, under a temporary name."""
        check_target(self.target)
        temporary = sibling(self.target, "tmp")
        with write_errors(self.target):
            temporary.mkdir(parents=True)
        self.temporary = temporary
        return [replace(plan, storage_data=_Target(temporary, f"rank-{i:05d}")) for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """On every rank: write its file, and force it to disk."""
        target: _Target = plan.storage_data
        folder = target.temporary / target.name
        tensors = {_key(item): data for item in plan.items if isinstance(data := planner.resolve_data(item), Tensor)}
        hashes: dict[str, Mapping[str, object]] = {}
        if tensors:
            with write_errors(self.target):
                folder.mkdir()
                files = [folder / name for name in save_safetensors(folder, tensors, max_shard_bytes=2**62)]
                hashes |= hash_files(target.temporary, files)
                flush_files(files)
        written = [(item, Place(file, _key(item))) for file in hashes for item in plan.items]
        return _done([WriteResult(item.index, 0, _Written(place, hashes[place.file])) for item, place in written])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written: write the lists, and give the folder its name."""
        assert self.temporary is not None, "the plan was made here"
        written: dict[MetadataIndex, _Written] = {each.index: each.storage_data for rank in results for each in rank}
        listed = {each.place.file: each.hashes for each in written.values()}
        with write_errors(self.target):
            write_metadata(self.temporary, metadata, {index: each.place for index, each in written.items()})
            (self.temporary / STATE_FILE).write_text(self.state)
            own = [self.temporary / METADATA_FILE, self.temporary / STATE_FILE]
            manifest = write_manifest(self.temporary, {**hash_files(self.temporary, own), **listed})
            flush_files([*own, manifest])
            publish(self.temporary, self.target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


@final
class _Reader(StorageReader):
    """Called by torch, as the writer is."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder, self.metadata = folder, metadata
        self._sources: dict[str, SafetensorsSource] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """On every rank: copy the parts that it needs of the chunks that hold them."""
        for item in plan.items:
            place: Place = self.metadata.storage_data[item.storage_index]
            stored = self._source(place.file).read(place.key)
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                stored = stored.narrow(dim, offset, length)
            planner.resolve_tensor(item).copy_(stored)
        return _done(None)

    def _source(self, file: str) -> SafetensorsSource:
        if file not in self._sources:
            self._sources[file] = SafetensorsSource(self.folder / file)
        return self._sources[file]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _key(item: WriteItem) -> str:
    """A chunk's name in its file: the tensor's, with the offsets where it is not the whole."""
    assert item.tensor_data is not None, "nothing but tensors is planned"
    if item.tensor_data.chunk.sizes == item.tensor_data.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, item.tensor_data.chunk.offsets))}"


def _done(value: T) -> "Future[T]":
    """What torch waits for."""
    future: Future[T] = Future()
    future.set_result(value)
    return future
