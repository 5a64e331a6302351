"""Several sources as one."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from swissarmy.data.source import Source
from swissarmy.data.sources import concatenated
from swissarmy.data.sources.concatenated import Concatenated
from swissarmy.data.sources.text import TextSource


def shards(folder: Path, sizes: list[int]) -> Concatenated:
    for part, size in enumerate(sizes):
        (folder / f"{part:03d}.txt").write_text("".join(f"{part}.{line}\n" for line in range(size)))
    return Concatenated([TextSource(folder / f"{part:03d}.txt") for part in range(len(sizes))])


def test_records_follow_one_another(tmp_path: Path) -> None:
    source = shards(tmp_path, [2, 0, 3, 0])
    assert isinstance(source, Source)
    assert [record["text"] for record in source] == ["0.0", "0.1", "2.0", "2.1", "2.2"]
    assert source.where(3) == f"{tmp_path / '002.txt'}:2"
    assert source[-1]["text"] == "2.2"
    assert pickle.loads(pickle.dumps(source))[4]["text"] == "2.2"
    with pytest.raises(IndexError):
        source[5]
    assert len(Concatenated([])) == 0


def test_only_so_many_parts_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concatenated, "_MOST_OPEN", 3)
    source = shards(tmp_path, [2] * 10)
    assert len(source) == 20
    opened: set[Any] = set()
    for index in [*range(20), 0, 19, 1, 0]:
        part, line = divmod(index, 2)
        assert source[index]["text"] == f"{part}.{line}"
        opened = {place for place, part in source._opened.items() if "_file" in vars(part)}
        assert len(opened) <= 3
    assert opened == {0, 8, 9}
    assert not any("_file" in vars(part) or "_index" in vars(part) for part in source.parts)


def test_the_fingerprint_is_of_the_parts_in_their_order(tmp_path: Path) -> None:
    source = shards(tmp_path, [2, 3])
    assert source.fingerprint == shards(tmp_path, [2, 3]).fingerprint
    assert source.fingerprint != Concatenated(source.parts[::-1]).fingerprint
