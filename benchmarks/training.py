"""Training beside its peers: the time of a step, real tokens a second, peak memory; each run in a process of its own.

    python benchmarks/training.py [--only gpt2] [--steps 6] [--rounds 3] [--litgpt PYTHON] [--out build/benchmarks]

GPT-2 (124M) and a LLaMA-like network on 2 x 256 tokens, GPT-2 on verses of the shipped text, which are short and of all
lengths, BERT-base classifying them, ViT-B/16, and LoRA on GPT-2's queries and values. Peers: `transformers.Trainer` as
it comes and in its other modes, a plain loop in the manner of nanoGPT, and litgpt, which needs an environment of its
own: `python -m venv build/litgpt && build/litgpt/bin/pip install litgpt`, then `--litgpt build/litgpt/bin/python`.

The networks start from the same weights and, where a step has the same samples, the first loss must be the same. The
limit is the time of the products of a step alone, measured here. Writes a table, a JSON file and a plot.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from measure import Timing, describe_machine, ratio
from rich.console import Console
from rich.table import Table
from training_peers import RUNNERS, Outcome
from training_works import WORKS, Work, products_seconds, save_networks

FIRST_STEPS: Final = 2
"""They compile, make the optimizer's state, and warm caches: not counted."""
LITGPT: Final = Path(__file__).parent / "training_litgpt.py"


@dataclass(frozen=True)
class Result:
    """What one candidate did, over all rounds."""

    steps: Timing
    """Seconds of a step."""
    tokens_per_second: float
    """Real ones: padding is none. For images, images."""
    peak_gigabytes: float
    waited: float | None
    """The share of the time that the loop waited for data, where it is known."""


def run_once(candidate: str, work: Work, folder: str, steps: int, python: str | None) -> Outcome:
    """One run, in a new process."""
    if candidate == "litgpt":
        assert python is not None
        command = [python, str(LITGPT), str(steps), str(work.batch), str(work.length), str(torch.get_num_threads())]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return Outcome(**json.loads(printed.splitlines()[-1]))
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(candidate, work, folder, steps, torch.get_num_threads(), sending))
    process.start()
    sending.close()
    try:
        answer = receiving.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{candidate}, {work.name}: the process died with exit code {process.exitcode}") from None
    process.join()
    if isinstance(answer, str):
        raise SystemExit(f"{candidate}, {work.name}: {answer}")
    outcome: Outcome = answer
    return outcome


