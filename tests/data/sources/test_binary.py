"""Records of fixed length."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swissarmy.data.source import DataError
from swissarmy.data.sources.binary import BinaryDataset


@pytest.mark.parametrize(("dtype", "shape"), [("uint16", 6), ("<f4", (2, 3)), (">i4", (3, 1)), ("uint8", ())])
def test_records_are_read_as_they_were_written(tmp_path: Path, dtype: str, shape: Any) -> None:
    path = tmp_path / "a.bin"
    full = (shape,) if isinstance(shape, int) else shape
    values = np.arange(5 * np.prod(full, dtype=int)).reshape(5, *full).astype(dtype)
    path.write_bytes(values.tobytes())
    source = pickle.loads(pickle.dumps(BinaryDataset(path, dtype, shape, field="x")))
    assert len(source) == 5
    for index in range(5):
        record = source[index]["x"]
        assert record.dtype == np.dtype(dtype).newbyteorder("=")
        assert record.shape == full
        assert (record == values[index]).all()
    assert source.where(4) == f"{path}, record 4"


def test_a_record_is_a_copy_that_may_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(8))
    source = BinaryDataset(path, "uint8", 4)
    source[0]["data"][:] = 1
    assert source[0]["data"].sum() == 0


def test_a_size_that_is_no_multiple_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(21))
    with pytest.raises(DataError, match=r"a\.bin has 21 bytes, which is no multiple of 8.*5 bytes are left over"):
        len(BinaryDataset(path, "uint16", 4))
    path.write_bytes(b"")
    assert len(BinaryDataset(path, "uint16", 4)) == 0


@pytest.mark.parametrize(
    ("dtype", "shape", "words"),
    [("uint17", 1, "dtype='uint17'"), ("O", 1, "dtype='O'"), ("uint8", 0, "shape=0"), ("uint8", (2, -1), "shape=")],
)
def test_types_and_shapes_that_are_none_are_refused(tmp_path: Path, dtype: str, shape: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        BinaryDataset(tmp_path / "a.bin", dtype, shape)


def test_the_settings_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(16))
    made = {BinaryDataset(path, dtype, shape).fingerprint for dtype in ("uint16", "int16") for shape in (2, 4)}
    assert len(made) == 4
