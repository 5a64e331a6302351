"""A strict reader of YAML config files: a dataclass type in, a validated instance out.

Plain values mean what YAML 1.2 says: `1e-4` is a number, and `no`, `on` and `12:30` are text. Every problem of a file
is in one report, with its line. Tags and aliases are refused, so nothing is ever constructed but plain values and the
dataclass itself.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from swissarmy.cli.config_values import TAG, Reader
from swissarmy.cli.dataclass_values import construct
from swissarmy.core.errors import ConfigError

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
            node: yaml.Node | None = yaml.compose(file, Loader=_Loader)
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


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema for plain scalars; no tags and no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As in the base class, without what a file could construct objects with, or endless values."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"aliases (*{event.anchor}) are not read: write the value out"
        elif event.tag is not None:
            problem = f"tags ({event.tag.replace(TAG, '!!')}) are not read: write a plain value, or text in quotes"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_CORE_SCHEMA: Mapping[str, str] = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "null": r"~|null|Null|NULL|",
}

_Loader.yaml_implicit_resolvers = {}
for _name, _pattern in _CORE_SCHEMA.items():
    _Loader.add_implicit_resolver(f"{TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), None)
