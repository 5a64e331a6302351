"""What goes wrong, said so that it can be mended: what, where, the nearest valid name, and the cure."""

import difflib
import importlib
import pickle
from collections.abc import Iterable
from types import ModuleType


class SwissArmyError(ValueError):
    """The base of every error that this library raises for something the caller can change."""


class ConfigError(SwissArmyError):
    """A configuration is invalid; the message lists every problem found, not only the first."""


class CheckpointError(SwissArmyError):
    """A checkpoint cannot be read or written as asked; nothing was half done."""


class HookDefinitionError(SwissArmyError):
    """A class defines a hook that does not exist, or with a signature that cannot be called."""


class HookConflictError(SwissArmyError):
    """Two mixins claim the same hook."""


class HookCallError(SwissArmyError):
    """A call brought a keyword that nothing accepts, or a hook returned what it must not."""


class TokenizerError(SwissArmyError):
    """A tokenizer cannot be read, or cannot do what it was asked."""


class MissingExtraError(SwissArmyError, ImportError):
    """An optional dependency is not installed; the message says which extra brings it."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the candidate closest to `name`, or the empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def require_extra(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra to install.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtraError(f'{purpose} needs `{module}`: pip install "swissarmy[{extra}]"') from error


def sendable(error: Exception) -> Exception:
    """The error for another process: one of a plain type with the same words where it cannot travel by pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - an exception's own way to be copied may fail in any way
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            plain.add_note(note)
        return plain
    return error
