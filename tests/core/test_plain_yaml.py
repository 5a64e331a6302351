"""YAML of plain values: what is written comes back, whichever version of YAML it is read by."""

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from swissarmy.core.plain_yaml import TAG, compose, scalar_value, write_yaml

PLAIN = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text()
VALUES = st.dictionaries(st.text(), st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3), max_leaves=6))


def value_of(node: yaml.Node | None) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {value_of(key): value_of(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [value_of(each) for each in node.value]
    assert isinstance(node, yaml.ScalarNode)
    return scalar_value(node)


@given(VALUES)
def test_values_come_back(values: dict[str, Any]) -> None:
    text = write_yaml(values)
    assert repr(value_of(compose(text))) == repr(yaml.safe_load(text)) == repr(values)


LOOKS_LIKE = [
    "3e-4",
    "1e5",
    "0o17",
    "017",
    "1_000",
    "no",
    "on",
    "12:30",
    "2026-11-23",
    ".inf",
    "~",
    "",
    "0x1F",
    "=",
    "<<",
]


@pytest.mark.parametrize("text", ["", *LOOKS_LIKE])
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    written = write_yaml({"a": text, text: "a"})
    assert value_of(compose(written)) == yaml.safe_load(written) == {"a": text, text: "a"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("0o17", 15), ("no", "no"), ("12:30", "12:30"), ("017", 17), ("TRUE", True), ("1_0", "1_0")],
)
def test_plain_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    node = compose(f"a: {text}")
    assert value_of(node) == {"a": value}


@pytest.mark.parametrize("text", ["a: !!python/name:os.system x", "a: &x 1\nb: *x", "a: !x 1"])
def test_tags_and_aliases_are_refused(text: str) -> None:
    with pytest.raises(yaml.MarkedYAMLError, match="are not read"):
        compose(text)


def test_equal_values_are_written_out_each_time() -> None:
    shared = {"type": "LoRAMixin"}
    assert "&" not in write_yaml({"a": shared, "b": shared})
    assert TAG not in write_yaml({"a": shared})
