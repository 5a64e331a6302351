"""`sat data tokenize`: texts into a file of token ids."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, final

import tyro
from rich.table import Table

from swissarmy.cli import output
from swissarmy.cli.command import DONE, Command, Options
from swissarmy.cli.data_check import Files, open_all
from swissarmy.data.config import DataConfig


@final
@dataclass(frozen=True, kw_only=True)
class TokenizeOptions(Options):
    """What `sat data tokenize` takes."""

    files: Files
    """Files, folders, patterns such as "data/*.jsonl", or hf:owner/name on the hub; one after another."""
    tokenizer: str
    """A checkpoint or a folder with a tokenizer."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The new file, such as train.tokens. A run that was interrupted goes on when it is given again."""
    text_field: str = "text"
    """The field that holds the text."""
    text_unit: Literal["line", "paragraph", "file"] = "line"
    """What a record of a .txt file is."""
    append_eos: bool = True
    """End each document with the end token, where the tokenizer does not do so by itself."""
    special_tokens: bool = True
    """Add what the tokenizer puts around a text, such as a first token."""
    num_workers: int = 1
    """Processes."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Whether a record that cannot be read ends the run, or is left out."""
    max_bad_records: int = 100
    """How many may be left out before the run ends all the same."""
    progress: bool = True
    """Show a bar on standard error, if that is a terminal."""
    json: bool = False
    """Print what was written as a JSON object."""

    def problems(self) -> Iterator[str]:
        """Values outside their ranges."""
        if not self.files:
            yield "there are no FILES to read"
        if self.num_workers < 1:
            yield f"--num-workers {self.num_workers} must be at least 1"
        if self.max_bad_records < 0:
            yield f"--max-bad-records {self.max_bad_records} must be at least 0"


def run(options: TokenizeOptions) -> int:
    """Write the file."""
    from swissarmy.data.samples.encoders import TextEncoder
    from swissarmy.data.samples.examples import Examples
    from swissarmy.data.sources.concatenated import Concatenated
    from swissarmy.data.tokenize import write_tokens
    from swissarmy.interop.tokenizer import load_tokenizer

    config = DataConfig(train_data=options.files, text_field=options.text_field, text_unit=options.text_unit)
    tokenizer = load_tokenizer(options.tokenizer)
    encoder = TextEncoder(
        tokenizer=tokenizer,
        text_field=options.text_field,
        append_eos=options.append_eos,
        add_special_tokens=options.special_tokens,
    )
    sources = list(open_all(options.files, config).values())
    source = sources[0] if len(sources) == 1 else Concatenated(sources)
    header = write_tokens(
        Examples(source, encoder, vocab_size=len(tokenizer)),
        options.output,
        vocab_size=len(tokenizer),
        num_workers=options.num_workers,
        max_bad_records=options.max_bad_records if options.on_bad_record == "skip" else 0,
        progress=options.progress and output.console(stderr=True).is_terminal,
    )
    facts = {"path": str(options.output), "bytes": header.size, **asdict(header)}
    if options.json:
        output.print_json(facts, indent=2)
        return DONE
    table = Table.grid(padding=(0, 2))
    table.add_row("written", f"{options.output}, {header.size:,} bytes")
    table.add_row("documents", f"{header.documents:,}" + (f", {header.skipped:,} left out" if header.skipped else ""))
    table.add_row("tokens", f"{header.tokens:,}, {header.tokens / header.documents:,.1f} in a document, {header.dtype}")
    output.console().print(table)
    return DONE


COMMAND = Command(
    summary="turn texts into a file of token ids",
    examples=(
        "sat data tokenize train.jsonl --tokenizer openai-community/gpt2 -o train.tokens",
        'sat data tokenize "shards/*.jsonl" --tokenizer ./model -o train.tokens --num-workers 8 --on-bad-record skip',
    ),
    options=TokenizeOptions,
    run=run,
)
