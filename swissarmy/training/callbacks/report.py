"""Reports of windows that were discarded: what somebody needs who wants to know where the NaN came from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import numpy as np

from swissarmy.core.files import replace_file
from swissarmy.training.callbacks.base import Callback, Run, Skip
from swissarmy.training.callbacks.metrics_file import finite


def report_path(folder: Path, step: int) -> Path:
    """Where the report of a step is."""
    return folder / "reports" / f"step-{step:08}.json"


@final
class ReportCallback(Callback):
    """Writes `reports/step-….json` for each window that was discarded."""

    def on_skip(self, run: Run, skip: Skip) -> None:
        """Write the report, on the first rank."""
        if not run.ranks.is_first:
            return
        path = report_path(run.folder, skip.step)
        path.parent.mkdir(exist_ok=True)
        with replace_file(path) as file:
            file.write(json.dumps(_content(run, skip), indent=2, ensure_ascii=False).encode() + b"\n")


def _content(run: Run, skip: Skip) -> Mapping[str, Any]:
    """The window, rank by rank, and the last step before it; a sum that is no number is text: `nan`, `inf`."""
    content: Mapping[str, Any] = finite(
        {
            "step": skip.step,
            "reason": skip.reason,
            "in_a_row": skip.in_a_row,
            "skipped": run.skipped,
            "ranks": [{**asdict(trouble), "records": _records(run, trouble.sample_ids)} for trouble in skip.ranks],
            "step_before": None if run.last is None else {**vars(run.last), "metrics": dict(run.last.metrics)},
        },
        otherwise=str,
    )
    return content


def _records(run: Run, sample_ids: Sequence[int]) -> list[str]:
    """Where samples come from: `train.jsonl:17`; those of a stream cannot be found again."""
    if run.loaders.train is None:
        return []
    batches = run.loaders.train.batches
    places = batches.order.places(np.array(sample_ids, np.int64))
    parts = (batches.parts[part] for part in places.parts)
    rows = batches.order.rows(places)
    return ["a stream" if part is None else part.where(int(row)) for part, row in zip(parts, rows, strict=True)]
