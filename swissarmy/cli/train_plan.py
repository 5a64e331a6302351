"""What `sat train --dry-run` prints: a rank's memory, and what a step is."""

from collections.abc import Mapping

from rich.table import Table

from swissarmy.cli import output
from swissarmy.training.dry_run.plan import Plan

MEMORY: Mapping[str, str] = {
    "parameters": "parameters",
    "gathered": "two layers, gathered",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "average": "averaged weights",
    "activations": "activations",
    "recomputed": "one layer, recomputed",
    "logits": "logits, a piece at a time",
    "total": "in all",
}
"""The rows of the table, in the words of people."""


def show(plan: Plan) -> None:
    """Print the plan, for people."""
    console = output.console()
    axes = " x ".join(f"{name} {size}" for name, size in plan.axes.items()) or "alone"
    console.print(f"{plan.world_size:,} processes ({axes})", style="bold", soft_wrap=True)
    console.print(_facts(plan))
    console.print("\nmemory of a rank", style="bold")
    console.print(_memory(plan))
    if plan.communication:
        console.print("\nwhat a rank sends in a step", style="bold")
        console.print(_amounts({name: _bytes(count) for name, count in plan.communication.items()}))
    console.print("\nOn top come the process itself, the allocator's gaps, and the network's buffers.", soft_wrap=True)


def _facts(plan: Plan) -> Table:
    share = plan.trainable / max(plan.parameters, 1)
    parts = "" if plan.accumulation == 1 else f", in {plan.accumulation} micro-batches"
    flops, share_of_rank = plan.flops / 1e12, plan.flops / plan.world_size / 1e12
    return _amounts(
        {
            "parameters": f"{plan.parameters:,}, of which {share:.2%} train",
            "a step": f"{plan.global_batch_size:,} samples of {plan.length:,}, {plan.tokens:,} tokens{parts}",
            "arithmetic of a step": f"{flops:,.2f} TFLOP, {share_of_rank:,.2f} a rank",
        }
    )


def _memory(plan: Plan) -> Table:
    found = plan.to_dict()["memory"]
    return _amounts({label: _bytes(found[name]) for name, label in MEMORY.items() if found[name]})


def _amounts(rows: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right" if all(len(value) < 16 for value in rows.values()) else "left")
    for name, value in rows.items():
        table.add_row(f"  {name}", value)
    return table


def _bytes(count: int) -> str:
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:,.2f} {units[0]}" if units[0] != "B" else f"{count} B"
