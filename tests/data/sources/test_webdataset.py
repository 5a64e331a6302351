"""Tar shards: read at any place, and nothing in them is believed, unpacked or executed."""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources import record_index
from swissarmy.data.sources.webdataset import WebDatasetSource


def array(values: object, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values), **options)
    return file.getvalue()


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (255, 0, 0)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: Mapping[str, bytes], *, kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


LONG = "x" * 150
SAMPLES = {
    "dir/0001.json": b'{"a": 1}',
    "dir/0001.seg.png": picture(),
    "dir/0001.txt": "naïve".encode(),
    "dir/0002.cls": b"7\n",
    "dir/0002.npy": array([[1.5, 2.0]]),
    f"dir/{LONG}.data": b"\x00\xff",
    f"dir/{LONG}.npy": array(np.asfortranarray(np.arange(6).reshape(2, 3))),
}


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_with_one_key_are_a_record(tmp_path: Path, kind: int) -> None:
    source = WebDatasetSource(shard(tmp_path / "a.tar", SAMPLES, kind=kind))
    first, second, third = source
    assert (first["__key__"], first["json"], first["txt"]) == ("dir/0001", {"a": 1}, "naïve")
    assert first["seg.png"].tolist() == [[[255, 0, 0]] * 3] * 2
    assert (second["cls"], second["npy"].tolist()) == (7, [[1.5, 2.0]])
    assert (third["data"], third["npy"].tolist()) == (b"\x00\xff", [[0, 1, 2], [3, 4, 5]])
    assert [source.where(index) for index in range(3)] == [
        f"{tmp_path}/a.tar:dir/{key}" for key in ("0001", "0002", LONG)
    ]
    assert pickle.loads(pickle.dumps(source))[1]["cls"] == 7


def test_a_record_is_read_without_the_others(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {f"{n:05d}.cls": str(n).encode() for n in range(300)})
    with patch.object(record_index, "_WORTH_KEEPING", 0):
        assert len(WebDatasetSource(path)) == 300
        source = WebDatasetSource(path)  # from the kept index
        assert [source[index]["cls"] for index in (299, 0, 150)] == [299, 0, 150]


def test_folders_in_an_archive_are_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        folder = tarfile.TarInfo("dir")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("dir/1.cls")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"3"))
    assert list(WebDatasetSource(tmp_path / "a.tar")) == [{"__key__": "dir/1", "cls": 3}]


@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "a/../../out.txt"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    path = shard(tmp_path / "a.tar", {"1.cls": b"1", name: b"x"})
    with pytest.raises(DataError, match=r"a name in a shard is relative"):
        len(WebDatasetSource(path))
    assert os.listdir(tmp_path) == ["a.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("1.txt")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"'1\.txt' is a link, a device"):
        len(WebDatasetSource(tmp_path / "a.tar"))


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("field", ["pkl", "pyd", "pickle", "pth", "npy"])
def test_nothing_is_unpickled(tmp_path: Path, field: str) -> None:
    canary = Canary(tmp_path / "executed")
    data = array([canary], allow_pickle=True) if field == "npy" else pickle.dumps(canary)
    source = WebDatasetSource(shard(tmp_path / "a.tar", {f"1.{field}": data, "2.cls": b"2"}))
    with pytest.raises(RecordError, match=rf"a\.tar:1\.{field}: .*pickle"):
        source[0]
    assert source[1]["cls"] == 2
    assert not canary.path.exists()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("1.json", b"{"),
        ("1.json", b"\xff"),
        ("1.cls", b"one"),
        ("1.txt", b"\xff"),
        ("1.npy", b"no array"),
        ("1.npy", array(np.zeros(4))[:-3]),
        ("1.npy", array(np.zeros(4)).replace(b"(4,)", b"(1073741824,)")),
        ("1.npy", array(np.zeros(4)).replace(b"(4,)", b"(-4,)")),
        ("1.jpg", b"no picture"),
    ],
)
def test_a_damaged_member_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    source = WebDatasetSource(shard(tmp_path / "a.tar", {name: data}))
    with pytest.raises(RecordError, match=rf"a\.tar:{name}: "):
        source[0]


def test_two_members_of_one_name_are_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for _ in range(2):
            info = tarfile.TarInfo("1.cls")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"1"))
    with pytest.raises(RecordError, match="two of this name"):
        WebDatasetSource(tmp_path / "a.tar")[0]


@pytest.mark.parametrize("cut", [100, 600, 1100, 1536, 2000, 3072])
def test_a_shard_that_was_not_copied_completely_is_an_error(tmp_path: Path, cut: int) -> None:
    whole = shard(tmp_path / "a.tar", {"1.txt": b"x" * 700, "2.txt": b"y" * 700}).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"a\.tar.*(damaged|ends within|no mark)"):
        len(WebDatasetSource(tmp_path / "a.tar"))


def test_headers_that_go_on_and_on_are_an_error(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    (tmp_path / "a.tar").write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 5000)
    with pytest.raises(DataError, match=r"a\.tar: not a tar file, or damaged"):
        len(WebDatasetSource(tmp_path / "a.tar"))


def test_rubbish_is_no_shard_and_an_empty_one_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tar" * 500)
    with pytest.raises(DataError, match="not a tar file"):
        len(WebDatasetSource(tmp_path / "a.tar"))
    assert len(WebDatasetSource(shard(tmp_path / "b.tar", {}))) == 0


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_changed_bytes_in_headers_never_do_worse_than_an_error(tmp_path: Path, kind: int) -> None:
    members = {"1.json": json.dumps({"a": 1}).encode(), f"{LONG}.cls": b"2"}
    whole = shard(tmp_path / "a.tar", members, kind=kind).read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 3072, 200).tolist():
        damaged = bytearray(whole)
        damaged[place] = int(rng.integers(256))
        header = place // 512 * 512  # its checksum is made to fit again, so that it is believed
        damaged[header + 148 : header + 156] = b" " * 8
        checksum = sum(damaged[header : header + 512])
        damaged[header + 148 : header + 156] = f"{checksum:06o}".encode() + b"\0 "
        (tmp_path / "a.tar").write_bytes(damaged)
        try:
            list(WebDatasetSource(tmp_path / "a.tar"))
        except DataError as error:
            assert "a.tar" in str(error)  # noqa: PT017
    assert os.listdir(tmp_path) == ["a.tar"]
