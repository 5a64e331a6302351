"""Configurations: frozen, keyword-only, validated with every problem in one report."""

import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Self, Union

from swissarmy.core.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The base of every configuration. A subclass adds fields, and `problems` for what types cannot say."""

    def __new__(cls, **values: Any) -> Self:
        """Refuse names that are no fields.

        Raises:
            ConfigError: With the nearest name of each.
        """
        report(f"{cls.__name__}:", _unknown(cls, values))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check types, then what the subclass checks.

        Raises:
            ConfigError: With a line for each problem.
        """
        problems = list(_type_problems(type(self), self.to_dict()))
        report(f"{type(self).__name__}:", problems or self.problems())

    def problems(self) -> Iterator[str]:
        """A line for each thing that is wrong with the values; types are right when this is called."""
        yield from ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str | None = None) -> Self:
        """Build from a mapping, refusing unknown keys by their nearest name.

        Raises:
            ConfigError: Unknown or missing keys, wrong types, or values that `problems` refuses.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        known = {key: _as_tuple(value) for key, value in values.items() if key in fields}
        problems = list(_unknown(cls, values))
        problems += [f"{name} is missing" for name, field in fields.items() if name not in known and _required(field)]
        report(f"{where or cls.__name__}:", [*problems, *_type_problems(cls, known)])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def replace(self, **changes: Any) -> Self:
        """The same configuration with some fields changed."""
        return type(self).from_dict({**self.to_dict(), **changes})


def report(title: str, problems: Iterable[str]) -> None:
    """Raise one `ConfigError` for all problems; do nothing when there are none."""
    lines = list(problems)
    if len(lines) == 1:
        raise ConfigError(f"{title} {lines[0]}")
    if lines:
        raise ConfigError("\n  - ".join([f"{title} {len(lines)} problems", *lines]))


def size_problems(**sizes: Any) -> Iterator[str]:
    """A line for each size that is no whole number of at least 1."""
    for name, size in sizes.items():
        if not _fits(size, int) or size < 1:
            yield f"{name}={size!r} must be a whole number, at least 1"


def _unknown(cls: type[Config], names: Iterable[str]) -> Iterator[str]:
    fields = [field.name for field in dataclasses.fields(cls)]
    yield from (f"unknown field '{name}'.{nearest(str(name), fields)}" for name in names if name not in fields)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _type_problems(cls: type[Config], values: Mapping[str, Any]) -> Iterator[str]:
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            yield f"{name}={value!r} is not {_name(hints[name])}"


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _name(hint: Any) -> str:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(argument) for argument in typing.get_args(hint))
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
