"""What hooks hand on beside their result: to the caller, and to the layers that follow."""

from collections.abc import Collection, Iterator, MutableMapping
from typing import Any, final

from swissarmy.core.errors import HookCallError


@final
class Outputs(MutableMapping[str, Any]):
    """A dict that remembers who wrote each key, and refuses a second writer.

    `written_by` gives a view of the same record for another writer; one is made for each mixin that runs.
    """

    __slots__ = ("content", "kind", "reserved", "writer", "writers")

    def __init__(
        self, kind: str, reserved: Collection[str], content: dict[str, Any], writers: dict[str, str], writer: str
    ) -> None:
        """Look at a record as one of its writers.

        Args:
            kind: What the record is called in messages.
            reserved: Keys that are refused.
            content: What was written.
            writers: Who wrote each key.
            writer: Who writes through this view.
        """
        self.kind, self.reserved, self.content = kind, reserved, content
        self.writers, self.writer = writers, writer

    @classmethod
    def empty(cls, kind: str, *, reserved: Collection[str] = ()) -> "Outputs":
        """A new record."""
        return cls(kind, reserved, {}, {}, "the backbone")

    def written_by(self, writer: str) -> "Outputs":
        """The same record, for `writer` to write to."""
        return Outputs(self.kind, self.reserved, self.content, self.writers, writer)

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self.reserved:
            raise HookCallError(
                f"{self.kind}['{key}'], written by '{self.writer}': hooks are given '{key}' already; rename the key."
            )
        first = self.writers.get(key, self.writer)
        if first != self.writer:
            raise clash(f"{self.kind}['{key}']", first, self.writer)
        self.writers[key] = self.writer
        self.content[key] = value

    def __getitem__(self, key: str) -> Any:
        return self.content[key]

    def __delitem__(self, key: str) -> None:
        del self.content[key], self.writers[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


def clash(what: str, first: str, second: str) -> HookCallError:
    """The error for one key with two writers."""
    return HookCallError(f"{what} is written by '{first}' and by '{second}': rename the key in one of them.")
