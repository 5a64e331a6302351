"""Reading a step back: everything is compared before anything is loaded."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from swissarmy.core.errors import CheckpointError, SwissArmyError
from swissarmy.interop.json_object import parse_json_object
from swissarmy.interop.matching import report
from swissarmy.interop.safe_write import MANIFEST, verify_manifest
from swissarmy.interop.tensor_source import TensorFile
from swissarmy.training.checkpoint.frozen import check_frozen
from swissarmy.training.checkpoint.metadata import read_metadata
from swissarmy.training.checkpoint.optimizer_state import PART_OF_STATE, PER_RANK
from swissarmy.training.checkpoint.random_state import (
    draw_anew,
    first_random_tensors,
    random_tensors,
    restore_random_state,
)
from swissarmy.training.checkpoint.sharded import STATE_FILE, read_tensors
from swissarmy.training.checkpoint.state import TrainState
from swissarmy.training.ranks import Ranks

TORCH_METADATA: Final = ".metadata"
_LOG = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class StoredStep:
    """What a step's folder says of itself; its files are those that were saved."""

    folder: Path
    metadata: Metadata
    """Which tensor is where."""
    values: Mapping[str, Any]
    """All that is no tensor."""


def open_step(folder: Path, ranks: Ranks) -> StoredStep:
    """Compare a step's files with their hashes, and read what is no tensor; every rank calls it.

    Raises:
        CheckpointError: It is damaged.
        ConfigError: Other ranks found that it is damaged.
    """
    share = (ranks.rank, ranks.world_size)
    listed = ranks.together(partial(verify_manifest, folder, share=share))
    return ranks.together(partial(_read, folder, listed))


def restore(
    step: StoredStep, state: TrainState, frozen: Mapping[str, list[Any]], ranks: Ranks, *, allow_data_change: bool
) -> None:
    """Fill a run from a step; every rank calls it.

    Args:
        step: As `open_step` gave it.
        state: Of the run, just built.
        frozen: What of its model does not train.
        ranks: The processes, which need not be as many as wrote it.
        allow_data_change: Go on although the data changed.

    Raises:
        CheckpointError: On every rank: of another model or optimizer; nothing was loaded.
        FingerprintError: The data changed.
    """
    folder, metadata, values = step.folder, step.metadata, step.values
    try:
        ranks.together(partial(check_frozen, values["frozen"], frozen))
        state.make_room(metadata.state_dict_metadata.keys())
        tensors = state.tensors()
        ranks.together(partial(_compare, folder, tensors, metadata, ranks.world_size))
        ranks.together(partial(state.load_data, values, allow_data_change=allow_data_change))
    except SwissArmyError as error:
        if changes := state.changes(values):
            error.add_note(f"Since then other settings: {'; '.join(changes)}.")
        raise

    is_same_layout = [values["ranks"], values["readers"]] == [ranks.world_size, ranks.data_size]
    draws = random_tensors(ranks) if is_same_layout else first_random_tensors()
    draws = {name: tensor for name, tensor in draws.items() if name in metadata.state_dict_metadata}
    read_tensors(folder, metadata, {**tensors, **draws}, ranks)
    state.load_values(values)
    if is_same_layout:
        restore_random_state(draws, ranks)
    else:
        draw_anew(draws, ranks)
        _LOG.warning("%s was written by other ranks: random numbers are drawn anew", folder)


def check_not_torchs(folder: Path) -> None:
    """Refuse what `torch.distributed.checkpoint` itself wrote.

    Raises:
        CheckpointError: It did.
    """
    if (folder / TORCH_METADATA).exists() and not (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder} was written by torch.distributed.checkpoint itself: its {TORCH_METADATA} is a pickle, and to "
            "read it is to run whatever is in it, so it was not opened. If you trust it, make a file of its weights "
            "with torch.distributed.checkpoint.format_utils.dcp_to_torch_save."
        )


def _read(folder: Path, listed: Collection[str]) -> StoredStep:
    file = TensorFile(folder / STATE_FILE)
    values = parse_json_object(file.read_bytes(0, file.size), str(file.path))
    missing = {"format", "ranks", "readers", "frozen", "step", "optimizer", "extra"} - values.keys()
    if missing or values["format"] != 1:
        raise CheckpointError(f"{file.path} is not the state of a run, format 1")
    metadata = read_metadata(folder)
    strangers = {place.file for place in metadata.storage_data.values()}.difference(listed)
    if strangers:
        raise CheckpointError(f"{folder / MANIFEST} does not list {min(strangers)}, which holds tensors")
    return StoredStep(folder, metadata, values)


def _compare(folder: Path, tensors: Mapping[str, Tensor], metadata: Metadata, world_size: int) -> None:
    everything = metadata.state_dict_metadata.keys()
    _check_owners(folder, tensors, everything, world_size)
    stored = {
        name: each
        for name, each in metadata.state_dict_metadata.items()
        if isinstance(each, TensorStorageMetadata) and (name in tensors or not PER_RANK.search(name))
    }
    problems = report("missing", [name for name in tensors if name not in everything], stored)
    problems += report("unexpected", [name for name in stored if name not in tensors], tensors)
    problems += [
        f"{name}: have {list(have.size)} {_name(have.properties.dtype)}, want {list(want.shape)} {_name(want.dtype)}"
        for name, have in stored.items()
        if (want := tensors.get(name)) is not None and (have.size, have.properties.dtype) != (want.shape, want.dtype)
    ]
    if problems:
        shown = problems[:12] + [f"and {len(problems) - 12} more"] * (len(problems) > 12)
        raise CheckpointError(
            "\n  - ".join([f"{folder} is of another model or optimizer; nothing was loaded:", *shown])
        )


def _check_owners(folder: Path, tensors: Collection[str], everything: Collection[str], world_size: int) -> None:
    """Refuse optimizer state in eight bits that other ranks own than there are: it cannot be cut anew."""
    ours, theirs = ({name for name in names if PART_OF_STATE.search(name)} for names in (tensors, everything))
    owners = {found[0] for name in theirs if (found := PER_RANK.search(name))}
    if ours and theirs and (not ours <= theirs or len(owners) not in (0, world_size)):
        raise CheckpointError(
            f"{folder}: its optimizer state in eight bits is that of {len(owners) or 1} ranks, each its own, and there "
            f"are {world_size}: resume on as many, with the same shard and tensor_parallel. Nothing was loaded."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
