"""`sat data check`: read all of some files, and say what is in them and what is wrong."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import tyro
from rich.table import Table

from swissarmy.cli import output
from swissarmy.cli.command import DONE, FAILED, Command, Options
from swissarmy.core.errors import require_extra
from swissarmy.data.config import DataConfig, RecordFormat

if TYPE_CHECKING:
    from swissarmy.data.samples.examples import Encoder
    from swissarmy.data.source import Source
    from swissarmy.data.survey import Encode, Survey
    from swissarmy.data.tokenizer import Tokenizer

Files = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")]
"""Data as commands take it: files, folders, patterns, names on the hub."""

_BAR = 40


@final
@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """What `sat data check` takes."""

    files: Files
    """Files, folders, patterns such as "data/*.jsonl", or hf:owner/name on the hub."""
    tokenizer: str | None = None
    """A checkpoint or a folder with a tokenizer: lengths are then in tokens, and tokens are counted."""
    record_format: RecordFormat = "auto"
    """What records are, where there is a tokenizer; `auto` goes by the fields of the first."""
    text_field: str = "text"
    """The field that holds the text, where there is a tokenizer."""
    text_unit: Literal["line", "paragraph", "file"] = "line"
    """What a record of a .txt file is."""
    histogram: Path | None = None
    """Draw the lengths into this PNG file."""
    max_listed: int = 20
    """How many bad records, and how many duplicates, are listed."""
    json: bool = False
    """Print a JSON object instead."""

    def problems(self) -> Iterator[str]:
        """Values outside their ranges."""
        if not self.files:
            yield "there are no FILES to check"
        if self.max_listed < 0:
            yield f"--max-listed {self.max_listed} must be at least 0"
        if self.histogram is not None and self.histogram.suffix.lower() != ".png":
            yield f"--histogram {self.histogram}: the name must end with .png"


def run(options: CheckOptions) -> int:
    """Read everything; 1 if a record is bad."""
    from swissarmy.data.survey import Duplicates, survey

    if options.histogram is not None:
        require_extra("matplotlib.figure", extra="plots", purpose="--histogram")
    config = _config(options)
    tokenizer = _tokenizer(options.tokenizer)
    sources = open_all(options.files, config)
    for source in sources.values():
        _verify(source)
    duplicates, surveys = Duplicates(), {}
    with _progress(sum(map(len, sources.values()))) as tick:
        for name, source in sources.items():
            encode = None if tokenizer is None else _encode(source, config, tokenizer)
            surveys[name] = survey(source, encode=encode, duplicates=duplicates, tick=tick)
    vocabulary = None if tokenizer is None else len(tokenizer)
    facts: dict[str, Any] = {
        "files": [_facts(name, sources[name], found, vocabulary, options) for name, found in surveys.items()],
        "duplicates": _repeats(duplicates.pairs(), list(zip(sources.values(), surveys.values(), strict=True)), options),
    }
    if options.histogram is not None:
        _draw(surveys, options.histogram)
    if options.json:
        output.print_json(facts, indent=2)
    else:
        _show(facts, surveys)
    return FAILED if any(found.bad for found in surveys.values()) else DONE


def open_all(files: Sequence[str], config: DataConfig) -> "dict[str, Source]":
    """The sources by their names; a name that is given twice is one."""
    from swissarmy.data.prepare import create_dataset
    from swissarmy.data.source import Source

    opened = {name: create_dataset(name, config) for name in files}
    return {name: source for name, source in opened.items() if isinstance(source, Source)}


def _verify(source: "Source") -> None:
    """Compare what has a checksum with it."""
    from swissarmy.data.sources.concatenated import Concatenated
    from swissarmy.data.sources.tokens import TokenDocuments

    for part in source.parts if isinstance(source, Concatenated) else (source,):
        if isinstance(part, TokenDocuments):
            part.tokens.verify()


def _config(options: CheckOptions) -> DataConfig:
    return DataConfig(
        train_data=options.files,
        record_format=options.record_format,
        text_field=options.text_field,
        text_unit=options.text_unit,
    )


def _tokenizer(path: str | None) -> "Tokenizer | None":
    from swissarmy.interop.tokenizer import load_tokenizer

    return None if path is None else load_tokenizer(path)


def _encode(source: "Source", config: DataConfig, tokenizer: "Tokenizer") -> "Encode | None":
    """The encoder for records such as the first good one."""
    from swissarmy.data.formats import encoder_for, format_of
    from swissarmy.data.source import RecordError

    for index in range(len(source)):
        try:
            record = source[index]
        except RecordError:
            continue  # the survey reports it
        return _with_place(encoder_for(format_of(record, source.where(index), config), config, tokenizer))
    return None


def _with_place(encoder: "Encoder | None") -> "Encode | None":
    return None if encoder is None else lambda record, where: encoder(record, where=where)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if that is a terminal; gives what is called after each record."""
    from rich.progress import Progress

    console = output.console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("reading", total=total)
        yield lambda: bar.advance(task)


