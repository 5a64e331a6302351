"""`ImageEncoder`: a picture and its class as what a vision model reads.

Shapes: H x W the picture's size, h x w the model's, c channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from swissarmy.core.config import report
from swissarmy.data.samples.encoders import label_of
from swissarmy.data.samples.examples import Cut, Sample
from swissarmy.data.source import RecordError, digest, field_of


@final
@dataclass(frozen=True, kw_only=True)
class ImageEncoder:
    """`{"image": array, "label": ...}`: scaled to the model's size, and normalised channel by channel.

    Pictures are `[H, W]` or `[H, W, c]`: uint8 or uint16 over their whole range, or floats from 0 to 1. One of a single
    channel is repeated for each of the model's.
    """

    size: tuple[int, int]
    """Height and width that the model wants, in pixels."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Taken off each channel, whose values are 0 to 1."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """What each channel is then divided by."""
    crop: bool = False
    """Keep the proportions and cut what sticks out at both sides, instead of stretching."""
    image_field: str = "image"
    """Where the picture is."""
    label_field: str | None = "label"
    """Where the class is, its name or its number; `None` for pictures without one."""
    label_names: Sequence[str] = ()
    """The classes in order; without them labels must be numbers."""

    def __post_init__(self) -> None:
        """Refuse sizes and scales that give no picture."""
        problems = []
        if len(self.size) != 2 or min(self.size) < 1:
            problems.append(f"size={self.size} is a height and a width, each at least 1")
        if len(self.mean) != len(self.std) or not self.mean:
            problems.append(f"mean has {len(self.mean)} channels and std {len(self.std)}")
        if any(scale <= 0 for scale in self.std):
            problems.append(f"std={self.std} must be above 0")
        report("ImageEncoder:", problems)

    @property
    def fingerprint(self) -> str:
        """Of the settings."""
        return digest("ImageEncoder", {each.name: getattr(self, each.name) for each in fields(self)})

    def __call__(self, record: Mapping[str, Any], *, where: str, cut: Cut | None = None) -> Sample:
        """`pixel_values` `[c, h, w]` float32, and `labels` `[]`."""
        pixels = self._scaled(self._pixels(field_of(record, self.image_field, where), where))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        sample: Sample = {"pixel_values": ((pixels - mean) / std).numpy()}
        if self.label_field is not None:
            sample["labels"] = label_of(record, self.label_field, self.label_names, where)
        return sample

    def _pixels(self, image: Any, where: str) -> torch.Tensor:
        """`[c, H, W]`, 0 to 1."""
        array = np.asarray(image)
        array = array[:, :, None] if array.ndim == 2 else array
        if array.ndim != 3 or array.size == 0 or array.shape[2] not in (1, len(self.mean)):
            raise RecordError(
                f"{where}: {self.image_field} has shape {np.shape(image)}; it is [H, W] or [H, W, {len(self.mean)}]"
            )
        channels = torch.from_numpy(
            np.ascontiguousarray(_unit_range(array, self.image_field, where).transpose(2, 0, 1))
        )
        return channels.expand(len(self.mean), -1, -1)

    def _scaled(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[c, H, W]` to `[c, h, w]`, smoothed when it shrinks."""
        height, width = pixels.shape[1:]
        target = self.size
        if self.crop:
            factor = max(self.size[0] / height, self.size[1] / width)
            target = (max(self.size[0], round(height * factor)), max(self.size[1], round(width * factor)))
        if (height, width) != target:
            resized = F.interpolate(pixels[None], target, mode="bilinear", antialias=True, align_corners=False)
            pixels = resized[0]
        top, left = (target[0] - self.size[0]) // 2, (target[1] - self.size[1]) // 2
        return pixels[:, top : top + self.size[0], left : left + self.size[1]]


def _unit_range(array: NDArray[Any], name: str, where: str) -> NDArray[np.float32]:
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    if array.dtype.kind == "f" and np.isfinite(array).all():
        return array.astype(np.float32)
    raise RecordError(f"{where}: {name} holds {array.dtype}; it is uint8, uint16, or finite floats from 0 to 1")
