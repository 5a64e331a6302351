"""`sat chat`: a conversation in the terminal, or line by line from standard input."""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from swissarmy.cli import output
from swissarmy.cli.command import DONE, Command, UsageError
from swissarmy.cli.loading import decode_text, load_model, outline_of_generator, read_text
from swissarmy.cli.sampling import SamplingOptions
from swissarmy.core.errors import ConfigError, SwissArmyError, nearest

if TYPE_CHECKING:
    from swissarmy.data.tokenizer import Tokenizer
    from swissarmy.generation.chat import Chat

COMMANDS = ("/reset", "/system", "/quit")
HINT = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit ends; Ctrl-C interrupts a reply."


@final
@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions):
    """What `sat chat` takes."""

    system: str | None = None
    """The system prompt."""
    template: Path | None = None
    """A file with the chat template (Jinja), for a checkpoint that has none or another one."""
    max_new_tokens: int = 512
    """The most tokens of a reply."""

    def problems(self) -> Iterator[str]:
        """Values outside their ranges."""
        yield from super().problems()
        if self.max_new_tokens < 1:
            yield f"--max-new-tokens {self.max_new_tokens} must be at least 1"


def run(options: ChatOptions) -> int:
    """Check everything that can be checked without the weights, load them, talk."""
    if sys.stdin is None:
        raise UsageError("standard input is closed: there is nobody to talk to.")
    template = None
    if options.template is not None:
        template = decode_text(read_text(options.template, "--template"), str(options.template))
    from swissarmy.generation.chat import Chat
    from swissarmy.interop.tokenizer import load_tokenizer

    if outline_of_generator(options.path).parts:
        raise ConfigError(f"{options.path} answers single texts: use `sat generate`.")
    tokenizer = _with_template(load_tokenizer(options.path), template, options.path)
    model = load_model(options)
    chat = Chat(
        model,
        tokenizer,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        strategy=options.strategy(),
    )
    if sys.stdin.isatty():
        output.print_error(HINT)
    talk(chat)
    return DONE


def talk(chat: "Chat") -> None:
    """Answer each line until there are no more; on a terminal, errors and Ctrl-C end a reply and not the conversation.

    Raises:
        SwissArmyError: Something went wrong, and nobody is there to go on.
    """
    interactive = sys.stdin.isatty()
    for line in _lines(interactive):
        if line.strip() == "/quit":
            return
        try:
            if line.startswith("/"):
                _obey(chat, line)
            elif line.strip():
                _answer(chat, line)
        except SwissArmyError as error:
            if not interactive:
                raise
            output.print_error(f"sat chat: {error}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(flush=True)


def _with_template(tokenizer: "Tokenizer", template: str | None, path: str) -> "Tokenizer":
    if template is not None:
        return tokenizer.with_chat_template(template)
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{path} has no chat template: it is a base model, which continues texts (`sat generate`), or its "
            "template is kept elsewhere. Give one with --template FILE (Jinja)."
        )
    return tokenizer


def _lines(interactive: bool) -> Iterator[str]:
    """What is typed, or the lines of standard input."""
    if interactive:
        while True:
            try:
                yield input("> ")
            except EOFError:
                print(flush=True)
                return
    for number, line in enumerate(sys.stdin.buffer, start=1):
        yield decode_text(line, f"standard input, line {number}").rstrip("\r\n")


def _obey(chat: "Chat", line: str) -> None:
    command, _, text = line.strip().partition(" ")
    if command == "/reset":
        chat.reset()
    elif command == "/system":
        chat.system = text.strip() or None
    else:
        raise UsageError(f"there is no command '{command}'.{nearest(command, COMMANDS)} {HINT}")


def _answer(chat: "Chat", text: str) -> None:
    with closing(chat.reply(text)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print(flush=True)


COMMAND = Command(
    summary="talk with a model that was trained on conversations",
    examples=(
        "sat chat google/gemma-3-270m-it",
        'sat chat ./my-model --system "Answer in one sentence." --temperature 0.7 --top-p 0.9',
        "sat chat ./my-base-model --template chat.jinja < questions.txt",
    ),
    options=ChatOptions,
    run=run,
)
