"""Comparing names for messages, and putting tensors in their places."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from swissarmy.core.errors import nearest


def report(kind: str, names: Sequence[str], others: Iterable[str]) -> list[str]:
    """A line for each group of names, with the nearest of the others."""
    others = list(others)
    lines = []
    for group in group_names(names):
        example = re.sub(r"\{(\d+)[^}]*\}", r"\1", group)
        lines.append(f"{kind}: {group}.{nearest(example, others)}")
    return lines


def group_names(names: Iterable[str]) -> list[str]:
    """Names that differ only in a layer's number, as one: `layers.{0..23}.x`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        template = name if number is None else name[: number.start(1)] + "{}" + name[number.end(1) :]
        groups.setdefault(template, []).append(-1 if number is None else int(number[1]))
    return [template.replace("{}", _ranges(sorted(numbers)), 1) for template, numbers in groups.items()]


def allowed(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter of that name, in every module that shares it."""
    owner, _, attribute = name.rpartition(".")
    module, parameter = model.get_submodule(owner), nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    vars(parameter).update(vars(getattr(module, attribute)))  # what it was marked with, such as no_weight_decay
    setattr(module, attribute, parameter)


def _ranges(numbers: Sequence[int]) -> str:
    """`{0..23}` for a run, `{0,2,5}` otherwise, and the number itself when there is one."""
    if len(numbers) == 1:
        return str(numbers[0])
    run = numbers[-1] - numbers[0] + 1 == len(numbers)
    return "{" + (f"{numbers[0]}..{numbers[-1]}" if run else ",".join(map(str, numbers))) + "}"
