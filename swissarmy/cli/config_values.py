"""YAML nodes into values of the types that a dataclass declares, collecting every problem with its line."""

import dataclasses
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Union, final

import yaml

from swissarmy.cli.dataclass_values import construct, default_of, is_required
from swissarmy.core.errors import ConfigError, nearest
from swissarmy.core.plain_yaml import TAG, scalar_value

REFUSED: Final = object()
"""In place of a value that had a problem."""

_NAMES: Mapping[Any, str] = {
    str: "text",
    Path: "a path",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


@final
class Reader:
    """Reads one file's nodes.

    Args:
        complete: Whether a key that has no default must be there.
        without: Fields of the outermost dataclass that the file cannot set.
    """

    def __init__(self, *, complete: bool, without: Collection[str] = ()) -> None:
        self.complete = complete
        self.without = without
        self.problems: list[tuple[int, str]] = []

    def fields(self, node: yaml.Node | None, cls: type[Any], place: str = "") -> dict[str, Any]:
        """The values for a dataclass, by field; `place` is the dotted path so far, ending in a dot."""
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init and (place or f.name not in self.without)}
        values: dict[str, Any] = {}
        for key, key_node, value in self._items(node, place, hyphens="_"):
            if key in fields:
                reader = self._filled() if dataclasses.is_dataclass(default_of(fields[key])) else self
                values[key] = reader._value(value, hints[key], place + key)
            else:
                self._add(key_node, f"unknown key '{place}{key}'.{nearest(key, fields)}")
        for name, field in fields.items():
            if self.complete and is_required(field) and name not in values:
                self._add(node, f"'{place}{name}' is missing")
        return values

    def _filled(self) -> "Reader":
        """A reader into the same report, for a dataclass whose missing keys come from a default."""
        reader = Reader(complete=False)
        reader.problems = self.problems
        return reader

    def _items(
        self, node: yaml.Node | None, place: str, *, hyphens: str = "-"
    ) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        lines: dict[str, int] = {}
        for key_node, value in () if node is None else node.value:
            if key_node.tag != f"{TAG}str":
                self._add(key_node, f"{place}{_shown(key_node)} is no key: a key is text")
                continue
            key = key_node.value.replace("-", hyphens)
            if key in lines:
                self._add(key_node, f"duplicate key '{place}{key}', given before on line {lines[key]}")
                continue
            lines[key] = _line(key_node)
            yield key, key_node, value

    def _value(self, node: yaml.Node, hint: Any, place: str) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):
            return self._one_of(node, arguments, place)
        if origin is Literal:
            return self._choice(node, arguments, place)
        if hint is Any:
            return self.plain(node, place)
        if dataclasses.is_dataclass(hint) and isinstance(node, yaml.MappingNode):
            return self.fields(node, typing.cast(type[Any], hint), f"{place}.")
        if origin in (dict, Mapping) and isinstance(node, yaml.MappingNode):
            return {
                key: self._value(item, arguments[1], f"{place}.{key}")
                for key, _, item in self._items(node, f"{place}.")
            }
        if origin in (list, tuple, Sequence) and isinstance(node, yaml.SequenceNode):
            return self._several(node, hint, place)
        if hint in _NAMES and _fits(node, hint):
            return hint(scalar_value(node)) if hint in (Path, float) else scalar_value(node)
        return self._refuse(node, place, _expected(hint))

    def _one_of(self, node: yaml.Node, hints: Sequence[Any], place: str) -> Any:
        """The first member of the union that takes the node; with one besides `None`, its own problems."""
        if type(None) in hints and _fits(node, type(None)):
            return None
        wanted = [hint for hint in hints if hint is not type(None)]
        if len(wanted) == 1:
            return self._value(node, wanted[0], place)
        for hint in wanted:
            trial = Reader(complete=self.complete)
            value = trial._value(node, hint, place)
            if not trial.problems:
                return value
        return self._refuse(node, place, " or ".join(map(_expected, wanted)))

    def _choice(self, node: yaml.Node, choices: Sequence[Any], place: str) -> Any:
        value = scalar_value(node) if isinstance(node, yaml.ScalarNode) else REFUSED
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return choice
        expected = "one of " + ", ".join(map(str, choices))
        return self._refuse(node, place, expected, hint=nearest(str(value), map(str, choices)))

    def _several(self, node: yaml.SequenceNode, hint: Any, place: str) -> Any:
        arguments = typing.get_args(hint)
        if typing.get_origin(hint) is tuple and arguments[-1] is not ...:
            if len(node.value) != len(arguments):
                return self._refuse(node, place, f"a list of {len(arguments)}")
            hints = list(arguments)
        else:
            hints = [arguments[0]] * len(node.value)
        pairs = zip(node.value, hints, strict=True)
        values = [self._whole(item, kind, f"{place}[{index}]") for index, (item, kind) in enumerate(pairs)]
        return values if typing.get_origin(hint) is list else tuple(values)

    def _whole(self, node: yaml.Node, hint: Any, place: str) -> Any:
        """An item of a list: a dataclass among them cannot be completed from elsewhere, so it is made here."""
        if not dataclasses.is_dataclass(hint):
            return self._value(node, hint, place)
        inner = Reader(complete=True)
        value = inner._value(node, hint, place)
        self.problems += inner.problems
        if inner.problems:
            return REFUSED
        try:
            return construct(typing.cast(type[Any], hint), value)
        except ConfigError as error:
            self._add(node, f"{place}: {error}")
            return REFUSED

    def plain(self, node: yaml.Node, place: str) -> Any:
        """A value of no declared type; `place` is what leads to it."""
        if isinstance(node, yaml.MappingNode):
            return {key: self.plain(item, f"{place}.{key}") for key, _, item in self._items(node, f"{place}.")}
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, f"{place}[{index}]") for index, item in enumerate(node.value)]
        return scalar_value(node)

    def _refuse(self, node: yaml.Node, place: str, expected: str, hint: str = "") -> Any:
        wants_text = expected in (_NAMES[str], _NAMES[Path]) and isinstance(node, yaml.ScalarNode)
        cure = f"; in quotes it is text: '{node.value}'" if wants_text else ""
        self._add(node, f"{place}: expected {expected}, not {_shown(node)}{cure}.{hint}")
        return REFUSED

    def _add(self, node: yaml.Node | None, text: str) -> None:
        self.problems.append((1 if node is None else _line(node), text))


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line + 1
    return line


def _fits(node: yaml.Node, hint: Any) -> bool:
    """Whether a node is a scalar of that type; a whole number is a number too."""
    value = scalar_value(node) if isinstance(node, yaml.ScalarNode) else REFUSED
    kinds = {float: (int, float), Path: (str,)}.get(hint, (hint,))
    return type(value) in kinds


def _shown(node: yaml.Node) -> str:
    """A node in a message: the kind of thing that was found, and what stands there."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return f"a list of {len(node.value)}"
    value = scalar_value(node)
    text = node.value if len(node.value) <= 40 else f"{node.value[:40]}..."
    return "null" if value is None else f"{_NAMES[type(value)]} ({text!r})" if isinstance(value, bool) else repr(text)


def _expected(hint: Any) -> str:
    """A type in a message."""
    if hint in _NAMES:
        return _NAMES[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple, Sequence):
        return f"a list (each {_expected(arguments[0])})"
    return "a mapping" if origin in (dict, Mapping) or dataclasses.is_dataclass(hint) else str(hint)
