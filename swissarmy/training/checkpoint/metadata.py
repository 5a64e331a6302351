"""Which tensor of a checkpoint lies where: `metadata.json`, which torch keeps as a pickle.

A tensor is one chunk or several; each is a tensor of some rank's safetensors file, and says where in the whole it
belongs. That is all that torch needs to give any other number of ranks, sharded in any other way, their parts.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.json_object import parse_json_object
from swissarmy.interop.safetensors_folder import DTYPES
from swissarmy.interop.tensor_source import TensorFile

FILE: Final = "metadata.json"
_FORMAT: Final = 1
_DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_TENSOR_FILE: Final = re.compile(r"rank-\d{5,}/model\.safetensors")


@final
@dataclass(frozen=True)
class Place:
    """Where a chunk lies."""

    file: str
    """Relative to the checkpoint's folder."""
    key: str
    """What it is called in there."""


def write_metadata(folder: Path, metadata: Metadata, places: Mapping[MetadataIndex, Place]) -> None:
    """Write what there is, and where each chunk lies."""
    tensors = {
        name: _tensor_to_json(name, tensor, places)
        for name, tensor in metadata.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    (folder / FILE).write_text(json.dumps({"format": _FORMAT, "tensors": tensors}, separators=(",", ":")))


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint's folder holds; `storage_data` is the `Place` of each chunk.

    Raises:
        CheckpointError: It is not such a file, or its chunks do not make up their tensors.
    """
    file = TensorFile(folder / FILE)
    content = parse_json_object(file.read_bytes(0, file.size), str(file.path))
    if content.get("format") != _FORMAT or not isinstance(content.get("tensors"), dict):
        raise CheckpointError(f"{file.path} is not a list of tensors, format {_FORMAT}")
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, Place] = {}
    for name, value in content["tensors"].items():
        try:
            tensors[name] = _tensor_from_json(value)
            places |= _places_from_json(name, value)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file.path}: {name!r} is not understood: {error}") from error
    return Metadata(state_dict_metadata=tensors, storage_data=places)


def _tensor_to_json(
    name: str, tensor: TensorStorageMetadata, places: Mapping[MetadataIndex, Place]
) -> dict[str, object]:
    chunks = [(chunk, places[MetadataIndex(name, chunk.offsets)]) for chunk in tensor.chunks]
    return {
        "dtype": _DTYPE_NAMES[tensor.properties.dtype],
        "shape": list(tensor.size),
        "chunks": [
            {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": place.file, "key": place.key}
            for chunk, place in chunks
        ],
    }


def _tensor_from_json(value: Mapping[str, Any]) -> TensorStorageMetadata:
    shape = _naturals(value["shape"])
    chunks = [ChunkStorageMetadata(_naturals(each["offsets"]), _naturals(each["sizes"])) for each in value["chunks"]]
    for chunk in chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
            raise ValueError(f"a chunk has {len(chunk.sizes)} dimensions, the tensor {len(shape)}")
        if any(offset + size > whole for offset, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
            raise ValueError(f"a chunk at {list(chunk.offsets)} leads out of {list(shape)}")
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(shape):
        raise ValueError(f"its chunks hold {covered} elements of {math.prod(shape)}")
    return TensorStorageMetadata(TensorProperties(dtype=DTYPES[value["dtype"]]), shape, chunks)


def _places_from_json(name: str, value: Mapping[str, Any]) -> dict[MetadataIndex, Place]:
    places = {}
    for each in value["chunks"]:
        place = Place(each["file"], each["key"])
        if not _TENSOR_FILE.fullmatch(place.file):
            raise ValueError(f"{place.file!r} is not the file of a rank")
        places[MetadataIndex(name, _naturals(each["offsets"]))] = place
    return places


def _naturals(value: object) -> torch.Size:
    if not isinstance(value, list) or not all(type(each) is int and 0 <= each < 2**63 for each in value):
        raise ValueError(f"{value!r:.80} is not a list of sizes")
    return torch.Size(value)
