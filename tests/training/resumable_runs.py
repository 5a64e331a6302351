"""A run in which everything is random that may be, for tests that break it off and go on."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Final

import torch

from swissarmy.backbone.model import Model
from swissarmy.interop import safetensors_write
from swissarmy.mixins.lora import LoRAMixin
from swissarmy.training.train import TrainResult
from tests.training.tiny_runs import model_of, run, step

STEPS: Final = 6
STATE: Final = f"checkpoints/step-{STEPS:08d}/rank-00000/model.safetensors"
"""Weights, optimizer, average and random numbers after the last step."""
WEIGHTS: Final = "final/model.safetensors"


def random_model(*, adapters: bool = False) -> Model:
    """Two layers with dropout, and LoRA; with `adapters` nothing else trains."""
    model = model_of(resid_pdrop=0.3, attn_pdrop=0.1)
    torch.manual_seed(4)
    model.add_mixin("lora", LoRAMixin.for_model(model, r=2).double())
    if adapters:
        model.freeze_except("mixins.lora")
    return model


def random_run(folder: Path, *, adapters: bool = False, forward_step: Any = step, **changes: Any) -> TrainResult:
    """Six steps over a blend of two sources, two micro-batches each, with a schedule and averaged weights."""
    settings = {
        "train_data": ("rows:40", "rows:23"),
        "train_data_weights": (2.0, 1.0),
        "train_iters": STEPS,
        "accumulation": 2,
        "lr_decay_style": "cosine",
        "warmup": 2.0,
        "lr": 1e-2,
        "ema_decay": 0.9,
        "save_interval": 2,
        "resume": "auto",
    }
    return run(folder, model=random_model(adapters=adapters), forward_step=forward_step, **{**settings, **changes})


def outcome(folder: Path) -> tuple[bytes, bytes]:
    """The bits that a run ends with."""
    return (folder / STATE).read_bytes(), (folder / WEIGHTS).read_bytes()


def in_a_child(work: Callable[..., None], *arguments: Any) -> int:
    """The exit code of a process that does it; the imports are done once, for all of them."""
    process = context().Process(target=work, args=arguments)
    process.start()
    process.join(timeout=300)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def context() -> ForkServerContext:
    """Where children come from: a process that has imported this module, and runs no threads."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__])
    return server


class Countdown:
    """Kills this process at the n-th of the moments that matter, or counts them.

    Moments are forward passes, and whatever is about to be done in the run's folder: opening, making, renaming and
    removing of files, each tensor that is written, each flush.
    """

    def __init__(self, folder: Path, moments: int = sys.maxsize) -> None:
        self.folder, self.left, self.counted = str(folder), moments, 0

    def start(self) -> None:
        """From now on, for as long as the process lives."""
        sys.addaudithook(self._hear)
        parts, fsync = safetensors_write._parts, os.fsync
        safetensors_write._parts = lambda *args: self._then(parts, *args)  # type: ignore[assignment]
        os.fsync = lambda descriptor: self._then(fsync, descriptor)

    def step(self, batch: Any, model: Any) -> Any:
        """The forward step of the run."""
        return self._then(step, batch, model)

    def _then(self, action: Callable[..., Any], *arguments: Any) -> Any:
        self._tick()
        return action(*arguments)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and self.folder in str(arguments[0]):
            self._tick()

    def _tick(self) -> None:
        self.counted += 1
        if self.counted == self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_run(folder: Path, moments: int, options: dict[str, Any]) -> None:
    """In a child: a run that is killed at a moment."""
    torch.set_num_threads(1)
    countdown = Countdown(folder, moments)
    countdown.start()
    random_run(folder, forward_step=countdown.step, **options)


def counted_run(folder: Path, options: dict[str, Any]) -> None:
    """In a child: a whole run, and a file beside its folder that says how many moments it had."""
    torch.set_num_threads(1)
    countdown = Countdown(folder)
    countdown.start()
    random_run(folder, forward_step=countdown.step, **options)
    folder.with_suffix(".moments").write_text(str(countdown.counted))


def resumed_run(folder: Path, options: dict[str, Any]) -> None:
    """In a child: whatever is there, to the end."""
    torch.set_num_threads(1)
    random_run(folder, **options)
