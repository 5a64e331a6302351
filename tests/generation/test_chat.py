"""`Chat`: what a turn reads, and that a reply is what a fresh full prompt gives."""

import string
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models
from torch import Tensor

import swissarmy as sat
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.generation.chat import Chat, turn_ends
from swissarmy.testing import tiny_model
from tests.helpers import hook_mixin

SPECIAL = ("<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FAMILIES = ["gpt2", "llama", "gemma3_text"]


@pytest.fixture
def tokenizer() -> Tokenizer:
    """61 tokens: five special ones, letters, and a few signs."""
    characters = (string.ascii_letters + " .,!")[: 61 - len(SPECIAL)]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL])
    return Tokenizer(backend, special_tokens={"bos_token": "<s>"}, chat_template=TEMPLATE)


class Counted:
    """A model that counts the tokens of each forward, and says nothing that a text does not show but the end."""

    def __init__(self, family: str) -> None:
        self.model = (
            tiny_model(family, max_position_embeddings=256) if family != "gpt2" else tiny_model(family, n_positions=256)
        )
        self.read: list[int] = []

        @sat.non_conflict
        def word_embedding_forward(mixin: Any, input_ids: Tensor, *, old_impl: Any, **kw_args: Any) -> Tensor:
            self.read.append(input_ids.shape[1])
            result: Tensor = old_impl(input_ids, **kw_args)
            return result

        @sat.non_conflict
        def final_forward(mixin: Any, hidden_states: Tensor, *, old_impl: Any, **kw_args: Any) -> Tensor:
            logits: Tensor = old_impl(hidden_states, **kw_args)
            return logits.index_fill(-1, torch.tensor([0, 2, 3, 4]), float("-inf"))

        self.model.add_mixin("speaks", hook_mixin("final_forward", final_forward))
        self.model.add_mixin("counts", hook_mixin("word_embedding_forward", word_embedding_forward))


def fresh(chat: Chat, messages: list[dict[str, str]]) -> str:
    """The reply to a full prompt that nothing was read of before."""
    ids = torch.tensor([*chat.prompt_ids(messages), *[-1] * chat.max_new_tokens])
    tokens, _ = sat.fill_sequence(chat.model, ids, strategy=chat.strategy)
    new = tokens[0, (ids >= 0).sum() :].tolist()
    end = [index for index, token in enumerate(new) if token in chat.strategy.end_tokens or token < 0]
    return chat.tokenizer.decode(new[: end[0]] if end else new)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_turn_reads_only_what_is_new_and_replies_as_a_full_prompt(family: str, tokenizer: Tokenizer) -> None:
    counted = Counted(family)
    chat = Chat(counted.model, tokenizer, system="be kind", max_new_tokens=8)
    known: list[int] = []
    for text in ("hello there", "and now", "what else is new", "bye"):
        counted.read.clear()
        asked = [*chat.messages, {"role": "user", "content": text}]
        ids = chat.prompt_ids(asked)
        said = "".join(chat.reply(text))
        first, *rest = counted.read
        assert rest == [1] * len(rest)
        assert first == len(ids) - common(ids, known)
        known = [*ids, *tokenizer.encode(said)][: len(ids) + len(rest)]
        assert said == fresh(chat, asked)
        assert chat.messages == [*asked, {"role": "assistant", "content": said}]
    assert first < len(ids) / 3, "the last turn reads little of the whole conversation"


def common(new: list[int], old: list[int]) -> int:
    """What the cache can hold of a prompt: its last token is always read."""
    pairs = enumerate(zip(new[:-1], old, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(new) - 1, len(old)))


def test_reset_system_and_an_early_stop_leave_no_trace(tokenizer: Tokenizer) -> None:
    chat = Chat(tiny_model("llama", max_position_embeddings=256), tokenizer, max_new_tokens=8)
    list(chat.reply("hello"))
    pieces = chat.reply("tell me more")
    begun = next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": begun}
    asked = [*chat.messages, {"role": "user", "content": "go on"}]
    assert "".join(chat.reply("go on")) == fresh(chat, asked)
    chat.system = "be brief"
    asked = [*chat.messages, {"role": "user", "content": "so"}]
    assert "".join(chat.reply("so")) == fresh(chat, asked)
    chat.reset()
    assert "".join(chat.reply("hello")) == fresh(chat, [{"role": "user", "content": "hello"}])
    assert len(chat.messages) == 2


def test_an_interrupt_inside_the_model_leaves_a_cache_that_can_be_trusted(tokenizer: Tokenizer) -> None:
    model, calls = tiny_model("llama", max_position_embeddings=256), iter(range(1000))

    @sat.non_conflict
    def mlp_forward(mixin: Any, hidden_states: Tensor, *, old_impl: Any, **kw_args: Any) -> Tensor:
        if next(calls) == 6:  # in the first of two layers, whose attention has written its keys
            raise KeyboardInterrupt
        result: Tensor = old_impl(hidden_states, **kw_args)
        return result

    model.add_mixin("interrupts", hook_mixin("mlp_forward", mlp_forward))
    chat = Chat(model, tokenizer, max_new_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        list(chat.reply("hello"))
    asked = [*chat.messages, {"role": "user", "content": "go on"}]
    assert "".join(chat.reply("go on")) == fresh(chat, asked)


def test_gradients_stay_on_for_the_caller_between_pieces(tokenizer: Tokenizer) -> None:
    chat = Chat(tiny_model("llama", max_position_embeddings=256), tokenizer, max_new_tokens=8)
    for pieces in (chat.reply("hello"), sat.stream(chat.model, tokenizer, "hello", max_new_tokens=4)):
        for _ in pieces:
            assert torch.is_grad_enabled()
        assert torch.is_grad_enabled()


def test_the_end_of_a_turn_is_found_in_the_template(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_ids == ()
    assert turn_ends(tokenizer) == [tokenizer.token_to_id("<|end|>")]
    assert Chat(tiny_model("gpt2"), tokenizer).strategy.end_tokens == (1,)


def test_a_conversation_that_is_full_says_so_and_can_begin_again(tokenizer: Tokenizer) -> None:
    chat = Chat(tiny_model("gpt2"), tokenizer)
    with pytest.raises(sat.HookCallError, match="the model's maximum is 64"):
        list(chat.reply("a" * 64))
    assert chat.messages == []
    list(chat.reply("a"))
    assert len(chat.messages) == 2


def test_what_cannot_talk_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(sat.TokenizerError, match="no chat template"):
        Chat(tiny_model("gpt2"), tokenizer.with_chat_template(None))
    for family in ("t5", "bert"):
        with pytest.raises(sat.HookCallError, match="causal"):
            Chat(tiny_model(family), tokenizer)
    with pytest.raises(sat.HookCallError, match="max_new_tokens=0"):
        Chat(tiny_model("gpt2"), tokenizer, max_new_tokens=0)
