"""Conversations: exactly the assistant's words are scored, or the record is refused."""

from typing import Any

import pytest

from swissarmy.core.errors import ConfigError
from swissarmy.data.samples.chat_encoder import ChatEncoder
from swissarmy.data.samples.examples import Cut, Sample
from swissarmy.data.source import RecordError
from swissarmy.data.tokenizer import Tokenizer
from tests.data.tiny_data import byte_level, letters

PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Each turn between tokens, as ChatML has it."""
BARE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% else %}|{% endif %}{% endfor %}"
"""No opening of the assistant's turn: its words follow at once."""
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}a: {% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}u: {{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
FORGETS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('.')[-1] if not loop.last else m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Like the templates of thinking models: what an answer says before its `.` is shown only while it is the last."""
ENDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last %}</s>{% endif %}\n{% endfor %}"
"""Ends the conversation, but not its turns: no beginning of it is rendered as it is in the whole."""

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "and that?"},
    {"role": "assistant", "content": " a dog"},
]


def encoded(
    template: str, messages: object = TALK, kind: Any = byte_level, cut: Cut | None = None, **options: Any
) -> tuple[Tokenizer, Sample]:
    tokenizer = kind(chat_template=template)
    sample = ChatEncoder(tokenizer=tokenizer, **options)({"messages": messages}, where="a.jsonl:7", cut=cut)
    return tokenizer, sample


def scored(tokenizer: Tokenizer, sample: Sample) -> list[str]:
    """The stretches of text that are to be predicted."""
    runs: list[list[int]] = []
    before = False
    for number, is_scored in zip(sample["input_ids"].tolist(), sample["loss_mask"].tolist(), strict=True):
        if is_scored:
            runs = runs if before else [*runs, []]
            runs[-1].append(number)
        before = is_scored
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def refusal(template: str, messages: object = TALK, **options: Any) -> str:
    with pytest.raises(RecordError) as caught:
        encoded(template, messages, **options)
    assert str(caught.value).startswith("a.jsonl:7: ")
    return str(caught.value)


def test_ids_are_those_of_the_rendered_text() -> None:
    tokenizer, sample = encoded(PLAIN)
    text = tokenizer.apply_chat_template(TALK)
    assert sample["input_ids"].tolist() == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", [byte_level, letters])
def test_every_answer_is_scored_with_its_end_and_nothing_else(kind: Any) -> None:
    assert scored(*encoded(PLAIN, kind=kind)) == ["a cat</s>\n", " a dog</s>\n"]
    assert scored(*encoded(BARE, kind=kind)) == ["a cat</s>", " a dog</s>"]


def test_a_token_that_begins_before_the_answer_is_not_scored() -> None:
    """The line breaks that end the opening and begin the answer are one token: no prompt ends before it."""
    messages = [TALK[1], {"role": "assistant", "content": "\n a dog"}]
    assert scored(*encoded(PLAIN, messages)) == [" a dog</s>\n"]
    assert scored(*encoded(PLAIN, messages, kind=letters)) == ["\n a dog</s>\n"]


def test_marks_of_the_template_are_heeded() -> None:
    tokenizer, sample = encoded(MARKED, kind=letters)
    assert scored(tokenizer, sample) == ["a cat</s>", " a dog</s>"]
    text = tokenizer.apply_chat_template(TALK)
    assert "\ufdd0" not in text
    assert sample["input_ids"].tolist() == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("template", [PLAIN, BARE, MARKED, FORGETS])
def test_the_last_answer_alone_can_be_scored(template: str) -> None:
    assert len(scored(*encoded(template, train_on="last"))) == 1
    assert "dog" in scored(*encoded(template, train_on="last"))[0]
    assert "cat" not in scored(*encoded(template, train_on="last"))[0]


def test_all_can_be_scored() -> None:
    _, sample = encoded(FORGETS, train_on="all")
    assert sample["loss_mask"][1:].all()
    assert not sample["loss_mask"][0]


def test_an_answer_that_opens_the_conversation_is_found() -> None:
    messages = [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "a dog"}]
    assert scored(*encoded(PLAIN, messages)) == ["a cat</s>\n"]


def test_answers_that_follow_each_other_are_found() -> None:
    messages = [{"role": "user", "content": "a"}, *[{"role": "assistant", "content": text} for text in ("b", "c")]]
    assert scored(*encoded(PLAIN, messages, kind=letters)) == ["b</s>\n", "c</s>\n"]


@pytest.mark.parametrize("template", [FORGETS, ENDS])
def test_a_template_that_shows_a_turn_differently_later_is_refused(template: str) -> None:
    messages = [*TALK[:2], {"role": "assistant", "content": "hm.a cat"}, *TALK[3:]]
    message = refusal(template, messages)
    assert "renders message 2 differently when it opens or ends the conversation" in message
    assert "{% generation %}" in message
    assert "train_on='last'" in message


def test_such_a_template_gives_no_trouble_where_the_only_answer_ends_the_conversation() -> None:
    messages = [*TALK[:2], {"role": "assistant", "content": "hm.a cat"}]
    assert scored(*encoded(FORGETS, messages)) == ["hm.a cat\n"]


def test_a_generation_prompt_that_the_answer_does_not_have_is_refused() -> None:
    template = PLAIN.replace("<s>assistant\n{% endif %}", "<s>assistant\nhm.{% endif %}")
    assert "message 2 differently" in refusal(template)


def test_marks_that_are_left_or_changed_are_refused() -> None:
    left = (
        "{% for m in messages %}{% generation %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}"
    )
    assert "a mark is missing" in refusal(left)
    changed = (
        "{% for m in messages %}{% set x %}{% generation %}{{ m.content }}{% endgeneration %}{% endset %}{{ x[1:] }}"
        "{% endfor %}"
    )
    assert "noncharacters U+FDD0" in refusal(changed)


def test_noncharacters_in_a_message_are_not_taken_for_marks() -> None:
    messages = [*TALK[:2], {"role": "assistant", "content": "a \ufdd1cat\ufdd0"}]
    assert "noncharacters" in refusal(MARKED, messages) or "mark is missing" in refusal(MARKED, messages)
    assert scored(*encoded(PLAIN, messages)) == ["a \ufdd1cat\ufdd0</s>\n"]


def test_tools_reach_the_template() -> None:
    template = "{% if tools %}{{ tools | tojson }}|{% endif %}" + BARE
    tokenizer = letters(chat_template=template)
    record = {"messages": TALK, "tools": ["dog"]}
    sample = ChatEncoder(tokenizer=tokenizer)(record, where="x")
    assert tokenizer.decode(sample["input_ids"].tolist()).count("dog") == 2
    assert scored(tokenizer, sample) == ["a cat</s>", " a dog</s>"]


def test_surrogate_pairs_do_not_move_the_answer() -> None:
    messages = [{"role": "user", "content": "\ud83d\ude00 is it?"}, {"role": "assistant", "content": "a cat"}]
    assert scored(*encoded(PLAIN, messages)) == ["a cat</s>\n"]


def test_an_answer_that_is_cut_off_is_an_error() -> None:
    assert "none of them is to be predicted" in refusal(PLAIN, cut=Cut(3))
    assert scored(*encoded(PLAIN, cut=Cut(2, "left"))) == ["\n"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no list of messages"),
        ("hello", "no list of messages"),
        (["hello"], "no list of messages"),
        ([{"content": "a", "rol": "user"}], "message 0 has no role; it has 'content', 'rol'"),
        (TALK[:2], "no token of this record is to be predicted"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: object, message: str) -> None:
    assert message in refusal(PLAIN, messages)


def test_what_the_template_refuses_is_named() -> None:
    assert "refused these messages: no system" in refusal("{{ raise_exception('no system') }}")
    with pytest.raises(RecordError, match=r"no field 'messages'.*Did you mean 'message'"):
        ChatEncoder(tokenizer=letters(chat_template=PLAIN))({"message": TALK}, where="a.jsonl:7")


def test_settings_that_make_no_sense_are_errors_at_once() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        ChatEncoder(tokenizer=letters())
    with pytest.raises(ConfigError, match="train_on='user' is none of"):
        ChatEncoder(tokenizer=letters(chat_template=PLAIN), train_on="user")  # type: ignore[arg-type]


def test_the_fingerprint_has_the_template() -> None:
    prints = {ChatEncoder(tokenizer=letters(chat_template=template)).fingerprint for template in (PLAIN, BARE)}
    assert len(prints) == 2
