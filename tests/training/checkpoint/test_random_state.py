"""Random numbers go on where they stood."""

import random

import numpy as np
import torch

from swissarmy.training.checkpoint.random_state import (
    draw_anew,
    first_random_tensors,
    random_tensors,
    restore_random_state,
)
from swissarmy.training.ranks import Ranks


def drawn() -> list[float]:
    """From every generator, in both of the ways that keep a spare number."""
    return [float(torch.rand(())), random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal()]


def test_every_generator_goes_on_with_its_spare_numbers() -> None:
    drawn()
    tensors = {name: tensor.clone() for name, tensor in random_tensors(Ranks()).items()}
    first = [drawn() for _ in range(3)]
    restore_random_state(tensors, Ranks())
    assert [drawn() for _ in range(3)] == first


def test_other_ranks_draw_other_numbers_and_the_same_each_time() -> None:
    torch.manual_seed(3)
    tensors = {name: tensor.clone() for name, tensor in first_random_tensors().items()}
    streams = []
    for data_rank in (0, 1, 0):
        draw_anew(tensors, Ranks(rank=5, world_size=6, data_rank=data_rank, data_size=3))
        streams.append(drawn())
    torch.manual_seed(3)
    assert streams[0] == streams[2] != streams[1]
    assert drawn()[0] not in (streams[0][0], streams[1][0])
