"""Mixins made for a model: options that are none."""

from typing import Any

import pytest

import swissarmy as sat
from swissarmy.testing import tiny_model


class Sized(sat.BaseMixin):
    """Takes sizes from a model, and options of its own."""

    def __init__(self, hidden_size: int, *, num_things: int = 1) -> None:
        super().__init__()
        self.sizes = hidden_size, num_things

    @classmethod
    def for_config(cls, config: Any, *, factor: int = 1, **options: Any) -> "Sized":
        return cls(config.hidden_size * factor, **options)


class Reading(sat.BaseMixin):
    """Reads options that no signature names."""

    def __init__(self, things: list[int]) -> None:
        super().__init__()
        self.total = sum(things)

    @classmethod
    def for_config(cls, config: Any, **options: Any) -> "Reading":
        return cls(options.pop("anything"), **options)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Sized, {"num_thing": 2}, r"Sized: unknown option 'num_thing'. Did you mean 'num_things'\?"),
        (Sized, {"factr": 2}, r"Did you mean 'factor'\? It is made from: factor, hidden_size, num_things; a model"),
        (sat.PrefixTuningMixin, {"prefixlen": 3}, r"unknown option 'prefixlen'. Did you mean 'prefix_len'\?"),
        (sat.PromptTuningMixin, {"promptlen": 3}, r"Did you mean 'prompt_len'\?"),
        (sat.MLPHeadMixin, {"sizes": (2,)}, r"unknown option 'sizes'.*output_sizes"),
        (sat.CachedAutoRegressiveMixin, {"size": 2}, r"unknown option 'size'. It is made from: nothing"),
    ],
)
def test_an_option_that_is_none_is_named(
    family: str, kind: type[sat.BaseMixin], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        kind.for_model(tiny_model(family), **options)


def test_options_that_no_signature_names_are_taken_and_other_errors_stay_what_they_are() -> None:
    model = tiny_model("gpt2")
    assert Reading.for_model(model, anything=[1, 2]).total == 3
    with pytest.raises(TypeError, match="unsupported operand"):
        Reading.for_model(model, anything=["a"])
