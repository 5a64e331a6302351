"""Finding the files of an old checkpoint: `latest`, the folder of an iteration, one file for each rank."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.hub import describe_folder
from swissarmy.interop.json_object import read_json_object
from swissarmy.interop.tensor_source import TensorFile

_CONFIG_FILE = "model_config.json"
_TRACKER = "latest"
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_STEP = re.compile(r"\d+(-ema)?|release")


@final
@dataclass(frozen=True)
class LegacyFolder:
    """Where a checkpoint lies."""

    root: Path
    """The folder that was named, or that holds the file that was named."""
    step: str
    """The iteration, or `release`; empty where a file was named alone."""
    files: tuple[Path, ...]
    """One for each model-parallel rank, in their order."""
    config: Mapping[str, Any]
    """What `model_config.json` says; empty where there is none."""
    config_place: str
    """Where it lies, or is missing; begins the message of an error."""


def find_checkpoint(path: str | os.PathLike[str], *, step: str | None = None) -> LegacyFolder:
    """The files of a checkpoint.

    Args:
        path: The folder with `latest`, the folder of one iteration, or a single `.pt` file.
        step: An iteration, or `release`, in place of what `latest` says.

    Raises:
        CheckpointError: There is no checkpoint, `latest` is no guide (the steps that exist are listed), a rank's file
            is missing, or a link leads out of the folder.
    """
    if "\0" in os.fspath(path):
        raise CheckpointError(f"{os.fspath(path)!r} is not a path: it contains a NUL")
    given = Path(path)
    if given.is_file():
        return LegacyFolder(given.parent, "", (given,), *_read_config(given.parent, given.parent.parent))
    if not given.is_dir():
        raise CheckpointError(f"{given}: there is no such file or folder")
    if step is None and _rank_files(given):
        return LegacyFolder(given, given.name, _all_ranks(given, given), *_read_config(given, given.parent))
    chosen = _latest(given) if step is None else _checked_step(given, step, f"step {step!r}")
    files = _all_ranks(given, given / chosen)
    return LegacyFolder(given, chosen, files, *_read_config(given))


def _latest(root: Path) -> str:
    """The step that the tracker file names."""
    tracker = root / _TRACKER
    if not os.path.lexists(tracker):
        raise CheckpointError(f"{root} has no file '{_TRACKER}', which names the newest step; {_steps(root)}")
    file = TensorFile(_inside(root, tracker))
    text = file.read_bytes(0, min(file.size, 100)).decode("utf-8", "replace").strip()
    return _checked_step(root, text, f"{tracker} says {text!r}" if text else f"{tracker} is empty")


def _checked_step(root: Path, step: str, says: str) -> str:
    if not _STEP.fullmatch(step):
        what = "" if not step else ", which is neither an iteration nor 'release'"
        raise CheckpointError(f"{says}{what}; {_steps(root)}")
    if not (root / step).is_dir():
        raise CheckpointError(f"{says}, and there is no such folder; {_steps(root)}")
    return step


def _steps(root: Path) -> str:
    steps = [item.name for item in root.iterdir() if _STEP.fullmatch(item.name) and item.is_dir()]
    steps.sort(key=lambda name: (len(name), name))
    if not steps:
        return f"no step is there either: {describe_folder(root)}"
    return f"the steps that exist are: {', '.join(steps)}. Name one with --step"


def _rank_files(folder: Path) -> dict[int, Path]:
    found = {item: _RANK_FILE.fullmatch(item.name) for item in folder.iterdir()}
    return {int(match[1]): item for item, match in sorted(found.items()) if match is not None}


def _all_ranks(root: Path, folder: Path) -> tuple[Path, ...]:
    """The files of ranks 0, 1, ...; none may be missing between them."""
    _inside(root, folder)
    ranks = _rank_files(folder)
    if not ranks:
        raise CheckpointError(f"{folder} holds no mp_rank_XX_model_states.pt; {describe_folder(folder)}")
    size = max(ranks) + 1
    if len(ranks) < size:
        raise missing_ranks(folder, (rank for rank in range(size) if rank not in ranks), size)
    return tuple(_inside(root, ranks[rank]) for rank in sorted(ranks))


def missing_ranks(folder: Path, missing: Iterable[int], size: int) -> CheckpointError:
    """The error for a checkpoint of `size` ranks that lacks some; the first few are named."""
    names = ", ".join(f"mp_rank_{rank:02d}_model_states.pt" for rank in islice(missing, 8))
    return CheckpointError(f"{folder} lacks {names}: the model was split over {size} ranks, and every share is needed")


def _read_config(*folders: Path) -> tuple[Mapping[str, Any], str]:
    """What the first `model_config.json` says, and where it is."""
    for folder in folders:
        file = folder / _CONFIG_FILE
        if os.path.lexists(file):
            return read_json_object(_inside(folder, file)), str(file)
    return {}, f"{folders[0]}, without {_CONFIG_FILE}"


def _inside(root: Path, path: Path) -> Path:
    """The path itself, if what it leads to lies in the folder."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise CheckpointError(f"{path} is a link that leads out of its folder; give that place's own path")
    return path
