"""`docs/composition.md`, from what a run of the whole matrix found."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tests.contracts.matrix import ALL_CHECKS, FOR_PAIRS, Case, Result
from tests.contracts.rows import EXCLUDED, FAMILIES, NOT_CHECKED, NOT_ON_TOP, ROWS, pairs

PAGE: Final = Path(__file__).parents[2] / "docs" / "composition.md"
RESULTS: Final = Path(__file__).with_name("results.json")

HEAD: Final = (
    "# What combines with what\n\n"
    "Written by `make contracts` from what it saw; `tests/contracts/rows.py` is where rows and exclusions come from. "
    "A number says how many checks a mixin passed on a family: all that say something about the family, unless it says "
    "of how many.\n"
)
CHECK_HEAD: Final = """
## The checks

`swissarmy.testing.check_mixin` puts a mixin of yours to the same ones (`docs/write_a_mixin.md`).

| check | what is compared |
|---|---|
"""
MEANING: Final = {
    "forward and backward": "every parameter of the mixin has a finite gradient",
    "same at start": "a new one changes nothing, where the method promises it",
    "detaching restores": "without it the model is the same, bit for bit",
    "recomputing": "activation checkpointing changes neither loss nor gradients",
    "cached = uncached": "logits of a prompt, of two tokens, of one at a time",
    "batched = single": "rows of different lengths, filled together and alone",
    "beam search": "each beam's score, recomputed without a cache",
    "save and load": "`save_pretrained` and `sat.load` give the same logits",
    "compiles whole": "`torch.compile(fullgraph=True)`, forward and backward",
    "FSDP2 x 2": "loss and gradients of two processes and of one, in float64",
    "TP x 2": "the same with shared products",
    "CP x 2": "the same with shared positions",
}


def as_json(results: Iterable[Result]) -> dict[str, Any]:
    """What is kept of a run: the checks passed by each row on each family, how many by pairs, and every failure."""
    passed: dict[str, dict[str, list[str]]] = {}
    of_pairs: dict[str, int] = {}
    failures: dict[str, str] = {}
    for case, check, problem in results:
        if problem is not None:
            failures[f"{case.family}: {' + '.join(case.rows)}: {check}"] = problem
        elif len(case.rows) == 1:
            passed.setdefault(case.rows[0], {}).setdefault(case.family, []).append(check)
        else:
            of_pairs[check] = of_pairs.get(check, 0) + 1
    return {"passed": passed, "pairs": of_pairs, "failures": failures}


def write(results: Mapping[str, Any]) -> None:
    """The results, and the page."""
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(results), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    """The page's text."""
    return "".join((HEAD, _singles(results["passed"]), _exclusions(), _pairs(results), _checks()))


def _singles(passed: Mapping[str, Mapping[str, list[str]]]) -> str:
    lines = [f"| | {' | '.join(FAMILIES)} |", f"|---|{'---|' * len(FAMILIES)}"]
    for row in ROWS:
        cells = [_cell(row, family, passed.get(row, {}).get(family, [])) for family in FAMILIES]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n" + "\n".join(lines) + "\n"


def _cell(row: str, family: str, checks: list[str]) -> str:
    if (row, family) in EXCLUDED:
        return "–"
    expected = Case(family, (row,)).checks
    return f"{len(checks)}" if set(checks) == set(expected) else f"{len(checks)} of {len(expected)}"


def _exclusions() -> str:
    lines = [
        "\n## What is left out, and why\n",
        "| mixin | with | reason |",
        "|---|---|---|",
        *(f"| {one} | {other} | {reason} |" for (one, other), reason in EXCLUDED.items()),
        *(f"| {row} | the check “{check}” | {reason} |" for (row, check), reason in NOT_CHECKED.items()),
        *(f"| `{name}` | is no row | {reason} |" for name, reason in NOT_ON_TOP.items()),
    ]
    return "\n".join(lines) + "\n"


def _pairs(results: Mapping[str, Any]) -> str:
    if not results["pairs"]:
        return "\n## Pairs\n\nThe last run left them out (`--alone`); `make contracts` runs them.\n"
    number = len({(first, second) for _, first, second in pairs()})
    lines = [
        "\n## Pairs\n",
        f"{number} pairs of mixins of different classes, on every family that both are for; on two processes on "
        f"{' and '.join(FOR_PAIRS['TP x 2'])}. Compiled are all mixins at once that a family takes.\n",
        "| check | combinations passed |",
        "|---|---|",
        *(f"| {check} | {results['pairs'].get(check, 0)} |" for check in ALL_CHECKS),
    ]
    failures = [f"- {where}: {problem}" for where, problem in results["failures"].items()]
    return "\n".join([*lines, "", *(["Failed:", "", *failures] if failures else ["None failed."])]) + "\n"


def _checks() -> str:
    return CHECK_HEAD + "".join(f"| {name} | {MEANING[name]} |\n" for name in ALL_CHECKS)
