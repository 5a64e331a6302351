"""Constrained decoding: texts that match a regular expression, or are JSON of a schema, whatever the model prefers.

A constraint is given to any strategy like a logits processor. Grammars are followed by the library llguidance, byte by
byte, so that tokens may cut the text anywhere, within a character too. A row's state belongs to its tokens and not to
its place in the batch: beams that change places, and guesses that do not come true, need nothing more.
Shapes: b rows, n tokens so far.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from swissarmy.core.errors import ConfigError, HookCallError, TokenizerError, require_extra
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.generation.grid import GAP
from swissarmy.generation.processors import LogitsProcessor, ProcessorOfARun
from swissarmy.generation.token_bytes import token_bytes

_NOT_FORCED = '%llguidance {"no_forcing": true}\n'
"""Where the grammar leaves one text, the model still decides how it is cut into tokens."""
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes it; a model that may put spaces anywhere may put them forever."""


@final
class Constraint(ProcessorOfARun):
    """What may follow the tokens of a row so far; an end token only where the text is complete.

    It is a processor for any strategy: `sat.BeamSearchStrategy(processors=[constraint], end_tokens=...)`. The text
    begins at the first gap; what is given after that counts as part of it.
    """

    def __init__(self, vocabulary: "Vocabulary", grammar: str, name: str) -> None:
        """Use `regex_constraint` or `json_schema_constraint`, which make the grammar.

        Raises:
            ConfigError: It is no grammar, or one that cannot be followed.
        """
        wrong, messages = vocabulary.library.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary.tokens)
        if wrong:
            raise ConfigError(f"{name}: {messages[0].strip()}")
        self.vocabulary, self.grammar, self.name = vocabulary, grammar, name

    def begin(self, end_tokens: Sequence[int]) -> LogitsProcessor:
        """Follow the rows of one run.

        Raises:
            HookCallError: There is no end token to say that the text is complete.
        """
        if not end_tokens:
            raise HookCallError(f"{self.name}: only an end token says that the text is complete; give end_tokens.")
        return _Rows(self, end_tokens)

    def start(self) -> Any:
        """A matcher before the first token."""
        return self.vocabulary.library.LLMatcher(self.vocabulary.tokens, self.grammar, log_level=0)


def regex_constraint(tokenizer: object, pattern: str) -> Constraint:
    r"""Texts that match a regular expression from beginning to end.

    The syntax is that of the Rust crate `regex`, which is Python's without look-around and back-references.

    Raises:
        ConfigError: The pattern is none.
        MissingExtraError: llguidance is not installed.
        TokenizerError: The tokenizer joins tokens by rules.
    """
    vocabulary = Vocabulary.of(tokenizer)
    whole = f" (?:{pattern})" if vocabulary.drops_first_space else pattern
    (rule,) = json.loads(vocabulary.library.LLMatcher.grammar_from_regex(whole))["grammars"]  # its slashes are escaped
    return Constraint(vocabulary, _NOT_FORCED + rule["lark_grammar"], f"regex={pattern!r}")


def json_schema_constraint(tokenizer: object, schema: Mapping[str, Any] | str) -> Constraint:
    """JSON texts that a schema (draft 2020-12) allows, properties in the schema's order, in `JSON_STYLE`.

    Args:
        tokenizer: What `sat.load_tokenizer` gives.
        schema: The schema, or its JSON text; its own `x-guidance` entries, which llguidance reads, win over the style.

    Raises:
        ConfigError: It is no schema, or has a keyword that cannot be followed.
        MissingExtraError: llguidance is not installed.
        TokenizerError: The tokenizer joins tokens by rules.
    """
    read = _read_schema(schema)
    read = {**read, "x-guidance": {**JSON_STYLE, **read.get("x-guidance", {})}}
    vocabulary = Vocabulary.of(tokenizer)
    space = '" " ' if vocabulary.drops_first_space else ""
    rules = f"start: {space}value\nvalue: %json {json.dumps(read)}"
    return Constraint(vocabulary, _NOT_FORCED + rules, "json_schema")


