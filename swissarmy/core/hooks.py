"""The ten hooks: the named steps of a forward pass that a mixin can replace or wrap.

A hook method is *plain* (it replaces the default), `@non_conflict` (it wraps what was there and receives
it as `old_impl`) or `@replaceable` (a default of its own, that a plain one may displace).
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, overload

from torch import Tensor, nn

from swissarmy.core.errors import HookDefinitionError, nearest

Hook = Callable[..., Any]
Stage = Literal["transform", "cache", "extend", "bias"]
STAGES: tuple[Stage, ...] = ("transform", "cache", "extend", "bias")
"""The order of `attention_fn`'s wrappers, from the outside in; the kernel comes after the last."""


class HookContext(TypedDict, total=False):
    """What every hook finds in `kw_args`, beside each keyword of the call and of earlier hooks."""

    layer_id: int
    """The index of the layer that is running; absent in the embedding and final hooks."""
    layer: nn.Module
    """The backbone's layer that is running, with its `attention` and `mlp`."""
    transformer: nn.Module
    """The backbone."""
    hooks: "HookTable"
    """The resolved hooks, for a hook that calls another."""
    input_ids: Tensor | None
    """`[b, s]`, as the caller gave them."""
    padding_mask: Tensor | None
    """`[b, k]`, as the caller gave it."""
    position_ids: Tensor
    """`[b or 1, s]`, the position of each token."""
    given_position_ids: Tensor | None
    """In the embedding hooks: what the caller gave as `position_ids`, if anything."""
    positions_before: int
    """How many positions mixins take before a row's first token; in `position_embedding_forward` they are counted."""
    mems: Any
    """The key-value cache of this call, or `None`."""
    output_this_layer: Any
    """Write `[key] = value` here to find it in `outputs_per_layers[layer_id][key]`."""
    output_cross_layer: Any
    """Write `[key] = value` here to find it in the next layer's `kw_args[key]`."""
    cross_layer_output: Any
    """In the embedding hooks, another name of `output_cross_layer`."""


@dataclass(frozen=True)
class HookSpec:
    """How one hook is called, and what its result is measured against."""

    name: str
    arguments: tuple[str, ...]
    options: tuple[str, ...] = ()
    in_layer: bool = True

    @property
    def signature(self) -> str:
        """The call as a reader would write it."""
        options = tuple(f"{option}=..." for option in self.options)
        return f"{self.name}({', '.join((*self.arguments, *options, '**kw_args'))})"

    def argument(self, index: int, arguments: tuple[Any, ...], kw_args: Mapping[str, Any]) -> Any:
        """An argument of a call, however it was passed."""
        return arguments[index] if index < len(arguments) else kw_args[self.arguments[index]]

    def problem(self, arguments: tuple[Any, ...], kw_args: Mapping[str, Any], result: Any) -> str | None:
        """What is wrong with `result`, or `None`; compares shapes only, never values."""
        if result is None:
            return None if self.name == "position_embedding_forward" else "returned None"
        if self.name in ("final_forward", "routing_forward"):
            return None
        if not isinstance(result, Tensor):
            return f"returned {type(result).__name__} instead of a tensor"
        if not self.in_layer:
            width = kw_args["transformer"].config.hidden_size
            fits = result.dim() == 3 and result.shape[2] == width
            return None if fits else f"returned {list(result.shape)} where [b, s, {width}] was expected"
        expected = self.argument(0, arguments, kw_args).shape
        if self.name == "linear_forward":
            expected = (*expected[:-1], self.argument(1, arguments, kw_args).out_features)
        if result.shape != expected:
            return f"returned {list(result.shape)} where {list(expected)} was expected"
        return None


HOOKS: Mapping[str, HookSpec] = {
    spec.name: spec
    for spec in (
        HookSpec("word_embedding_forward", ("input_ids",), in_layer=False),
        HookSpec("position_embedding_forward", ("position_ids",), in_layer=False),
        HookSpec("layer_forward", ("hidden_states", "mask")),
        HookSpec("attention_forward", ("hidden_states", "mask")),
        HookSpec("cross_attention_forward", ("hidden_states", "cross_attention_mask", "encoder_outputs")),
        HookSpec("attention_fn", ("q", "k", "v", "mask", "dropout_fn"), ("cross_attention",)),
        HookSpec("mlp_forward", ("hidden_states",)),
        HookSpec("routing_forward", ("hidden_states",)),
        HookSpec("linear_forward", ("x", "linear", "name")),
        HookSpec("final_forward", ("hidden_states",), in_layer=False),
    )
}

RESERVED = frozenset(
    {*HookContext.__annotations__, "old_impl", "self"}
    | {name for spec in HOOKS.values() for name in (*spec.arguments, *spec.options)}
) - {"encoder_outputs", "cross_attention_mask"}
"""Keys that neither a caller nor a hook can put into `kw_args`: hooks are given them otherwise."""


@dataclass(frozen=True)
class HookTable:
    """One resolved callable for each hook: immutable, looked up by attribute."""

    word_embedding_forward: Hook
    position_embedding_forward: Hook
    layer_forward: Hook
    attention_forward: Hook
    cross_attention_forward: Hook
    attention_fn: Hook
    mlp_forward: Hook
    routing_forward: Hook
    linear_forward: Hook
    final_forward: Hook


@dataclass(frozen=True)
class HookMark:
    """What a decorator says of a hook method."""

    kind: Literal["plain", "non_conflict", "replaceable"] = "plain"
    stage: Stage = "transform"


