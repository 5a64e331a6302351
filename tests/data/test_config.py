"""The config of the data: settings that contradict each other are refused, all in one report."""

from typing import Any

import pytest

from swissarmy.core.errors import ConfigError
from swissarmy.data.config import DataConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there is no data"),
        ({"train_data": ("a",), "train_data_weights": (1.0, 2.0)}, "2 weights for 1 train_data"),
        ({"train_data": ("a",), "train_data_weights": (float("nan"),)}, "finite number"),
        ({"train_data": ("a",), "train_data_weights": (-1,)}, "negative"),
        ({"train_data": ("a",), "train_data_weights": (0,)}, "all weights are 0"),
        ({"train_data": ("a",), "train_data_weights_schedule": ("x",)}, "STEP: WEIGHT"),
        ({"train_data": ("a",), "train_data_weights_schedule": ("5: 1 2",)}, "from step 5: 2 weights for 1"),
        ({"valid_data": ("a",), "split": "1,1,1"}, "nothing to split"),
        ({"train_data": ("a",), "split": "1,1"}, "give three"),
        ({"train_data": ("a",), "split": "0,1,1"}, "leaves nothing to train on"),
        ({"train_data": ("a",), "valid_data": ("b",), "split": "8,1,1"}, "makes valid data and valid_data gives it"),
        ({"train_data": ("a",), "packing": True}, "packing needs a sequence_length"),
        ({"train_data": ("a",), "truncation": "drop"}, "needs a sequence_length"),
        (
            {"train_data": ("a",), "packing": True, "sequence_length": 4, "record_format": "seq2seq"},
            "not for record_format='seq2seq'",
        ),
        ({"train_data": ("a",), "streaming": True}, "share"),
        ({"train_data": ("a",), "num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"train_data": ("a",), "worker_timeout": float("nan")}, "worker_timeout=nan"),
        ({"train_data": ("a",), "image_size": (3,)}, "height and a width"),
        ({"train_data": ("a",), "seed": 2**64}, r"seed=\d+ must be from 0 to 2\*\*63 - 1"),
        ({"train_data": ("a",), "image_std": (0.5, 0.0)}, "must be above 0"),
        ({"train_data": ("a",), "image_mean": (0.5,), "image_std": (0.5, 0.5)}, "1 channels and image_std 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_all_problems_are_in_one_report() -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*prefetch=0.*2 weights for 1.*packing needs"):
        DataConfig(train_data=("a",), train_data_weights=(1, 2), prefetch=0, packing=True)
