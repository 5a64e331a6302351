"""Writing a file so that its name stands for the old content or the new, and never for half of either."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Gives a new file to write; when the block ends without an error it is flushed to disk and becomes `path`.

    A process that is killed leaves at most `.<name>.tmp-<pid>-<random>` beside it, which nothing reads.

    Raises:
        OSError: it cannot be written; `path` is as it was and the temporary is removed.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
