"""`sat generate`: continue texts."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import tyro

from swissarmy.cli import output
from swissarmy.cli.command import DONE, CheckpointPath, Command, Options, UsageError
from swissarmy.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from swissarmy.backbone.model import Model
    from swissarmy.data.tokenizer import Tokenizer
    from swissarmy.generation.strategies import Strategy


@final
@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """What `sat generate` takes."""

    path: CheckpointPath
    """A Hugging Face folder, a .gguf file, or the name of a model on the hub."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A text to continue; - reads standard input. Give several for a batch."""
    prompt_file: Path | None = None
    """A file whose whole text is one more prompt."""
    max_new_tokens: int = 64
    """The most tokens that each prompt gets."""
    temperature: float | None = None
    """Draw tokens, below 1 sharper and above 1 flatter. Without this, top-k, top-p and seed: the likeliest token."""
    top_k: int | None = None
    """Draw only from so many likeliest tokens."""
    top_p: float | None = None
    """Draw only from the likeliest tokens that together reach this probability."""
    seed: int | None = None
    """Makes the draws repeatable."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The precision of the weights; as stored when left out (float32 for GGUF)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs."""
    stream: bool = True
    """Print the text of a single prompt as it comes."""
    json: bool = False
    """Print a JSON object for each prompt instead."""

    def problems(self) -> Iterator[str]:
        """Values outside their ranges."""
        if self.max_new_tokens < 1:
            yield f"--max-new-tokens {self.max_new_tokens} must be at least 1"
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            yield f"--temperature {self.temperature} must be above 0; for the likeliest token leave it out"
        if self.top_k is not None and self.top_k < 1:
            yield f"--top-k {self.top_k} must be at least 1"
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"--top-p {self.top_p} must be above 0 and at most 1"
        if self.prompt.count("-") > 1:
            yield "--prompt -: standard input can be read only once"


def run(options: GenerateOptions) -> int:
    """Check everything that can be checked without the weights, load them, generate."""
    prompts = read_prompts(options)
    from swissarmy.cli.outline import outline
    from swissarmy.interop.tokenizer import load_tokenizer

    found = outline(options.path)
    if found.misfit is not None:
        raise CheckpointError(found.misfit)
    check_generates(found.model, options.path)
    tokenizer = load_tokenizer(options.path)
    check_lengths(found.model, tokenizer, prompts, options.max_new_tokens)
    model = _load(options)
    settings: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "strategy": _strategy(options)}
    _print_texts(model, tokenizer, prompts, options, settings)
    return DONE


def read_prompts(options: GenerateOptions) -> list[str]:
    """The prompts, with standard input and the file read.

    Raises:
        UsageError: There is none, or one is no UTF-8 text.
    """
    prompts = [_standard_input() if prompt == "-" else _argument(prompt) for prompt in options.prompt]
    if options.prompt_file is not None:
        try:
            prompts.append(_text(options.prompt_file.read_bytes(), str(options.prompt_file)))
        except OSError as error:
            raise UsageError(f"--prompt-file {options.prompt_file}: {error.strerror}") from error
    if not prompts:
        raise UsageError(
            "there is no prompt: give --prompt TEXT, --prompt-file FILE, or --prompt - and a text on stdin."
        )
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {index + 1} is empty: give some text to continue.")
    return prompts


def check_generates(model: "Model", path: str) -> None:
    """Refuse encoders, and heads that give no logits over the vocabulary.

    Raises:
        ConfigError: The checkpoint cannot generate.
    """
    from swissarmy.backbone.model import iterate_models
    from swissarmy.mixins.heads import ClassificationHeadMixin, NoHeadMixin

    *_, (_, decoder) = iterate_models(model)
    if decoder.config.causal and not any(decoder.find_mixin(kind) for kind in (ClassificationHeadMixin, NoHeadMixin)):
        return
    name = f"{path}: {model.source.config.architecture}"
    raise ConfigError(f"{name} does not generate text: it is an encoder, or its head does not say what comes next.")


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


def _load(options: GenerateOptions) -> "Model":
    import torch

    from swissarmy.interop.load import load

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; leave it out to run on the CPU.")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    with output.console(stderr=True).status(f"loading {options.path}"):
        return load(options.path, dtype=dtype, device=options.device)


def _strategy(options: GenerateOptions) -> "Strategy":
    from swissarmy.generation.strategies import GreedyStrategy, SamplingStrategy

    given = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p, "seed": options.seed}
    given = {name: value for name, value in given.items() if value is not None}
    return SamplingStrategy(**given) if given else GreedyStrategy()  # type: ignore[arg-type]


def _print_texts(
    model: "Model", tokenizer: "Tokenizer", prompts: Sequence[str], options: GenerateOptions, settings: dict[str, Any]
) -> None:
    from swissarmy.generation.text import generate, stream

    if options.stream and len(prompts) == 1 and not options.json:
        for piece in stream(model, tokenizer, prompts[0], **settings):
            print(piece, end="", flush=True)
        print()
        return
    for index, (prompt, text) in enumerate(zip(prompts, generate(model, tokenizer, prompts, **settings), strict=True)):
        if options.json:
            output.print_json({"prompt": prompt, "text": text})
        elif len(prompts) == 1:
            print(text)
        else:
            print(f"{'' if index == 0 else chr(10)}> {prompt}\n{text}")


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
    try:
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: not valid UTF-8 at byte {error.start}.") from error


COMMAND = Command(
    summary="continue texts with a model",
    examples=(
        'sat generate openai-community/gpt2 --prompt "Once upon a time" --max-new-tokens 40',
        'sat generate model.gguf --prompt "A haiku:" --temperature 0.8 --top-p 0.9 --seed 1',
        "cat story.txt | sat generate ./my-model --prompt - --json",
    ),
    options=GenerateOptions,
    repeatable=("--prompt",),
    run=run,
)
