"""Beam search: the most likely sequences that a fixed number of beams finds, exactly, with no sampling.

Shapes: b rows, n beams of a row, tokens `[b * n, c]`; g groups of w = n / g beams.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Unpack, final

import torch
from torch import Tensor

from swissarmy.core.errors import ConfigError, HookCallError
from swissarmy.generation.grid import GAP
from swissarmy.generation.strategies import Strategy, StrategyOptions, check_logits
from swissarmy.nn.kv_cache import KVCache
from swissarmy.nn.precision import precise

LengthPenalty = Callable[[int], float]
"""What the log-probability of so many generated tokens, the end token counted, is divided by."""

_NEVER = float("-inf")


def gnmt_length_penalty(alpha: float) -> LengthPenalty:
    """`((5 + length) / 6) ** alpha` (Wu et al. 2016); 0 compares plain log-probabilities, 1 favours long sequences."""
    return lambda length: float(((5 + length) / 6) ** alpha)


def power_length_penalty(exponent: float) -> LengthPenalty:
    """`length ** exponent`, which is what `length_penalty` means to `transformers`; 1 compares means per token."""
    return lambda length: float(length**exponent)


class Hypothesis(NamedTuple):
    """A sequence that may be returned."""

    score: float
    """Log-probability divided by the length penalty."""
    tokens: Tensor
    """`[c]`, its columns up to the last that was generated."""
    beam: int | None
    """Where it stands among the rows `[b * n]`, if it is still being continued: the cache holds it."""


@final
class BeamSearchStrategy(Strategy):
    """The best of `num_beams` sequences that are continued side by side.

    Scores are sums of log-probabilities of the chosen tokens, after processors, as `transformers` counts them. Rows may
    differ in length and in how many tokens they want; given tokens between two gaps of a row are refused.
    """

    def __init__(
        self,
        num_beams: int = 4,
        *,
        length_penalty: float | LengthPenalty = 0.0,
        early_stopping: bool | Literal["never"] = False,
        num_beam_groups: int = 1,
        diversity_penalty: float = 0.0,
        num_return_sequences: int = 1,
        end_tokens: Iterable[int] = (),
        **options: Unpack[StrategyOptions],
    ) -> None:
        """Set how wide the search is and what it prefers.

        Args:
            num_beams: How many sequences of each row are continued.
            length_penalty: The alpha of `gnmt_length_penalty`, or a function of the length to divide scores by, such as
                `power_length_penalty(1.0)`, the way of `transformers`.
            early_stopping: When a row, or group, with as many ended sequences as beams is done. `True`: at once.
                `False`: when its best beam, if it ended now, would not enter them; exact unless the length penalty
                grows. `"never"`: when no continuation of it can enter them; always exact.
            num_beam_groups: Into how many groups the beams are divided (Vijayakumar et al. 2018).
            diversity_penalty: What a token loses, while candidates are chosen, for each time that an earlier group
                chose it in the same step. It is not part of the scores.
            num_return_sequences: How many sequences of each row are returned, best first.
            end_tokens: Tokens that end a sequence.
            **options: As for every strategy, see `StrategyOptions`.

        Raises:
            ConfigError: A value outside its range.
        """
        super().__init__(end_tokens, **options)
        _check(num_beams, num_beam_groups, diversity_penalty, num_return_sequences, early_stopping)
        self.num_beams, self.num_beam_groups = num_beams, num_beam_groups
        self.diversity_penalty, self.num_return_sequences = diversity_penalty, num_return_sequences
        self.length_penalty = length_penalty if callable(length_penalty) else gnmt_length_penalty(length_penalty)
        self.early_stopping = early_stopping
        self.scores: Tensor | None = None
        """After a run, the score of each returned sequence, `[b * num_return_sequences]`."""

    def reset(self, batch_size: int, device: torch.device, gaps: Tensor | None = None) -> None:
        """Begin a new batch.

        Raises:
            HookCallError: A row in which tokens are given between gaps.
        """
        super().reset(batch_size, device, gaps)
        if gaps is not None:
            runs = gaps[:, 0].long() + (gaps[:, 1:] & ~gaps[:, :-1]).sum(dim=1)
            if bool((runs > 1).any()):
                raise HookCallError(
                    f"row {int((runs > 1).nonzero()[0])} has given tokens between its gaps: beam search fills one gap "
                    "of a row; use sat.GreedyStrategy() or sat.SamplingStrategy()."
                )
        groups = self.num_beam_groups
        self.wanted = None if gaps is None else gaps.sum(dim=1).tolist()
        self.running = torch.zeros(batch_size, 1, dtype=torch.float64, device=device)
        self.found: list[list[list[Hypothesis]]] = [[[] for _ in range(groups)] for _ in range(batch_size)]
        self.done = [[False] * groups for _ in range(batch_size)]
        self.length = 0
        self.scores = None

    @property
    def is_done(self) -> bool:
        """Whether no row has a beam that may still improve its result."""
        return all(all(row) for row in self.done)

    def forward(self, logits: Tensor, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """Continue the best beams: tokens `[b * n, c]` (at first `[b, c]`) to `[b * n, c + 1]`, the cache reordered."""
        rows, column = len(self.done), tokens.shape[1]
        live = self._live(column).to(tokens.device)
        for row in (~live).nonzero().flatten().tolist():
            self._close(row, tokens)
        beams = len(tokens) // rows
        log_probabilities = self._log_probabilities(logits, tokens, live.repeat_interleave(beams))
        self.length += 1
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        counts = torch.zeros(rows, logits.shape[-1], dtype=torch.float64, device=logits.device)
        for group in range(self.num_beam_groups):
            steps.append(self._continue(group, log_probabilities.view(rows, beams, -1), counts, tokens))
            _, chosen, running = steps[-1]
            counts.scatter_add_(1, chosen, torch.isfinite(running).double())
        parents, chosen, running = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
        if beams > 1:  # what is found of a row that is over stays where it stands in the cache
            parents = torch.where(live[:, None], parents, torch.arange(beams, device=tokens.device))
            running = torch.where(live[:, None], running, self.running)
        self.running = running
        order = (torch.arange(rows, device=tokens.device)[:, None] * beams + parents).flatten()
        mems.reorder(order)
        return torch.cat((tokens[order], chosen.view(-1, 1)), dim=1), mems

    def finalize(self, tokens: Tensor, mems: KVCache) -> tuple[Tensor, KVCache]:
        """The best sequences `[b * num_return_sequences, c]`, and the cache if it holds them, else an empty one.

        Raises:
            HookCallError: Fewer sequences are possible than are to be returned.
        """
        for row in range(len(self.done)):
            self._close(row, tokens)
        best = [found for row in range(len(self.found)) for found in self._best(row)]
        self.scores = torch.tensor([found.score for found in best], dtype=torch.float64, device=tokens.device)
        result = torch.stack([self._whole(found, index, tokens) for index, found in enumerate(best)])
        beams = [found.beam for found in best if found.beam is not None]
        if len(beams) < len(best):
            return result, KVCache(mems.num_layers)
        mems.reorder(torch.tensor(beams, device=tokens.device))
        return result, mems

    def _log_probabilities(self, logits: Tensor, tokens: Tensor, live: Tensor) -> Tensor:
        """`[b * beams, vocab]`; of the beams of rows that are over, anything."""
        column, rows = tokens.shape[1], len(self.done)
        live = live & torch.isfinite(self.running.flatten())
        check_logits(logits, live, column, times=len(tokens) // rows)
        processed = self.process(precise(logits).log_softmax(dim=-1), tokens).double()
        best = processed.amax(dim=-1).masked_fill(~live, _NEVER).view(rows, -1).amax(dim=-1)
        ended = torch.tensor([any(groups) for groups in self.found], device=tokens.device)
        going = live.view(rows, -1).any(dim=-1)  # a dead end is one only where nothing of the row was found
        check_logits(best.masked_fill(ended & torch.isneginf(best), 0)[:, None], going, column)
        return processed.nan_to_num(nan=_NEVER, neginf=_NEVER)

    def _generated(self, tokens: Tensor) -> Tensor:
        """Every live row has got one token in each step."""
        return torch.full((len(tokens),), self.length, device=tokens.device)

    def _continue(
        self, group: int, log_probabilities: Tensor, counts: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The beams `[b, w]` that a group continues: which beam each comes from, its new token, its running score."""
        beams, vocab = log_probabilities.shape[1:]
        width = self.num_beams // self.num_beam_groups
        span = slice(0, 1) if beams == 1 else slice(group * width, (group + 1) * width)
        scores = (self.running[:, span, None] + log_probabilities[:, span]).flatten(1)
        preferred = scores - self.diversity_penalty * counts.repeat(1, scores.shape[1] // vocab)
        wanted = max(2, 1 + len(self.end_tokens)) * width
        order = preferred.topk(min(wanted, scores.shape[1]), dim=-1).indices
        scores = scores.gather(1, order)
        parents, chosen = order // vocab + span.start, order % vocab
        ending = torch.isin(chosen, torch.tensor(self.end_tokens, dtype=torch.long, device=tokens.device))
        self._keep_ended(group, parents[:, :width], chosen, scores, ending[:, :width], tokens)
        kept = _first(~ending, width)
        running = scores.gather(1, kept).masked_fill(ending.gather(1, kept), _NEVER)
        parents, chosen = parents.gather(1, kept), chosen.gather(1, kept)
        missing = width - kept.shape[1]  # fewer candidates than beams: the rest are beams that never win
        running = torch.nn.functional.pad(running, (0, missing), value=_NEVER)
        parents = torch.nn.functional.pad(parents, (0, missing), value=span.start)
        self._stop(group, running)
        return parents, torch.nn.functional.pad(chosen, (0, missing)), running

    def _keep_ended(
        self, group: int, parents: Tensor, chosen: Tensor, scores: Tensor, ending: Tensor, tokens: Tensor
    ) -> None:
        """Candidates among the best w that end are found; each row and group keeps the best w of these."""
        beams, width = len(tokens) // len(self.done), self.num_beams // self.num_beam_groups
        for row, rank in ending.nonzero().tolist():
            score = float(scores[row, rank])
            if self.done[row][group] or score == _NEVER:
                continue
            source = tokens[row * beams + int(parents[row, rank])]
            whole = torch.cat((source, chosen[row, rank : rank + 1]))
            found = [*self.found[row][group], Hypothesis(score / self.length_penalty(self.length), whole, None)]
            self.found[row][group] = sorted(found, key=lambda each: each.score, reverse=True)[:width]

    def _stop(self, group: int, running: Tensor) -> None:
        """Mark the rows in which this group is done."""
        width = self.num_beams // self.num_beam_groups
        for row, best in enumerate(running.amax(dim=1).tolist()):
            found = self.found[row][group]
            if self.done[row][group] or self._is_last(row) or (len(found) < width and best > _NEVER):
                continue
            worst = found[-1].score if found else _NEVER
            self.done[row][group] = self.early_stopping is True or self._attainable(row, best) <= worst

    def _is_last(self, row: int) -> bool:
        """Whether the row wants no more tokens; what its beams have is found then, whatever was found before."""
        return self.wanted is not None and self.wanted[row] == self.length

    def _attainable(self, row: int, best: float) -> float:
        """The highest score that a beam of this log-probability can reach."""
        if self.early_stopping != "never" or self.wanted is None or best == _NEVER:
            return best / self.length_penalty(self.length)
        longest = max(self.wanted[row], self.length)
        return max(best / self.length_penalty(length) for length in range(self.length, longest + 1))

    def _live(self, column: int) -> Tensor:
        """Which rows want a token in this column and are not done, `[b]`."""
        going = torch.tensor([not all(row) for row in self.done])
        return going if self.gaps is None else going & self.gaps[:, column].cpu()

    def _close(self, row: int, tokens: Tensor) -> None:
        """No more tokens for this row: what its beams have is found."""
        if self.length == 0:  # nothing was to be generated in this row
            self.found[row][0] = [Hypothesis(0.0, tokens[row], None)] * self.num_return_sequences
            self.done[row] = [True] * self.num_beam_groups
            return
        width = self.num_beams // self.num_beam_groups
        for group in range(self.num_beam_groups):
            if self.done[row][group]:
                continue
            found = self.found[row][group]
            for beam in range(group * width, (group + 1) * width):
                score = float(self.running[row, beam])
                if score > _NEVER:
                    place = row * self.num_beams + beam
                    found.append(Hypothesis(score / self.length_penalty(self.length), tokens[place], place))
            found.sort(key=lambda each: each.score, reverse=True)
            del found[width:]
            self.done[row][group] = True

    def _best(self, row: int) -> list[Hypothesis]:
        found = sorted((each for group in self.found[row] for each in group), key=lambda each: -each.score)
        if len(found) < self.num_return_sequences:
            raise HookCallError(
                f"row {row} has {len(found)} sequences, and num_return_sequences={self.num_return_sequences}: no more "
                "are possible with this vocabulary, these processors and these end tokens."
            )
        return found[: self.num_return_sequences]

    def _whole(self, found: Hypothesis, index: int, tokens: Tensor) -> Tensor:
        """A sequence with its end token repeated in the gaps that are left, and what was given after them."""
        row = index // self.num_return_sequences
        whole = tokens[row * len(tokens) // len(self.done)].clone()
        if self.gaps is not None:
            whole[self.gaps[row, : len(whole)]] = self.end_tokens[0] if self.end_tokens else GAP
        whole[: len(found.tokens)] = found.tokens
        return whole


def _first(wanted: Tensor, width: int) -> Tensor:
    """The places of the first `width` candidates `[b, k]` that are wanted, in order, then of others."""
    return (~wanted).int().argsort(dim=-1, stable=True)[:, :width]


def _check(beams: int, groups: int, diversity: float, returned: int, early_stopping: object) -> None:
    if beams < 1:
        raise ConfigError(f"num_beams={beams} must be at least 1.")
    if groups < 1 or beams % groups:
        raise ConfigError(f"num_beam_groups={groups} must divide num_beams={beams}.")
    if not 0 <= diversity < float("inf"):
        raise ConfigError(f"diversity_penalty={diversity} must be 0 or above.")
    if not 1 <= returned <= beams:
        raise ConfigError(f"num_return_sequences={returned} must be between 1 and num_beams={beams}.")
    if early_stopping not in (True, False, "never"):
        raise ConfigError(f'early_stopping={early_stopping!r} must be True, False or "never".')
