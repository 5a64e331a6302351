"""Random numbers of a sample, and what is drawn with them: which, how many, and how long.

All is made of uniform numbers alone, which NumPy keeps the same in every version.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator, Philox

from swissarmy.data.order.permutation import derive_key
from swissarmy.data.samples.examples import Ids

Lengths = Callable[[int, int, Generator], Ids]
"""From a total, a number and random numbers to as many lengths of at least 1 that add up to the total."""


def random_numbers(seed: int, sample_id: int) -> Generator:
    """Those of one sample of a run, whichever process asks."""
    return Generator(Philox(key=derive_key(seed, "objective", sample_id)))


def drawn(count: int, number: int, random: Generator) -> Ids:
    """So many different ones of `range(count)`, in random order."""
    return random.random(count).argsort()[:number]


def rounded(number: float, random: Generator) -> int:
    """A whole number beside it, which on average is it."""
    return math.floor(number + random.random())


def even_lengths(total: int, number: int, random: Generator) -> Ids:
    """Lengths of which every choice is equally likely, as T5 draws them (Raffel et al. 2020)."""
    borders = np.sort(drawn(total - 1, number - 1, random)) + 1
    return np.diff(borders, prepend=0, append=total)


def poisson_lengths(total: int, number: int, random: Generator) -> Ids:
    """Lengths that are 1 and a Poisson number more, given their total: as GLM draws them (Du et al. 2022)."""
    placed = (random.random(total - number) * number).astype(np.int64)
    return 1 + np.bincount(placed, minlength=number)
