"""YAML of plain values, by the core schema of YAML 1.2: `1e-4` is a number, and `no`, `on` and `12:30` are text.

What is written here is read here as the same values, and by readers of YAML 1.1 too: text that either of them would
take for something else stands in quotes.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import yaml

TAG: Final = "tag:yaml.org,2002:"
"""How the tags of plain values begin."""
_CORE_SCHEMA: Final[Mapping[str, str]] = {
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "null": r"~|null|Null|NULL|",
}
_CONSTANTS: Final = {"true": True, "false": False, "null": None, "~": None, "": None}


def compose(stream: Any) -> yaml.Node | None:
    """The syntax tree of a text or file; nothing in it is constructed, and `scalar_value` says what scalars are.

    Raises:
        yaml.YAMLError: It is not YAML, or has tags, or aliases, with which a file could be endless.
        RecursionError: It is nested too deeply.
    """
    node: yaml.Node | None = yaml.compose(stream, Loader=_Loader)
    return node


def scalar_value(node: yaml.Node) -> Any:
    """The plain value of a scalar."""
    text = str(node.value)
    match node.tag.removeprefix(TAG):
        case "int" if len(text) < 100:  # Python refuses to read thousands of digits
            return int(text, 0 if text[:2] in ("0o", "0x") else 10)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        case "bool" | "null":
            return _CONSTANTS[text.lower()]
        case _:
            return text


def write_yaml(values: Mapping[str, Any]) -> str:
    """A mapping of plain values as YAML, in its order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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


class _Dumper(yaml.SafeDumper):
    """Writes for both schemas, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Equal values are written out each time."""
        return True


def _write_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """In quotes, with escapes, where something in it cannot be seen: PyYAML would lose some line ends."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar(f"{TAG}str", text, style=style)


_Dumper.add_representer(str, _write_text)
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern in _CORE_SCHEMA.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"{TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), None)
