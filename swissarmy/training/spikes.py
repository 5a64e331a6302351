"""Steps that must not be taken: numbers that are not finite, and losses or gradients far from all before."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from swissarmy.core.config import Config
from swissarmy.core.errors import SwissArmyError


class TrainingError(SwissArmyError):
    """A run cannot go on; the message says at which step, and why."""


@dataclass(frozen=True, kw_only=True)
class SkipOptions(Config):
    """Which steps are skipped, and when the run gives up."""

    max_skipped: int = 10
    """After how many skipped steps in a row the run ends with an error."""
    skip_outliers: bool = False
    """Whether steps are skipped too whose loss or gradient norm is far above those of the last steps."""
    outlier_sigma: float = 6.0
    """How far: so many standard deviations above the mean."""
    outlier_window: int = 128
    """Of how many steps; nothing is judged before half as many were taken."""

    def problems(self) -> Iterator[str]:
        """Numbers out of range."""
        if self.max_skipped < 1:
            yield f"max_skipped={self.max_skipped} must be at least 1."
        if not self.outlier_sigma > 0:
            yield f"outlier_sigma={self.outlier_sigma} must be positive."
        if self.outlier_window < 8:
            yield f"outlier_window={self.outlier_window} must be at least 8: fewer steps say nothing of what is usual."


@final
class Spikes:
    """Judges steps by loss and gradient norm, and remembers those that were taken."""

    def __init__(self, options: SkipOptions) -> None:
        self.options = options
        self._losses: deque[float] = deque(maxlen=options.outlier_window)
        self._norms: deque[float] = deque(maxlen=options.outlier_window)

    def problem(self, loss: float, grad_norm: float) -> str | None:
        """Why a step must not be taken; `None`: it may."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if self.options.skip_outliers:
            return self._outlier("loss", loss, self._losses) or self._outlier("gradient norm", grad_norm, self._norms)
        return None

    def remember(self, loss: float, grad_norm: float) -> None:
        """Count a step that was taken among those that others are judged by."""
        if self.options.skip_outliers:
            self._losses.append(loss)
            self._norms.append(grad_norm)

    def state_dict(self) -> dict[str, Any]:
        """The steps that are remembered."""
        return {"losses": list(self._losses), "norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Judge by the steps of a checkpoint."""
        self._losses = deque(state["losses"], maxlen=self.options.outlier_window)
        self._norms = deque(state["norms"], maxlen=self.options.outlier_window)

    def _outlier(self, name: str, value: float, before: Sequence[float]) -> str | None:
        if 2 * len(before) < self.options.outlier_window:
            return None
        mean = math.fsum(before) / len(before)
        deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in before) / len(before))
        distance = (value - mean) / deviation if deviation else math.inf * (value - mean) if value > mean else 0.0
        if distance <= self.options.outlier_sigma:
            return None
        return (
            f"the {name} {value:.6g} is {distance:.1f} standard deviations above the mean {mean:.6g} of the last steps"
        )
