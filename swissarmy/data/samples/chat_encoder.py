"""`ChatEncoder`: conversations through the tokenizer's template, of which the assistant's words are to be predicted.

Where these stand is found in one of two ways. A template that marks them with `{% generation %}` is asked. Of any
other, the conversation is rendered up to each answer and through it: both must begin the whole text, or else the
template shows a turn differently once more follows, the place of the answer is unknown, and the record is refused.
A token is scored if it begins in an answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import numpy as np

from swissarmy.core.errors import ConfigError, TokenizerError
from swissarmy.data.chat_template import GENERATION_MARKS
from swissarmy.data.encoding import as_unicode
from swissarmy.data.samples.encoders import TokenizerEncoder, scored_sample
from swissarmy.data.samples.examples import Cut, Sample
from swissarmy.data.source import RecordError, field_of

Messages = Sequence[Mapping[str, Any]]

_START, _END = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which no text contains: they stand around the assistant's words for a moment."""


class Span(NamedTuple):
    """A stretch of a rendered conversation, in characters."""

    start: int
    stop: int


@final
@dataclass(frozen=True, kw_only=True)
class ChatEncoder(TokenizerEncoder):
    """`{"messages": [{"role": ..., "content": ...}, ...]}`, with `tools` if the record has any."""

    messages_field: str = "messages"
    """Where the messages are."""
    tools_field: str = "tools"
    """Where the tools are, for templates that describe them; may be missing."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Predict every answer of the assistant, only the last one, or the whole conversation."""

    def __post_init__(self) -> None:
        """Refuse a tokenizer without a chat template."""
        if self.train_on not in ("assistant", "last", "all"):
            raise ConfigError(f"ChatEncoder: train_on={self.train_on!r} is none of 'assistant', 'last', 'all'")
        if self.tokenizer.chat_template is None:
            raise ConfigError("ChatEncoder: the tokenizer has no chat template: Tokenizer.with_chat_template(text)")

    def __call__(self, record: Mapping[str, Any], *, where: str, cut: Cut | None = None) -> Sample:
        """`input_ids` and `loss_mask`, `[n]`.

        Raises:
            RecordError: the template refuses the messages or does not tell where the answers are, there is none, or
                none is left after cutting.
        """
        messages = self._messages(record, where)
        tools = {"tools": record[self.tools_field]} if record.get(self.tools_field) else {}
        try:
            text, spans = self._rendered(messages, tools)
        except TokenizerError as error:
            raise RecordError(f"{where}: {error}") from error
        ids, begins = self.offsets(text, add_special_tokens=False)
        scored = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in spans:
            scored |= (begins >= start) & (begins < stop)
        return scored_sample(ids, scored, cut, where=where)

    def _messages(self, record: Mapping[str, Any], where: str) -> Messages:
        messages: Messages = field_of(record, self.messages_field, where)
        is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
        if not is_list or not messages or not all(isinstance(message, Mapping) for message in messages):
            raise RecordError(f"{where}: {self.messages_field} is no list of messages, {{'role': ..., 'content': ...}}")
        for number, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise RecordError(f"{where}: message {number} has no role; it has {', '.join(map(repr, message))}")
        return messages

    def _rendered(self, messages: Messages, tools: dict[str, Any]) -> tuple[str, list[Span]]:
        """The conversation as text, and the stretches that are to be predicted."""
        text = self._text(messages, tools)
        if self.train_on == "all":
            return text, [Span(0, len(text))]
        marked = self._text(messages, {**tools, **dict(zip(GENERATION_MARKS, (_START, _END), strict=True))})
        if marked != text:
            spans = marked_spans(marked, text)
            return text, spans[-1:] if self.train_on == "last" else spans
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = answers[-1:] if self.train_on == "last" else answers
        return text, [self._span(messages, number, text, tools) for number in wanted]

    def _span(self, messages: Messages, number: int, text: str, tools: dict[str, Any]) -> Span:
        """Where the answer in message `number` stands in `text`, its end marker included."""
        before = self._text(messages[:number], {**tools, "add_generation_prompt": True})
        through = self._text(messages[: number + 1], tools)
        if not (text.startswith(through) and through.startswith(before)):
            raise TokenizerError(
                f"the chat template renders message {number} differently when it opens or ends the conversation, so "
                "its place is unknown: mark the assistant's words in the template with {% generation %}, or train on "
                "the last answer only (train_on='last')"
            )
        return Span(len(before), len(through))

    def _text(self, messages: Messages, variables: dict[str, Any]) -> str:
        return as_unicode(self.tokenizer.apply_chat_template(messages, **variables))


def marked_spans(marked: str, text: str) -> list[Span]:
    """The stretches of `text` that stand between marks in `marked`, which is the same text with marks in it.

    Raises:
        TokenizerError: the marks do not come in pairs, or the text differs.
    """
    spans, rest, length = [], marked, 0
    while _START in rest:
        outside, _, rest = rest.partition(_START)
        inside, end, rest = rest.partition(_END)
        if not end or _START in inside:
            raise TokenizerError("the chat template leaves a {% generation %} block before its end: a mark is missing")
        length += len(outside)
        spans.append(Span(length, length + len(inside)))
        length += len(inside)
    if marked.replace(_START, "").replace(_END, "") != text:
        raise TokenizerError(
            "the chat template changes what {% generation %} gives, or the messages contain noncharacters U+FDD0 or "
            "U+FDD1: where the assistant's words are is unknown"
        )
    return spans
