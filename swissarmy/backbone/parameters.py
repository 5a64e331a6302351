"""Which parameters train: freezing by name, and a summary to look at."""

import fnmatch
from collections.abc import Sequence
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
    """Leave `requires_grad` only where a name matches; a pattern matches a whole name or a dotted start of it.

    A parameter that several modules share trains if any of its names matches.

    Raises:
        ConfigError: A pattern that matches no parameter; nothing was changed.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(matches(name, pattern) for name, _ in named):
            prefixes = {name.rsplit(".", depth)[0] for name, _ in named for depth in range(name.count(".") + 1)}
            raise ConfigError(f"'{pattern}' matches no parameter.{nearest(pattern, prefixes)}")
    trained = {id(parameter) for name, parameter in named if any(matches(name, pattern) for pattern in patterns)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter's name, or a dotted start of it, matches a pattern with `*`; inside a part as well."""
    if name.startswith("parts.") and matches(name.split(".", 2)[2], pattern):
        return True
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


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
