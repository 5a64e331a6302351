"""An old checkpoint, opened: its files, its ranks, its family, and the models that are in it. Reads only headers."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, final

import torch

from swissarmy.core.errors import CheckpointError, nearest
from swissarmy.interop.sat_legacy.facts import Arguments, CrossNorms
from swissarmy.interop.sat_legacy.families import LAYOUTS, find_family
from swissarmy.interop.sat_legacy.folder import LegacyFolder, find_checkpoint, missing_ranks
from swissarmy.interop.sat_legacy.generic import generic, parts_of
from swissarmy.interop.sat_legacy.layout import WORDS, Checkpoint
from swissarmy.interop.sat_legacy.merge import MergedSource, user_split
from swissarmy.interop.sat_legacy.names import Generation, canonical_names, generation
from swissarmy.interop.sat_legacy.parameters import ParameterSource, Place
from swissarmy.interop.sat_legacy.part import Part, plan_part
from swissarmy.interop.sat_legacy.torch_file import TorchFile

FusedRows = Literal["blocks", "heads"]

_PART = re.compile(r"([A-Za-z0-9_-]+\.)*")  # becomes the name of a folder
_BY_HEAD = ("chatglm", "glm_130b")
"""Families whose `query_key_value` has the rows of one head after those of another, and Q, K, V within each."""


@final
@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller says about an old checkpoint."""

    family: str | None = None
    """The old family; by `model_class` when `None`."""
    arguments: Mapping[str, Any] | None = None
    """Old arguments, over those of `model_config.json`."""
    positions: Mapping[int, str] | None = None
    """Names of mixins by position."""
    step: str | None = None
    """The iteration, or `release`; by `latest` when `None`."""
    vocab_size: int | None = None
    """How many rows of the vocabulary are tokens; the argument `vocab_size` when `None`."""
    keep_padding: bool = False
    """Keep the rows that are no tokens."""
    cross_norms: CrossNorms = "early"
    """In decoders that normalise before each sublayer: `post_attention_layernorm` is in front of cross-attention
    (`early`, most releases) or of the MLP (`late`, since CogAgent)."""
    splits: Mapping[str, str] | None = None
    """How tensors of the user's own mixins were split over ranks: patterns of names, to `rows` or `columns`."""
    fused_rows: FusedRows | None = None
    """How `query_key_value` is fused: Q, K and V as blocks over all heads, or head by head; as the family's releases
    did when `None`."""


@final
@dataclass(frozen=True, kw_only=True)
class LegacyCheckpoint:
    """An old checkpoint, understood."""

    folder: LegacyFolder
    family: str
    generation: Generation
    iteration: int | None
    parts: tuple[Part, ...]
    rest: ParameterSource
    """Tensors outside every part of a model of several, under their own names."""
    vocabulary: tuple[int, int]
    """Rows of the word embeddings as stored, and as written."""
    files: tuple[TorchFile, ...]


def open_legacy(path: str | os.PathLike[str], options: Options | None = None) -> LegacyCheckpoint:
    """Open an old checkpoint and decide where everything goes; no weight is read, except to see what is tied.

    Each part's `parameters` reads whole parameters and slices of them, for a run of any number of ranks.

    Raises:
        CheckpointError: Files, names or shapes are not those of a checkpoint that can be migrated; nothing is read.
        ConfigError: What it is cannot be told.
    """
    options = options or Options()
    folder = find_checkpoint(path, step=options.step)
    files = tuple(TorchFile(file) for file in folder.files)
    arguments = Arguments({**folder.config, **(options.arguments or {})}, folder.config_place)
    _check_ranks(folder, files, arguments)
    positions = options.positions or {}
    names = [canonical_names(file.tensors, positions, str(file.path)) for file in files]
    source = MergedSource(files, names, [user_split(*item) for item in (options.splits or {}).items()])
    _check_splits(source, options.splits or {})
    family = find_family(options.family, arguments)
    checkpoint = Checkpoint(
        source=source,
        arguments=_without_padding(arguments) if options.keep_padding else arguments,
        vocab_size=options.vocab_size,
        cross_norms=options.cross_norms,
    )
    parts = tuple(_parts(checkpoint, family, options))
    return LegacyCheckpoint(
        folder=folder,
        family=family,
        generation=generation(names[0].values(), multi_query=bool(arguments.get("num_multi_query_heads", int, 0))),
        iteration=_whole_number(files[0].content.get("iteration")),
        parts=parts,
        rest=_rest(source, parts),
        vocabulary=_vocabulary(source, parts[0]),
        files=files,
    )


