"""`sat eval`: measure how well a model predicts a text, or does on the tasks of lm-evaluation-harness."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from rich.table import Table

from swissarmy.cli import output
from swissarmy.cli.command import DONE, Command, UsageError
from swissarmy.cli.loading import ModelOptions, decode_text, load_model, outline_of_generator, read_text
from swissarmy.core.errors import ConfigError

if TYPE_CHECKING:
    from swissarmy.backbone.model import Model
    from swissarmy.data.tokenizer import Tokenizer


@final
@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions):
    """What `sat eval` takes."""

    perplexity: Path | None = None
    """A UTF-8 text file, to be predicted token by token."""
    stride: int | None = None
    """With --perplexity, for a text longer than the model's maximum: how far each window moves on. Smaller: more
    context, more time. Half the maximum when left out."""
    tasks: str | None = None
    """In place of --perplexity: names of tasks, groups and tags of lm-evaluation-harness, with commas between; * stands
    for anything. Needs the extra `eval`."""
    include_path: Path | None = None
    """With --tasks: a folder with task files of your own. It may hold Python code, which is run."""
    limit: int | None = None
    """With --tasks: only so many examples of each, for trying out."""
    num_fewshot: int | None = None
    """With --tasks: how many solved examples stand before each question; as each task says when left out."""
    apply_chat_template: bool = False
    """With --tasks: put questions as turns of a conversation, for models that were trained on those."""
    batch_size: int = 8
    """With --tasks: how many requests are worked on at a time."""
    output: Path | None = None
    """With --tasks: a new file for the harness's whole report, each question and answer included, as JSON."""
    json: bool = False
    """Print a JSON object instead."""

    def problems(self) -> Iterator[str]:
        """Values outside their ranges, and flags that do not go together."""
        if (self.perplexity is None) == (self.tasks is None):
            yield "give --perplexity FILE or --tasks NAMES, one of them"
        elif self.tasks is None:
            for flag in ("include_path", "limit", "num_fewshot", "output"):
                if getattr(self, flag) is not None:
                    yield f"--{flag.replace('_', '-')} goes with --tasks"
        elif self.stride is not None:
            yield "--stride goes with --perplexity"
        for flag, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
            value = getattr(self, flag)
            if value is not None and value < least:
                yield f"--{flag.replace('_', '-')} {value} must be at least {least}"
        if self.stride is not None and self.stride < 1:
            yield f"--stride {self.stride} must be at least 1"


def run(options: EvalOptions) -> int:
    """Check everything that can be checked without the weights, load them, measure."""
    if os.environ.get("RANK", "0") != "0" or os.environ.get("LOCAL_RANK", "0") != "0":
        output.print_error("sat eval: one process measures; this rank leaves that to rank 0.")
        return DONE
    if options.perplexity is not None:
        return _run_perplexity(options, options.perplexity)
    from swissarmy.cli.eval_tasks import run as run_tasks

    assert options.tasks is not None
    return run_tasks(options.tasks, options)


def _run_perplexity(options: EvalOptions, file: Path) -> int:
    text = decode_text(read_text(file, "--perplexity"), str(file))
    from swissarmy.interop.tokenizer import load_tokenizer

    outlined = outline_of_generator(options.path)
    stride = _stride(outlined, options)
    tokenizer = load_tokenizer(options.path)
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise UsageError(f"{file}: {len(ids)} tokens, and there must be two: the first begins the text.")
    model = load_model(options)
    facts = {
        "path": options.path,
        "file": str(file),
        **measure(model, ids, stride=stride, num_bytes=scored_bytes(text, ids, tokenizer)),
    }
    if options.json:
        output.print_json(facts, indent=2)
    else:
        output.console().print(_table(facts))
    return DONE


def measure(model: "Model", ids: list[int], *, stride: int, num_bytes: int) -> dict[str, Any]:
    """The figures, as `--json` prints them; seconds are those of the measurement alone."""
    import torch

    from swissarmy.generation.perplexity import evaluate_perplexity

    started = time.perf_counter()
    with output.console(stderr=True).status(f"reading {len(ids):,} tokens"):
        result = evaluate_perplexity(model, torch.tensor(ids), stride=stride)
    return {
        "perplexity": result.perplexity,
        "nats_per_token": result.nll,
        "bits_per_byte": result.nll * result.tokens / math.log(2) / max(num_bytes, 1),
        "tokens": result.tokens,
        "bytes": num_bytes,
        "stride": stride,
        "seconds": time.perf_counter() - started,
    }


def scored_bytes(text: str, ids: list[int], tokenizer: "Tokenizer") -> int:
    """How many bytes of UTF-8 the scored tokens make: all, or without the first token where that is text."""
    return len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())


def _stride(model: "Model", options: EvalOptions) -> int:
    from swissarmy.cli.outline import parts_of

    if model.parts:
        raise ConfigError(f"{options.path} answers a source text; --perplexity measures models that continue one.")
    (config,) = parts_of(model).values()
    longest = config.max_sequence_length
    if options.stride is not None and options.stride >= longest:
        raise UsageError(f"--stride {options.stride} must be below {longest}, the model's maximum.")
    return options.stride or max(longest // 2, 1)


def _table(facts: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("perplexity", f"{facts['perplexity']:.4f}")
    table.add_row("nats per token", f"{facts['nats_per_token']:.4f}")
    table.add_row("bits per byte", f"{facts['bits_per_byte']:.4f}")
    table.add_row("tokens", f"{facts['tokens']:,}")
    table.add_row("bytes", f"{facts['bytes']:,}")
    table.add_row("seconds", f"{facts['seconds']:.1f}")
    return table


COMMAND = Command(
    summary="measure how well a model predicts a text, or does on tasks",
    examples=(
        "sat eval openai-community/gpt2 --perplexity book.txt",
        "sat eval model.gguf --perplexity book.txt --stride 512 --json",
        "sat eval model.gguf --tasks hellaswag,arc_easy --limit 100 --output report.json",
    ),
    options=EvalOptions,
    run=run,
)
