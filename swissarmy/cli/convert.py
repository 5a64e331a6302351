"""`sat convert`: any checkpoint that `sat.load` reads into a Hugging Face folder."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import tyro
from rich.table import Table

from swissarmy.cli import output
from swissarmy.cli.command import DONE, Command, Options
from swissarmy.cli.loading import Dtype

if TYPE_CHECKING:
    from swissarmy.interop.convert import Conversion


@final
@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """What `sat convert` takes."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A folder of this library or of Hugging Face, a .gguf file, or the name of a model on the hub."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The new folder."""
    dtype: Dtype | None = None
    """The precision of the weights; as stored when left out (float32 for GGUF)."""
    drop_mixins: bool = False
    """Leave out the mixins that are stored beside the model, which transformers cannot read."""
    json: bool = False
    """Print what was done as a JSON object."""


def run(options: ConvertOptions) -> int:
    """Convert, and say what was done."""
    import torch

    from swissarmy.interop.convert import convert

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    with output.console(stderr=True).status(f"converting {options.source}"):
        done = convert(options.source, options.target, dtype=dtype, drop_mixins=options.drop_mixins)
    if options.json:
        output.print_json(asdict(done), indent=2)
    else:
        show(done)
    return DONE


def show(done: "Conversion") -> None:
    """What was done, for people."""
    table = Table.grid(padding=(0, 2))
    rows = {
        "written": done.target,
        "as": f"{done.architecture}, family {done.family}",
        "parameters": f"{done.parameters:,} in {done.dtype}",
        "beside them": ", ".join(done.companions) or "no tokenizer: the source has none",
    }
    if done.dropped_mixins:
        rows["left out"] = ", ".join(f"{name} ({size:,} parameters)" for name, size in done.dropped_mixins.items())
    for name, text in rows.items():
        table.add_row(name, text)
    output.console().print(table)


COMMAND = Command(
    summary="write any checkpoint as a Hugging Face folder",
    examples=("sat convert ./roberta ./roberta-hf", "sat convert model.gguf ./model-hf --dtype bfloat16"),
    options=ConvertOptions,
    run=run,
)
