"""`sat data show`: a batch as the model will see it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Annotated, final

import tyro
from rich.style import Style
from rich.text import Text

from swissarmy.cli import output
from swissarmy.cli.command import DONE, Command, Options, UsageError
from swissarmy.core.errors import ConfigError
from swissarmy.data.config import DataConfig

if TYPE_CHECKING:
    from torch import Tensor

    from swissarmy.data.build import Loaders
    from swissarmy.data.loading.collate import Batch
    from swissarmy.data.tokenizer import Tokenizer

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")
"""Of documents, in turn; neighbouring tokens differ in being underlined."""


@final
@dataclass(frozen=True, kw_only=True)
class ShowOptions(Options):
    """What `sat data show` takes."""

    data: Annotated[DataConfig, tyro.conf.OmitArgPrefixes]
    """Which data, and what is done with it, as in training."""
    tokenizer: str
    """A checkpoint or a folder with a tokenizer."""
    step: int = 0
    """Which step of training."""
    batch_size: int = 4
    """Samples of a step."""
    num_steps: int | None = None
    """Print also how much of each source a run of so many steps sees."""
    ids: bool = False
    """Show token ids as well."""

    def problems(self) -> Iterator[str]:
        """Values outside their ranges."""
        if self.step < 0:
            yield f"--step {self.step} must be at least 0"
        if self.batch_size < 1:
            yield f"--batch-size {self.batch_size} must be at least 1"
        if self.num_steps is not None and self.num_steps <= self.step:
            yield f"--num-steps {self.num_steps} must be above --step, which is {self.step}"


def run(options: ShowOptions) -> int:
    """Make the batch, and print it row by row."""
    from swissarmy.data.build import build_loaders
    from swissarmy.interop.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    loaders = build_loaders(options.data, tokenizer, global_batch_size=options.batch_size, num_steps=options.num_steps)
    batch = _batch(loaders, options.step)
    if "input_ids" not in batch:
        raise ConfigError(f"a batch of {', '.join(batch)} has no tokens to show.")
    console = output.console()
    plain = console.color_system is None
    if options.num_steps is not None:
        console.print("\n".join(loaders.plan), soft_wrap=True)
    console.print(_legend(batch, plain=plain), soft_wrap=True)
    for row in range(len(batch["input_ids"])):
        console.print(f"row {row}: {_described(batch, row)}", style="bold")
        for line in _lines(batch, row, tokenizer, with_ids=options.ids):
            console.print(_bracketed(line) if plain else line, soft_wrap=True)
    return DONE


def _batch(loaders: "Loaders", step: int) -> "Batch":
    """The batch of a training step; where there is nothing to train on, that number of the evaluation."""
    if loaders.train is not None:
        loaders.train.load_state_dict({**loaders.train.state_dict(), "step": step})
        batch: Batch = next(iter(loaders.train))
        return batch
    loader = loaders.valid or loaders.test
    assert loader is not None, "a config without data is refused"
    found: Batch | None = next(islice(loader, step, None), None)
    if found is None:
        raise UsageError(f"--step {step}: there are {loader.num_steps} steps in these data.")
    return found


def _bracketed(line: Text) -> str:
    """A line for where there are no colours: what is not to be predicted is in brackets."""
    runs = groupby(line.spans, key=lambda span: isinstance(span.style, Style) and bool(span.style.dim))
    pieces = ((dim, "".join(line.plain[span.start : span.end] for span in spans)) for dim, spans in runs)
    return "".join(f"[{piece}]" if dim else piece for dim, piece in pieces)


def _legend(batch: "Batch", *, plain: bool) -> Text:
    """What the styles mean, and the shapes of the batch."""
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.items())
    if plain:
        return Text(f"{shapes}; to be predicted, [not]")
    scored = Text.assemble(("to be predicted", _style(0, 0, scored=True)), ", ", ("not", _style(0, 0, scored=False)))
    return Text.assemble(shapes, "; ", scored)


def _described(batch: "Batch", row: int) -> str:
    real = _is_real(batch, row)
    documents = "" if "document_ids" not in batch else f"{int(batch['document_ids'][row].max()) + 1} documents, "
    label = f", label {int(batch['labels'][row])}" if "labels" in batch and batch["labels"].dim() == 1 else ""
    return f"{documents}{int(real.sum())} tokens, {int(_is_scored(batch, row).sum())} to be predicted{label}"


def _lines(batch: "Batch", row: int, tokenizer: "Tokenizer", *, with_ids: bool) -> Iterator[Text]:
    """The tokens without padding; of an encoder-decoder also those that it is to give."""
    real = _is_real(batch, row)
    documents = batch["document_ids"][row] if "document_ids" in batch else real.long() * 0
    scored = _is_scored(batch, row)
    yield _line(tokenizer, batch["input_ids"][row][real], scored[real], documents[real], with_ids)
    if "labels" in batch and batch["labels"].dim() == 2:
        labels = batch["labels"][row]
        labels = labels[labels >= 0]
        yield _line(tokenizer, labels, labels >= 0, labels * 0 + 1, with_ids)


def _line(tokenizer: "Tokenizer", ids: "Tensor", scored: "Tensor", documents: "Tensor", with_ids: bool) -> Text:
    """Tokens in the colours of their documents, with a bar between two."""
    shown, last = Text(), None
    for place, (token, is_scored, document) in enumerate(zip(*map(_plain, (ids, scored, documents)), strict=True)):
        if last not in (None, document):
            shown.append(" | ", style="bold")
        last = document
        style = _style(document, place, scored=bool(is_scored))
        shown.append(_visible(tokenizer.decode([token], skip_special_tokens=False)), style=style)
        if with_ids:
            shown.append(f"<{token}>", style="dim")
    return shown


def _plain(row: "Tensor") -> list[int]:
    numbers: list[int] = row.tolist()
    return numbers


def _is_real(batch: "Batch", row: int) -> "Tensor":
    if "document_ids" in batch:
        return batch["document_ids"][row] >= 0
    return batch["padding_mask"][row].bool()


def _is_scored(batch: "Batch", row: int) -> "Tensor":
    """Where the tokens of `input_ids` are targets; none are where targets are a sequence of their own."""
    return batch["loss_mask"][row].bool() if "loss_mask" in batch else _is_real(batch, row) & False


def _style(document: int, place: int, *, scored: bool) -> Style:
    return Style(color=_COLOURS[document % len(_COLOURS)], dim=not scored, underline=place % 2 == 1)


def _visible(piece: str) -> str:
    """A token's text; control characters would move the cursor."""
    marked = piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n").replace("\t", "\N{RIGHTWARDS ARROW}\t")
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in marked
    )


COMMAND = Command(
    summary="show a batch as the model will see it",
    examples=(
        "sat data show --train-data a.jsonl b.jsonl --train-data-weights 2 1 --tokenizer ./model",
        "sat data show --train-data a.jsonl --tokenizer ./model --packing --sequence-length 2048 --step 100",
    ),
    options=ShowOptions,
    run=run,
)
