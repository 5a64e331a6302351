"""What `datasets` reads, from local files."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from swissarmy.core import errors
from swissarmy.core.errors import MissingExtraError
from swissarmy.data.source import DataError, Source
from swissarmy.data.sources.hugging_face import HuggingFaceSource

TABLE = pa.table({"text": ["one", "two", "three"], "n": [1, 2, 3]})
ROWS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}, {"text": "three", "n": 3}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, table: pa.Table = TABLE) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    make = pa.ipc.new_file if path.stem.startswith("file") else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_files_of_columns_are_read_by_row(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    source = HuggingFaceSource(path.suffix[1:], (path,))
    assert isinstance(source, Source)
    assert list(source) == ROWS
    assert (source[-1], source.where(-1)) == (ROWS[2], f"{path}, row 2")
    assert len(pickle.dumps(source)) < 500
    assert pickle.loads(pickle.dumps(source))[1] == ROWS[1]


def test_the_fingerprint_is_of_the_files(tmp_path: Path) -> None:
    one, same = write(tmp_path / "a.parquet"), write(tmp_path / "b.parquet")
    other = write(tmp_path / "c.parquet", TABLE.slice(1))
    prints = [HuggingFaceSource("parquet", (path,)).fingerprint for path in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_a_saved_dataset_is_read_from_its_folder(tmp_path: Path) -> None:
    datasets.Dataset(TABLE).save_to_disk(tmp_path / "saved")
    source = HuggingFaceSource(str(tmp_path / "saved"))
    assert list(source) == ROWS
    assert source.fingerprint == HuggingFaceSource(str(tmp_path / "saved")).fingerprint


def test_a_stream_resumes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    first, again = (HuggingFaceSource("parquet", (path,)).stream() for _ in range(2))
    records = iter(first)
    assert next(records) == ROWS[0]
    again.load_state_dict(first.state_dict())
    assert list(again) == ROWS[1:]
    assert list(again) == ROWS


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_what_it_cannot_read_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(DataError, match=f"{name}: `datasets` cannot read it"):
        len(HuggingFaceSource(path.suffix[1:], (path,)))
    path.write_bytes(b"rubbish")
    with pytest.raises(DataError, match=f"{name}: `datasets` cannot read it"):
        len(HuggingFaceSource(path.suffix[1:], (path,)))


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r'pip install "swissarmy\[data\]"'):
        len(HuggingFaceSource("parquet", (tmp_path / "a.parquet",)))