def _whole_number(value: object) -> int | None:
    return value if type(value) is int else None


def _without_padding(arguments: Arguments) -> Arguments:
    """The arguments without what they say of the vocabulary, so that all its rows count."""
    return Arguments({key: value for key, value in arguments.values.items() if key != "vocab_size"}, arguments.where)


def _check_ranks(folder: LegacyFolder, files: Sequence[TorchFile], arguments: Arguments) -> None:
    """All ranks are here, and all are of one step."""
    said = [arguments.get("model_parallel_size", int, len(files))]
    said += [file.content["mp_world_size"] for file in files if isinstance(file.content.get("mp_world_size"), int)]
    if max(said) > len(files):
        raise missing_ranks(folder.files[0].parent, range(len(files), max(said)), max(said))
    if min(said) < len(files):
        raise CheckpointError(
            f"{folder.files[0].parent} has {len(files)} files mp_rank_XX, and the model was split over {min(said)} "
            f"ranks: files of another run are among them, or it is wrong (--set model_parallel_size={len(files)})"
        )
    for key in ("iteration", "global_steps"):
        steps = {file.path.name: file.content.get(key) for file in files}
        if len(set(map(str, steps.values()))) > 1:
            shown = ", ".join(f"{name}: {step}" for name, step in steps.items())
            raise CheckpointError(f"{folder.files[0].parent}: the ranks are of different steps ({key} {shown})")


def _check_splits(source: MergedSource, patterns: Iterable[str]) -> None:
    """Each pattern of the caller is of some tensor: a slip would leave equal shares unmerged."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in source.names()):
            raise CheckpointError(f"--split '{pattern}=...' is of no tensor.{nearest(pattern, source.names())}")


def _parts(checkpoint: Checkpoint, family: str, options: Options) -> Iterator[Part]:
    by_head = options.fused_rows == "heads" or (options.fused_rows is None and family in _BY_HEAD)
    if family in LAYOUTS:
        yield plan_part(checkpoint, LAYOUTS[family](checkpoint), prefix="", by_head=by_head, experts=False)
        return
    prefixes = parts_of(checkpoint)
    if not prefixes:
        raise CheckpointError(
            f"{checkpoint.arguments.where}: the checkpoint has no transformer.layers: it is no SAT model"
        )
    for prefix in prefixes:
        if not _PART.fullmatch(prefix):
            raise CheckpointError(f"{checkpoint.arguments.where}: {prefix!r} is no name of a part of a model")
        found = generic(checkpoint, family, prefix)
        part = plan_part(checkpoint, found, prefix=prefix, by_head=by_head, experts=True)
        yield part if len(prefixes) > 1 else replace(part, folder="")


def _first_prefix(source: MergedSource) -> str:
    return next(name.removesuffix(WORDS) for name in source.names() if name.endswith(WORDS))


def _rest(source: MergedSource, parts: Sequence[Part]) -> ParameterSource:
    """What belongs to no part, such as the temperature between two towers."""
    prefixes = tuple(part.prefix for part in parts)
    places = {}
    for name in source.names():
        if not name.startswith(prefixes):
            shape = source.shape(name)
            places[name] = Place(name, ((0, shape[0] if shape else 0),), shape)
    return ParameterSource(source, places, torch.float32)


def _vocabulary(source: MergedSource, part: Part) -> tuple[int, int]:
    prefix = part.prefix or _first_prefix(source)
    before = source.shape(f"{prefix}{WORDS}")[0]
    words = [name for name in part.parameters.names() if name.endswith("word_embeddings.weight")]
    return before, part.parameters.shape(words[0])[0] if words else before