def _facts(
    name: str, source: "Source", found: "Survey", vocabulary: int | None, options: CheckOptions
) -> dict[str, Any]:
    from swissarmy.data.survey import summary

    facts = {
        "path": name,
        "records": found.records,
        "bad_records": len(found.bad),
        "bad": list(found.bad.values())[: options.max_listed],
        "fields": {f"{field} ({kind})": count for (field, kind), count in sorted(found.fields.items())},
        "unit": "tokens" if found.in_tokens else "characters",
        "lengths": summary(found.lengths),
        "fingerprint": source.fingerprint,
    }
    if found.uses:
        used: dict[str, float] = {"tokens": found.uses.total(), "different_tokens": len(found.uses)}
        if vocabulary is not None:
            used |= {"vocabulary": vocabulary, "characters_per_token": found.characters / found.uses.total()}
        facts["tokens"] = used
    return facts


def _repeats(
    pairs: Sequence[tuple[int, int]], surveys: "Sequence[tuple[Source, Survey]]", options: CheckOptions
) -> dict[str, Any]:
    """How many records repeat another, and where the first of them stand."""
    good = _places(surveys, {number for pair in pairs[: options.max_listed] for number in pair})
    listed = [{"record": good[repeat], "repeats": good[first]} for first, repeat in pairs[: options.max_listed]]
    return {"records": len(pairs), "listed": listed}


def _places(surveys: "Sequence[tuple[Source, Survey]]", wanted: set[int]) -> Mapping[int, str]:
    """Where the wanted ones stand, of the good records of all sources."""
    places: dict[int, str] = {}
    number = 0
    for source, found in surveys:
        for index in range(found.records) if wanted else ():
            if index in found.bad:
                continue
            if number in wanted:
                places[number] = source.where(index)
            number += 1
    return places


def _show(facts: Mapping[str, Any], surveys: "Mapping[str, Survey]") -> None:
    console = output.console()
    for file in facts["files"]:
        console.print(file["path"], style="bold")
        console.print(_table(file))
        for line in _bars(surveys[file["path"]].lengths, str(file["unit"])):
            console.print(line, overflow="ignore", no_wrap=True)
        for line in file["bad"]:
            console.print(line, style="red", soft_wrap=True)
        if file["bad_records"] > len(file["bad"]):
            console.print(f"... and {file['bad_records'] - len(file['bad']):,} more bad records")
        console.print()
    repeats = facts["duplicates"]
    console.print(f"{repeats['records']:,} records repeat another one")
    for each in repeats["listed"]:
        console.print(f"{each['record']} repeats {each['repeats']}", soft_wrap=True)


def _table(file: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_row("records", f"{file['records']:,}")
    table.add_row("bad", f"{file['bad_records']:,}", style="red" if file["bad_records"] else None)
    table.add_row("fields", ", ".join(f"{field}: {count:,}" for field, count in file["fields"].items()))
    if lengths := file["lengths"]:
        shown = (f"{name} {value:,.1f}" if name == "mean" else f"{name} {value:,}" for name, value in lengths.items())
        table.add_row(file["unit"], ", ".join(shown))
    if tokens := file.get("tokens"):
        different = f"{tokens['different_tokens']:,} different"
        if "vocabulary" in tokens:
            different += f" of {tokens['vocabulary']:,}, {tokens['characters_per_token']:.2f} characters each"
        table.add_row("vocabulary", different)
    return table


def _bars(lengths: Sequence[int], unit: str) -> Iterator[str]:
    from swissarmy.data.survey import histogram

    ranges = histogram(lengths)
    most = max((count for *_, count in ranges), default=0)
    block = "\N{FULL BLOCK}" if output.is_unicode(output.console().file) else "#"
    width = max((len(f"{end:,}") for _, end, _ in ranges), default=0)
    for start, end, count in ranges:
        bar = block * -(-_BAR * count // most)
        yield f"  {start:>{width},} to {end:>{width},} {unit}  {bar} {count:,}"


def _draw(surveys: "Mapping[str, Survey]", path: Path) -> None:
    """The lengths of all files as lines in one picture, on a logarithmic scale."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    longest = max((max(found.lengths, default=1) for found in surveys.values()), default=1)
    edges = np.geomspace(1, longest + 1, 61)
    for name, found in surveys.items():
        axes.stairs(np.histogram(np.maximum(found.lengths, 1), edges)[0], edges, label=name)
    units = {"tokens" if found.in_tokens else "characters" for found in surveys.values()}
    axes.set(xscale="log", xlabel=f"{' or '.join(sorted(units))} in a record", ylabel="records")
    axes.legend()
    figure.savefig(path, format="png", dpi=150)


COMMAND = Command(
    summary="count records, lengths and tokens; list bad records and duplicates",
    examples=(
        "sat data check train.jsonl",
        "sat data check train.jsonl valid.jsonl --tokenizer openai-community/gpt2 --histogram lengths.png",
    ),
    options=CheckOptions,
    run=run,
)
