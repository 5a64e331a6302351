"""`open_source`: a path as a source, by its extension."""

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl

from swissarmy.core.errors import nearest
from swissarmy.data.source import DataError, Source
from swissarmy.data.sources.binary import BinaryDataset
from swissarmy.data.sources.concatenated import Concatenated
from swissarmy.data.sources.hugging_face import HuggingFaceSource
from swissarmy.data.sources.images import ImageFolder, has_pictures
from swissarmy.data.sources.jsonl import JsonArraySource, JsonlSource
from swissarmy.data.sources.stream import Stream
from swissarmy.data.sources.table import CsvSource
from swissarmy.data.sources.text import TextSource
from swissarmy.data.sources.tokens import TokenDocuments, TokenWindows
from swissarmy.data.sources.webdataset import WebDatasetSource

S = TypeVar("S")
HUB = "hf:"
"""Begins the name of a data set on the hub: `hf:owner/name?config=en&split=validation`."""
_COMPRESSED = {".gz": "gunzip -k", ".bz2": "bunzip2 -k", ".xz": "unxz -k", ".zst": "unzstd", ".tgz": "gunzip -k"}


def open_source(path: str | os.PathLike[str], **options: Any) -> Source:
    """The source that a path names; it has at least one record.

    | path | source |
    |---|---|
    | `.jsonl` `.ndjson`, `.json` | `JsonlSource`, or `JsonArraySource` for a file that is one array |
    | `.txt` | `TextSource(unit=)` |
    | `.csv`, `.tsv` | `CsvSource(delimiter=)` |
    | `.parquet`, `.arrow` | `HuggingFaceSource` |
    | `.tokens` | `TokenDocuments`, or `TokenWindows(length=, stride=)` |
    | `.bin` | `BinaryDataset(dtype=, shape=)` |
    | `.tar` | `WebDatasetSource` |
    | a folder, or a pattern such as `data/*.jsonl` | its files as one source, in the order of their names |
    | a folder of pictures, or of a folder for each class | `ImageFolder(size=, mode=)` |
    | a folder that `datasets` saved | `HuggingFaceSource` |
    | `hf:owner/name?config=...&split=...&revision=...` | `HuggingFaceSource` from the hub |

    Args:
        path: the path; a pattern may have `**` for any number of folders.
        options: for the source, as above.

    Raises:
        DataError: there is no such file, nothing matches, the extension or an option is not known, the file cannot be
            read, or there is no record in it.
    """
    name = os.fspath(path)
    source = _from_hub(name, options) if name.startswith(HUB) else _from_path(name, options)
    if not len(source):
        raise DataError(f"{name} is empty: there is no record in it")
    return source


def open_stream(path: str | os.PathLike[str], **options: Any) -> Stream:
    """A data set on the hub (`hf:owner/name?...`) as a stream, without keeping it on the disk.

    Raises:
        DataError: `path` is no such name, or it cannot be read.
    """
    name = os.fspath(path)
    if not name.startswith(HUB):
        raise DataError(f"{name}: only a name on the hub ({HUB}owner/name) is read as a stream")
    return _from_hub(name, options).stream()


