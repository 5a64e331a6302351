"""From the rows to cases and checks, and what came out: the same for a run of the whole and for a slice of it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import torch

from swissarmy.testing import CHECKS, Addition
from swissarmy.testing.contract import applies
from swissarmy.testing.sharding import SHARDED_CHECKS, check_sharded
from tests.contracts.rows import EXCLUDED, FAMILIES, NOT_CHECKED, ROWS, pairs, singles

ALL_CHECKS: Final = (*CHECKS, *SHARDED_CHECKS)
FOR_PAIRS: Final = {"compiles whole": (), **dict.fromkeys(SHARDED_CHECKS, ("gpt2", "t5"))}
"""Pairs are spread over processes on these families alone, and not compiled: all mixins at once are."""


class Case(NamedTuple):
    """A family and the rows that are added to it, in this order."""

    family: str
    rows: tuple[str, ...]

    @property
    def additions(self) -> list[Addition]:
        """The mixins."""
        return [ROWS[row] for row in self.rows]

    @property
    def checks(self) -> list[str]:
        """The checks that say something about it."""
        return [name for name in ALL_CHECKS if self._takes(name)]

    def _takes(self, check: str) -> bool:
        if any((row, check) in NOT_CHECKED for row in self.rows):
            return False
        if len(self.rows) > 2:
            return check == "compiles whole"
        if len(self.rows) == 2 and self.family not in FOR_PAIRS.get(check, (self.family,)):
            return False
        return applies(check, self.family, self.additions)


def all_cases() -> Iterator[Case]:
    """Every mixin alone, every pair, and all at once."""
    yield from (Case(family, (row,)) for family, row in singles())
    yield from (Case(family, (first, second)) for family, first, second in pairs())
    yield from (Case(family, all_rows(family)) for family in FAMILIES)


def all_rows(family: str) -> tuple[str, ...]:
    """As many rows as a family takes at once."""
    chosen: list[str] = []
    for row in ROWS:
        clashes = any({(row, other), (other, row)} & set(EXCLUDED) for other in (*chosen, family))
        if not clashes and (row, "compiles whole") not in NOT_CHECKED:
            chosen.append(row)
    return tuple(chosen)


class Result(NamedTuple):
    """What a check found in a case."""

    case: Case
    check: str
    problem: str | None


def run_here(case: Case, checks: Iterable[str] = tuple(CHECKS)) -> list[Result]:
    """The checks that one process can do."""
    torch.set_num_threads(1)
    wanted = [check for check in case.checks if check in CHECKS and check in set(checks)]
    return [Result(case, check, _problem(case, check)) for check in wanted]


def _problem(case: Case, check: str) -> str | None:
    try:
        CHECKS[check](case.family, case.additions)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what this check found
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def run_sharded(check: str, cases: Sequence[Case]) -> list[Result]:
    """A check that takes two processes, for all cases at once."""
    wanted = [case for case in cases if check in case.checks]
    problems = check_sharded(check, [(case.family, case.additions) for case in wanted])
    return [Result(case, check, problem) for case, problem in zip(wanted, problems, strict=True)]
