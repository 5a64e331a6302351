"""Writing checkpoints so that a folder is either absent or complete.

A folder is filled under a temporary name beside its target, hashed, flushed to disk and renamed. A process that is
killed leaves at most that temporary, `.<name>.tmp-<pid>-<random>`, which nothing reads and `leftovers` lists.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.json_object import parse_json_object
from swissarmy.interop.tensor_source import TensorFile, explained

MANIFEST = "manifest.json"
_TEMPORARY = re.compile(r"\.([^/]+)\.tmp-\d+-[0-9a-f]+")
OUT_OF_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


@contextmanager
def write_folder(target: str | os.PathLike[str], *, overwrite: bool = False, manifest: bool = True) -> Iterator[Path]:
    """Gives an empty temporary folder to fill; when the block ends without an error it becomes `target`, atomically.

    Every file is flushed to disk first and, with `manifest`, listed in `manifest.json` with its size and sha256.
    `overwrite` replaces a folder that an earlier `write_folder` made and that holds nothing besides; a process killed
    between the two renames leaves the old one as `.<name>.old-<pid>-<random>`.

    Raises:
        CheckpointError: `target` is a file or a folder that is not empty, cannot be written, or the disk is full;
            `target` is untouched and the temporary is removed.
    """
    if "\0" in os.fspath(target):
        raise CheckpointError(f"{os.fspath(target)!r} is not a path: it contains a NUL")
    final_path = Path(os.path.realpath(target))
    check_target(final_path, overwrite=overwrite)
    temporary = sibling(final_path, "tmp")
    try:
        with write_errors(final_path):
            temporary.mkdir(parents=True)
        with write_errors(final_path, only=OUT_OF_SPACE):
            yield temporary
        with write_errors(final_path):
            _flush(temporary, manifest=manifest)
            _move(temporary, final_path, overwrite=overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def leftovers(target: str | os.PathLike[str]) -> tuple[Path, ...]:
    """What killed saves of `target` left beside it: `.<name>.tmp-*` (incomplete), `.<name>.old-*` (replaced)."""
    path = Path(os.path.realpath(target))
    return leftovers_in(path.parent, re.escape(path.name))


def leftovers_in(folder: Path, name_pattern: str) -> tuple[Path, ...]:
    """What killed saves left in `folder`, of all targets whose names the regular expression matches."""
    pattern = re.compile(rf"\.({name_pattern})\.(tmp|old)-\d+-[0-9a-f]+")
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry for entry in folder.iterdir() if pattern.fullmatch(entry.name)))


def verify_manifest(folder: str | os.PathLike[str], *, share: tuple[int, int] = (0, 1)) -> tuple[str, ...]:
    """Check every file that `manifest.json` lists, and give their names; files it does not list are not looked at.

    With `share=(i, n)` only every n-th file from the i-th on is checked: n processes share the work.

    Raises:
        CheckpointError: the manifest is missing or malformed, or names the first file that is missing or differs.
    """
    root = Path(folder)
    listed = _read_manifest(root)
    for name, (size, sha256) in list(listed.items())[share[0] :: share[1]]:
        file = TensorFile(root / name)
        if file.size != size:
            raise CheckpointError(
                f"{file.path} has {file.size} bytes, {MANIFEST} says {size}: it is not what was saved"
            )
        if _sha256(file.path) != sha256:
            raise CheckpointError(f"{file.path} differs from what was saved (sha256); copy or download it again")
    return tuple(listed)


def hash_files(root: Path, files: Iterable[Path]) -> dict[str, dict[str, object]]:
    """Size and sha256 of each file, by its name relative to `root`: what `write_manifest` takes."""
    return {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def write_manifest(folder: Path, listed: Mapping[str, Mapping[str, object]]) -> Path:
    """Write the list of files, the last file that a folder gets."""
    if MANIFEST in listed:
        raise CheckpointError(f"{MANIFEST} is the name of the list of files; give that file another name")
    (folder / MANIFEST).write_text(dump({"format": 1, "files": listed}))
    return folder / MANIFEST


def flush_files(files: Iterable[Path]) -> None:
    """Force files, and the folders that they are in, to disk."""
    folders = set[Path]()
    for path in files:
        _fsync(path)
        folders.add(path.parent)
    for folder in folders:
        _fsync(folder)


def publish(temporary: Path, target: Path) -> None:
    """Give a folder that is complete and on disk its name, which must not be taken."""
    check_target(target)
    _move(temporary, target, overwrite=False)


def sibling(path: Path, kind: str) -> Path:
    return path.parent / f".{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def check_target(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a target that is a file, or a folder with something in it that may not be replaced."""
    if not os.path.lexists(path):
        return
    with write_errors(path):
        present = {file.relative_to(path).as_posix() for file in _files(path)} if path.is_dir() else None
    if present is None:
        raise CheckpointError(f"{path} is a file; give the name of a folder")
    if not os.listdir(path):
        return
    if not overwrite:
        raise CheckpointError(
            f"{path} exists and is not empty; it is never written over in place: "
            "choose another name, or delete it first"
        )
    strangers = present - {*_read_manifest(path), MANIFEST}
    if strangers:
        raise CheckpointError(f"{path} holds {min(strangers)!r}, which no save wrote; overwrite=True would delete it")