def _read_schema(schema: Mapping[str, Any] | str) -> dict[str, Any]:
    try:
        read = json.loads(schema) if isinstance(schema, str) else json.loads(json.dumps(dict(schema)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"json_schema: no JSON: {error}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"json_schema: {read!r} is no object; every value is allowed by {{}}.")
    return read


@final
class Vocabulary:
    """A tokenizer's tokens as llguidance wants them; made once for each tokenizer, which takes a second or two."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read every token."""
        self.library = require_extra("llguidance", extra="constrained", purpose="constrained decoding")
        found = token_bytes(tokenizer)
        self.size, self.drops_first_space = len(found.tokens), found.drops_first_space
        self.written = torch.tensor([bool(each) for each in found.tokens])
        wrapper = self.library.TokenizerWrapper(_Tokens([*found.tokens, b""], tokenizer))
        self.tokens = self.library.LLTokenizer(wrapper, n_vocab=self.size + 1)

    @classmethod
    def of(cls, tokenizer: object) -> "Vocabulary":
        """The tokens of a tokenizer.

        Raises:
            TokenizerError: It is not one of `sat.load_tokenizer`.
        """
        if not isinstance(tokenizer, Tokenizer):
            raise TokenizerError(
                f"a {type(tokenizer).__name__} does not say what bytes its tokens are: use sat.load_tokenizer."
            )
        known = _VOCABULARIES.get(tokenizer)
        if known is None or known.size != len(tokenizer):
            known = _VOCABULARIES[tokenizer] = cls(tokenizer)
        return known


_VOCABULARIES: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()


@final
class _Tokens:
    """What llguidance asks of a tokenizer. The end is a token of its own: which ids end a row is the strategy's."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], tokenizer: Tokenizer) -> None:
        self.tokens, self.tokenizer = tokens, tokenizer
        self.eos_token_id = len(tokens) - 1
        self.special_token_ids = [number for number, each in enumerate(tokens) if not each]

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@final
class _Rows:
    """A processor that follows the rows of one run."""

    def __init__(self, constraint: Constraint, end_tokens: Sequence[int]) -> None:
        self.constraint, self.end_tokens = constraint, end_tokens
        self.start: int | None = None
        self.states: dict[tuple[int, ...], Any] = {}

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Rule out what does not fit; rows that are over are left alone."""
        self.start = tokens.shape[1] if self.start is None else self.start
        rows = [tuple(row) for row in tokens[:, self.start :].tolist()]
        self.states = {row: self._state(row) for row in dict.fromkeys(rows)}
        masks = {row: self._allowed(state, logits.shape[1]) for row, state in self.states.items()}
        allowed = torch.stack([masks[row] for row in rows]).to(logits.device)
        return logits.masked_fill(~allowed, float("-inf"))

    def _state(self, row: tuple[int, ...]) -> Any:
        """The matcher after a row's new tokens, `None` where the row is over; from the longest beginning known."""
        known = next((size for size in range(len(row), -1, -1) if row[:size] in self.states), None)
        state = self.constraint.start() if known is None else self.states[row[:known]]
        for token in row[known or 0 :]:
            if state is None or token in self.end_tokens or token == GAP:
                return None
            state = state.deep_copy()
            state.consume_token(token)
        return state

    def _allowed(self, state: Any, vocab: int) -> Tensor:
        """Which tokens may follow, `[vocab]`; none after tokens that do not fit, which only a caller can have given."""
        allowed = torch.full((vocab,), state is None)
        if state is None or state.is_error():
            return allowed
        bits = np.unpackbits(np.frombuffer(state.compute_bitmask(), dtype=np.uint8), bitorder="little")
        size = min(vocab, self.constraint.vocabulary.size)
        allowed[:size] = torch.from_numpy(bits[:size].astype(bool)) & self.constraint.vocabulary.written[:size]
        ends = [token for token in self.end_tokens if token < vocab]
        allowed[ends] = bool(state.is_accepting())
        return allowed
