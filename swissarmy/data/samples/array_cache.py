"""Arrays that take long to make, kept in a folder under a name that says all about them, and read as memory maps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swissarmy.core.files import replace_file

Arrays = Sequence[NDArray[Any]]


def cached(folder: Path | None, name: str, count: int, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of that name, or else what `make` gives, kept from now on.

    Args:
        folder: where; `None` makes them anew each time, in memory.
        name: without a suffix; it changes whenever the arrays would.
        count: how many arrays there are.
        make: makes them; ranks that do so at the same time write the same files.

    Raises:
        OSError: the folder cannot be written.
    """
    if folder is None:
        return make()
    paths = [folder / f"{name}.{number}.npy" for number in range(count)]
    kept = _read(paths)
    if kept is not None:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    for path, array in zip(paths, make(), strict=True):
        with replace_file(path) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
    kept = _read(paths)
    assert kept is not None, f"{folder} does not give back what was written"
    return kept


def _read(paths: Sequence[Path]) -> Arrays | None:
    try:
        return [np.lib.format.open_memmap(path, mode="r") for path in paths]
    except (OSError, ValueError):
        return None
