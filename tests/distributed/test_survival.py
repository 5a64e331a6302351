"""A rank that is killed: the run ends, says which rank it was, and leaves nobody behind."""

import os
import subprocess
import sys
from pathlib import Path

from tests.distributed import killed_worker


def test_a_killed_rank_ends_the_run_and_is_named() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", killed_worker.__file__],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode != 0
    report = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in report
    assert "SIGKILL" in report
