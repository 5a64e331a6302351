"""The random numbers of each rank: what dropout, and a user's own code, will draw next."""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from swissarmy.training.ranks import Ranks

PREFIX: Final = "random.rank-"


def random_tensors(ranks: Ranks) -> dict[str, Tensor]:
    """The state of this rank's generators: torch's on the CPU and on its device, Python's, numpy's."""
    prefix = f"{PREFIX}{ranks.rank:05d}"
    _, words, spare = random.getstate()
    kind, numpy_words, *numpy_rest = np.random.get_state()
    assert kind == "MT19937", "numpy's old generator is always this"
    tensors = {
        f"{prefix}.torch": torch.get_rng_state(),
        f"{prefix}.python": _vector([*words, math.nan if spare is None else spare]),
        f"{prefix}.numpy": _vector([*map(int, numpy_words), *map(float, numpy_rest)]),
    }
    if ranks.device.type != "cpu":
        tensors[f"{prefix}.device"] = torch.get_device_module(ranks.device).get_rng_state(ranks.device)
    return tensors


def first_random_tensors() -> dict[str, Tensor]:
    """Room for what `draw_anew` needs, of whichever rank."""
    return {f"{PREFIX}00000.torch": torch.get_rng_state()}


def restore_random_state(tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Go on drawing where `random_tensors` of the same rank stood."""
    prefix = f"{PREFIX}{ranks.rank:05d}"
    torch.set_rng_state(tensors[f"{prefix}.torch"])
    *words, spare = tensors[f"{prefix}.python"].tolist()
    random.setstate((3, tuple(map(int, words)), None if math.isnan(spare) else spare))
    *words, position, has_spare, spare = tensors[f"{prefix}.numpy"].tolist()
    numpy_words = np.array(words, dtype=np.uint32)
    np.random.set_state(("MT19937", numpy_words, int(position), int(has_spare), spare))
    if f"{prefix}.device" in tensors:
        torch.get_device_module(ranks.device).set_rng_state(tensors[f"{prefix}.device"], ranks.device)


def draw_anew(tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Begin new streams, where the ranks are not those of the checkpoint: one for each that reads its own samples.

    They follow from the first rank's old state, so that the same checkpoint goes on in the same way, and do not repeat
    what was drawn before.
    """
    digest = hashlib.sha256(tensors[f"{PREFIX}00000.torch"].numpy().tobytes())
    digest.update(str(ranks.data_rank).encode())
    seed = int.from_bytes(digest.digest()[:4], "little")
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _vector(numbers: Sequence[float]) -> Tensor:
    """Words of 32 bits and positions are exact in float64."""
    return torch.tensor(numbers, dtype=torch.float64)
