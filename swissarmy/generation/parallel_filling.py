"""`fill_sequence_in_parallel`: all gaps of a sequence at once, in a few rounds, as for the tokens of an image.

In each round one forward pass predicts every gap that is still open, whatever the others will become; the predictions
with the lowest entropy are kept, and the rest are predicted again with these in view. The number of passes is that of
the rounds, not of the tokens. The sources are CogView2's parallel decoding (Ding et al. 2022), whose strategy in SAT
has the name used here and keeps what is below a threshold, and MaskGIT (Chang et al. 2022), whose schedule decides how
many are kept where no threshold is given.
Shapes: b rows, s columns.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.core.errors import ConfigError, HookCallError
from swissarmy.generation.eval_mode import in_eval_mode
from swissarmy.generation.grid import GAP, as_rows
from swissarmy.generation.processors import suppressed_tokens as suppress
from swissarmy.generation.processors import temperature as heat
from swissarmy.generation.processors import top_k as keep_k
from swissarmy.generation.step_inputs import MasksAndPositions
from swissarmy.generation.strategies import check_logits, draw, row_generators
from swissarmy.nn.precision import precise

_NO_TOKENS = torch.empty(0, 0, dtype=torch.long)
"""For processors that look at the scores alone."""


@final
class IterativeEntropyFilterStrategy:
    """Draws a token for every open gap, and keeps those of the positions that the model is surest of."""

    def __init__(
        self,
        num_rounds: int = 8,
        *,
        entropy_threshold: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | None = None,
        suppressed_tokens: Iterable[int] = (),
        seed: int | None = None,
    ) -> None:
        """Set how many rounds there are, and what is kept in each.

        Args:
            num_rounds: How many forward passes there are at most; the last one keeps all.
            entropy_threshold: Keep positions whose entropy, in nats and before temperature and top-k, is at most this,
                and in each row at least the one of lowest entropy. When omitted, the share of a row's gaps that are
                filled after round r of R is 1 - cos(pi / 2 * r / R), at least one a round.
            temperature: Of the draws.
            top_k: Draw only from so many most likely tokens; 1 takes the most likely one.
            suppressed_tokens: Ids that are never drawn.
            seed: Makes the draws repeatable; without one they follow `torch.manual_seed`.

        Both threshold and temperature may be a sequence with a value for each round.

        Raises:
            ConfigError: A value outside its range, or a sequence that has not `num_rounds` values.
        """
        if num_rounds < 1:
            raise ConfigError(f"num_rounds={num_rounds} must be at least 1.")
        self.num_rounds, self.seed = num_rounds, seed
        self.thresholds = None
        if entropy_threshold is not None:
            self.thresholds = _by_round("entropy_threshold", entropy_threshold, num_rounds)
            if not all(value >= 0 for value in self.thresholds):
                raise ConfigError(f"entropy_threshold={entropy_threshold} must not be negative.")
        self.temperatures = [heat(value) for value in _by_round("temperature", temperature, num_rounds)]
        self.narrow = None if top_k is None else keep_k(top_k)
        self.suppress = suppress(suppressed_tokens)
        self.round = 0

    def reset(self, tokens: Tensor, open_gaps: Tensor) -> None:
        """Begin with tokens `[b, s]`, to be chosen where `open_gaps` `[b, s]`."""
        self.open = open_gaps
        self.counts = open_gaps.sum(dim=1)
        self.round = 0
        self.generators = row_generators(self.seed, len(tokens))

    @property
    def is_done(self) -> bool:
        """Whether no gap is open."""
        return self.round == self.num_rounds or not bool(self.open.any())

    def forward(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Tokens `[b, s]` with some gaps filled, from logits `[b, s, vocab]` of each position.

        Raises:
            HookCallError: Logits of an open gap that are not numbers, or all ruled out.
        """
        rows, columns = self.open.nonzero(as_tuple=True)
        scores = self._scores(logits[rows, columns])
        best = scores.amax(dim=-1)
        if not bool(torch.isfinite(best).all()):
            column = int(columns[~torch.isfinite(best)][0])
            check_logits(self._scores(logits[:, column]), self.open[:, column], column)
        entropy = torch.full(tokens.shape, math.inf, dtype=scores.dtype, device=scores.device)
        entropy[rows, columns] = torch.special.entr(scores.softmax(dim=-1)).sum(dim=-1)
        filled = tokens.clone()
        filled[rows, columns] = self._drawn(scores)
        kept = self.open & self._sure(entropy)
        self.open = self.open & ~kept
        self.round += 1
        return torch.where(kept, filled, tokens)

    def _scores(self, logits: Tensor) -> Tensor:
        """Logits `[n, vocab]` in float32 or better, without the suppressed tokens."""
        return self.suppress(precise(logits), _NO_TOKENS)

    def _drawn(self, scores: Tensor) -> Tensor:
        """A token for each open gap, `[n]`, row after row; each row draws its own numbers."""
        scores = self.temperatures[self.round](scores, _NO_TOKENS)
        if self.narrow is not None:
            scores = self.narrow(scores, _NO_TOKENS)
        pairs = zip(self.generators, self.open.sum(dim=1).tolist(), strict=True)
        numbers = [torch.rand(count, generator=generator, dtype=torch.float64) for generator, count in pairs]
        return draw(scores, torch.cat(numbers))

    def _sure(self, entropy: Tensor) -> Tensor:
        """Which positions `[b, s]` are kept in this round; entropy is infinite where nothing is open."""
        if self.round + 1 == self.num_rounds:
            return torch.ones_like(self.open)
        rank = entropy.argsort(dim=1, stable=True).argsort(dim=1)
        if self.thresholds is not None:
            return (entropy <= self.thresholds[self.round]) | (rank == 0)
        share = 1 - math.cos(math.pi / 2 * (self.round + 1) / self.num_rounds)
        filled = self.counts - self.open.sum(dim=1)
        wanted = (self.counts * share).ceil().long() - filled
        return rank < wanted.clamp(min=1)[:, None]


