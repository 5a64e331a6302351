"""Pictures: how one is decoded, and folders of them, a folder for each class."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np
import numpy.typing as npt

from swissarmy.core.errors import require_extra
from swissarmy.data.source import DataError, RecordError, check_index, digest, file_fingerprint

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
Mode = Literal["RGB", "L"]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Those that Pillow decodes by itself: of some others it starts programs."""
MAX_PIXELS = 1 << 27
"""A picture that claims more is refused before it is decoded: 134 million, 400 MB as RGB."""
_SAMPLED = 64

_FAILURES = (OSError, ArithmeticError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError)
_DECODING_FAILURES = (*_FAILURES, EOFError, Warning, struct.error, zlib.error)
"""What Pillow's decoders raise for damaged files, also where warnings are errors."""


def decode_image(data: bytes, *, where: str, mode: Mode = "RGB", size: tuple[int, int] | None = None) -> Pixels:
    """A picture as `[height, width, 3]`, or `[height, width]` for `mode="L"`; uint8.

    It stands as its EXIF orientation says. Of an animation it is the first frame; 16 bits are brought to 8; CMYK and
    palettes become colours; transparent parts lie on white.

    Args:
        data: the file's bytes.
        where: begins errors.
        mode: colours or grey.
        size: height and width to scale to, in pixels.

    Raises:
        RecordError: it is truncated, damaged, of another format, or has more than `MAX_PIXELS`.
        MissingExtraError: Pillow is not installed.
    """
    image_module = require_extra("PIL.Image", extra="data", purpose="reading pictures")
    try:
        with image_module.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise RecordError(f"{where}: {width} x {height} pixels, more than {MAX_PIXELS:,}: refused undecoded")
            return _pixels(image, mode, size)
    except RecordError:
        raise
    except image_module.UnidentifiedImageError as error:
        raise RecordError(f"{where}: no picture of the formats {', '.join(FORMATS)}") from error
    except image_module.DecompressionBombError as error:
        raise RecordError(f"{where}: {error}") from error
    except _DECODING_FAILURES as error:
        raise RecordError(f"{where}: the picture is damaged: {error}") from error


def _pixels(image: "Image", mode: Mode, size: tuple[int, int] | None) -> Pixels:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        upright = Image.fromarray(_eight_bits(np.asarray(upright)))
    elif upright.mode == "F":
        raise ValueError("it holds fractions, which have no stated range")
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    upright = upright.convert(mode)
    if size is not None:
        upright = upright.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.array(upright, dtype=np.uint8)


def _eight_bits(values: npt.NDArray[Any]) -> Pixels:
    """Values of 16 bits, which Pillow may hold in 32."""
    if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
        raise ValueError("its values are outside the range of 16 bits")
    return ((values.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)


@final
@dataclass(frozen=True)
class ImageFolder:
    """`{"image": pixels, "label": number, "label_name": folder}` for each picture of a folder, as in `decode_image`.

    `cats/1.jpg` is of the class `cats`; classes are numbered in the order of their names. Pictures that lie in the
    folder itself have no label. Hidden files and files that are no pictures by their extension are passed over.

    Args:
        path: the folder.
        size: height and width to scale to, in pixels; a number for both. As stored when omitted.
        mode: colours, or grey (`L`).
    """

    path: Path
    size: int | tuple[int, int] | None = None
    mode: Mode = "RGB"

    def __post_init__(self) -> None:
        """Refuse sizes and modes that give no picture."""
        if self._size is not None and (len(self._size) != 2 or min(self._size) < 1):
            raise DataError(f"{self.path}: size={self.size} is a height and a width, each at least 1")
        if self.mode not in ("RGB", "L"):
            raise DataError(f"{self.path}: mode={self.mode!r} is neither 'RGB' nor 'L'")

    def __getstate__(self) -> dict[str, Any]:
        """The arguments alone; whoever unpickles lists the folder again."""
        return {"path": self.path, "size": self.size, "mode": self.mode}

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One picture, and its class if it has one.

        Raises:
            RecordError: it cannot be read.
        """
        where = self.where(index)
        try:
            data = Path(where).read_bytes()
        except OSError as error:
            raise RecordError(f"{where}: {error.strerror or error}") from error
        image = decode_image(data, where=where, mode=self.mode, size=self._size)
        folder = os.path.dirname(self._names[index])
        if not self.label_names:
            return {"image": image}
        return {"image": image, "label": self.label_names.index(folder), "label_name": folder}

    def where(self, index: int) -> str:
        """The picture's path."""
        return str(self.path / self._names[check_index(index, len(self))])

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """The classes, in the order of their numbers; none if the pictures lie in the folder itself."""
        return tuple(name for name in sorted({os.path.dirname(name) for name in self._names}) if name)

    @cached_property
    def fingerprint(self) -> str:
        """Of the names, of some of the files, and of the options."""
        step = max(1, len(self) // _SAMPLED)
        content = [file_fingerprint(self.path / name) for name in self._names[::step]]
        return digest("ImageFolder", self._names, content, self._size, self.mode)

    @property
    def _size(self) -> tuple[int, int] | None:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @cached_property
    def _names(self) -> tuple[str, ...]:
        try:
            own = sorted(_pictures(self.path))
            folders = sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir())
            classes = [f"{folder}/{name}" for folder in folders for name in sorted(_pictures(self.path / folder))]
        except OSError as error:
            raise DataError(f"{error.filename or self.path}: {error.strerror or error}") from error
        if own and classes:
            raise DataError(
                f"{self.path} holds pictures ({own[0]}) beside folders of pictures ({classes[0]}): are the folders "
                "classes, then move the pictures into them"
            )
        return tuple(own or classes)


def has_pictures(folder: Path) -> bool:
    """Whether there is a picture in a folder or in a folder of it."""
    folders = [folder, *(Path(entry) for entry in os.scandir(folder) if entry.is_dir())]
    return any(next(_pictures(each), None) is not None for each in folders)


def _pictures(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield entry.name
