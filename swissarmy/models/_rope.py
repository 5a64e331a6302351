"""Rope parameters as configs write them: `rope_parameters` since transformers 5, `rope_scaling` before."""

from collections.abc import Mapping
from typing import Any

from swissarmy.nn.rotary import RopeParameters

OTHER_NAMES = {"type": "rope_type"}
ROPE_TYPES = {"su": "longrope"}


def rope_parameters(
    current: Mapping[str, Any] | None,
    earlier: Mapping[str, Any] | None,
    *,
    theta: float | None,
    default_theta: float,
    original_length: int | None = None,
    where: str,
) -> RopeParameters:
    """One set of parameters from either spelling.

    Args:
        current: The field `rope_parameters`.
        earlier: The field `rope_scaling`.
        theta: The field `rope_theta`.
        default_theta: The family's base where none is given.
        original_length: The field `original_max_position_embeddings` at the root of the config.
        where: The name of the config, for messages.
    """
    given = {OTHER_NAMES.get(key, key): value for key, value in {**(earlier or {}), **(current or {})}.items()}
    given["rope_type"] = ROPE_TYPES.get(given.get("rope_type", "default"), given.get("rope_type", "default"))
    given.setdefault("rope_theta", default_theta if theta is None else theta)
    if original_length is not None:
        given.setdefault("original_max_position_embeddings", original_length)
    return RopeParameters.from_dict({key: value for key, value in given.items() if value is not None}, where=where)
