"""Ending a run that no longer gets better."""

import math
from collections.abc import Mapping
from typing import Any, final

from swissarmy.training.callbacks.base import Callback, Evaluation, Run


@final
class EarlyStop(Callback):
    """Ends the run after so many evaluations of the valid set, one after the other, without a lower loss; one that is
    no number is not lower.

    Args:
        patience: How many.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.without_improvement = 0

    def on_start(self, run: Run) -> None:
        """A run that had ended, and is resumed, goes on only if it has more patience now."""
        self._stop(run)

    def on_evaluate(self, run: Run, evaluation: Evaluation) -> None:
        """Count; the run's `best_loss` is the one from before."""
        if evaluation.name != "valid":
            return
        improved = evaluation.loss < (math.inf if run.best_loss is None else run.best_loss)
        self.without_improvement = 0 if improved else self.without_improvement + 1
        self._stop(run)

    def state_dict(self) -> dict[str, Any]:
        """How many evaluations it has been."""
        return {"without_improvement": self.without_improvement}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.without_improvement = state["without_improvement"]

    def _stop(self, run: Run) -> None:
        if self.without_improvement >= self.patience:
            than = "that is a number" if run.best_loss is None else f"below {run.best_loss:.6g}"
            times = f"{self.without_improvement} evaluation{'s'[: self.without_improvement > 1]}"
            run.stop(f"{times} without a loss {than}")
