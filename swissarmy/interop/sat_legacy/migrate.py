"""`migrate`: an old SAT checkpoint into a folder that `sat.load` reads, and `transformers` where it has the family.

The family's own tensors go to `model.safetensors` under their Hugging Face names, as `save_pretrained` writes them;
those of other mixins to `mixins/model.safetensors`. `migration.json` says where all of it came from, so that doing
the same again is seen to be done.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.json_object import read_json_object
from swissarmy.interop.mixin_folder import FOLDER as MIXINS_FOLDER
from swissarmy.interop.safe_write import verify_manifest, write_folder
from swissarmy.interop.safetensors_write import save_safetensors
from swissarmy.interop.sat_legacy.families import LAYOUTS
from swissarmy.interop.sat_legacy.part import Part, count, lazily
from swissarmy.interop.sat_legacy.plan import LegacyCheckpoint, Options, open_legacy
from swissarmy.interop.tensor_source import explained

RECORD: Final = "migration.json"
REST_FOLDER: Final = "rest"
_FORMAT = 1


@final
@dataclass(frozen=True, kw_only=True)
class Migration:
    """What was made of an old checkpoint."""

    target: str
    family: str
    model_type: str
    """The family here: the folder loads as this one."""
    generation: int
    """Of names: 1 mixins by position, 2 mixins by name, 3 gated MLPs, experts, multi-query attention."""
    ranks: int
    """How many model-parallel files were merged."""
    step: str
    iteration: int | None
    parts: tuple[str, ...]
    """The folders inside the target, where it holds a model of several parts."""
    parameters: int
    vocabulary: tuple[int, int]
    """Rows of the word embeddings before and after padding was cut."""
    mixins: Mapping[str, int]
    """Mixins whose weights were kept for the caller's own mixins, and how many parameters each has."""
    tied: tuple[str, ...]
    """Old tensors that were another one again."""
    zeros: tuple[str, ...]
    """Parameters that the old model did not have, and that are nothing at zero."""
    dropped: tuple[str, ...]
    """Buffers that are computed and need no file."""
    done_before: bool
    """Whether the target held all this already, and nothing was written."""


def migrate(
    source: str | os.PathLike[str], target: str | os.PathLike[str], options: Options | None = None
) -> Migration:
    """Migrate an old checkpoint; its files are only read, and `target` appears complete or not at all.

    Args:
        source: The folder with `latest`, that of one iteration, or a single `.pt` file.
        target: A new folder. If it holds the result of this very migration, nothing is done.
        options: What the checkpoint itself does not say.

    Raises:
        CheckpointError: The checkpoint cannot be read safely or understood, or `target` holds something else.
        ConfigError: The family or its configuration cannot be told.
    """
    checkpoint = open_legacy(source, options)
    folder = Path(os.path.realpath(target))
    if folder.is_relative_to(os.path.realpath(checkpoint.folder.root)):
        raise CheckpointError(f"{target} is inside {checkpoint.folder.root}, which is only read: name another folder")
    record = {"format": _FORMAT, "source": _fingerprint(checkpoint), "plan": _plan_hash(checkpoint)}
    if _is_done(folder, record):
        return _describe(checkpoint, folder, done_before=True)
    for file in checkpoint.files:
        file.check_records()
    with write_folder(folder) as temporary:
        for part in checkpoint.parts:
            _write_part(temporary / part.folder, part)
        if checkpoint.rest.names():
            (temporary / REST_FOLDER).mkdir(exist_ok=True)
            save_safetensors(temporary / REST_FOLDER, lazily(checkpoint.rest))
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return _describe(checkpoint, folder, done_before=False)


def _write_part(folder: Path, part: Part) -> None:
    folder.mkdir(exist_ok=True)
    dtype = str(part.parameters.dtype(part.parameters.names()[0])).removeprefix("torch.")
    values = {**part.config, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    save_safetensors(folder, part.tensors())
    if part.added.names():
        (folder / MIXINS_FOLDER).mkdir()
        save_safetensors(folder / MIXINS_FOLDER, lazily(part.added))


def _fingerprint(checkpoint: LegacyCheckpoint) -> list[dict[str, Any]]:
    """Names, sizes and hashes of the files of weights; what `model_config.json` decides is in the plan."""
    prints = []
    for path in (file.path for file in checkpoint.files):
        with explained(path), open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        prints.append({"file": path.name, "bytes": path.stat().st_size, "sha256": sha256})
    return prints


def _plan_hash(checkpoint: LegacyCheckpoint) -> str:
    """What is made of which tensor: two ways of asking for the same give the same."""
    plan: list[Any] = [checkpoint.rest.description()]
    plan += [
        [part.folder, part.config, part.parameters.description(), part.added.description()] for part in checkpoint.parts
    ]
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _is_done(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the folder is what this migration makes, whole.

    Raises:
        CheckpointError: It is, and was damaged since.
    """
    file = folder / RECORD
    if not file.is_file():
        return False
    with explained(file):
        written = read_json_object(file)
    if written != record:
        return False
    verify_manifest(folder)
    return True


def _describe(checkpoint: LegacyCheckpoint, folder: Path, *, done_before: bool) -> Migration:
    parts = checkpoint.parts
    mixins: dict[str, int] = {}
    for part in parts:
        start = f"{part.folder}." if part.folder else ""
        for name in part.added.names():
            mixin = start + re.sub(r"(.*mixins\.[^.]+)\..*", r"\1", name)
            mixins[mixin] = mixins.get(mixin, 0) + part.added.shape(name).numel()
    return Migration(
        target=str(folder),
        family=checkpoint.family,
        model_type=checkpoint.family if checkpoint.family in LAYOUTS else "swissarmy",
        generation=checkpoint.generation,
        ranks=len(checkpoint.files),
        step=checkpoint.folder.step,
        iteration=checkpoint.iteration,
        parts=tuple(part.folder for part in parts if part.folder),
        parameters=sum(count(part.parameters) for part in parts) + count(checkpoint.rest),
        vocabulary=checkpoint.vocabulary,
        mixins=mixins,
        tied=tuple(name for part in parts for name in part.tied),
        zeros=tuple(name for part in parts for name in part.zeros),
        dropped=tuple(name for part in parts for name in part.dropped),
        done_before=done_before,
    )
