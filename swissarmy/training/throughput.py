"""How fast a run is: tokens per second, and the share of what the machine can do that its arithmetic makes (MFU)."""

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Final, final

import torch
from torch import Tensor

from swissarmy.nn.linear import linear
from swissarmy.training.callbacks.base import StepReport
from swissarmy.training.flops import TrainingCost

_PEAKS: Final[Mapping[str, float]] = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "MI300X": 1307e12,
}
"""Dense bfloat16 operations per second by part of the device's name, from the makers' data sheets; first match wins."""


@final
class Meter:
    """Speeds over the last steps, of all ranks together.

    Args:
        window: How many steps.
        cost: What the arithmetic of a step is; without it there is no MFU.
        peak: Floating-point operations per second that all ranks together can do.
    """

    def __init__(self, window: int, cost: TrainingCost | None = None, peak: float = 0.0) -> None:
        self._steps: deque[StepReport] = deque(maxlen=window)
        self._cost, self._peak = cost, peak

    def add(self, step: StepReport) -> None:
        """Take a step into account."""
        self._steps.append(step)

    @property
    def seconds(self) -> float:
        """The mean of a step."""
        return sum(step.seconds for step in self._steps) / max(len(self._steps), 1)

    def speeds(self) -> dict[str, float | None]:
        """`seconds` a step, `tokens_per_second`, `samples_per_second`, `mfu`, and `waited`, the share of the time that
        the first rank waited for data. `mfu` is `None` where it is not known what a step costs.
        """
        seconds = max(sum(step.seconds for step in self._steps), 1e-9)
        return {
            "seconds": self.seconds,
            "tokens_per_second": sum(step.tokens for step in self._steps) / seconds,
            "samples_per_second": sum(step.samples for step in self._steps) / seconds,
            "mfu": self._mfu(self._cost, seconds) if self._cost is not None and self._peak else None,
            "waited": sum(step.waited for step in self._steps) / seconds,
        }

    def _mfu(self, cost: TrainingCost, seconds: float) -> float:
        flops = sum(cost.flops(step.tokens, step.samples, targets=step.count) for step in self._steps)
        return flops / seconds / self._peak


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second that a device can do at most.

    From the data sheet for 16-bit numbers on a GPU of known name; otherwise measured, by a product of matrices.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for part, peak in _PEAKS.items():
            if all(word in name for word in part.split()):
                return peak
    return measured_peak(device, dtype)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of a few products of square matrices, in floating-point operations per second."""
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    fastest = min(_seconds(matrix) for _ in range(3))
    return 2.0 * size**3 / fastest


@torch.no_grad()
def _seconds(matrix: Tensor) -> float:
    _wait_for(matrix.device)
    start = time.perf_counter()
    linear(matrix, matrix)
    _wait_for(matrix.device)
    return max(time.perf_counter() - start, 1e-9)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held: of the accelerator's memory, or of the main memory on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
