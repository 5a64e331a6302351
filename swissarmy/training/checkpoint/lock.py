"""One run per folder: a file that says who has it, locked for as long as that process lives."""

import fcntl
import json
import logging
import os
import socket
import weakref
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.safe_write import write_errors
from swissarmy.training.ranks import Ranks

FILE: Final = "run.lock"
_LOG = logging.getLogger(__name__)


@final
class RunLock:
    """While entered, no other run gets the folder. Every rank enters it; the first one holds the file.

    A process of this machine that was killed has left its lock open: the file is then taken over. What a process of
    another machine left cannot be told from a run that goes on: that is an error which says what to do.

    Args:
        folder: The run's; made if need be.
        ranks: The processes of this run.
    """

    def __init__(self, folder: str | os.PathLike[str], ranks: Ranks) -> None:
        self.path, self._ranks = Path(folder) / FILE, ranks
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        """Take the folder.

        Raises:
            CheckpointError: On every rank: another run has it, or it cannot be written.
        """
        self._ranks.on_first(self._take)
        return self

    def check_free(self) -> None:
        """Ask, before much is loaded, whether a run of this machine has the folder; nothing is made or taken.

        Raises:
            CheckpointError: One has.
        """
        if not self.path.exists():
            return
        with write_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(fcntl.LOCK_SH)  # which the other processes of this run may ask for at the same time
        finally:
            self._close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)  # not removed: another run may have opened it already, and would lock it
            self._close()

    def _take(self) -> None:
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock(fcntl.LOCK_EX)
            self._check_holder()
            with write_errors(self.path):
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        except BaseException:
            self._close()
            raise
        # A loader's workers are forked, and would hold the lock for some seconds longer than a run that is killed.
        lock = weakref.WeakMethod(self._close)
        os.register_at_fork(after_in_child=lambda: close() if (close := lock()) is not None else None)

    def _lock(self, kind: int) -> None:
        assert self._descriptor is not None, "the file was opened"
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{self.path.parent} belongs to a run that goes on: {self._holder()}. Wait for it or end it, or give "
                "this run another folder."
            ) from None
        except OSError as error:
            _LOG.warning("%s cannot be locked (%s): see that no other run uses this folder", self.path, error.strerror)

    def _check_holder(self) -> None:
        """Whoever wrote the file is gone, if that was here; elsewhere nobody can say."""
        host, pid = self._read()
        if host is None:
            return
        if host != socket.gethostname():
            raise CheckpointError(
                f"{self.path.parent} belongs to a run on another machine: {self._holder()}. If that run is over, it "
                f"was killed and left its lock: delete {self.path}."
            )
        _LOG.warning("%s was left by process %s, which was killed; this run takes it over", self.path, pid)

    def _read(self) -> tuple[str | None, object]:
        """Host and process id in the file; `None` for a file that says nothing."""
        assert self._descriptor is not None, "the file was opened"
        try:
            content = json.loads(os.pread(self._descriptor, 4096, 0))
            return str(content["host"]), content["pid"]
        except (ValueError, KeyError, TypeError):
            return None, None

    def _holder(self) -> str:
        host, pid = self._read()
        return "it has not said which" if host is None else f"process {pid} on {host}"

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
