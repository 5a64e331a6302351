"""`sat generate`: continue texts."""

import sys
from collections.abc import Iterator, Sequence
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
    from swissarmy.generation.constraints import Constraint
    from swissarmy.generation.strategies import Strategy
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
    num_beams: int | None = None
    """Search with so many beams for the likeliest text, instead of choosing or drawing token after token."""
    penalty_alpha: float | None = None
    """Contrastive search among the --top-k (4) likeliest tokens: what likeness to the text before costs, 0 to 1."""
    regex: str | None = None
    """The new text matches this regular expression from beginning to end, if the tokens suffice."""
    json_schema: Path | None = None
    """A file with a JSON schema; the new text is JSON of it, if the tokens suffice."""
    max_time: float | None = None
    """Seconds after which a batch gets no further token."""
    batch_size: int | None = None
    """How many prompts are continued at a time; all when left out."""
    stream: bool = True
    """Print the text of a single prompt as it comes."""
    progress: bool = True
    """Show a bar on standard error, if that is a terminal: of the batches, or of the tokens if there is one."""
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
        if self.regex is not None and self.json_schema is not None:
            yield "--regex and --json-schema: give one of them"
        yield from self._search_problems()

    def _search_problems(self) -> Iterator[str]:
        if self.num_beams is not None and self.num_beams < 1:
            yield f"--num-beams {self.num_beams} must be at least 1"
        if self.penalty_alpha is not None and not 0 <= self.penalty_alpha <= 1:
            yield f"--penalty-alpha {self.penalty_alpha} must be between 0 and 1"
        if self.num_beams is not None and self.penalty_alpha is not None:
            yield "--num-beams and --penalty-alpha are two kinds of search: give one of them"
        drawing = {"--temperature": self.temperature, "--top-p": self.top_p, "--seed": self.seed}
        if self.num_beams is not None:
            drawing["--top-k"] = self.top_k
        given = [flag for flag, value in drawing.items() if value is not None]
        if self.searches and given:
            yield f"{given[0]}: a search draws nothing; leave it out"

    @property
    def searches(self) -> bool:
        """Whether several texts are followed at a time, so that none can be shown before the end."""
        return self.num_beams is not None or self.penalty_alpha is not None

    def strategy(self, *, first_row: int = 0) -> "Strategy":
        """A search where one is asked for."""
        from swissarmy.generation.beam_search import BeamSearchStrategy
        from swissarmy.generation.contrastive import ContrastiveStrategy

        if self.num_beams is not None:
            return BeamSearchStrategy(self.num_beams)
        if self.penalty_alpha is not None:
            return ContrastiveStrategy(self.penalty_alpha, self.top_k or 4)
        return super().strategy(first_row=first_row)


def run(options: GenerateOptions) -> int:
    """Check everything that can be checked without the weights, load them, generate."""
    prompts = read_prompts(options)
    from swissarmy.interop.tokenizer import load_tokenizer

    outlined = outline_of_generator(options.path)
    tokenizer = load_tokenizer(options.path)
    check_lengths(outlined, tokenizer, prompts, options.max_new_tokens)
    constraint = read_constraint(options, tokenizer)
    model = load_model(options)
    if options.stream and len(prompts) == 1 and not (options.json or options.searches):
        _stream(model, tokenizer, prompts[0], options, constraint)
    else:
        for index, made in enumerate(_generations(model, tokenizer, prompts, options, constraint)):
            _print(prompts, index, made, tokenizer, options)
    return DONE


def read_constraint(options: GenerateOptions, tokenizer: "Tokenizer") -> list["Constraint"]:
    """What the new texts must be, if anything is asked of them.

    Raises:
        UsageError: The file cannot be read, or what is asked cannot be followed.
        MissingExtraError: It needs the extra `constrained`.
    """
    from swissarmy.generation.constraints import json_schema_constraint, regex_constraint

    flag = "--regex" if options.json_schema is None else f"--json-schema {options.json_schema}"
    try:
        if options.regex is not None:
            return [regex_constraint(tokenizer, options.regex)]
        if options.json_schema is not None:
            schema = decode_text(read_text(options.json_schema, "--json-schema"), str(options.json_schema))
            return [json_schema_constraint(tokenizer, schema)]
    except ConfigError as error:
        raise UsageError(f"{flag}: {error}") from error
    return []


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


def _settings(options: GenerateOptions, constraint: Sequence["Constraint"], *, first_row: int = 0) -> dict[str, Any]:
    return {
        "max_new_tokens": options.max_new_tokens,
        "strategy": options.strategy(first_row=first_row).with_processors(constraint),
        "stop": options.stop,
        "max_time": options.max_time,
    }


def _stream(
    model: "Model", tokenizer: "Tokenizer", prompt: str, options: GenerateOptions, constraint: Sequence["Constraint"]
) -> None:
    from swissarmy.generation.text import stream

    for piece in stream(model, tokenizer, prompt, **_settings(options, constraint)):
        print(piece, end="", flush=True)
    print()


def _generations(
    model: "Model",
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    options: GenerateOptions,
    constraint: Sequence["Constraint"],
) -> Iterator["Generation"]:
    """Each prompt's text, batch after batch; log-probabilities only where they are asked for."""
    from swissarmy.generation.progress import bar
    from swissarmy.generation.text import Generation, generate, generate_with_logprobs

    size = options.batch_size or len(prompts)
    starts = range(0, len(prompts), size)
    with bar(len(starts), shown=options.progress and len(starts) > 1) as report:
        for done, start in enumerate(starts):
            report(done)
            batch, settings = prompts[start : start + size], _settings(options, constraint, first_row=start)
            settings["progress"] = options.progress and len(starts) == 1
            if options.json:
                yield from generate_with_logprobs(model, tokenizer, batch, **settings)
            else:
                yield from (Generation(text, [], [], "end") for text in generate(model, tokenizer, batch, **settings))


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
        'sat generate ./my-model --prompt "Is it true? " --regex "yes|no"',
    ),
    options=GenerateOptions,
    repeatable=("--prompt", "--stop"),
    run=run,
)
