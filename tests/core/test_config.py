"""Configurations: every problem in one report, with the nearest name and what was wanted."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import pytest

import swissarmy as sat
from swissarmy.core.config import Config, report
from swissarmy.core.errors import ConfigError
from tests.helpers import tiny_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Config):
    size: int
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    name: str | None = None
    betas: tuple[float, ...] = (0.9, 0.95)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    on: bool = False
    anything: Any = None

    def problems(self) -> Iterator[str]:
        if self.size < 1:
            yield f"size={self.size} must be at least 1"
        if self.rate < 0:
            yield f"rate={self.rate} must not be negative"


def test_a_good_configuration_is_frozen_and_round_trips() -> None:
    config = Sample(size=3, rate=1, kind="b", name="x", betas=(1, 2), on=True)
    assert Sample.from_dict(config.to_dict()) == config
    assert config.replace(size=4).to_dict() == {**config.to_dict(), "size": 4}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.size = 5  # type: ignore[misc]


def test_lists_become_tuples_at_every_depth() -> None:
    assert Sample.from_dict({"size": 1, "betas": [1, 2.5]}).betas == (1, 2.5)
    assert Sample.from_dict({"size": 1, "anything": [[1], [2]]}).anything == ((1,), (2,))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"size": "3"}, "size='3' is not int"),
        ({"size": True}, "size=True is not int"),
        ({"size": 3.0}, "size=3.0 is not int"),
        ({"size": None}, "size=None is not int"),
        ({"size": 1, "rate": "1e-4"}, "rate='1e-4' is not float"),
        ({"size": 1, "rate": False}, "rate=False is not float"),
        ({"size": 1, "kind": "c"}, "kind='c' is not one of 'a', 'b'"),
        ({"size": 1, "kind": ["a"]}, "kind=('a',) is not one of 'a', 'b'"),
        ({"size": 1, "name": 3}, "name=3 is not str or None"),
        ({"size": 1, "betas": 0.9}, "betas=0.9 is not tuple[float, ...]"),
        ({"size": 1, "betas": [0.9, "x"]}, "betas=(0.9, 'x') is not tuple[float, ...]"),
        ({"size": 1, "options": [1]}, "options=(1,) is not dict[str, typing.Any]"),
        ({"size": 1, "on": 1}, "on=1 is not bool"),
        ({"size": 0}, "size=0 must be at least 1"),
        ({}, "size is missing"),
        ({"size": 1, "raet": 2}, "unknown field 'raet'. Did you mean 'rate'?"),
        ({"size": 1, 3: 2}, "unknown field '3'."),
    ],
)
def test_one_problem_is_one_line_that_names_the_field(values: dict[Any, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sample.from_dict(values)
    assert str(caught.value) == f"Sample: {named}"


def test_every_problem_of_a_file_is_in_one_report_with_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        Sample.from_dict({"siez": 1, "rate": "x", "kind": 3, "nmae": "y"}, where="runs/config.json")
    assert str(caught.value).splitlines() == [
        "runs/config.json: 5 problems",
        "  - unknown field 'siez'. Did you mean 'size'?",
        "  - unknown field 'nmae'. Did you mean 'name'?",
        "  - size is missing",
        "  - rate='x' is not float",
        "  - kind=3 is not one of 'a', 'b'",
    ]


def test_values_are_looked_at_together_once_their_types_are_right() -> None:
    with pytest.raises(ConfigError, match=r"(?s)Sample: 2 problems.*size=0.*rate=-1"):
        Sample(size=0, rate=-1)
    with pytest.raises(ConfigError, match=r"Sample: rate='x' is not float$"):
        Sample(size=0, rate="x")  # type: ignore[arg-type]


def test_unknown_fields_are_named_by_the_constructor_too() -> None:
    with pytest.raises(ConfigError, match=r"Sample: unknown field 'sise'. Did you mean 'size'\?"):
        Sample(sise=2)  # type: ignore[call-arg]


def test_replace_refuses_an_unknown_field() -> None:
    with pytest.raises(ConfigError, match=r"unknown field 'sise'. Did you mean 'size'\?"):
        Sample(size=1).replace(sise=2)


def test_a_report_without_problems_raises_nothing() -> None:
    report("nothing:", [])


# The backbone's


def test_the_backbone_reports_every_problem_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_config(
            num_layers=0,
            hidden_size=15,
            num_key_value_heads=3,
            activation="gelu_newer",
            hidden_dropout=1.0,
            vocab_size=-1,
        )
    message = str(caught.value)
    assert message.startswith("TransformerConfig: 6 problems")
    for part in (
        "num_layers=0 must be at least 1",
        "vocab_size=-1 must not be negative",
        "hidden_size=15 is not divisible by num_attention_heads=2",
        "num_attention_heads=2 is not a multiple of num_key_value_heads=3",
        "activation='gelu_newer' is unknown. Did you mean 'gelu_new'?",
        "hidden_dropout=1.0 must be in [0, 1)",
    ):
        assert part in message


@pytest.mark.parametrize(
    "name",
    [
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "max_sequence_length",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "encoder_hidden_size",
    ],
)
@pytest.mark.parametrize("size", [0, -4])
def test_every_size_of_the_backbone_must_be_positive(name: str, size: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name}={size} must be at least 1"):
        tiny_config(**{name: size})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"padding_id": 13}, "padding_id=13 is no token of 13"),
        ({"norm_placement": "middle"}, "norm_placement='middle' is not one of 'pre', 'post', 'sandwich', 'both'"),
        ({"norm": "batch"}, "norm='batch' is not one of"),
        ({"drop_path": float("nan")}, "drop_path=nan must be in"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1 must be in"),
        ({"hidden_sise": 16}, "unknown field 'hidden_sise'. Did you mean 'hidden_size'?"),
    ],
)
def test_a_wrong_option_of_the_backbone_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sat.TransformerConfig.from_dict({**tiny_config().to_dict(), **changes})
    assert named in str(caught.value)


def test_head_sizes_are_filled_in() -> None:
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2)
    assert (config.kv_heads, config.head_size, config.mlp_size) == (2, 4, 64)
    assert tiny_config(hidden_size=15, head_dim=8).head_size == 8


def test_every_field_of_the_backbone_is_documented() -> None:
    import ast
    import inspect

    body = ast.parse(inspect.getsource(sat.TransformerConfig)).body[0].body  # type: ignore[attr-defined]
    for item, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert documented, ast.unparse(item.target)
