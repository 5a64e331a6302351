"""The one reader of JSON objects that came from elsewhere: configs, headers, manifests, vocabularies."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from swissarmy.core.errors import CheckpointError, SwissArmyError


def read_json_object(path: Path, error: type[SwissArmyError] = CheckpointError) -> dict[str, Any]:
    """The object in a file, see `parse_json_object`."""
    return parse_json_object(path.read_bytes(), str(path), error)


def parse_json_object(data: bytes, place: str, error: type[SwissArmyError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in `data`: UTF-8, no name twice. `place` begins the message of an error.

    Raises:
        error: it is not that; the message is one line, and has the line of `data` where it can.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as cause:
        raise error(f"{place}:{cause.lineno}: not valid JSON: {cause.msg} at column {cause.colno}") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{place}: not valid UTF-8 at byte {cause.start}") from cause
    except RecursionError as cause:
        raise error(f"{place}: not valid JSON: nested too deeply") from cause
    except ValueError as cause:
        raise error(f"{place}: not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{place}: a JSON object is expected, not a {type(value).__name__}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((name, times),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} occurs {times} times")
    "".join(result).encode()  # a lone surrogate is not text: UnicodeEncodeError, which is a ValueError
    return result
