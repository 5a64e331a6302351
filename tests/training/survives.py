"""The kill sweep: a run is killed at random moments, and ends with the same bits all the same.

`python -m tests.training.survives 24` kills it 24 times; the test-suite does so three times.
"""

import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.training.resumable_runs import counted_run, in_a_child, killed_run, outcome, resumed_run


def sweep(folder: Path, points: int, *, seed: int = 0, **options: Any) -> Iterator[str]:
    """Kill a run at so many moments, spread over all that it has; a line for each, when it has come through.

    Args:
        folder: For the runs.
        points: How often.
        seed: Chooses the moments.
        options: Of the run.
    """
    whole = folder / "whole"
    assert in_a_child(counted_run, whole, options) == 0, "the run that nobody kills fails"
    expected, moments = outcome(whole), int(whole.with_suffix(".moments").read_text())
    choose = random.Random(seed)
    for point in range(points):
        killed = folder / f"killed-{point}"
        # one out of each of as many stretches; the last moments may not come, for a thread writes at its own pace
        moment = 1 + int((point + choose.random()) / points * moments * 0.95)
        assert in_a_child(killed_run, killed, moment, options) == -signal.SIGKILL, f"moment {moment} did not come"
        steps = sorted(path.name for path in killed.glob("checkpoints/step-*"))
        assert in_a_child(resumed_run, killed, options) == 0, f"killed at moment {moment}, it cannot be resumed"
        assert outcome(killed) == expected, f"killed at moment {moment}, it ends otherwise"
        shutil.rmtree(killed)
        yield f"killed at moment {moment} of {moments} with {', '.join(steps) or 'no step'}: the same bits"


def main() -> None:
    """Print the lines."""
    with tempfile.TemporaryDirectory() as folder:
        for line in sweep(Path(folder), int(sys.argv[1])):
            print(line, flush=True)


if __name__ == "__main__":
    main()
