"""Spans of a text, written as the number of the span that each token is in: -1 -1 0 0 0 -1 1 -1.

Shapes: n tokens of a text, k spans.
"""

import numpy as np
from numpy.random import Generator

from swissarmy.data.objectives.draws import Lengths, even_lengths
from swissarmy.data.samples.examples import Flags, Ids

OUTSIDE = -1
"""The number of a token in no span."""


def hidden_tokens(length: int, share: float) -> int:
    """How many tokens of a text are hidden: at least one, and never all; of a single token none."""
    return min(max(round(length * share), 1), max(length - 1, 0))


def number_of_spans(length: int, share: float, mean_length: float) -> int:
    """How many spans they make; there is something visible between any two."""
    hidden = hidden_tokens(length, share)
    return min(max(round(hidden / mean_length), 1), hidden, length - hidden + 1)


def scattered_spans(length: int, share: float, mean_length: float, random: Generator, lengths: Lengths) -> Ids:
    """Spans anywhere in a text, `[n]`.

    Args:
        length: n.
        share: Of the tokens that spans have.
        mean_length: Of a span.
        random: Of this text.
        lengths: Draws how long each span is.
    """
    hidden, number = hidden_tokens(length, share), number_of_spans(length, share, mean_length)
    if not number:
        return np.full(length, OUTSIDE)
    gaps = even_lengths(length - hidden + 2, number + 1, random)
    gaps[[0, -1]] -= 1  # a text may begin or end with a span
    pieces = np.empty(2 * number + 1, dtype=np.int64)
    pieces[0::2], pieces[1::2] = gaps, lengths(hidden, number, random)
    names = np.full(len(pieces), OUTSIDE)
    names[1::2] = np.arange(number)
    return np.repeat(names, pieces)


def among(chosen: Flags, spans: Ids) -> Ids:
    """Spans of the chosen tokens as spans of all, `[n]`."""
    result = np.full(len(chosen), OUTSIDE)
    result[chosen] = spans
    return result


def starts_of(spans: Ids) -> Flags:
    """Where a span begins, `[n]`, or goes on after something that is not hidden."""
    starts: Flags = (spans != OUTSIDE) & (spans != np.concatenate(([OUTSIDE], spans[:-1])))
    return starts
