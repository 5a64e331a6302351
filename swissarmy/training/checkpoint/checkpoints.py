"""The checkpoints of a run: written beside the training, each complete or absent, old ones let go.

`checkpoints/step-00000100/` holds `rank-00000/model.safetensors` for each rank, `metadata.json` (which tensor is
where), `state.json` (all that is no tensor) and `manifest.json` (sizes and hashes); `checkpoints/latest` holds the
number of the newest step. A folder has its name only when everything in it is on disk.
"""

import dataclasses
import logging
import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, final

import torch.distributed as dist

from swissarmy.core.errors import CheckpointError, ConfigError
from swissarmy.core.files import replace_file
from swissarmy.interop.safe_write import dump, leftovers_in, sibling, verify_manifest, write_errors
from swissarmy.training.checkpoint.frozen import frozen_identity
from swissarmy.training.checkpoint.options import CheckpointOptions
from swissarmy.training.checkpoint.random_state import random_tensors
from swissarmy.training.checkpoint.restore import StoredStep, check_not_torchs, open_step, restore
from swissarmy.training.checkpoint.sharded import Shard, write_step
from swissarmy.training.checkpoint.state import TrainState
from swissarmy.training.ranks import Ranks

FOLDER: Final = "checkpoints"
LATEST: Final = "latest"
_STEP: Final = re.compile(r"step-(\d{8,})")
_LOG = logging.getLogger(__name__)