def fill_sequence_in_parallel(
    model: Model,
    seq: Tensor | Sequence[Tensor],
    batch_size: int = 1,
    *,
    mask_token: int,
    strategy: IterativeEntropyFilterStrategy | None = None,
    shifted: bool | None = None,
    get_masks_and_position_ids: MasksAndPositions | None = None,
    **kw_args: Any,
) -> Tensor:
    """Choose every `-1` in sequences, all at the same time; given tokens stay.

    Args:
        model: An encoder with a masked-language head, or a causal model or encoder-decoder (then `input_ids=` is its
            source and `seq` the target), most useful with a mask that lets gaps see what is given after them.
        seq: Token ids `[len]` or `[b, len]`, or a list of `[len]` of any lengths.
        batch_size: How many rows to make of a single sequence.
        mask_token: What the model reads where a gap is open; it is never chosen.
        strategy: Chooses the tokens; `IterativeEntropyFilterStrategy()` when omitted.
        shifted: Whether the logits at a position are those of the next token; as is natural for the model if omitted:
            true of causal ones, whose rows must begin with a given token, and false of encoders.
        get_masks_and_position_ids: As for `fill_sequence`.
        **kw_args: For the model, in every round.

    Returns:
        Tokens `[b, len]` (int64, -1 after a row's end).

    Raises:
        HookCallError: Sequences that cannot be filled, another kind of strategy, or a model without logits over its
            vocabulary.
    """
    strategy = strategy or IterativeEntropyFilterStrategy()
    if not isinstance(strategy, IterativeEntropyFilterStrategy):
        raise HookCallError(f"strategy={type(strategy).__name__} chooses one token at a time: use sat.fill_sequence.")
    rows = as_rows(seq, batch_size)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=GAP).to(model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    real = torch.arange(tokens.shape[1], device=model.device) < lengths[:, None]
    with torch.no_grad(), in_eval_mode(model):
        decoder, call = (model, kw_args) if isinstance(model, BaseModel) else model.for_decoding(**kw_args)
        shifted = decoder.config.causal if shifted is None else shifted
        _check(decoder, tokens, real, mask_token, shifted)
        call = {**call, **_masks(get_masks_and_position_ids, seq, tokens)}
        if not bool(real.all()):
            call["padding_mask"] = real
        strategy.reset(tokens, (tokens == GAP) & real)
        while not strategy.is_done:
            logits = _logits(decoder, torch.where(real & (tokens == GAP), mask_token, tokens).clamp(min=0), call)
            logits[..., mask_token] = -math.inf
            tokens = strategy.forward(logits.roll(1, dims=1) if shifted else logits, tokens)
    return tokens


def _by_round(name: str, values: float | Sequence[float], num_rounds: int) -> list[float]:
    """A value for each round."""
    listed = [float(values)] * num_rounds if isinstance(values, int | float) else [float(value) for value in values]
    if len(listed) != num_rounds:
        raise ConfigError(f"{name} has {len(listed)} values for num_rounds={num_rounds}: give one for each, or one.")
    return listed


def _logits(decoder: BaseModel, tokens: Tensor, call: dict[str, Any]) -> Tensor:
    """What the model says of every position, `[b, s, vocab]`, as a tensor of the caller's own."""
    logits = decoder(tokens, **call)[0]
    vocab = decoder.config.vocab_size
    if not isinstance(logits, Tensor) or logits.shape != (*tokens.shape, vocab):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise HookCallError(f"the model's head gives {shape}, not logits over its vocabulary of {vocab}.")
    return logits.clone()


def _masks(give: MasksAndPositions | None, seq: Tensor | Sequence[Tensor], tokens: Tensor) -> dict[str, Any]:
    """The caller's mask and position ids, as far as there are any."""
    if give is None:
        return {}
    mask, position_ids = give(seq if isinstance(seq, Tensor) and seq.dim() == 1 else tokens)
    given = {"attention_mask": mask, "position_ids": position_ids}
    return {name: value for name, value in given.items() if value is not None}


def _check(decoder: BaseModel, tokens: Tensor, real: Tensor, mask_token: int, shifted: bool) -> None:
    """Refuse sequences and a mask token that the model cannot read."""
    if bool((real & (tokens < GAP)).any()):
        raise HookCallError(f"seq holds {int(tokens.min())}: ids are >= 0, and -1 stands for a gap.")
    if not 0 <= mask_token < decoder.config.vocab_size:
        raise HookCallError(f"mask_token={mask_token} is no id of the vocabulary of {decoder.config.vocab_size}.")
    empty = ~real.any(dim=1)
    if bool(empty.any()):
        raise HookCallError(f"row {int(empty.nonzero()[0])} is empty: give at least one token or gap.")
    if shifted and bool((tokens[:, 0] == GAP).any()):
        row = int((tokens[:, 0] == GAP).nonzero()[0])
        raise HookCallError(f"row {row} begins with a gap, and the model predicts the next token: give the first one.")
