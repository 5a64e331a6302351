"""Flags, with the values of a config file underneath, into a command's options."""

import dataclasses
import typing
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import tyro

from swissarmy.cli.command import OF_THE_COMMAND_LINE, Command, Options, UsageError
from swissarmy.cli.config_file import read_values
from swissarmy.cli.dataclass_values import construct, default_of, inner_dataclass, is_required, shallow
from swissarmy.core.errors import ConfigError

T = TypeVar("T")
_NULLS: Final = ("null", "None")
"""No value, as YAML and as Python write it."""


def parse(name: str, command: Command, arguments: Sequence[str]) -> Options:
    """A command's options from its flags; where `--config` names a file, flags win over it.

    Raises:
        UsageError: The config file has problems.
        SystemExit: The flags have problems, which are printed (2), or help was asked for (0).
    """
    path = _config_flag(arguments)
    try:
        values = {} if path is None else _config_values(path, command)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    _check_given_once(arguments, command)
    arguments, nulls = _without_nulls(arguments, command)
    values = {**values, **nulls}
    arguments = _spread(arguments, command.repeatable)
    for flag in {argument.split("=")[0] for argument in arguments}.intersection(command.repeatable):
        values.pop(flag.removeprefix("--").replace("-", "_"), None)  # the flag parser would add to it
    return parse_over(command.options_class, values, arguments, prog=f"sat {name}", description=_description(command))


def _without_nulls(arguments: Sequence[str], command: Command) -> tuple[list[str], dict[str, None]]:
    """The arguments without those such as `--clip-grad-norm null`, and the fields that these set to `None`."""
    hints = typing.get_type_hints(command.options_class)
    left, rest, nulls = deque(arguments), list[str](), dict[str, None]()
    while left:
        argument = left.popleft()
        flag, _, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        may_be_null = flag.startswith("--") and type(None) in typing.get_args(hints.get(name))
        if may_be_null and (value in _NULLS or (not value and left and left[0] in _NULLS)):
            nulls[name] = None
            if value not in _NULLS:
                left.popleft()
        else:
            rest.append(argument)
    return rest, nulls


def _check_given_once(arguments: Sequence[str], command: Command) -> None:
    """Refuse a flag of several values that comes twice: the second would take the place of the first.

    Raises:
        UsageError: With how to give them.
    """
    hints = typing.get_type_hints(command.options_class)
    times = Counter(argument.split("=")[0] for argument in arguments if argument.startswith("--"))
    for flag, count in times.items():
        kind = hints.get(flag.removeprefix("--").replace("-", "_"))
        if count > 1 and flag not in command.repeatable and typing.get_origin(kind) is tuple:
            raise UsageError(f"{flag} is given {count} times: give all its values after one, {flag} A B.")


def parse_over(
    cls: type[T], values: Mapping[str, Any], arguments: Sequence[str], *, prog: str, description: str = ""
) -> T:
    """An instance of a dataclass from flags, over values by field (dicts for nested dataclasses)."""
    parsed: T = tyro.cli(
        _with_defaults(cls, values),
        args=list(arguments),
        prog=prog,
        description=description,
        config=(tyro.conf.DisallowNone,),
    )
    return _restore(cls, parsed)


def _with_defaults(cls: type[Any], values: Mapping[str, Any]) -> type[Any]:
    """The dataclass with other defaults, which may leave required fields of nested ones to the flags."""
    if not values:
        return cls
    hints = typing.get_type_hints(cls, include_extras=True)
    changed: list[Any] = []
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, inner = values[field.name], inner_dataclass(typing.get_type_hints(cls)[field.name])
        if inner is None or not isinstance(value, dict):
            default = _factory(value) if isinstance(value, dict) else dataclasses.field(default=value)
            changed.append((field.name, hints[field.name], default))
        elif default_of(field) is None and any(is_required(f) and f.name not in value for f in _fields(inner)):
            changed.append((field.name, _with_defaults(inner, value)))
        else:
            default = default_of(field)
            made = construct(inner, value if default is None else {**shallow(default), **value})
            changed.append((field.name, hints[field.name], _factory(made)))
    return dataclasses.make_dataclass(cls.__name__, changed, bases=(cls,), frozen=True, kw_only=True)


def _fields(cls: type[Any]) -> Sequence["dataclasses.Field[Any]"]:
    return dataclasses.fields(cls)


def _factory(value: Any) -> Any:
    return dataclasses.field(default_factory=lambda: value)


def _restore(cls: type[T], instance: Any) -> T:
    """The same values in the class itself, not in the one with other defaults."""
    made = {}
    for name, value in shallow(instance).items():
        inner = inner_dataclass(typing.get_type_hints(cls)[name])
        made[name] = _restore(inner, value) if inner is not None and isinstance(value, inner) else value
    return cls(**made)


def _config_values(path: Path, command: Command) -> dict[str, Any]:
    other = command.other_config(path) if command.other_config is not None else None
    return dict(other) if other is not None else read_values(path, command.options_class, without=OF_THE_COMMAND_LINE)


def _config_flag(arguments: Sequence[str]) -> Path | None:
    """The last `--config`; whether it stands where a flag may stand is judged with the other flags."""
    found: Path | None = None
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            found = Path(arguments[index + 1])
        elif argument.startswith("--config="):
            found = Path(argument.removeprefix("--config="))
    return found


def _spread(arguments: Sequence[str], repeatable: Sequence[str]) -> list[str]:
    """`PATH --prompt A B` as `PATH --prompt A --prompt B`; where no path came first, B is taken for it."""
    spread: list[str] = []
    current = ""
    for argument in arguments:
        is_flag = argument.startswith("-") and argument != "-"
        if current and not is_flag and spread[-1] != current and not arguments[0].startswith("-"):
            spread.append(current)
        elif is_flag:
            current = argument if argument in repeatable else ""
        spread.append(argument)
    return spread


def _description(command: Command) -> str:
    return "\n\n".join([command.summary, "examples:\n" + "\n".join(f"  {line}" for line in command.examples)])
