"""How the hook methods of several mixins become one callable: conflicts, order, and blame.

Resolved when a mixin is added, never in a forward pass. A plain method is the innermost link in place of
the default; wrappers go around it, whichever was added first. The last wrapper added is the outermost,
except that `attention_fn`'s wrappers are sorted by stage first.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from swissarmy.core.errors import HookCallError, HookConflictError
from swissarmy.core.hooks import HOOKS, RESERVED, STAGES, Hook, HookMark, HookTable, answers, mark_of


@dataclass(frozen=True)
class Link:
    """One mixin's method for one hook."""

    owner: str
    method: Hook
    mark: HookMark


@dataclass(frozen=True)
class Chain:
    """What answers one hook: the wrappers from the outside in, then one plain method or the default."""

    hook: str
    wrappers: tuple[Link, ...]
    plain: Link | None

    def resolve(self, default: Hook) -> Hook:
        """Fold the chain into one callable."""
        call = default if self.plain is None else _answer(self.hook, self.plain)
        for link in reversed(self.wrappers):
            call = _answer(self.hook, link, call)
        return call

    def describe(self, default: str) -> str:
        """The chain in one line, from the outside in."""
        links = [
            f"{link.owner} ({link.mark.stage})" if self.hook == "attention_fn" else link.owner for link in self.wrappers
        ]
        innermost = default if self.plain is None else f"{self.plain.owner} (replaces the default)"
        return " → ".join([*links, innermost])


def chain_of(hook: str, answerers: Mapping[str, object]) -> Chain:
    """The chain for one hook, from the objects that may answer it, in the order of adding.

    Raises:
        HookConflictError: Two of them replace the default.
    """
    links = [
        Link(owner, getattr(answerer, hook), mark_of(getattr(answerer, hook)))
        for owner, answerer in answerers.items()
        if answers(answerer, hook)
    ]
    wrappers = [link for link in reversed(links) if link.mark.kind == "non_conflict"]
    if hook == "attention_fn":
        wrappers.sort(key=lambda link: STAGES.index(link.mark.stage))
    return Chain(hook, tuple(wrappers), _only_plain(hook, links))


def resolve(answerers: Mapping[str, object], defaults: HookTable) -> HookTable:
    """The table of callables for these answerers over these defaults."""
    return HookTable(**{hook: chain_of(hook, answerers).resolve(getattr(defaults, hook)) for hook in HOOKS})


def accepted_keywords(answerers: Mapping[str, object], defaults: HookTable) -> frozenset[str]:
    """The keywords of a call that some hook reads: by name in its signature, or in a mixin's `accepts`."""
    accepted: set[str] = set()
    for hook, spec in HOOKS.items():
        methods = [getattr(answerer, hook) for answerer in answerers.values() if answers(answerer, hook)]
        for method in (getattr(defaults, hook), *methods):
            accepted |= set(_keywords(method, num_arguments=len(spec.arguments)))
    for answerer in answerers.values():
        accepted |= set(getattr(answerer, "accepts", ()))
    return frozenset(accepted - RESERVED)


def _keywords(method: Hook, *, num_arguments: int) -> list[str]:
    """The parameters that a signature names after the hook's own arguments, whatever it calls those."""
    parameters = list(inspect.signature(method).parameters.values())[num_arguments:]
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


def _only_plain(hook: str, links: Sequence[Link]) -> Link | None:
    plain = [link for link in links if link.mark.kind == "plain"]
    replaceable = [link for link in links if link.mark.kind == "replaceable"]
    for rivals in (plain, replaceable):
        if len(rivals) > 1:
            first, second = rivals[0].owner, rivals[1].owner
            raise HookConflictError(
                f"'{first}' and '{second}' both replace {hook}. Remove one (del_mixin('{first}')), "
                f"or let one wrap the other: @non_conflict above {hook}, with old_impl in its signature."
            )
    return next(iter(plain + replaceable), None)


def _answer(hook: str, link: Link, inner: Hook | None = None) -> Hook:
    """The link's method, around `inner` if it is a wrapper, with its result checked and its errors signed.

    What a wrapper calls as `old_impl` knows the keywords of the call: they reach the inner links even where the
    wrapper names one in its signature, or passes none on; those it does pass replace them.
    """
    spec, owner, method = HOOKS[hook], link.owner, link.method
    by_position = (*spec.arguments, *spec.options)
    keeps_keys = hook == "attention_fn" and link.mark.stage == "transform"

    def call(*arguments: Any, **kw_args: Any) -> Any:
        _sign_outputs(kw_args, owner)
        try:
            if inner is None:
                result = method(*arguments, **kw_args)
            else:
                num_keys = spec.argument(1, arguments, kw_args).shape[2] if keeps_keys else None

                def old_impl(*again: Any, **changed: Any) -> Any:
                    if num_keys is not None:
                        _check_keys(owner, num_keys, spec.argument(1, again, changed), kw_args)
                    named = {**kw_args, **changed}
                    for name in by_position[: len(again)]:
                        named.pop(name, None)
                    return inner(*again, **named)

                result = method(*arguments, old_impl=old_impl, **kw_args)
        except Exception as error:
            _sign(error, hook, owner, kw_args)
            raise
        problem = spec.problem(arguments, kw_args, result)
        if problem is not None:
            raise HookCallError(f"{_place(hook, owner, kw_args)} {problem}")
        return result

    return call


def _check_keys(owner: str, expected: int, keys: Tensor, kw_args: Mapping[str, Any]) -> None:
    """A wrapper that transforms may change keys and not their number."""
    if keys.shape[2] != expected:
        raise HookCallError(
            f"{_place('attention_fn', owner, kw_args)} turned {expected} keys into {keys.shape[2]} in the "
            'stage "transform"; declare @non_conflict(stage="extend") to add keys.'
        )


def _sign_outputs(kw_args: dict[str, Any], owner: str) -> None:
    for name in ("output_this_layer", "output_cross_layer", "cross_layer_output"):
        outputs = kw_args.get(name)
        if outputs is not None:
            kw_args[name] = outputs.written_by(owner)


def _place(hook: str, owner: str, kw_args: Mapping[str, Any]) -> str:
    layer_id = kw_args.get("layer_id")
    return f"mixin '{owner}', hook {hook}" + ("" if layer_id is None else f", layer {layer_id}") + ":"


def _sign(error: Exception, hook: str, owner: str, kw_args: Mapping[str, Any]) -> None:
    """Note on the error which mixin it came from: the innermost, when several are on the way.

    An error of ours that names a mixin already gets no note: the wrappers around that mixin are not to blame.
    """
    notes = [*getattr(error, "__notes__", []), f"in {error}" if isinstance(error, HookCallError) else ""]
    if not any(note.startswith("in mixin ") for note in notes):
        error.add_note("in " + _place(hook, owner, kw_args).rstrip(":"))
