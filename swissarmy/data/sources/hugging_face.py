"""What Hugging Face `datasets` reads, local files or names on the hub, through that library."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from swissarmy.core.errors import require_extra
from swissarmy.data.source import DataError, check_index, digest, file_fingerprint
from swissarmy.data.sources.stream import Stream
from swissarmy.data.sources.wrapped import content_hash

if TYPE_CHECKING:
    import datasets

_SAMPLED = 8
_ARROW_FILE = b"ARROW1"


@final
@dataclasses.dataclass(frozen=True)
class HuggingFaceSource:
    """The rows of a `datasets.Dataset`, which that library keeps memory-mapped in its cache.

    Args:
        name: a name on the hub, a folder that `save_to_disk` wrote, or the kind of `files`: `parquet`, `arrow`,
            `json`, ...
        files: local files.
        config: which configuration of the data set, if it has several.
        split: which split of it.
        revision: a commit or tag on the hub.

    Raises:
        MissingExtraError: on first use, if `datasets` is not installed.
        DataError: on first use, if it cannot read the data.
    """

    name: str
    files: tuple[Path, ...] = ()
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone; whoever unpickles opens the cached data again."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """One row."""
        row: Mapping[str, Any] = self._rows[check_index(index, len(self))]
        return row

    def where(self, index: int) -> str:
        """`a.parquet, row 17`."""
        name = self.name if not self.files else str(self.files[0]) + (", ..." if len(self.files) > 1 else "")
        return f"{name}, row {check_index(index, len(self))}"

    @cached_property
    def fingerprint(self) -> str:
        """Of local files; of what is on the hub its columns, its length and some rows."""
        options = (self.config, self.split)
        if self.files:
            return digest("HuggingFaceSource", options, [file_fingerprint(path) for path in self.files])
        places = sorted({(len(self) - 1) * place // (_SAMPLED - 1) for place in range(_SAMPLED)}) if len(self) else []
        rows = [content_hash(self[place]) for place in places]
        return digest("HuggingFaceSource", options, str(self._rows.features), len(self), rows)

    def stream(self) -> Stream:
        """The rows one after another, without a copy in the cache: for what is too large for the disk."""
        rows = _load(self, streaming=True)
        return Stream(rows, name=self.name, fingerprint=digest(*map(str, self.__getstate__().values())))

    @cached_property
    def _rows(self) -> "datasets.Dataset":
        rows: datasets.Dataset = _load(self, streaming=False)
        return rows


def _load(source: HuggingFaceSource, *, streaming: bool) -> Any:
    library = require_extra("datasets", extra="data", purpose=f"reading {source.name}")
    files = [str(path) for path in source.files]
    try:
        if source.name == "arrow" and not streaming and all(map(_is_stream, source.files)):
            return library.concatenate_datasets([library.Dataset.from_file(file) for file in files])
        if Path(source.name).is_dir() and (Path(source.name) / "dataset_info.json").exists():
            return library.load_from_disk(source.name)
        return library.load_dataset(
            source.name,
            source.config,
            data_files=files or None,
            split=source.split,
            revision=source.revision,
            streaming=streaming,
        )
    except (OSError, ValueError, ArithmeticError, LookupError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise _explained(source, error) from error


def _explained(source: HuggingFaceSource, error: Exception) -> DataError:
    cause = error.__cause__ or error
    reason = (str(cause) or type(cause).__name__).splitlines()[0]
    return DataError(f"{', '.join(map(str, source.files)) or source.name}: `datasets` cannot read it: {reason}")


def _is_stream(path: Path) -> bool:
    """Whether an Arrow file is of the streaming format, which is mapped as it is; the other kind is converted."""
    with path.open("rb") as file:
        return file.read(len(_ARROW_FILE)) != _ARROW_FILE
