"""`ObjectiveOptions`: how much of a text is hidden from a model that is to find it again, and in what pieces."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from swissarmy.core.config import Config

Objective = Literal[
    "causal_lm",
    "masked_lm",
    "seq2seq",
    "span_corruption",
    "blank_infilling",
    "classification",
    "image_classification",
]
"""What a model can learn with the stock forward steps."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(Config):
    """What the objectives `masked_lm`, `span_corruption` and `blank_infilling` do to a text; others do nothing to it.

    Special tokens are never hidden, and do not count in shares.
    """

    mask_probability: float = 0.15
    """The share of a text's tokens that is hidden."""
    mask_whole_words: bool = False
    """Whether `masked_lm` hides words and not single tokens."""
    mask_kept: float = 0.1
    """Of the tokens that `masked_lm` hides, the share that stays what it is."""
    mask_random: float = 0.1
    """The share that becomes any other token; the rest becomes the mask token."""
    mask_token: str | None = None
    """What stands for something hidden; the tokenizer's mask token, or `[MASK]`, when `None`."""
    mean_span_length: float = 3.0
    """Tokens in a row that `span_corruption` and `blank_infilling` hide together, on average."""
    sentinels: str = "<extra_id_{}>"
    """What `span_corruption` puts for the first span (0), the second (1), and so on, as far as the tokenizer knows
    them: `<unused{}>`, `<|reserved_special_token_{}|>`, ..."""
    infilling_long: float = 0.5
    """The share of texts of which `blank_infilling` hides one long end, of half the text or more (`[gMASK]`)."""
    infilling_sentences: float = 0.0
    """The share of texts of which it hides whole sentences (`[sMASK]`); of the rest it hides short spans."""
    infilling_start_token: str | None = None
    """What a hidden span begins with; `<|startofpiece|>` or `<sop>` when `None`."""
    infilling_end_token: str | None = None
    """What ends it; `<|endofpiece|>` or `<eop>` when `None`."""
    infilling_block_positions: bool = False
    """Whether `blank_infilling` counts in two dimensions, as GLM does: `position_ids` say where a span belongs, and
    `block_position_ids`, which some mixin must read, where in the span a token is. Else positions count on."""

    def problems(self) -> Iterator[str]:
        """Shares that are none, spans without length, and sentinels that would all be one."""
        if not 0 < self.mask_probability < 1:
            yield f"mask_probability={self.mask_probability} must be between 0 and 1."
        for name, other in (("mask_kept", "mask_random"), ("infilling_long", "infilling_sentences")):
            first, second = getattr(self, name), getattr(self, other)
            if not (first >= 0 and second >= 0 and first + second <= 1):
                yield f"{name}={first} and {other}={second} must be shares, with a sum of at most 1."
        if not 1 <= self.mean_span_length < float("inf"):
            yield f"mean_span_length={self.mean_span_length} must be at least 1."
        if self.sentinels.count("{}") != 1 or self.sentinels.strip("{}") == "":
            yield f"sentinels={self.sentinels!r} must hold {{}}, for the number of the span."
