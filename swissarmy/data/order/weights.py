"""Weights as people write them, made exact: what they may be, what they mean, and when they change."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Final, Literal

from swissarmy.core.config import report
from swissarmy.core.errors import ConfigError

Weight = int | float | str | Fraction
WeightsMean = Literal["repeats", "share"]

_NUMBER: Final = re.compile(r"[-+]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][-+]?\d{1,3})?")
_RATIO: Final = re.compile(r"\d{1,400}/0*[1-9]\d{0,400}")


def parse_weights(weights: Sequence[Weight], *, title: str = "weights:") -> list[Fraction]:
    """Weights as exact fractions; a float is taken by its decimal text, so 0.1 is a tenth.

    Args:
        weights: Numbers, or text such as `2`, `0.5`, `1e-12` or `1/3`.
        title: How the report of problems begins.

    Raises:
        ConfigError: A weight is negative, NaN, infinite or no number, or all are 0; names each.
    """
    exact, problems = list[Fraction](), list[str]()
    for number, weight in enumerate(weights, 1):
        text = str(weight).strip()
        if _NUMBER.fullmatch(text) or _RATIO.fullmatch(text):
            exact.append(Fraction(text))
        else:
            problems.append(f"weight {number} is {text[:40]!r}: a weight is a finite number.")
    problems += [f"weight {number} is negative: {weights[number - 1]}" for number, w in enumerate(exact, 1) if w < 0]
    if not problems and not any(exact):
        problems.append("all weights are 0: nothing would be drawn.")
    report(title, problems)
    return exact


def drawn_in_proportion_to(
    weights: Sequence[Weight] | None, lengths: Sequence[int | None], mean: WeightsMean, *, title: str = "weights:"
) -> list[Fraction]:
    """What each part is drawn in proportion to.

    Args:
        weights: One for each part; 1 each when `None`.
        lengths: How many samples each part has; `None` for a stream, which has no length.
        mean: `repeats`: a part stands for length * weight samples of an epoch; `share`: it gets its weight's share of
            the samples, whatever its length.
        title: How the report of problems begins.

    Raises:
        ConfigError: The weights are not as many as the parts, or are refused by `parse_weights`; a part that is to be
            drawn from is empty; `repeats` for a stream.
    """
    given: Sequence[Weight] = [1] * len(lengths) if weights is None else weights
    if len(given) != len(lengths):
        raise ConfigError(f"{title} {len(given)} weights for {len(lengths)} sources; each source needs one.")
    exact = parse_weights(given, title=title)
    report(title, _undrawable(exact, lengths, mean))
    return [
        weight * (length or 0) if mean == "repeats" else weight for weight, length in zip(exact, lengths, strict=True)
    ]


def _undrawable(weights: Sequence[Fraction], lengths: Sequence[int | None], mean: WeightsMean) -> Iterator[str]:
    for number, (weight, length) in enumerate(zip(weights, lengths, strict=True), 1):
        if weight and length == 0:
            yield f"source {number} is empty but has weight {weight}; give it weight 0 or leave it out."
        if weight and length is None and mean == "repeats":
            yield f"source {number} is a stream of no known length: its weight can only mean a `share`."


def parse_stages(stages: Sequence[str], *, title: str = "weights schedule:") -> list[tuple[int, list[str]]]:
    """Stages written as `STEP: WEIGHT WEIGHT ...`, as steps and the text of the weights from there on.

    Raises:
        ConfigError: A stage is written otherwise, or the steps do not rise from above 0.
    """
    parsed, problems = list[tuple[int, list[str]]](), list[str]()
    for stage in stages:
        step, colon, weights = stage.partition(":")
        if colon and re.fullmatch(r"\d{1,18}", step.strip()) and weights.split():
            parsed.append((int(step), weights.replace(",", " ").split()))
        else:
            problems.append(f"{stage!r} is no stage: write `STEP: WEIGHT WEIGHT ...`, such as '1000: 2 1'.")
    steps = [0, *(step for step, _ in parsed)]
    if not problems and steps != sorted(set(steps)):
        problems.append(f"the steps {', '.join(map(str, steps[1:]))} must rise, each once, from 1 or more.")
    report(title, problems)
    return parsed
