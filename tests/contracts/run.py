"""The whole matrix: every mixin and every pair of mixins on every family, through every check; writes the page.

    make contracts
    .venv/bin/python -W ignore -m tests.contracts.run --alone    # no pairs: minutes instead of an hour

What is found is written as it is found, so that a run that is broken off leaves what it knows. Exit code 1 if anything
fails; the failures are printed, and stand on the page.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from rich.progress import Progress

from swissarmy.testing.sharding import SHARDED_CHECKS
from tests.contracts.matrix import Case, Result, all_cases, run_here, run_sharded
from tests.contracts.page import PAGE, as_json, write

AT_ONCE = 100
"""Cases of a call to two processes: starting them costs seconds, and what goes wrong in one ends them all."""


def run_all(cases: list[Case], progress: Progress) -> Iterator[Result]:
    """Every result; what one process can do in two at a time."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for results in progress.track(pool.map(run_here, cases, chunksize=8), len(cases), description="one process"):
            yield from results
    for check in SHARDED_CHECKS:
        takers = [case for case in cases if check in case.checks]
        for start in progress.track(range(0, len(takers), AT_ONCE), description=check):
            yield from run_sharded(check, takers[start : start + AT_ONCE])


def main() -> int:
    """Run, write, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alone", action="store_true", help="leave the pairs out")
    options = parser.parse_args()
    cases = [case for case in all_cases() if len(case.rows) != 2 or not options.alone]
    results: list[Result] = []
    with Progress() as progress:
        for result in run_all(cases, progress):
            results.append(result)
            if len(results) % 5000 == 0:
                write(as_json(results))
    found = as_json(results)
    write(found)
    for where, problem in found["failures"].items():
        print(f"{where}: {problem}")
    print(f"{len(results)} checks, {len(found['failures'])} failed; see {PAGE}")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
