"""`sat generate`: continue texts."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import tyro

from swissarmy.cli import output
from swissarmy.cli.command import DONE, Command, UsageError
from swissarmy.cli.loading import decode_text, load_model, outline_of_generator, read_text
from swissarmy.cli.sampling import SamplingOptions
from swissarmy.core.errors import ConfigError

if TYPE_CHECKING:
    from swissarmy.backbone.model import Model
    from swissarmy.data.tokenizer import Tokenizer
    from swissarmy.generation.text import Generation


@final
@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions):
    """What `sat generate` takes."""

    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text to continue; - reads standard input. Give several for a batch."""
    prompt_file: Path | None = None
    """A file whose whole text is one more prompt."""
    max_new_tokens: int = 64
    """The most tokens that each prompt gets."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text that ends the answer, and is not printed. Several may be given."""
    max_time: float | None = None
    """Seconds after which a batch gets no further token."""
    batch_size: int | None = None
    """How many prompts are continued at a time; all when left out."""
    stream: bool = True
    """Print the text of a single prompt as it comes."""
    progress: bool = True
    """Show a bar on standard error while several batches run, if that is a terminal."""
    json: bool = False
    """Print a JSON object for each prompt instead, with its tokens and their log-probabilities."""

    def problems(self) -> Iterator[str]:
        """Values outside their ranges."""
        if self.max_new_tokens < 1:
            yield f"--max-new-tokens {self.max_new_tokens} must be at least 1"
        yield from super().problems()
        if self.prompt.count("-") > 1:
            yield "--prompt -: standard input can be read only once"
        if "" in self.stop:
            yield "--stop: an empty text would end every answer before it begins"
        if self.max_time is not None and not self.max_time > 0:
            yield f"--max-time {self.max_time} must be above 0 seconds"
        if self.batch_size is not None and self.batch_size < 1:
            yield f"--batch-size {self.batch_size} must be at least 1"


def run(options: GenerateOptions) -> int:
    """Check everything that can be checked without the weights, load them, generate."""
    prompts = read_prompts(options)
    from swissarmy.interop.tokenizer import load_tokenizer

    outlined = outline_of_generator(options.path)
    tokenizer = load_tokenizer(options.path)
    check_lengths(outlined, tokenizer, prompts, options.max_new_tokens)
    model = load_model(options.path, dtype=options.dtype, device=options.device)
    if options.stream and len(prompts) == 1 and not options.json:
        _stream(model, tokenizer, prompts[0], options)
    else:
        for index, made in enumerate(_generations(model, tokenizer, prompts, options)):
            _print(prompts, index, made, tokenizer, options)
    return DONE


def read_prompts(options: GenerateOptions) -> list[str]:
    """The prompts, with standard input and the file read.

    Raises:
        UsageError: There is none, or one is no UTF-8 text.
    """
    prompts = [_standard_input() if prompt == "-" else _argument(prompt) for prompt in options.prompt]
    if options.prompt_file is not None:
        prompts.append(_text(read_text(options.prompt_file, "--prompt-file"), str(options.prompt_file)))
    if not prompts:
        raise UsageError(
            "there is no prompt: give --prompt TEXT, --prompt-file FILE, or --prompt - and a text on stdin."
        )
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {index + 1} is empty: give some text to continue.")
    return prompts


def check_lengths(model: "Model", tokenizer: "Tokenizer", prompts: Sequence[str], max_new_tokens: int) -> None:
    """Refuse what is longer than the model was made for.

    Raises:
        ConfigError: Naming the prompt, its length and the room that there is.
    """
    from swissarmy.cli.outline import parts_of

    if model.parts:
        return  # relative positions, and the prompt and the answer do not share them
    (config,) = parts_of(model).values()
    longest = config.max_sequence_length
    for index, prompt in enumerate(prompts):
        length = len(tokenizer.encode(prompt))
        name = f"prompt {index + 1} ({prompt[:30]!r}{'...' if len(prompt) > 30 else ''})"
        if length >= longest:
            raise ConfigError(f"{name} has {length:,} tokens, and the model's maximum is {longest:,}: shorten it.")
        if length + max_new_tokens > longest:
            raise ConfigError(
                f"{name} has {length:,} tokens; with {max_new_tokens:,} new ones it passes the model's maximum of "
                f"{longest:,}: give --max-new-tokens {longest - length}."
            )


