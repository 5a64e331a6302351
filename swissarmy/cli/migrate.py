"""`sat migrate`: a checkpoint of the older SAT into a folder of this library."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import tyro
import yaml
from rich.table import Table

from swissarmy.cli import output
from swissarmy.cli.command import DONE, Command, Options, UsageError
from swissarmy.cli.loading import decode_text, read_text
from swissarmy.core.errors import ConfigError

if TYPE_CHECKING:
    from swissarmy.interop.sat_legacy.migrate import Migration

_ONLY_OF_MODELS = frozenset({"model_class", "num_layers", "hidden_size", "num_attention_heads"})
_STOCK_MIXINS = {
    "positions": "LearnedPositionsMixin",
    "experts": "MixtureOfExpertsMixin",
    "prefix-tuning": "PrefixTuningMixin",
}
"""Kept mixins that this library has itself."""


@final
@dataclass(frozen=True, kw_only=True)
class MigrateOptions(Options):
    """What `sat migrate` takes."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """The old checkpoint: the folder with `latest`, that of one iteration, or a single .pt file. It is only read."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The new folder."""
    config: Path | None = None
    """A YAML file with values for the flags; a flag given here wins. An old model_config.json serves as
    --model-config."""
    family: str | None = None
    """The old family (bert, roberta, gpt2, llama, t5, vit, glm, ..., generic), where no model_config.json says it."""
    model_config: Path | None = None
    """The model's old arguments (JSON or YAML), where model_config.json is missing or lies elsewhere."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Single old arguments over those of the file: num_attention_heads=16 layernorm_order=post."""
    map: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Names of mixins by position: 0=extra_position_embedding 1=attention_plus, or a YAML file of `0: name`."""
    step: str | None = None
    """The iteration to take, or "release"; by the file `latest` when left out."""
    vocab_size: int | None = None
    """How many rows of the vocabulary are tokens; what model_config.json says when left out."""
    keep_padding: bool = False
    """Keep the rows that are no tokens."""
    cross_norms: Literal["early", "late"] = "early"
    """What follows the norm after self-attention, in decoders: cross-attention, or (late, since CogAgent) the MLP."""
    split: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """How your own mixins were split over ranks: "mixins.mine.up.*=rows" "mixins.mine.down.weight=columns"."""
    fused_rows: Literal["blocks", "heads"] | None = None
    """How query, key and value share a matrix: in three blocks, or head by head; as the family had it."""
    json: bool = False
    """Print what was done as a JSON object."""

    def problems(self) -> Iterator[str]:
        """Values outside their ranges, and two that contradict each other."""
        if self.vocab_size is not None and self.vocab_size < 1:
            yield f"--vocab-size {self.vocab_size} must be at least 1"
        if self.vocab_size is not None and self.keep_padding:
            yield "--vocab-size cuts the vocabulary and --keep-padding keeps it whole: give one of them"


def run(options: MigrateOptions) -> int:
    """Migrate, and say what was done."""
    arguments = {} if options.model_config is None else _read_mapping(options.model_config, "--model-config")
    arguments |= dict(_pair(text) for text in options.set)
    from swissarmy.interop.safe_write import leftovers
    from swissarmy.interop.sat_legacy import migrate as legacy
    from swissarmy.interop.sat_legacy.names import parse_positions
    from swissarmy.interop.sat_legacy.plan import Options as LegacyOptions

    for path in leftovers(options.target):
        output.print_error(f"sat migrate: {path} was left by a run that was killed; it may be deleted.")
    with output.console(stderr=True).status(f"migrating {options.source}"):
        done = legacy.migrate(
            options.source,
            options.target,
            LegacyOptions(
                family=options.family,
                arguments=arguments,
                positions=parse_positions(_positions(options.map)),
                step=options.step,
                vocab_size=options.vocab_size,
                keep_padding=options.keep_padding,
                cross_norms=options.cross_norms,
                splits=dict(_way(text) for text in options.split),
                fused_rows=options.fused_rows,
            ),
        )
    if options.json:
        output.print_json(asdict(done), indent=2)
    else:
        show(done)
    return DONE


def show(done: "Migration") -> None:
    """What was done, for people."""
    console = output.console()
    if done.done_before:
        console.print(f"{done.target} holds this migration already: nothing was changed.", soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    for name, text in _rows(done).items():
        table.add_row(name, text)
    console.print(table)
    if done.mixins:
        names = [name.rpartition("mixins.")[2] for name in done.mixins]
        stock = ", ".join(f"{name} is sat.{_STOCK_MIXINS[name]}" for name in names if name in _STOCK_MIXINS)
        console.print(
            f"\nMixins' weights were kept for mixins with parameters of these names{stock and f' ({stock})'}:\n"
            f'  sat.load("{done.target}", mixins={{"{names[0]}": MyMixin(...), ...}})',
            soft_wrap=True,
        )


def _rows(done: "Migration") -> dict[str, str]:
    before, after = done.vocabulary
    iteration = done.step or "unknown" if done.iteration is None else done.iteration
    steps = "release" if done.step == "release" else f"iteration {iteration}"
    ranks = "one file" if done.ranks == 1 else f"{done.ranks} model-parallel files, merged"
    rows = {
        "from": f"{done.family}, generation {done.generation} of names, {steps}, {ranks}",
        "to": f"{done.target} ({_kind(done)})",
        "parameters": f"{done.parameters:,}",
        "vocabulary": f"{after:,}" if before == after else f"{after:,}; {before - after:,} rows of padding were cut",
    }
    if done.parts:
        rows["parts"] = ", ".join(f"{part}/" for part in done.parts)
    for name, size in done.mixins.items():
        rows[f"kept {name}"] = f"{size:,} parameters"
    named = {"tied": done.tied, "new, at zero": done.zeros, "dropped (computed)": done.dropped}
    return rows | {title: ", ".join(names) for title, names in named.items() if names}


def _kind(done: "Migration") -> str:
    """What the target holds."""
    if done.model_type != "swissarmy":
        return f"family {done.model_type}"
    return "the plain backbone" if done.family == "generic" else f"the plain backbone: {done.family} has no file here"


def _positions(given: tuple[str, ...]) -> list[str]:
    """`INDEX=NAME` pairs, those of a file too."""
    pairs: list[str] = []
    for text in given:
        if "=" in text:
            pairs.append(text)
        else:
            pairs += [f"{index}={name}" for index, name in _read_mapping(Path(text), "--map").items()]
    return pairs


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {text}: write NAME=VALUE, such as num_attention_heads=16")
    from swissarmy.interop.sat_legacy.facts import check_argument_name

    try:
        check_argument_name(name)
    except ConfigError as error:
        raise UsageError(f"--set {text}: {error}") from error
    return name, _parsed(value, f"--set {text}")


def _way(text: str) -> tuple[str, str]:
    pattern, equals, way = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--split {text}: write NAMES=rows or NAMES=columns")
    return pattern, way


def _old_arguments(path: Path) -> dict[str, Any] | None:
    """`--config model_config.json` as `--model-config`; `None` for a file of flags, none of which has such a name."""
    try:
        values = _read_mapping(path, "--config")
    except UsageError:  # the reader of flags says it with the line
        return None
    return {"model_config": path} if _ONLY_OF_MODELS.intersection(values) else None


def _read_mapping(path: Path, flag: str) -> dict[str, Any]:
    """A JSON or YAML file of `key: value`."""
    values = _parsed(decode_text(read_text(path, flag), str(path)), str(path))
    if not isinstance(values, Mapping):
        raise UsageError(f"{path}: {flag} takes a file of lines `key: value`")
    return {str(key): value for key, value in values.items()}


def _parsed(text: str, place: str) -> Any:
    """JSON, else YAML's plain values: YAML takes 1e-5 for text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{place}: neither JSON nor YAML: {str(error).splitlines()[0]}") from error


COMMAND = Command(
    summary="bring a checkpoint of the older SAT along, safely",
    examples=(
        "sat migrate ./roberta-old ./roberta",
        "sat migrate ./mine ./mine-new --family generic --map 0=patches 1=my_head --set num_attention_heads=16",
        "sat migrate ./llama-mp4 ./llama --vocab-size 32000",
    ),
    options=MigrateOptions,
    repeatable=("--map", "--set", "--split"),
    other_config=_old_arguments,
    run=run,
)
