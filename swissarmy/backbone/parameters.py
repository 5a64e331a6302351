"""Which parameters train: freezing by name, and a summary to look at.

A pattern matches a whole name or a dotted start of it, with `*`, `{8..11}` for each of these numbers and `{a,b}` for
either. `transformer.` may be left out: `layers.{0..3}` are the backbone's layers, `word_embeddings` its embedding. In a
model of parts, a pattern without `parts.` holds in every part.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from swissarmy.core.errors import ConfigError, nearest


@final
@dataclass(frozen=True)
class TrainableSummary:
    """How many parameters a model has, and which of them train."""

    total: int
    trainable: int
    by_module: tuple[tuple[str, int, int], ...]
    """`(name, parameters, trainable parameters)` for the embedding, the layers and each mixin, in each part."""

    def __str__(self) -> str:
        share = self.trainable / max(self.total, 1)
        width = max([32, *(len(name) for name, _, _ in self.by_module)])
        rows = [f"  {name:<{width}} {count:>14,} {live:>14,}" for name, count, live in self.by_module]
        head = f"{self.trainable:,} of {self.total:,} parameters train ({share:.2%})"
        return "\n".join([head, f"  {'module':<{width}} {'parameters':>14} {'trainable':>14}", *rows])


def freeze_except(model: nn.Module, patterns: Sequence[str]) -> None:
    """Leave `requires_grad` only where a name matches.

    A parameter that several modules share trains if any of its names matches.

    Raises:
        ConfigError: A pattern that matches no parameter; nothing was changed.
    """
    trained = _matching(model, patterns)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take `requires_grad` away where a name matches, a shared parameter's any name; all others stay as they are.

    Raises:
        ConfigError: A pattern that matches no parameter; nothing was changed.
    """
    frozen = _matching(model, patterns)
    for parameter in model.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name, or a dotted start of it, matches a pattern with `*`; inside a part as well."""
    if name.startswith("parts.") and matches(name.split(".", 2)[2], pattern):
        return True
    names = {name, name.removeprefix("transformer.")}
    return any(fnmatch.fnmatchcase(each, end) for each in names for end in (pattern, f"{pattern}.*"))


def expanded(pattern: str) -> list[str]:
    """The patterns that one with `{8..11}` or `{a,b}` stands for."""
    braces = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if braces is None:
        return [pattern]
    first, last, names = braces.groups()
    choices = names.split(",") if names is not None else map(str, range(int(first), int(last) + 1))
    return [each for choice in choices for each in expanded(pattern.replace(braces[0], choice, 1))]


def singles_of(patterns: Iterable[str]) -> dict[str, str]:
    """The patterns without braces that some stand for, each with the first that it comes from.

    Raises:
        ConfigError: A range of nothing.
    """
    singles: dict[str, str] = {}
    for pattern in patterns:
        if not expanded(pattern):
            raise ConfigError(f"'{pattern}' is a range of nothing: the first number comes first.")
        for single in expanded(pattern):
            singles.setdefault(single, pattern)
    return singles


def shown(single: str, pattern: str) -> str:
    """A pattern without braces as an error calls it: with the one that it comes from."""
    return f"'{single}'" if single == pattern else f"'{single}', of '{pattern}',"


def _matching(model: nn.Module, patterns: Sequence[str]) -> set[int]:
    """The ids of the parameters that some pattern matches."""
    named = list(model.named_parameters(remove_duplicate=False))
    singles = singles_of(patterns)
    for single, pattern in singles.items():
        if not any(matches(name, single) for name, _ in named):
            names = {each for name, _ in named for each in (name, name.removeprefix("transformer."))}
            prefixes = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
            raise ConfigError(f"{shown(single, pattern)} matches no parameter.{nearest(single, prefixes)}")
    return {id(parameter) for name, parameter in named if any(matches(name, single) for single in singles)}


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count parameters, a shared one once, by the first of its names."""
    groups: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        depth = 4 if name.startswith("parts.") else 2
        group = groups.setdefault(".".join(name.split(".")[:depth]), [0, 0])
        group[0] += parameter.numel()
        group[1] += parameter.numel() if parameter.requires_grad else 0
    rows = tuple((name, count, live) for name, (count, live) in groups.items())
    return TrainableSummary(sum(row[1] for row in rows), sum(row[2] for row in rows), rows)
