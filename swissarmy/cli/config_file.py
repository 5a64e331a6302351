"""A strict reader of YAML config files: a dataclass type in, a validated instance out.

Every problem of a file is in one report, with its line. Tags and aliases are refused, so nothing is ever constructed
but plain values and the dataclass itself.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import yaml

from swissarmy.cli.config_values import Reader
from swissarmy.cli.dataclass_values import construct
from swissarmy.core.config import report
from swissarmy.core.errors import ConfigError
from swissarmy.core.plain_yaml import compose

T = TypeVar("T")


def read_config(path: str | Path, cls: type[T]) -> T:
    """An instance of a dataclass from a YAML file; nested dataclasses are nested mappings.

    Raises:
        ConfigError: Every unknown, duplicate or missing key and every wrong type, each with file:line; or values that
            the dataclass itself refuses.
    """
    values = _read(Path(path), cls, complete=True, without=())
    try:
        return construct(cls, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_values(path: str | Path, cls: type[Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """The values that a YAML file gives for some of a dataclass's fields, as dicts where a field is a dataclass.

    Args:
        path: The file.
        cls: The dataclass; a field that the file leaves out may be filled in from elsewhere.
        without: Fields that a file cannot set.

    Raises:
        ConfigError: As for `read_config`, except for missing keys.
    """
    return _read(Path(path), cls, complete=False, without=without)


def read_value(text: str, place: str) -> Any:
    """A plain value on the command line, as it would be in a file; what is no YAML is text.

    Raises:
        ConfigError: A mapping has a key twice, or one that is no text; `place` begins its name.
    """
    try:
        node = compose(text)
    except (yaml.YAMLError, RecursionError):
        return text
    reader = Reader(complete=False)
    value = None if node is None else reader.plain(node, place)
    report(f"{text!r}:", [problem for _, problem in reader.problems])
    return value


def _read(path: Path, cls: type[Any], *, complete: bool, without: Collection[str]) -> dict[str, Any]:
    reader = Reader(complete=complete, without=without)
    node = _compose(path)
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: the file must be a mapping, lines of `key: value`.")
    values = reader.fields(node, cls)
    problems = [f"{path}:{line}: {text}" for line, text in sorted(reader.problems)]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  - ".join([f"{path}: {len(problems)} problems", *problems]))
    return values


def _compose(path: Path) -> yaml.Node | None:
    """The file's syntax tree; nothing in it is constructed."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            node = compose(file)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8 at byte {error.start}") from error
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ConfigError(f"{path}: not valid YAML: {reason}") from error
    return node
