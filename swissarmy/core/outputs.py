"""What hooks hand on beside their result: to the caller, and to the layers that follow."""

from collections.abc import Collection, Iterator, MutableMapping
from typing import Any, final

from swissarmy.core.errors import HookCallError


@final
class Outputs(MutableMapping[str, Any]):
    """A dict that remembers who wrote each key, and refuses a second writer.

    `written_by` gives a view on the same values for another writer; one is made for each mixin that runs.
    """

    __slots__ = ("kind", "reserved", "values_by_key", "writer", "writers")

    def __init__(self, kind: str, *, reserved: Collection[str] = ()) -> None:
        """Make an empty record; `kind` names it in messages, and `reserved` keys are refused."""
        self.kind, self.reserved = kind, reserved
        self.writer = "the backbone"
        self.values_by_key: dict[str, Any] = {}
        self.writers: dict[str, str] = {}

    def written_by(self, writer: str) -> "Outputs":
        """The same record, for `writer` to write to."""
        view = Outputs(self.kind, reserved=self.reserved)
        view.writer, view.values_by_key, view.writers = writer, self.values_by_key, self.writers
        return view

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self.reserved:
            raise HookCallError(
                f"{self.kind}['{key}'], written by '{self.writer}': hooks are given '{key}' already; rename the key."
            )
        first = self.writers.get(key, self.writer)
        if first != self.writer:
            raise clash(f"{self.kind}['{key}']", first, self.writer)
        self.writers[key] = self.writer
        self.values_by_key[key] = value

    def __getitem__(self, key: str) -> Any:
        return self.values_by_key[key]

    def __delitem__(self, key: str) -> None:
        del self.values_by_key[key], self.writers[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_key)

    def __len__(self) -> int:
        return len(self.values_by_key)


def clash(what: str, first: str, second: str) -> HookCallError:
    """The error for one key with two writers."""
    return HookCallError(f"{what} is written by '{first}' and by '{second}': rename the key in one of them.")
