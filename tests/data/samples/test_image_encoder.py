"""Pictures as pixel values."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from swissarmy.core.errors import ConfigError
from swissarmy.data.samples.image_encoder import ImageEncoder
from swissarmy.data.source import RecordError

PLAIN = ImageEncoder(size=(2, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), label_field=None)


def pixels_of(encode: ImageEncoder, image: Any) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = encode({"image": image}, where="a.png")["pixel_values"]
    return result


def test_channels_come_first_and_values_are_normalised() -> None:
    image = np.zeros((2, 4, 3), np.uint8)
    image[..., 1] = 255
    encode = ImageEncoder(size=(2, 4), mean=(0.5, 0.25, 0.5), std=(0.5, 0.5, 0.25))
    sample = encode({"image": image, "label": 3}, where="a.png")
    assert sample["pixel_values"].dtype == np.float32
    assert sample["pixel_values"].shape == (3, 2, 4)
    assert [sample["pixel_values"][channel].tolist()[0][0] for channel in range(3)] == [-1.0, 1.5, -2.0]
    assert sample["labels"] == 3


def test_integers_cover_their_range_and_floats_are_taken_as_they_are() -> None:
    for dtype in (np.uint8, np.uint16):
        image = np.full((2, 4, 3), np.iinfo(dtype).max, dtype)
        assert np.all(pixels_of(PLAIN, image) == 1.0)
    assert np.all(pixels_of(PLAIN, np.full((2, 4, 3), 0.25)) == 0.25)


def test_a_grey_picture_has_the_same_value_in_each_channel() -> None:
    image = np.arange(8, dtype=np.uint8).reshape(2, 4)
    for grey in (image, image[:, :, None]):
        for channel in pixels_of(PLAIN, grey):
            np.testing.assert_allclose(channel, image / 255, rtol=1e-6)


def test_shrinking_averages() -> None:
    image = np.random.default_rng(0).random((8, 16, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], (2, 4), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(pixels_of(PLAIN, image), expected[0], rtol=1e-6)
    assert pixels_of(PLAIN, image).mean() == pytest.approx(image.mean(), abs=0.05)


def test_cropping_keeps_the_middle_and_the_proportions() -> None:
    crop = ImageEncoder(size=(2, 2), mean=(0.0,), std=(1.0,), crop=True, label_field=None)
    image = np.zeros((2, 6), np.uint8)
    image[:, 2:4] = 255
    assert np.all(pixels_of(crop, image) == 1.0)
    assert pixels_of(crop, np.zeros((5, 3), np.uint8)).shape == (1, 2, 2)
    assert pixels_of(crop, np.zeros((1, 700), np.uint8)).shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 2, 4), np.uint8), r"image has shape \(2, 2, 4\); it is \[H, W\] or \[H, W, 3\]"),
        (np.zeros(5, np.uint8), r"has shape \(5,\)"),
        (np.zeros((0, 2, 3), np.uint8), "has shape"),
        (np.zeros((2, 2, 3), np.int64), "holds int64; it is uint8"),
        (np.full((2, 2), np.nan), "holds float64; it is uint8, uint16, or finite floats"),
        ("a.png", "has shape"),
    ],
)
def test_what_is_no_picture_is_refused(image: Any, message: str) -> None:
    with pytest.raises(RecordError, match=rf"^a.png: .*{message}"):
        pixels_of(PLAIN, image)


def test_a_missing_picture_is_named() -> None:
    with pytest.raises(RecordError, match=r"no field 'image'.*'imag'"):
        PLAIN({"imag": 1}, where="a.png")


def test_settings_that_make_no_sense_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"(?s)size=\(0, 2\).*mean has 1 channels and std 3.*must be above 0"):
        ImageEncoder(size=(0, 2), mean=(0.5,), std=(0.5, 0.0, 0.5))


def test_it_travels_and_its_fingerprint_has_the_settings() -> None:
    assert pickle.loads(pickle.dumps(PLAIN)) == PLAIN
    assert PLAIN.fingerprint != ImageEncoder(size=(2, 4)).fingerprint