def _files(folder: Path) -> list[Path]:
    return sorted(Path(parent) / name for parent, _, names in os.walk(folder) for name in names)


def _flush(folder: Path, *, manifest: bool) -> None:
    """Force every file and folder to disk; with `manifest`, write the list of files with their hashes."""
    if manifest:
        write_manifest(folder, hash_files(folder, _regular_files(folder)))
    flush_files(_regular_files(folder))
    for parent, _, _ in os.walk(folder, topdown=False):
        _fsync(Path(parent))


def _regular_files(folder: Path) -> Iterator[Path]:
    for path in _files(folder):
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path.name} is not a regular file; a checkpoint holds only those")
        yield path


def _fsync_folders(folder: Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        _fsync(Path(parent))


def _move(temporary: Path, target: Path, *, overwrite: bool) -> None:
    aside = None
    if overwrite and target.is_dir() and os.listdir(target):
        aside = sibling(target, "old")
        os.rename(target, aside)
    try:
        os.rename(temporary, target)  # fails if somebody has put files there meanwhile
    except OSError:
        if aside is not None:
            os.rename(aside, target)
        raise
    _fsync(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _read_manifest(root: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 by file name, relative to `root`."""
    file = TensorFile(root / MANIFEST)
    content = parse_json_object(file.read_bytes(0, file.size), str(file.path))
    files = content.get("files")
    if content.keys() != {"format", "files"} or content["format"] != 1 or not isinstance(files, dict):
        raise CheckpointError(f"{file.path} is not a list of files with their sha256, format 1")
    result: dict[str, tuple[int, str]] = {}
    for name, fields in files.items():
        if not isinstance(fields, dict) or fields.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{file.path}: {name!r} needs exactly `bytes` and `sha256`")
        if "\0" in name or not Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root)):
            raise CheckpointError(f"{file.path}: {name!r} is not a file inside the folder")
        result[name] = (fields["bytes"], fields["sha256"])
    return result


def _sha256(path: Path) -> str:
    with explained(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dump(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


@contextmanager
def write_errors(path: Path, *, only: frozenset[int] | None = None) -> Iterator[None]:
    """An OSError inside (with `only`, one of those errnos) becomes a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        where = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        shown = _TEMPORARY.sub(r"\1", str(path))  # the name that it would have had
        raise CheckpointError(f"{shown} was not written: {error.strerror or error}{where}{_room(path)}") from error


def _room(path: Path) -> str:
    try:
        return f"; {shutil.disk_usage(path.parent).free >> 20} MiB are free there"
    except OSError:
        return ""
