"""`sat eval --tasks`: run tasks of lm-evaluation-harness; everything that can be checked before the weights is."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from swissarmy.cli import output
from swissarmy.cli.command import DONE, UsageError
from swissarmy.cli.loading import load_model, outline_of_generator
from swissarmy.core.errors import ConfigError, nearest, require_extra
from swissarmy.core.files import replace_file

if TYPE_CHECKING:
    from swissarmy.cli.eval import EvalOptions
    from swissarmy.data.tokenizer import Tokenizer


def run(tasks: str, options: "EvalOptions") -> int:
    """Find the tasks, load the model, measure, print, and write the whole report if that is asked for."""
    require_extra("lm_eval", extra="eval", purpose="sat eval --tasks")
    _check_output(options.output)
    names, manager = find_tasks(tasks, options.include_path)
    tokenizer = _tokenizer(options)
    report, facts = _measure(names, manager, tokenizer, options)
    if options.output is not None:
        with replace_file(options.output) as file:
            file.write(json.dumps(report, indent=2, ensure_ascii=False, default=str).encode() + b"\n")
    if options.json:
        output.print_json({"path": options.path, **facts}, indent=2)
    else:
        output.console().print(_table(facts["tasks"]))
    if facts["truncated"]:
        output.print_error(f"sat eval: {facts['truncated']:,} requests were too long and lost their beginning.")
    return DONE


def find_tasks(wanted: str, include_path: Path | None) -> tuple[list[str], Any]:
    """Names of tasks, groups and tags, patterns resolved, and the harness's manager that knows them.

    Raises:
        UsageError: There is no such folder, or no such task.
    """
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path {include_path}: there is no such folder.")
    from lm_eval.tasks import TaskManager

    patterns = [name.strip() for name in wanted.split(",")]
    manager = TaskManager(include_path=include_path and str(include_path), include_defaults=include_path is None)
    found = _matches(patterns, manager)
    if include_path is not None and not all(found):  # the harness's own are thousands of files: only where needed
        manager = TaskManager(include_path=str(include_path))
        found = _matches(patterns, manager)
    for pattern, matches in zip(patterns, found, strict=True):
        if not matches:
            raise UsageError(
                f"--tasks: there is no task '{pattern}'.{nearest(pattern, manager.all_tasks)} `lm-eval ls tasks` lists "
                "those of the harness; --include-path names a folder with your own."
            )
    return list(dict.fromkeys(name for matches in found for name in matches)), manager


def _matches(patterns: Sequence[str], manager: Any) -> list[list[str]]:
    return [sorted(manager.match_tasks([pattern])) for pattern in patterns]


def _check_output(path: Path | None) -> None:
    """Hours later would be too late to find out."""
    if path is None:
        return
    if path.exists():
        raise UsageError(f"--output {path}: this exists already; give a new name.")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--output {path}: the folder {path.parent} cannot be written to.")


def _tokenizer(options: "EvalOptions") -> "Tokenizer":
    from swissarmy.interop.tokenizer import load_tokenizer

    if outline_of_generator(options.path).parts:
        raise ConfigError(f"{options.path} answers a source text; --tasks measures models that continue one.")
    tokenizer = load_tokenizer(options.path)
    if options.apply_chat_template and tokenizer.chat_template is None:
        raise ConfigError(f"--apply-chat-template: the tokenizer of {options.path} has no chat template.")
    return tokenizer


def _measure(
    names: list[str], manager: Any, tokenizer: "Tokenizer", options: "EvalOptions"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The harness's whole report, and what is printed of it."""
    import lm_eval

    from swissarmy.generation.harness import HarnessModel

    model = load_model(options)
    harness = HarnessModel(model, tokenizer, batch_size=options.batch_size, progress=True)
    started = time.perf_counter()
    with _quiet_harness():
        report: dict[str, Any] = lm_eval.simple_evaluate(
            harness,
            tasks=names,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            log_samples=options.output is not None,
        )
    seconds = time.perf_counter() - started
    tasks = {name: _task_facts(name, values, report) for name, values in report["results"].items()}
    return report, {"tasks": tasks, "truncated": harness.num_truncated, "seconds": seconds}


def _task_facts(name: str, values: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    """A task's metrics by name; where the harness filtered answers first, the filter's name follows."""
    metrics: dict[str, Any] = {}
    for key, value in values.items():
        metric, is_metric, name_of_filter = key.partition(",")
        if not is_metric or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{name_of_filter}")
        metrics[metric if name_of_filter == "none" else key] = {
            "value": value,
            "stderr": error if isinstance(error, float) else None,
        }
    samples = report["n-samples"].get(name, {}).get("effective")
    return {"metrics": metrics, "samples": samples, "num_fewshot": report["n-shot"].get(name)}


def _table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("task", "metric", box=None, pad_edge=False, header_style="bold")
    for title in ("value", "± stderr", "samples", "shots"):
        table.add_column(title, justify="right")
    for name, facts in tasks.items():
        for metric, measured in facts["metrics"].items():
            error = "" if measured["stderr"] is None else f"{measured['stderr']:.4f}"
            value = f"{measured['value']:.4f}" if isinstance(measured["value"], float) else str(measured["value"])
            table.add_row(name, metric, value, error, str(facts["samples"] or ""), str(facts["num_fewshot"] or 0))
    return table


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Without the harness's hints on how to write a task."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
