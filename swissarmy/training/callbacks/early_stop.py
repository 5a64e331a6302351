"""Ending a run that no longer gets better."""

from collections.abc import Mapping
from typing import Any, final

from swissarmy.training.callbacks.base import Callback, Evaluation, Run


@final
class EarlyStop(Callback):
    """Ends the run after so many evaluations of the valid set, one after the other, without a lower loss.

    Args:
        patience: How many.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.without_improvement = 0

    def on_evaluate(self, run: Run, evaluation: Evaluation) -> None:
        """Count; the run's `best_loss` is the one from before."""
        if evaluation.name != "valid":
            return
        improved = run.best_loss is None or evaluation.loss < run.best_loss
        self.without_improvement = 0 if improved else self.without_improvement + 1
        if self.without_improvement >= self.patience:
            run.stop(f"{self.patience} evaluations without a loss below {run.best_loss:.6g}")

    def state_dict(self) -> dict[str, Any]:
        """How many evaluations it has been."""
        return {"without_improvement": self.without_improvement}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.without_improvement = state["without_improvement"]