F = TypeVar("F", bound=Callable[..., Any])


@overload
def non_conflict(method: F) -> F: ...
@overload
def non_conflict(*, stage: Stage) -> Callable[[F], F]: ...
def non_conflict(method: F | None = None, *, stage: Stage = "transform") -> F | Callable[[F], F]:
    """Mark a hook method as a wrapper: it receives what it wraps as the keyword `old_impl`.

    Args:
        method: The method, when used as a bare decorator.
        stage: For `attention_fn`, where in the chain the wrapper stands: `transform` (changes q, k and v),
            `cache`, `extend` (adds keys and values) or `bias` (adds to the scores), from the outside in.
    """
    if stage not in STAGES:
        raise HookDefinitionError(
            f"stage='{stage}' does not exist; stages are {', '.join(STAGES)}.{nearest(stage, STAGES)}"
        )

    def mark(function: F) -> F:
        if not inspect.isfunction(function):
            raise HookDefinitionError(
                f"@non_conflict marks a method, and was given {function!r}; write @non_conflict, or "
                '@non_conflict(stage="bias").'
            )
        vars(function)["hook_mark"] = HookMark("non_conflict", stage)
        return function

    return mark if method is None else mark(method)


def replaceable(method: F) -> F:
    """Mark a hook method as a default: it serves until a plain one of another mixin takes its place."""
    vars(method)["hook_mark"] = HookMark("replaceable")
    return method


def mark_of(method: Hook) -> HookMark:
    """The mark that a decorator left on a method (bound or not); plain when there is none."""
    mark: HookMark = getattr(method, "hook_mark", HookMark())
    return mark


def answers(answerer: object, hook: str) -> bool:
    """Whether an object's class defines this hook."""
    return callable(getattr(type(answerer), hook, None))


def check_hook_methods(cls: type) -> None:
    """Check the methods in the body of `cls` when the class is created.

    Raises:
        HookDefinitionError: A name that is nearly a hook's, a mark on something that is no hook, a stage on a hook
            that has none, or a signature that the forward pass could not call.
    """
    for name, method in vars(cls).items():
        if name in HOOKS and isinstance(method, staticmethod | classmethod):
            raise HookDefinitionError(
                f"{cls.__qualname__}.{name} is a {type(method).__name__}; a hook is a plain method, with self."
            )
        if not inspect.isfunction(method):
            continue
        if name in HOOKS:
            _check_stage(cls, name, mark_of(method))
            _check_signature(cls, HOOKS[name], method)
        elif "hook_mark" in vars(method) or (not name.startswith("_") and _looks_like_a_hook(name)):
            raise HookDefinitionError(
                f"{cls.__qualname__}.{name} looks like a hook and is not one.{nearest(name, HOOKS)} "
                f"The hooks are: {', '.join(HOOKS)}. A helper method that is no hook starts with '_'."
            )


def _looks_like_a_hook(name: str) -> bool:
    return bool(difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.8))


def _check_stage(cls: type, name: str, mark: HookMark) -> None:
    if name != "attention_fn" and mark.stage != "transform":
        raise HookDefinitionError(
            f"{cls.__qualname__}.{name} declares stage='{mark.stage}', and only attention_fn has stages: leave it out."
        )


def _check_signature(cls: type, spec: HookSpec, method: Hook) -> None:
    wraps = mark_of(method).kind == "non_conflict"
    keywords: dict[str, Any] = dict.fromkeys((*spec.options, "a_keyword_of_the_caller", *_named(spec, method)))
    if wraps:
        keywords["old_impl"] = None
    try:
        inspect.signature(method).bind(None, *spec.arguments, **keywords)
    except TypeError as error:
        wanted = spec.signature.replace("**kw_args", "old_impl, **kw_args") if wraps else spec.signature
        raise HookDefinitionError(
            f"{cls.__qualname__}.{spec.name}{inspect.signature(method)} cannot be called as the hook is: "
            f"{error}. Write it as `def {wanted.replace('(', '(self, ', 1)}`."
        ) from None
    if not wraps and "old_impl" in inspect.signature(method).parameters:
        raise HookDefinitionError(
            f"{cls.__qualname__}.{spec.name} takes old_impl but is not marked as a wrapper; put @non_conflict above it."
        )


def _named(spec: HookSpec, method: Hook) -> set[str]:
    """What a signature asks for by name and the call will bring: keyword-only parameters, and keys of `kw_args`."""
    parameters = inspect.signature(method).parameters.values()
    context = {*HookContext.__annotations__} - ({"layer_id", "layer"} if not spec.in_layer else set())
    keyword_only = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY and each.name != "old_impl"}
    never = {*HookContext.__annotations__} - context
    return (keyword_only - never) | (context & {each.name for each in parameters} - {*spec.arguments})


def check_accepts(cls: type, accepts: object) -> None:
    """Check a mixin's `accepts`.

    Raises:
        HookDefinitionError: It is no tuple of names, or holds one that hooks are given otherwise.
    """
    if not isinstance(accepts, tuple) or not all(isinstance(name, str) for name in accepts):
        raise HookDefinitionError(f'{cls.__qualname__}.accepts is {accepts!r}; write a tuple: accepts = ("image",).')
    taken = [name for name in accepts if name in RESERVED]
    if taken:
        raise HookDefinitionError(
            f"{cls.__qualname__}.accepts names '{taken[0]}', which every call brings already: choose another name."
        )
