"""`Chat`: a conversation that remembers what the model has read, so that a turn reads only what is new."""

from collections.abc import Generator, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.core.errors import HookCallError, TokenizerError
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.generation.autoregressive_sampling import GAP, Grid, steps
from swissarmy.generation.strategies import Strategy
from swissarmy.generation.text import ending, last_token

Message = dict[str, str]
"""`role` and `content`, as chat templates read them."""


@final
class Chat:
    """A conversation with a causal model, in the words of the tokenizer's chat template.

    Each turn renders the whole conversation, so a reply is what the full prompt would give; of its tokens, those
    that stand in the cache from earlier turns are not read again.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        strategy: Strategy | None = None,
    ) -> None:
        """Begin a conversation.

        Args:
            model: A causal model.
            tokenizer: Has a chat template.
            system: The system prompt.
            max_new_tokens: The most tokens of a reply; fewer where the model's maximum length leaves less.
            strategy: Chooses the tokens; greedy when omitted.

        Raises:
            TokenizerError: There is no chat template.
            HookCallError: The model is no causal one, or `max_new_tokens` is below 1.
        """
        if not isinstance(model, BaseModel) or not model.config.causal:
            raise HookCallError("a conversation needs a causal model that continues its own text.")
        if max_new_tokens < 1:
            raise HookCallError(f"max_new_tokens={max_new_tokens} must be at least 1.")
        self.model, self.tokenizer, self.system, self.max_new_tokens = model, tokenizer, system, max_new_tokens
        strategy = ending(strategy, tokenizer)
        self.strategy = strategy.ending_at(dict.fromkeys((*strategy.end_tokens, *turn_ends(tokenizer))))
        self.messages: list[Message] = []
        """What was said, without the system prompt."""
        self._ids: list[int] = []
        self._mems: Tensor | None = None

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages = []

    @torch.no_grad()  # so made that the caller's own setting holds between the pieces
    def reply(self, text: str) -> Generator[str, None, None]:
        """Say something, and yield the reply piece by piece; what was yielded stays said if the caller stops early.

        Raises:
            TokenizerError: The template refuses the conversation.
            HookCallError: The conversation has grown to the model's maximum length.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self.prompt_ids(asked)
        room = min(self.max_new_tokens, self.model.config.max_sequence_length - len(ids))
        if room < 1:
            raise HookCallError(
                f"the conversation has {len(ids):,} tokens, and the model's maximum is "
                f"{self.model.config.max_sequence_length:,}: begin a new one (/reset)."
            )
        said = ""
        try:
            for piece in self._answer(ids, room):
                said += piece
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": said}]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the reply begins."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = self.tokenizer.apply_chat_template([*system, *messages], add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _answer(self, ids: list[int], room: int) -> Iterator[str]:
        row = torch.tensor([*ids, *[GAP] * room])
        grid, decoder = Grid.of(row, 1, self.model.device), self.tokenizer.stream()
        read, cache, tokens = 0, None, grid.tokens
        try:
            for tokens, cache in steps(self.model, grid, self.strategy, mems=self._remembered(ids)):
                read = len(cache)
                token = last_token(tokens, self.strategy)
                piece = "" if token is None else decoder.put(token)
                if piece:
                    yield piece
            rest = decoder.end()
            if rest:
                yield rest
        finally:
            if cache is not None:  # an interrupt may have left a step half done: only what was read before it counts
                self._ids, self._mems = tokens[0, :read].tolist(), cache.to_mems()[:, :, :read]

    def _remembered(self, ids: Sequence[int]) -> Tensor | None:
        """What earlier turns have read of this prompt, but for its last token, whose logits are needed."""
        pairs = enumerate(zip(ids[:-1], self._ids, strict=False))
        common = next((place for place, (new, old) in pairs if new != old), min(len(ids) - 1, len(self._ids)))
        return None if self._mems is None or common == 0 else self._mems[:, :, :common]


def turn_ends(tokenizer: Tokenizer) -> list[int]:
    """The special token that the template puts behind an answer: checkpoints do not always list it as an end."""
    answer = "Xyzzy"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
        )
    except TokenizerError:
        if tokenizer.chat_template is None:
            raise
        return []
    ids = tokenizer.encode(text.rpartition(answer)[2].lstrip(), add_special_tokens=False)
    return [number for number in ids[:1] if number in tokenizer.special_ids]
