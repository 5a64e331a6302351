"""`FunctionEncoder`: a function of yours, from a record to a sample, as an encoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from swissarmy.data.samples.examples import TOKEN_FIELDS, Cut, Encoder, Sample
from swissarmy.data.source import RecordError, digest

Encode = Encoder | Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""An encoder, or a function from a record to lists, arrays or tensors under the names that models use."""


@final
@dataclass(frozen=True)
class FunctionEncoder:
    """Calls a function of a record alone; sequences as long as a sample's tokens are shortened with them."""

    function: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """Gives the sample; it travels to workers."""

    @property
    def fingerprint(self) -> str:
        """Of the function's name: what it does cannot be seen from outside."""
        kind = type(self.function)
        names = (getattr(self.function, name, getattr(kind, name)) for name in ("__module__", "__qualname__"))
        return digest("function", *names)

    def __call__(self, record: Mapping[str, Any], *, where: str, cut: Cut | None = None) -> Sample:
        """The sample of one record.

        Raises:
            RecordError: The function gave something else.
        """
        given = self.function(record)
        if not isinstance(given, Mapping):
            raise RecordError(
                f"{where}: encode gave a {type(given).__name__}; a sample is a dict, {{'input_ids': ids}}"
            )
        sample = {name: np.asarray(value) for name, value in given.items()}
        lengths = {len(sample[name]) for name in TOKEN_FIELDS if name in sample}
        if cut is None:
            return sample
        return {
            name: value[cut.kept(len(value))] if value.ndim and len(value) in lengths else value
            for name, value in sample.items()
        }


def as_encoder(encode: Encode | None) -> Encoder | None:
    """An encoder as it is, and a function as one."""
    return encode if encode is None or isinstance(encode, Encoder) else FunctionEncoder(encode)
