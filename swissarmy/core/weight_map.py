"""Weight maps: how a checkpoint's tensors and a model's parameters correspond, in both directions.

A map is a list of rules between name templates. `{i}` stands for a number, `{p}` for `weight` or `bias`, and
`{rest}` for anything; a rule may transpose, or join several of our parameters into one of their tensors.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from swissarmy.core.errors import CheckpointError

Tensors = Sequence[Tensor]
PLACEHOLDERS = {"i": r"\d+", "p": "weight|bias", "rest": ".+"}


@final
@dataclass(frozen=True)
class Rule:
    """One of their tensors, and the parameters of ours that it holds."""

    theirs: str
    ours: tuple[str, ...]
    split: Callable[[Tensor], Tensors]
    join: Callable[[Tensors], Tensor]
    fit: Callable[[Tensor, Mapping[str, Any]], Tensor] | None = None
    """Their tensor for the model's sizes, from the stored one and the `config.json` it was stored with; what it cannot
    fit it returns as it is. Without this, a stored tensor of another shape is an error."""

    def bind(self, our_name: str) -> "Entry | None":
        """The rule with its placeholders filled in from one of our names, or `None` if no template fits."""
        for template in self.ours:
            match = _pattern(template).fullmatch(our_name)
            if match is not None:
                values = match.groupdict()
                return Entry(self, _fill(self.theirs, values), tuple(_fill(each, values) for each in self.ours))
        return None


@final
@dataclass(frozen=True)
class Entry:
    """A rule for particular names."""

    rule: Rule
    theirs: str
    ours: tuple[str, ...]


def same(theirs: str, ours: str) -> Rule:
    """The same tensor under two names."""
    return Rule(theirs, (ours,), lambda tensor: [tensor], lambda parts: parts[0])


def transposed(theirs: str, ours: str) -> Rule:
    """A matrix that they store the other way round."""
    return Rule(theirs, (ours,), lambda tensor: [tensor.t().contiguous()], lambda parts: parts[0].t().contiguous())


def joined(theirs: str, ours: Sequence[str], *, sizes: Sequence[int] | None = None, transpose: bool = False) -> Rule:
    """Several of our parameters in one of their tensors, one after the other along dimension 0.

    Args:
        theirs: Their template.
        ours: Our templates, in order.
        sizes: Rows of each; equal shares when omitted.
        transpose: Whether they store the matrix the other way round, joined along dimension 1.
    """

    def split(tensor: Tensor) -> Tensors:
        dim = tensor.dim() - 1 if transpose else 0
        parts = tensor.chunk(len(ours), dim) if sizes is None else torch.split(tensor, list(sizes), dim)
        return [part.t().contiguous() if transpose and part.dim() == 2 else part.clone() for part in parts]

    def join(parts: Tensors) -> Tensor:
        whole = torch.cat(list(parts))
        return whole.t().contiguous() if transpose and whole.dim() == 2 else whole

    return Rule(theirs, tuple(ours), split, join)


def reshaped(theirs: str, ours: str, *, theirs_shape: Sequence[int], ours_shape: Sequence[int]) -> Rule:
    """The same numbers in another shape, as where they keep dimensions of size one; -1 is inferred."""
    return Rule(
        theirs,
        (ours,),
        lambda tensor: [tensor.reshape(tuple(ours_shape))],
        lambda parts: parts[0].reshape(tuple(theirs_shape)),
    )


def unsqueezed(rule: Rule) -> Rule:
    """The same rule where their tensor has one more dimension in front, of size one."""
    return replace(
        rule,
        split=lambda tensor: rule.split(tensor.squeeze(0)),
        join=lambda parts: rule.join(parts).unsqueeze(0),
    )


@final
@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """All rules of a family, and what else its checkpoints may contain."""

    rules: tuple[Rule, ...]
    prefix: str = ""
    """A start of their names that some checkpoints leave out, and others have where the map does not."""
    ignored: tuple[str, ...] = ()
    """Templates of their tensors that carry nothing this model needs (buffers, heads of another task)."""
    duplicates: Mapping[str, str] = field(default_factory=dict)
    """Their tensors that repeat another one, because they are tied; must be equal to it."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Their tensors that hold another one again: written beside it, and read only where the other is missing."""
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    """Their tensors that some checkpoints leave out, and the one that is read in their place."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Ends of names in old checkpoints, and what they are called now."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Templates of modules whose weights are stored under another name than the one they have in a running model of
    theirs, and that one: what adapters are saved by."""

    def entries(self, our_names: Iterable[str]) -> list[Entry]:
        """Which of their tensors hold our parameters.

        Raises:
            CheckpointError: One of ours has no rule: the model was changed in a way its family cannot write.
        """
        entries: dict[str, Entry] = {}
        for name in our_names:
            entry = next(filter(None, (rule.bind(name) for rule in self.rules)), None)
            if entry is None:
                raise CheckpointError(f"'{name}' has no place in this family's checkpoints.")
            entries[entry.theirs] = entry
        return list(entries.values())

    def canonical(self, name: str, wanted: Mapping[str, Entry]) -> str:
        """One of their names as the rules spell it: aliases replaced, the prefix as the rules have it."""
        for old, new in self.aliases.items():
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if name in wanted or not self.prefix:
            return name
        if name.startswith(self.prefix) and name.removeprefix(self.prefix) in wanted:
            return name.removeprefix(self.prefix)
        with_prefix = self.prefix + name
        return with_prefix if with_prefix in wanted or self.is_ignored(with_prefix) else name

    def running(self, stored: str) -> str:
        """What a tensor that is stored under this name is called in a running model of theirs."""
        module, dot, last = stored.rpartition(".")
        for template, running in self.modules.items():
            match = _pattern(template).fullmatch(module)
            if match is not None:
                return _fill(running, match.groupdict()) + dot + last
        return stored

    def is_ignored(self, name: str) -> bool:
        """Whether a checkpoint may hold this tensor without the model needing it."""
        return any(_pattern(template).fullmatch(name) for template in self.ignored)


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    parts = [
        re.escape(piece) if index % 2 == 0 else f"(?P<{piece}>{PLACEHOLDERS[piece]})"
        for index, piece in enumerate(pieces)
    ]
    return re.compile("".join(parts))


def _fill(template: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", value)
    return template