def _settings(options: GenerateOptions, *, first_row: int = 0) -> dict[str, Any]:
    return {
        "max_new_tokens": options.max_new_tokens,
        "strategy": options.strategy(first_row=first_row),
        "stop": options.stop,
        "max_time": options.max_time,
    }


def _stream(model: "Model", tokenizer: "Tokenizer", prompt: str, options: GenerateOptions) -> None:
    from swissarmy.generation.text import stream

    for piece in stream(model, tokenizer, prompt, **_settings(options)):
        print(piece, end="", flush=True)
    print()


def _generations(
    model: "Model", tokenizer: "Tokenizer", prompts: Sequence[str], options: GenerateOptions
) -> Iterator["Generation"]:
    """Each prompt's text, batch after batch; log-probabilities only where they are asked for."""
    from swissarmy.generation.text import Generation, generate, generate_with_logprobs

    size = options.batch_size or len(prompts)
    starts = range(0, len(prompts), size)
    for start in _with_bar(starts, options.progress and len(starts) > 1):
        batch, settings = prompts[start : start + size], _settings(options, first_row=start)
        if options.json:
            yield from generate_with_logprobs(model, tokenizer, batch, **settings)
        else:
            yield from (Generation(text, [], [], "end") for text in generate(model, tokenizer, batch, **settings))


def _with_bar(starts: Sequence[int], wanted: bool) -> Iterable[int]:
    """The same numbers; a bar on standard error, if that is a terminal, shows how many are done."""
    from rich.progress import track

    console = output.console(stderr=True)
    return track(starts, "generating", console=console, disable=not (wanted and console.is_terminal), transient=True)


def _print(
    prompts: Sequence[str], index: int, made: "Generation", tokenizer: "Tokenizer", options: GenerateOptions
) -> None:
    if options.json:
        tokens = [
            {"id": token, "text": tokenizer.decode([token]), "logprob": logprob}
            for token, logprob in zip(made.tokens, made.logprobs, strict=True)
        ]
        reason = {"finish_reason": made.finish_reason}
        output.print_json({"prompt": prompts[index], "text": made.text, **reason, "tokens": tokens})
    elif len(prompts) == 1:
        print(made.text)
    else:
        print(f"{'' if index == 0 else chr(10)}> {prompts[index]}\n{made.text}", flush=True)


def _argument(prompt: str) -> str:
    """A prompt from the command line, where a locale without UTF-8 leaves other bytes as surrogates."""
    if not any("\udc80" <= character <= "\udcff" for character in prompt):
        return prompt
    return _text(prompt.encode(sys.getfilesystemencoding(), "surrogateescape"), "--prompt")


def _standard_input() -> str:
    if sys.stdin is None:
        raise UsageError("--prompt -: standard input is closed.")
    return _text(sys.stdin.buffer.read(), "standard input")


def _text(data: bytes, place: str) -> str:
    """UTF-8 text without its last line break."""
    return decode_text(data, place).removesuffix("\n").removesuffix("\r")


COMMAND = Command(
    summary="continue texts with a model",
    examples=(
        'sat generate openai-community/gpt2 --prompt "Once upon a time" --max-new-tokens 40',
        'sat generate model.gguf --prompt "A haiku:" --temperature 0.8 --top-p 0.9 --seed 1',
        "cat story.txt | sat generate ./my-model --prompt - --json",
    ),
    options=GenerateOptions,
    repeatable=("--prompt", "--stop"),
    run=run,
)
