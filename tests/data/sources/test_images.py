"""Pictures of every odd kind are handled, or refused with their path."""

import io
import pickle
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from swissarmy.core import errors
from swissarmy.core.errors import MissingExtraError
from swissarmy.data.source import DataError, RecordError, Source
from swissarmy.data.sources.images import ImageFolder, decode_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def two_halves(mode: str = "RGB") -> Image.Image:
    """Red at the left, blue at the right; 4 wide, 2 high."""
    image = Image.new("RGB", (4, 2), RED)
    image.paste(BLUE, (2, 0, 4, 2))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, **options: Any) -> Any:
    return decode_image(data, where="cat.png", **options)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "PPM", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_a_picture_becomes_colours(kind: str, mode: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = two_halves(mode if kind in ("PNG", "BMP", "TIFF", "GIF") else "RGB")
    pixels = decoded(encoded(image, kind, **options))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (2, 4, 3))
    assert (pixels[0, 0].tolist(), pixels[1, 3].tolist()) == (list(RED), list(BLUE))
    pixels[0, 0] = 7  # it is the caller's


def test_grey_and_size_are_as_asked() -> None:
    data = encoded(two_halves())
    assert decoded(data, mode="L").shape == (2, 4)
    assert decoded(data, size=(6, 8)).shape == (6, 8, 3)
    assert decoded(encoded(Image.new("L", (3, 3), 9))).tolist() == [[[9] * 3] * 3] * 3


def test_a_turned_picture_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # it was taken with the camera turned: show it turned by 90 degrees to the right
    pixels = decoded(encoded(two_halves(), "PNG", exif=exif))
    assert pixels.shape == (4, 2, 3)
    assert (pixels[0, 0].tolist(), pixels[3, 0].tolist()) == (list(RED), list(BLUE))


def test_print_colours_become_screen_colours() -> None:
    pixels = decoded(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(pixels.astype(int) - RED).max() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight_over_their_whole_range(kind: str) -> None:
    values = np.array([[0, 128, 32768, 65535]], dtype=np.uint16)
    pixels = decoded(encoded(Image.fromarray(values), kind), mode="L")
    assert pixels.tolist() == [[0, 0, 128, 255]]


def test_of_an_animation_it_is_the_first_frame() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, BLUE)]
    pixels = decoded(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert pixels.tolist() == [[list(RED)] * 2] * 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_what_is_transparent_lies_on_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    data = encoded(image if mode == "RGBA" else image.convert(mode), "PNG" if mode != "PA" else "TIFF")
    assert decoded(data).tolist() == [[[255] * 3, [0] * 3]]


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(10_000, 10_000), (12_000, 12_000), (60_000, 60_000), (1 << 30, 1 << 30)]
)
def test_a_bomb_is_refused_by_its_claimed_size(width: int, height: int) -> None:
    with pytest.raises(RecordError, match=r"^cat\.png: .*(pixels|size|damaged)"):
        decoded(bomb(width, height))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_and_damaged_pictures_are_refused_or_decoded_and_nothing_else(kind: str) -> None:
    rng = random.Random(0)
    noise = Image.frombytes("RGB", (16, 16), rng.randbytes(768))
    whole = encoded(noise, kind)
    with pytest.raises(RecordError, match=r"^cat\.png: "):
        decoded(whole[: len(whole) // 2])
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert decoded(bytes(damaged)).dtype == np.uint8
        except RecordError as error:
            assert str(error).startswith("cat.png: ")  # noqa: PT017


@pytest.mark.parametrize("data", [b"", b"not a picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_is_refused_and_no_program_started(data: bytes) -> None:
    with pytest.raises(RecordError, match=r"cat\.png: no picture of the formats JPEG"):
        decoded(data)


def test_fractions_without_a_range_are_refused() -> None:
    with pytest.raises(RecordError, match="no stated range"):
        decoded(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r'pip install "swissarmy\[data\]"'):
        decoded(encoded(two_halves()))


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for name, colour in (("dogs/b.png", BLUE), ("cats/a.PNG", RED), ("cats/c.jpeg", RED), ("cats/.hidden.png", RED)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), colour).save(root / name)
    (root / "cats" / "notes.txt").write_text("no picture")
    (root / "empty").mkdir()
    return root


def test_folders_are_classes_in_the_order_of_their_names(folder: Path) -> None:
    source = ImageFolder(folder)
    assert isinstance(source, Source)
    assert source.label_names == ("cats", "dogs")
    assert [source.where(index) for index in range(3)] == [
        str(folder / name) for name in ("cats/a.PNG", "cats/c.jpeg", "dogs/b.png")
    ]
    assert [(record["label"], record["label_name"]) for record in source] == [(0, "cats"), (0, "cats"), (1, "dogs")]
    assert source[-1]["image"].tolist() == [[list(BLUE)] * 3] * 2
    assert pickle.loads(pickle.dumps(source))[0]["label"] == 0
    assert ImageFolder(folder, size=5)[0]["image"].shape == (5, 5, 3)


def test_pictures_of_the_folder_itself_have_no_label(folder: Path) -> None:
    assert list(ImageFolder(folder / "cats")[0]) == ["image"]


def test_pictures_beside_folders_of_pictures_are_unclear(folder: Path) -> None:
    Image.new("RGB", (1, 1)).save(folder / "x.png")
    with pytest.raises(DataError, match=r"x\.png.*beside folders of pictures"):
        len(ImageFolder(folder))


def test_a_bad_picture_is_named_by_its_path(folder: Path) -> None:
    (folder / "cats" / "a.PNG").write_bytes(b"")
    source = ImageFolder(folder)
    with pytest.raises(RecordError, match=str(folder / "cats" / "a.PNG")):
        source[0]
    (folder / "dogs" / "b.png").unlink()
    with pytest.raises(RecordError, match=r"b\.png: No such file"):
        source[2]


def test_names_content_and_options_are_in_the_fingerprint(folder: Path) -> None:
    before = {
        ImageFolder(folder).fingerprint,
        ImageFolder(folder, size=4).fingerprint,
        ImageFolder(folder, mode="L").fingerprint,
    }
    Image.new("RGB", (3, 2), (1, 2, 3)).save(folder / "dogs" / "b.png")
    before.add(ImageFolder(folder).fingerprint)
    (folder / "dogs" / "b.png").rename(folder / "dogs" / "z.png")
    before.add(ImageFolder(folder).fingerprint)
    assert len(before) == 5


@pytest.mark.parametrize("options", [{"size": 0}, {"size": (1, 2, 3)}, {"mode": "CMYK"}])
def test_options_that_give_no_picture_are_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=next(iter(options))):
        ImageFolder(folder, **options)
