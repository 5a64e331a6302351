"""One run per folder."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from swissarmy.core.errors import CheckpointError
from swissarmy.training.checkpoint.lock import RunLock
from swissarmy.training.ranks import Ranks

HOLDS = """
import sys, time
from swissarmy.training.checkpoint.lock import RunLock
from swissarmy.training.ranks import Ranks
with RunLock(sys.argv[1], Ranks()):
    print("held", flush=True)
    time.sleep(60)
"""


def lock(folder: Path) -> RunLock:
    return RunLock(folder, Ranks())


def test_a_folder_is_free_again_after_a_run(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path / "new" / "run"):
            assert json.loads((tmp_path / "new" / "run" / "run.lock").read_text())["pid"] == os.getpid()
    with pytest.raises(ZeroDivisionError), lock(tmp_path):
        raise ZeroDivisionError
    with lock(tmp_path):
        pass


def test_a_second_run_in_this_process_is_refused(tmp_path: Path) -> None:
    with lock(tmp_path):
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} on {socket.gethostname()}"), lock(tmp_path):
            pass
        with pytest.raises(CheckpointError, match="another folder"), lock(tmp_path):
            pass


def test_a_run_elsewhere_on_this_machine_is_named_and_one_that_was_killed_is_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"goes on: process {holder.pid} on"), lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with lock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"{tmp_path / 'run.lock'} was left by process {holder.pid}, which was killed; this run takes it over"
    ]


def test_a_lock_of_another_machine_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(json.dumps({"host": "node7", "pid": 12}))
    message = "another machine: process 12 on node7.*delete .*run.lock"
    with pytest.raises(CheckpointError, match=message), lock(tmp_path):
        pass
    assert json.loads((tmp_path / "run.lock").read_text()) == {"host": "node7", "pid": 12}
    (tmp_path / "run.lock").unlink()
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"host": 1}'])
def test_a_lock_that_says_nothing_is_nobodys(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(text)
    with lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="was not written: "), lock(tmp_path / "file" / "run"):
        pass


def _wait(pipe: Connection) -> None:
    pipe.send("here")
    signal.pause()


def test_a_forked_worker_does_not_hold_the_lock(tmp_path: Path) -> None:
    first = lock(tmp_path)
    first.__enter__()
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_wait, args=(theirs,))
    worker.start()
    assert ours.recv() == "here"
    try:
        assert first._descriptor is not None
        os.close(first._descriptor)  # as the kernel does for a process that is killed
        first._descriptor = None
        with lock(tmp_path):
            pass
    finally:
        worker.kill()
        worker.join()
