"""Text to token ids and back: a thin wrapper over the Rust library `tokenizers`.

Shapes: b = texts, s = tokens of the longest text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import tokenizers
import torch

from swissarmy.core.errors import TokenizerError, nearest
from swissarmy.core.files import replace_file
from swissarmy.data.chat_template import ChatTemplate
from swissarmy.data.encoding import Encoding, as_unicode, check_lengths, fit, pad
from swissarmy.data.text_stream import TextStream

__all__ = ["SPECIAL_TOKENS", "Encoding", "TextStream", "Tokenizer"]

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The roles a token can have, as Hugging Face files name them."""


@final
class Tokenizer:
    """Text to ids and back, with the special tokens and the chat template of one checkpoint.

    Args:
        backend: the Rust tokenizer; it now belongs to this object, which switches off its padding and truncation.
        special_tokens: the token of each role in `SPECIAL_TOKENS`, as far as there is one.
        eos_token_ids: further ids that end a text, after the `eos_token`.
        chat_template: Jinja text; see `apply_chat_template`.
        model_max_length: how many tokens the model takes, if known; only kept and saved.

    Raises:
        TokenizerError: a role is not known, or its token is not in the vocabulary.
    """

    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    sep_token_id: int | None
    pad_token_id: int | None
    cls_token_id: int | None
    mask_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Every id that ends a text, `eos_token_id` first."""
    special_ids: frozenset[int]
    """Every id that decoding skips."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
        model_max_length: int | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.model_max_length = model_max_length
        self._compiled_template: ChatTemplate | None = None
        self._mark_special()
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.sep_token_id = map(self._role, SPECIAL_TOKENS[:4])
        self.pad_token_id, self.cls_token_id, self.mask_token_id = map(self._role, SPECIAL_TOKENS[4:])
        first = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids = tuple(dict.fromkeys((*first, *eos_token_ids)))
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)

    def _mark_special(self) -> None:
        """Make the backend treat the token of every role as special: matched whole, and skipped in decoding."""
        added = self.backend.get_added_tokens_decoder().values()
        already = {token.content for token in added if token.special}
        for role, token in self.special_tokens.items():
            if role not in SPECIAL_TOKENS:
                raise TokenizerError(f"there is no special token {role!r}.{nearest(role, SPECIAL_TOKENS)}")
            if self.backend.token_to_id(token) is None:
                raise TokenizerError(f"the {role} {token!r} is not in the vocabulary; add it to the backend first")
            if token not in already:
                self.backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])

    def _role(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)

    def __len__(self) -> int:
        """The number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, {self.special_tokens})"

    def __getstate__(self) -> dict[str, Any]:
        # workers of a loader get a copy by pickling, which a compiled template cannot go through
        return self.__dict__ | {"_compiled_template": None}

    @property
    def vocab_size(self) -> int:
        """The number of tokens without those added later, as Hugging Face counts it."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id) if token_id >= 0 else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text.

        Raises:
            TokenizerError: `text` is no string, or has half of a surrogate pair.
        """
        return self.backend.encode(as_unicode(text), add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = True) -> str:
        """The text of one list of ids, `[s]`; an id that has no token (a padded embedding row) adds nothing.

        Raises:
            TokenizerError: an id is negative, or the tensor has more than one dimension.
        """
        if isinstance(ids, torch.Tensor):
            if ids.dim() != 1:
                raise TokenizerError(f"decode takes one list of ids, not shape {tuple(ids.shape)}; see decode_batch")
            ids = ids.tolist()
        for place, number in enumerate(ids):
            if number < 0:
                raise TokenizerError(f"id {number} at position {place} is no token; cut unfilled positions off first")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_batch(
        self, batch: Sequence[Sequence[int] | torch.Tensor] | torch.Tensor, *, skip_special_tokens: bool = True
    ) -> list[str]:
        """The texts of several lists of ids, or of a tensor `[b, s]`."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in batch]

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one; see `TextStream`."""
        return TextStream(self)

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        text_pair: str | Sequence[str] | None = None,
        padding_side: Literal["right", "left"] = "right",
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
    ) -> Encoding:
        """Encode a batch, padded to its longest text.

        Args:
            texts: one text or several.
            text_pair: as many second texts, for models that read pairs.
            padding_side: where padding goes; `left` for generating.
            max_length: the most tokens a text may have, special tokens included.
            truncation: cut what is longer than `max_length` at its end (of a pair: the longer of the two).
            add_special_tokens: add those that the model expects around a text.

        Raises:
            TokenizerError: a text is longer than `max_length` without `truncation`, padding is needed and there is
                neither a pad nor an end token, or a text cannot be encoded.
        """
        if padding_side not in ("right", "left"):
            raise TokenizerError(f"padding_side is 'right' or 'left', not {padding_side!r}")
        if truncation and max_length is None:
            raise TokenizerError("truncation=True needs a max_length")
        firsts = [texts] if isinstance(texts, str) else list(texts)
        seconds = (
            [text_pair] if isinstance(text_pair, str) else [None] * len(firsts) if text_pair is None else text_pair
        )
        if len(seconds) != len(firsts):
            raise TokenizerError(f"text_pair has {len(seconds)} texts for {len(firsts)} in texts")
        room = max_length if truncation else None
        rows = [self._row(*pair, add_special_tokens, room) for pair in zip(firsts, seconds, strict=True)]
        if max_length is not None:
            check_lengths(rows, max_length)
        return self._pad(rows, left=padding_side == "left")

    def _row(self, first: str, second: str | None, special: bool, room: int | None) -> tokenizers.Encoding:
        # truncation is done here and not by the backend, whose settings would be shared between threads
        if room is None:
            pair = None if second is None else as_unicode(second)
            return self.backend.encode(as_unicode(first), pair, add_special_tokens=special)
        parts = [
            self.backend.encode(as_unicode(text), add_special_tokens=False)
            for text in (first, second)
            if text is not None
        ]
        taken = self.backend.num_special_tokens_to_add(is_pair=len(parts) == 2) if special else 0
        if taken > room:
            raise TokenizerError(f"max_length={room} has no room for the {taken} special tokens of a text")
        for part, length in zip(parts, fit([len(part) for part in parts], room - taken), strict=True):
            part.truncate(length)
        return self.backend.post_process(parts[0], parts[1] if second is not None else None, special)

    def _pad(self, rows: Sequence[tokenizers.Encoding], *, left: bool) -> Encoding:
        longest = max((len(row) for row in rows), default=0)
        ragged = any(len(row) != longest for row in rows)
        return pad(rows, self._padding_id() if ragged else 0, left=left)

    def _padding_id(self) -> int:
        for candidate in (self.pad_token_id, *self.eos_token_ids):
            if candidate is not None:
                return candidate
        raise TokenizerError(
            "texts of different lengths need padding, and this tokenizer has neither a pad_token nor an eos_token: "
            "give it one (special_tokens={'pad_token': ...}), or encode the texts one by one"
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation, as the model was trained to read it; it holds its own special tokens.

        So encode it with `add_special_tokens=False`.

        Args:
            messages: mappings with `role` and `content`.
            add_generation_prompt: end with the opening of the assistant's answer.
            variables: whatever else the template reads, such as `tools`.

        Raises:
            TokenizerError: there is no chat template, it refused the messages, or the sandbox blocked it.
        """
        if self.chat_template is None:
            raise TokenizerError(
                "this tokenizer has no chat template: it belongs to a model that was not trained on conversations, or "
                "its folder lacks chat_template.jinja; Tokenizer.with_chat_template(text) sets one"
            )
        if isinstance(messages, (str, Mapping)):
            raise TokenizerError("messages is a list of mappings, such as [{'role': 'user', 'content': 'Hello'}]")
        if self._compiled_template is None:
            self._compiled_template = ChatTemplate(self.chat_template)
        known = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return self._compiled_template.render(messages, {**self.special_tokens, **known, **variables})

    def with_chat_template(self, chat_template: str | None) -> "Tokenizer":
        """The same tokenizer with another chat template; both share the backend."""
        return Tokenizer(
            self.backend,
            special_tokens=self.special_tokens,
            eos_token_ids=self.eos_token_ids,
            chat_template=chat_template,
            model_max_length=self.model_max_length,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which `transformers.AutoTokenizer` loads."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self.special_tokens
        if self.eos_token_ids[1:]:
            config["eos_token_ids"] = list(self.eos_token_ids)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        if self.model_max_length is not None:
            config["model_max_length"] = self.model_max_length
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        texts = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        for name, text in texts.items():
            with replace_file(root / name) as file:
                file.write(text.encode())
