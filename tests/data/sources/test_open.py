"""A path picks its source."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from swissarmy.data.source import DataError
from swissarmy.data.sources.binary import BinaryDataset
from swissarmy.data.sources.concatenated import Concatenated
from swissarmy.data.sources.hugging_face import HuggingFaceSource
from swissarmy.data.sources.images import ImageFolder
from swissarmy.data.sources.jsonl import JsonArraySource, JsonlSource
from swissarmy.data.sources.open import EXTENSIONS, open_source, open_stream
from swissarmy.data.sources.table import CsvSource
from swissarmy.data.sources.text import TextSource
from swissarmy.data.sources.token_file import write_token_file
from swissarmy.data.sources.tokens import TokenDocuments, TokenWindows
from swissarmy.data.sources.webdataset import WebDatasetSource
from tests.data.sources.test_webdataset import shard


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of each kind."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"n": 1}\n')
    (folder / "a.ndjson").write_text('{"n": 1}\n')
    (folder / "lines.json").write_text('\n {"n": 1}\n')
    (folder / "array.json").write_text('\ufeff [{"n": 1}]')
    (folder / "a.TXT").write_text("one\n\ntwo\n")
    (folder / "a.csv").write_text("n,m\n1,2\n")
    (folder / "a.tsv").write_text("n\tm\n1\t2\n")
    (folder / "a.bin").write_bytes(bytes(8))
    shard(folder / "a.tar", {"1.cls": b"1"})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"n": [1]}).to_parquet(folder / "a.parquet")
    datasets.Dataset.from_dict({"n": [1]}).save_to_disk(folder / "saved")
    datasets.enable_progress_bars()
    shutil.copy(folder / "saved" / "data-00000-of-00001.arrow", folder / "a.arrow")
    with write_token_file(folder / "a.tokens", vocab_size=10, made_of="test") as writer:
        writer.add(np.arange(6), where="0")
    (folder / "pets" / "cats").mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(folder / "pets" / "cats" / "1.png")
    return folder


@pytest.mark.parametrize(
    ("name", "options", "kind", "first"),
    [
        ("a.jsonl", {}, JsonlSource, {"n": 1}),
        ("a.ndjson", {}, JsonlSource, {"n": 1}),
        ("lines.json", {}, JsonlSource, {"n": 1}),
        ("array.json", {}, JsonArraySource, {"n": 1}),
        ("a.TXT", {}, TextSource, {"text": "one"}),
        ("a.TXT", {"unit": "file"}, TextSource, {"text": "one\n\ntwo\n"}),
        ("a.csv", {}, CsvSource, {"n": "1", "m": "2"}),
        ("a.tsv", {}, CsvSource, {"n": "1", "m": "2"}),
        ("a.parquet", {}, HuggingFaceSource, {"n": 1}),
        ("a.arrow", {}, HuggingFaceSource, {"n": 1}),
        ("saved", {}, HuggingFaceSource, {"n": 1}),
        ("a.bin", {"dtype": "uint8", "shape": 4}, BinaryDataset, {"data": [0, 0, 0, 0]}),
        ("a.tar", {}, WebDatasetSource, {"__key__": "1", "cls": 1}),
        ("a.tokens", {}, TokenDocuments, {"input_ids": [0, 1, 2, 3, 4, 5]}),
        ("a.tokens", {"length": 2}, TokenWindows, {"input_ids": [0, 1]}),
        ("pets", {"size": 1, "mode": "L"}, ImageFolder, {"image": [[0]], "label": 0, "label_name": "cats"}),
    ],
)
def test_the_extension_says_which(data: Path, name: str, options: dict[str, Any], kind: type, first: Any) -> None:
    for path in (data / name, str(data / name)):
        source = open_source(path, **options)
        assert type(source) is kind
        plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in source[0].items()}
        assert plain == first


def test_a_pattern_or_a_folder_is_all_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "README.md", "a.jsonl.sat-index", ".d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"name": name}) + "\n")
    for path, want in (
        (tmp_path, ["a.jsonl", "b.jsonl"]),
        (tmp_path / "*.jsonl", ["a.jsonl", "b.jsonl"]),
        (tmp_path / "**" / "*.jsonl", ["a.jsonl", "b.jsonl", "sub/c.jsonl"]),
        (tmp_path / "[b]*.jsonl", ["b.jsonl"]),
    ):
        source = open_source(path)
        assert [record["name"] for record in source] == want
        assert isinstance(source, Concatenated) == (len(want) > 1)


def test_a_name_that_looks_like_a_pattern_is_a_name_first(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text("{}")
    assert len(open_source(tmp_path / "a[1].jsonl")) == 1


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("b.jsonl", {}, r"b\.jsonl: there is no such file or folder\. Did you mean 'a\.jsonl'\?"),
        ("*.jsonll", {}, r"no file matches this pattern"),
        ("a.jsnl", {}, r"no source for the extension '\.jsnl'\. Did you mean '\.jsonl'\? Known are \.jsonl"),
        ("a.jsonl.gz", {}, r"unpack it first \(gunzip -k .*a\.jsonl\.gz\)"),
        ("zero.jsonl", {}, r"zero\.jsonl is empty: there is no record in it"),
        ("blank.jsonl", {}, r"blank\.jsonl is empty"),
        ("header.csv", {}, r"header\.csv is empty"),
        ("zero.csv", {}, r"zero\.csv is empty"),
        ("z*.jsonl", {}, r"z\*\.jsonl is empty"),
        ("folder", {}, r"folder holds no file that is data"),
        ("a.TXT", {"units": "line"}, r"TextSource has no option 'units'\. Did you mean 'unit'\?; it has unit"),
        ("a.jsonl", {"unit": "line"}, r"JsonlSource has no option 'unit'"),
        ("a.bin", {}, r"BinaryDataset needs dtype and shape"),
        (".", {}, r"are of different kinds: give a pattern"),
        ("\0", {}, r"there is no such file"),
    ],
)
def test_what_cannot_be_opened_is_an_error_at_the_start(
    data: Path, name: str, options: dict[str, Any], words: str
) -> None:
    (data / "a.jsnl").write_text("{}")
    (data / "a.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    (data / "zero.jsonl").touch()
    (data / "zero.csv").touch()
    (data / "blank.jsonl").write_text("\n \n")
    (data / "header.csv").write_text("a,b\n")
    (data / "folder").mkdir()
    with pytest.raises(DataError, match=words):
        open_source(f"{data}/{name}", **options)


def test_a_name_on_the_hub_has_its_options_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, config: str | None, **options: Any) -> datasets.Dataset:
        asked.append((name, config, options["split"], options["revision"], options["streaming"]))
        return datasets.Dataset.from_dict({"n": [1]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("hf:owner/name?config=en&split=test", revision="v1")
    assert (list(source), source.where(0)) == ([{"n": 1}], "owner/name, row 0")
    open_stream("hf:owner/name")
    assert asked == [("owner/name", "en", "test", "v1", False), ("owner/name", None, "train", None, True)]


def test_a_name_that_could_be_on_the_hub_is_never_looked_for_there() -> None:
    with pytest.raises(DataError, match=r"owner/name: there is no such file or folder\. .* is written hf:owner/name"):
        open_source("owner/name")


@pytest.mark.parametrize(("path", "words"), [("hf:", "is missing"), ("hf:a/b?splitt=x", "Did you mean 'split'")])
def test_a_bad_name_on_the_hub_is_refused(path: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_source(path)
    with pytest.raises(DataError, match="only a name on the hub"):
        open_stream("a.jsonl")


def test_every_extension_is_in_the_table() -> None:
    assert all(f"`{extension}`" in (open_source.__doc__ or "") for extension in EXTENSIONS)
