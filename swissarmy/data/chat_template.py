"""Chat templates: Jinja programs that come with a checkpoint, and are therefore run in a sandbox.

The environment is the one that published templates are written for (`trim_blocks`, `lstrip_blocks`, `break` and
`continue`, `raise_exception`, `tojson`, `strftime_now`, `{% generation %}`); the rest of Python is out of reach.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.exceptions import SecurityError

from swissarmy.core.errors import TokenizerError

MAX_CHARACTERS = 1 << 24
"""The longest text that a template may produce, and the longest text or list that it may build by `*`."""

GENERATION_MARKS = ("generation_start_mark", "generation_end_mark")
"""Variables that a template prints around the assistant's words where it has `{% generation %}`."""


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter turns `<`, `>`, `&` and `'` into escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@final
class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's words.

    It gives its body, between the variables of `GENERATION_MARKS`, which are empty unless a caller sets them.
    """

    tags = {"generation"}  # noqa: RUF012 - the type that jinja2 declares

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (
            jinja2.nodes.Output([jinja2.nodes.Name(name, "load", lineno=line)], lineno=line)
            for name in GENERATION_MARKS
        )
        return [start, *body, end]


@final
class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses at once what the stock sandbox lets pass as an undefined value, and operators that fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__} is not allowed")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("the operator '**' is not allowed")
        for repeated, times in ((left, right), (right, left)):
            sized = isinstance(repeated, (str, bytes, list, tuple))
            if sized and isinstance(times, int) and len(repeated) * times > MAX_CHARACTERS:
                raise SecurityError(f"repeating something {times} times is not allowed")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    return environment


@final
class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.

    Raises:
        TokenizerError: it is not valid Jinja; the message has the line.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The conversation as text.

        Args:
            messages: mappings with `role` and `content`, and what else the template reads.
            variables: what it sees beside `messages`.

        Raises:
            TokenizerError: the template raised an error, reached for something that the sandbox does not allow,
                or produced more than 16,777,216 characters.
        """
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate({**variables, "messages": messages}):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise SecurityError(f"more than {MAX_CHARACTERS} characters were produced")
        except SecurityError as error:
            raise TokenizerError(f"the chat template was blocked by the sandbox: {error}") from error
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template refused these messages: {error.message}") from error
        except (ArithmeticError, LookupError, MemoryError, OverflowError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise TokenizerError(f"the chat template failed on these messages: {what}") from error
        return "".join(pieces)