@final
class Checkpoints:
    """Saves and loads the steps of one run; every rank calls the same methods at the same step.

    Args:
        folder: The run's.
        options: What is kept, and whether steps go on while it is written.
        ranks: The processes of the run; they share the file system.
        timeout: Seconds that one process waits for another.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        options: CheckpointOptions,
        ranks: Ranks,
        *,
        timeout: float = 600.0,
    ) -> None:
        self.folder = Path(folder) / FOLDER
        self._options = options
        # A group of its own: what is written in the background must not get between the messages of the steps.
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if ranks.world_size > 1 else None
        self._ranks = dataclasses.replace(ranks, group=group)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._frozen: dict[str, list[Any]] | None = None
        self._resumed_from: int | None = None
        self.newest: int | None = None
        """The step that was saved, or resumed from, last."""

    @property
    def failed(self) -> bool:
        """Whether what was written in the background failed, on this rank; `wait` then raises what happened.

        It may be seen a step later on one rank than on another, and `wait` is called by all of them at the same step.
        """
        return self._error is not None

    def steps(self) -> tuple[int, ...]:
        """The steps that are complete, oldest first."""
        return steps_in(self.folder)

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint, or hand it over to be written while steps go on; the one before is waited for.

        The step that this run has just saved, or resumed from, is not written again.

        Returns:
            The folder that the step has, or will have.

        Raises:
            CheckpointError: On every rank: this checkpoint, or the one before, was not written; older ones are intact.
        """
        self.wait()
        target = self._path(state.step)
        if state.step == self.newest:
            return target
        if self._frozen is None:
            self._frozen = frozen_identity(state.model, self._ranks)
        text = self._text_of(state)
        tensors = {**state.tensors(), **random_tensors(self._ranks)}
        shards = {name: Shard(name, each, copy=self._options.save_async) for name, each in tensors.items()}
        if self._options.save_async:
            self._thread = threading.Thread(target=self._write_aside, args=(state.step, shards, text), name=target.name)
            self._thread.start()
        else:
            self._write(state.step, shards, text)
        self.newest = state.step
        return target

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: On every rank: the last checkpoint was not written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self.newest = None
            raise error

    def resume(self, state: TrainState) -> int | None:
        """Do what the option `resume` says.

        Returns:
            The step that was loaded, if any.

        Raises:
            CheckpointError: `must`, and there is none; `never`, and there are some; or what `load` raises.
            FingerprintError: The data changed.
        """
        if self._options.resume == "never":
            self._ranks.on_first(self._check_unused)
            return None
        step = self.load(state)
        if step is None and self._options.resume == "must":
            raise CheckpointError(f"{self.folder} has no step to resume from, and resume=must.")
        return step

    def load(self, state: TrainState, which: Literal["auto"] | int = "auto") -> int | None:
        """Bring a run that was just built to where a checkpoint left it.

        Args:
            state: Of the new run; its tensors are filled in place, `step` and `extra` are set.
            which: The step, or `auto` for the newest one that is whole; of damaged ones the names are changed then.

        Returns:
            The step; `None` if there is none.

        Raises:
            CheckpointError: On every rank: of another model or optimizer, none that is whole, or no such step; nothing
                was loaded.
            FingerprintError: The data changed.
        """
        self.wait()
        steps = self._ranks.on_first(partial(self._find, which))
        if not steps:
            return None
        stored, damaged = self._open_first_whole(steps)
        step = steps[len(damaged)]
        self._frozen = frozen_identity(state.model, self._ranks)
        restore(stored, state, self._frozen, self._ranks, allow_data_change=self._options.allow_data_change)
        if damaged:
            self._ranks.on_first(partial(self._put_aside, damaged, step))
        self._resumed_from = self.newest = step
        return step

    def _open_first_whole(self, steps: Sequence[int]) -> tuple[StoredStep, dict[int, Exception]]:
        """The first of the steps that can be read, and what is wrong with those before it."""
        damaged: dict[int, Exception] = {}
        for step in steps:
            try:
                return open_step(self._path(step), self._ranks), damaged
            except (CheckpointError, ConfigError) as error:  # on every rank, its own or that of others
                damaged[step] = error
        raise damaged[steps[0]]

    def _put_aside(self, damaged: Mapping[int, Exception], instead: int) -> None:
        """Keep damaged steps under other names, as the run comes to the same steps again."""
        with write_errors(self.folder):
            for step, error in damaged.items():
                aside = sibling(self._path(step), "damaged")
                os.rename(self._path(step), aside)
                _LOG.warning("%s: going on from step %d; what is left of it is now %s", error, instead, aside)
            self._point_to(instead)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _text_of(self, state: TrainState) -> str:
        layout = {"format": 1, "ranks": self._ranks.world_size, "readers": self._ranks.data_size}
        try:
            return dump({**layout, "frozen": self._frozen, **state.values()})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the run's state cannot be saved, it is to be of plain values: {error}") from error

    def _write_aside(self, step: int, shards: dict[str, Shard], state: str) -> None:
        try:
            self._write(step, shards, state)
        except Exception as error:  # noqa: BLE001 - raised again by `wait`
            self._error = error

    def _write(self, step: int, shards: dict[str, Shard], state: str) -> None:
        write_step(self._path(step), shards, state, self._ranks)
        share = (self._ranks.rank, self._ranks.world_size)
        self._ranks.together(partial(verify_manifest, self._path(step), share=share))
        self._ranks.on_first(partial(self._settle, step))

    def _settle(self, newest: int) -> None:
        """The new step can be read: say so, and let go of old ones."""
        with write_errors(self.folder):
            self._point_to(newest)
            for step in self.steps():
                if step < newest and not self._is_kept(step):
                    aside = sibling(self._path(step), "old")
                    os.rename(self._path(step), aside)  # so that what is half deleted does not pass for complete
                    shutil.rmtree(aside)

    def _point_to(self, step: int) -> None:
        with replace_file(self.folder / LATEST) as file:
            file.write(f"{step}\n".encode())

    def _is_kept(self, step: int) -> bool:
        last, every = self._options.keep_last, self._options.keep_every
        is_recent = last is None or step in self.steps()[-last:]
        return is_recent or step == self._resumed_from or (every is not None and step % every == 0)

    def _check_unused(self) -> None:
        if steps := self.steps():
            raise CheckpointError(
                f"{self.folder} has steps already ({_listed(steps)}): resume the run (--resume auto), or give this one "
                "another folder."
            )

    def _find(self, which: Literal["auto"] | int) -> tuple[int, ...]:
        """Which steps to try, on the first rank: the newest first."""
        for path in leftovers_in(self.folder, _STEP.pattern):
            _LOG.warning("%s was left by a save that was broken off; it is not used, and may be deleted", path)
        steps = self.steps()
        for folder in (self.folder.parent, self.folder, *map(self._path, steps)):
            check_not_torchs(folder)
        if which != "auto":
            if which not in steps:
                raise CheckpointError(f"{self.folder} has no step {which}; it has {_listed(steps)}.")
            return (which,)
        latest = self._latest(steps)
        if latest is not None and latest < max(steps):
            _LOG.warning("%s says %d, and %d is complete: loading that", self.folder / LATEST, latest, max(steps))
        return steps[::-1]

    def _latest(self, steps: tuple[int, ...]) -> int | None:
        """What the file `latest` says, which must be a step; `None` where there is no such file."""
        path = self.folder / LATEST
        if not os.path.lexists(path):
            return None
        try:
            text = path.read_bytes()[:200].decode(errors="replace").strip() if path.is_file() else ""
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) not in steps:
            raise CheckpointError(
                f"{path} says {text[:60]!r}, which is no step that is here; there is {_listed(steps)}. Delete it to "
                "go on from the newest."
            )
        return int(text)


def steps_in(folder: Path) -> tuple[int, ...]:
    """The steps in a folder of checkpoints, oldest first."""
    if not folder.is_dir():
        return ()
    folders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    return tuple(sorted(int(match[1]) for entry in folders if (match := _STEP.fullmatch(entry.name))))


def _listed(steps: tuple[int, ...]) -> str:
    return f"step {', '.join(map(str, steps))}" if steps else "none"