def _serve(candidate: str, work: Work, folder: str, steps: int, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        pipe.send(RUNNERS[candidate](work, folder, steps))
    except Exception as error:  # noqa: BLE001 - told to the parent, which says which candidate it was
        pipe.send(f"{type(error).__name__}: {error}")


def measure(
    work: Work, candidates: Sequence[str], folder: str, *, steps: int, rounds: int, python: str | None
) -> dict[str, Result]:
    """Every candidate once a round, forwards and backwards."""
    runs: dict[str, list[Outcome]] = {name: [] for name in candidates}
    for index in range(rounds):
        for name in candidates if index % 2 == 0 else list(reversed(candidates)):
            runs[name].append(run_once(name, work, folder, steps + FIRST_STEPS, python))
            print(f"  {work.name}: {name}: {Timing(tuple(runs[name][-1].seconds[FIRST_STEPS:])).median:.3f} s a step")
    _check_agreement(work, runs)
    return {name: _result(outcomes) for name, outcomes in runs.items()}


def _result(outcomes: Sequence[Outcome]) -> Result:
    seconds = [second for outcome in outcomes for second in outcome.seconds[FIRST_STEPS:]]
    tokens = [count for outcome in outcomes for count in outcome.tokens[FIRST_STEPS:]]
    waits = [second for outcome in outcomes for second in outcome.waited[FIRST_STEPS:]]
    return Result(
        steps=Timing(tuple(seconds)),
        tokens_per_second=sum(tokens) / sum(seconds),
        peak_gigabytes=max(outcome.peak_bytes for outcome in outcomes) / 1e9,
        waited=sum(waits) / sum(seconds) if waits else None,
    )


def _check_agreement(work: Work, runs: Mapping[str, Sequence[Outcome]]) -> None:
    """The same network on the same samples has the same first loss; litgpt starts from its own random weights."""
    losses = {name: outcomes[0].first_loss for name, outcomes in runs.items() if name != "litgpt"}
    if work.same_samples and max(losses.values()) - min(losses.values()) > 1e-3:
        raise SystemExit(f"{work.name}: the first losses differ: {losses}")


def print_results(work: Work, results: Mapping[str, Result], limit: float | None) -> list[dict[str, Any]]:
    """A table of one work; its rows again as values for the plot."""
    theirs = [name for name in results if not name.startswith("swissarmy")]
    best = min(theirs, key=lambda name: results[name].steps.median, default=None)
    trainer, peer = results.get("Trainer"), None if best is None else results[best]
    table = Table(title=f"{work.name} (best peer: {best})", title_justify="left")
    table.add_column("candidate")
    headings = (f"{work.unit}/s", "ms a step", "min", "max", "x Trainer", "x best peer", "peak GB", "x Trainer")
    for heading in (*headings, "of the limit", "waiting"):
        table.add_column(heading, justify="right")
    rows = []
    for name, each in results.items():
        share = None if limit is None else limit / each.steps.median
        beside = [None if other is None else ratio(each.steps, other.steps) for other in (trainer, peer)]
        memory = None if trainer is None else each.peak_gigabytes / trainer.peak_gigabytes
        times = (f"{1000 * value:.0f}" for value in (each.steps.median, each.steps.min, each.steps.max))
        table.add_row(
            name,
            f"{each.tokens_per_second:.1f}",
            *times,
            *map(_figure, beside),
            f"{each.peak_gigabytes:.2f}",
            _figure(memory),
            "-" if share is None else f"{share:.0%}",
            "-" if each.waited is None else f"{each.waited:.2%}",
        )
        rows.append({"work": work.name, "unit": work.unit, "candidate": name, "limit_seconds": limit, **asdict(each)})
    Console(width=150).print(table)
    return rows


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars of tokens a second and of memory, a line of panels for each work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    works = list(dict.fromkeys(row["work"] for row in rows))
    figure, axes = plt.subplots(len(works), 2, figsize=(11, 1.8 * len(works)), squeeze=False)
    for line, work in zip(axes, works, strict=True):
        shown = [row for row in rows if row["work"] == work]
        names = [row["candidate"] for row in shown]
        colours = ["#2a6f97" if name.startswith("swissarmy") else "#888888" for name in names]
        for axis, key, heading in zip(
            line, ("tokens_per_second", "peak_gigabytes"), (f"{shown[0]['unit']} a second", "peak GB"), strict=True
        ):
            bars = axis.barh(names, [row[key] for row in shown], color=colours)
            axis.bar_label(bars, [f" {row[key]:.3g}" for row in shown], fontsize=7)
            axis.invert_yaxis()
            axis.set_title(f"{work}: {heading}", fontsize=8, loc="left")
            axis.tick_params(labelsize=7)
            axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="works whose name contains this, e.g. gpt2")
    parser.add_argument("--candidates", default="", help="candidates whose name contains this, e.g. swissarmy")
    parser.add_argument("--without", default="", help="leave out candidates whose name contains this, e.g. compiled")
    parser.add_argument("--steps", type=int, default=6, help=f"of a run, beside the first {FIRST_STEPS}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--litgpt", help="the Python of an environment that has litgpt")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # its own look at the processor may fail, and all code be scalar then
    print(describe_machine())
    if options.litgpt is None:
        print("litgpt does not take part: give --litgpt PYTHON")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        works = [work for work in WORKS if options.only in work.name]
        folders = save_networks(works, Path(temporary))
        for work in works:
            names = [name for name in work.candidates if options.candidates in name]
            names = [name for name in names if not options.without or options.without not in name]
            names = [name for name in names if name != "litgpt" or options.litgpt is not None]
            measured = measure(
                work, names, folders[work.network], steps=options.steps, rounds=options.rounds, python=options.litgpt
            )
            results += print_results(work, measured, products_seconds(work, folders[work.network]))
    (options.out / "training.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, options.out / "training.png")
    print(f"written: {options.out / 'training.json'}, {options.out / 'training.png'}")


if __name__ == "__main__":
    main()
