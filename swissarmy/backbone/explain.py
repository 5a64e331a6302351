"""`model.explain()`: every hook, and the chain of mixins that answers it."""

from collections.abc import Mapping

from swissarmy.core.compose import chain_of
from swissarmy.core.hooks import HOOKS


def explain_hooks(answerers: Mapping[str, object], *, title: str) -> str:
    """One line a hook: its name, then what answers it, from the outside in."""
    width = max(map(len, HOOKS))
    lines = [f"  {hook:<{width}}  {chain_of(hook, answerers).describe('the backbone')}" for hook in HOOKS]
    return "\n".join([title, *lines])
