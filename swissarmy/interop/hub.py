"""Where a checkpoint is: a local path, or a name on the Hugging Face hub that is downloaded into its cache."""

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from swissarmy.core.errors import CheckpointError, nearest

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def resolve(path_or_name: str | Path, allow_patterns: Sequence[str], *, revision: str | None = None) -> Path:
    """The local file or folder of a checkpoint; what is on disk is used as it is and never needs a network.

    Args:
        path_or_name: a file or folder, or a name on the hub such as `openai-community/gpt2`.
        allow_patterns: which files of a hub repository to fetch, such as `["*.json"]`.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: there is no such path or name, it is gated, or the hub cannot be reached.
    """
    if not str(path_or_name):
        raise CheckpointError("the name of a checkpoint is empty; give a path, or a name on the Hugging Face hub")
    path = Path(path_or_name).expanduser()
    if _exists(path):
        return path
    name = str(path_or_name)
    if isinstance(path_or_name, Path) or _looks_like_path(name):
        raise CheckpointError(f"{path_or_name}: there is no such file or folder; {_surroundings(path)}")
    return _download(name, allow_patterns, revision)


def describe_folder(folder: Path, *, limit: int = 12) -> str:
    """For messages: what a folder holds."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return f"{folder} holds {', '.join(names[:limit])}{more}" if names else f"{folder} is empty"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for a file system, or a folder that may not be read
        return False


def _looks_like_path(name: str) -> bool:
    """Names that the hub cannot have, and those whose first part is a folder here."""
    if not _HUB_NAME.fullmatch(name) or ".." in name or name.endswith((".gguf", ".json")):
        return True
    first, slash, _ = name.partition("/")
    return bool(slash) and _exists(Path(first))


def _surroundings(path: Path) -> str:
    """What is in the nearest folder above `path` that exists."""
    for parent in path.parents:
        if _exists(parent) and parent.is_dir():
            wanted = path.relative_to(parent).parts[0]
            return f"{describe_folder(parent)}.{nearest(wanted, (entry.name for entry in parent.iterdir()))}"
    return "nor is there any folder above it"


def _download(name: str, allow_patterns: Sequence[str], revision: str | None) -> Path:
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(allow_patterns)))
    except hub_errors.GatedRepoError as error:
        cure = f"accept its terms at https://huggingface.co/{name} and log in with `hf auth login`"
        raise CheckpointError(f"{name!r} on the Hugging Face hub is gated: {cure}") from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name!r} on the Hugging Face hub has no revision {revision!r}") from error
    except hub_errors.RepositoryNotFoundError as error:
        cure = "check the spelling; a private one needs `hf auth login`"
        raise CheckpointError(f"{name!r} is no folder here and no name on the Hugging Face hub: {cure}") from error
    except (hub_errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name!r} is no folder here, and could not be fetched{at} from the Hugging Face hub ({reason}); "
            "without a network give the path of a downloaded folder"
        ) from error
