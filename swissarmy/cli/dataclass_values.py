"""Dataclasses from plain values, and what their fields say."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union

T = TypeVar("T")


def construct(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from values by field; dicts become the dataclasses that the fields declare.

    Raises:
        ConfigError: The dataclass refuses the values.
    """
    made = dict(values)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        inner = inner_dataclass(typing.get_type_hints(cls)[field.name])
        if inner is not None and isinstance(made.get(field.name), dict):
            default = default_of(field)
            given = made[field.name] if default is None else {**shallow(default), **made[field.name]}
            made[field.name] = construct(inner, given)
    return cls(**made)


def inner_dataclass(hint: Any) -> type[Any] | None:
    """The dataclass that a field holds, also where it may be `None`."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    found = [member for member in members if dataclasses.is_dataclass(member) and isinstance(member, type)]
    return found[0] if found else None


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a dataclass cannot be made without this field."""
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, or `None`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def shallow(instance: Any) -> dict[str, Any]:
    """An instance's fields, by name."""
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