def extension_of(path: str | os.PathLike[str]) -> str:
    """The extension of the files that a path names, in small letters; empty for pictures and for what `datasets` reads.

    Raises:
        DataError: a folder cannot be read.
    """
    name = os.fspath(path)
    files = [] if name.startswith(HUB) else _files(name)
    return files[0].suffix.lower() if files else ""


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuse a path that names nothing, without opening what it names; of a name on the hub nothing is known yet.

    Raises:
        DataError: there is no such file or folder, or no file matches.
    """
    name = os.fspath(path)
    if name.startswith(HUB) or _files(name) or Path(name).is_dir():
        return
    if glob.has_magic(name):
        raise DataError(f"{name}: no file matches this pattern")
    plain = Path(name)
    hint = nearest(plain.name, os.listdir(plain.parent) if plain.parent.is_dir() else ())
    hint += "" if plain.suffix or plain.is_absolute() else f" A data set on the hub is written {HUB}{name}."
    raise DataError(f"{name}: there is no such file or folder.{hint}")


def _from_hub(name: str, options: dict[str, Any]) -> HuggingFaceSource:
    repository, _, query = name.removeprefix(HUB).partition("?")
    if not repository:
        raise DataError(f"{name}: a name on the hub is missing, as in {HUB}owner/name?split=train")
    return _make(HuggingFaceSource, repository, {**dict(parse_qsl(query)), **options})


def _from_path(name: str, options: dict[str, Any]) -> Source:
    check_path(name)
    files = _files(name)
    return _from_files(files, options) if files else _from_folder(Path(name), options)


def _files(name: str) -> list[Path]:
    """The file that a path is, or those in a folder or of a pattern, by their names; none of what is not ours to open.

    Raises:
        DataError: a folder cannot be read.
    """
    path = Path(name)
    if path.is_dir():
        try:
            found = () if _is_saved(path) else tuple(path.iterdir())
        except OSError as error:
            raise DataError(f"{name}: {error.strerror or error}") from error
        return sorted(each for each in found if each.suffix.lower() in _KINDS and not each.name.startswith("."))
    if path.exists():
        return [path]
    matches = glob.glob(name, recursive=True) if glob.has_magic(name) else ()
    return sorted(Path(match) for match in matches if os.path.isfile(match))


def _is_saved(folder: Path) -> bool:
    """Whether a folder is a data set that `datasets` saved."""
    return (folder / "dataset_info.json").exists() and (folder / "state.json").exists()


def _from_folder(folder: Path, options: dict[str, Any]) -> Source:
    if _is_saved(folder):
        return _make(HuggingFaceSource, str(folder), options)
    if has_pictures(folder):
        return _make(ImageFolder, folder, options)
    raise DataError(f"{folder} holds no file that is data: the extensions are {', '.join(_KINDS)}, and pictures")


def _from_files(files: Sequence[Path], options: dict[str, Any]) -> Source:
    """Several files of one kind as one source.

    Raises:
        DataError: they are of different kinds.
    """
    if len(files) == 1:
        return _from_file(files[0], options)
    kinds = {file.suffix.lower(): file.name for file in reversed(files)}
    if len(kinds) > 1:
        (_, one), (_, other), *_ = sorted(kinds.items())
        raise DataError(
            f"{files[0].parent}: {one} and {other} are of different kinds: give a pattern that matches one kind, such "
            f"as {files[0].parent / ('*' + files[0].suffix)}"
        )
    return Concatenated([_from_file(file, options) for file in files])


def _from_file(path: Path, options: dict[str, Any]) -> Source:
    extension = path.suffix.lower()
    if extension in _COMPRESSED:
        raise DataError(
            f"{path}: compressed files cannot be read at any place: unpack it first ({_COMPRESSED[extension]} {path})"
        )
    if extension not in _KINDS:
        raise DataError(
            f"{path}: there is no source for the extension {extension!r}.{nearest(extension, _KINDS)} Known are "
            f"{', '.join(_KINDS)}"
        )
    return _KINDS[extension](path, options)


def _make(make: Callable[..., S], place: Path | str, options: dict[str, Any], **fixed: Any) -> S:
    """A source from its class, with options that are checked against its fields."""
    known = {field.name: field for field in fields(cast(Any, make))[1:] if field.name not in fixed}
    for name in options:
        if name not in known:
            has = f"; it has {', '.join(known)}" if known else ""
            raise DataError(f"{place}: {make.__name__} has no option {name!r}.{nearest(name, known)}{has}")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in options]
    if missing:
        raise DataError(f"{place}: {make.__name__} needs {' and '.join(missing)}")
    return make(place, **options, **fixed)


def _json(path: Path, options: dict[str, Any]) -> Source:
    with path.open("rb") as file:
        begins = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return _make(JsonArraySource if begins == b"[" else JsonlSource, path, options)


def _table(delimiter: str, path: Path, options: dict[str, Any]) -> Source:
    return _make(CsvSource, path, {"delimiter": delimiter, **options})


def _columns(kind: str, path: Path, options: dict[str, Any]) -> Source:
    return _make(HuggingFaceSource, kind, options, files=(path,))


def _tokens(path: Path, options: dict[str, Any]) -> Source:
    return _make(TokenWindows if options else TokenDocuments, path, options)


def _plain(make: Callable[..., Source], path: Path, options: dict[str, Any]) -> Source:
    return _make(make, path, options)


_KINDS: dict[str, Callable[[Path, dict[str, Any]], Source]] = {
    ".jsonl": partial(_plain, JsonlSource),
    ".ndjson": partial(_plain, JsonlSource),
    ".json": _json,
    ".txt": partial(_plain, TextSource),
    ".csv": partial(_table, ","),
    ".tsv": partial(_table, "\t"),
    ".parquet": partial(_columns, "parquet"),
    ".arrow": partial(_columns, "arrow"),
    ".tokens": _tokens,
    ".bin": partial(_plain, BinaryDataset),
    ".tar": partial(_plain, WebDatasetSource),
}
"""How a file of each extension is opened."""
EXTENSIONS = tuple(_KINDS)
"""Those that `open_source` knows."""
