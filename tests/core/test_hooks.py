"""A class that defines a hook wrongly is refused when it is created, by a message that says how to write it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.core.hooks import HOOKS, RESERVED, HookContext, HookDefinitionError, HookTable, mark_of
from tests.helpers import hook_mixin, tiny_ids, tiny_model


def define(name: str, method: Any, base: type = sat.BaseMixin, **body: Any) -> type:
    return type("Broken", (base,), {name: method, **body})


def plain(self: Any, hidden_states: Tensor, mask: Any = None, **kw_args: Any) -> Tensor:
    return hidden_states


@pytest.mark.parametrize("base", [sat.BaseMixin, sat.BaseModel])
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("attention_forwad", "attention_forward"),
        ("atention_forward", "attention_forward"),
        ("attentionForward", "attention_forward"),
        ("attn_forward", "attention_forward"),
        ("attention_func", "attention_fn"),
        ("mlp_foward", "mlp_forward"),
        ("layers_forward", "layer_forward"),
        ("final_foward", "final_forward"),
        ("word_embeding_forward", "word_embedding_forward"),
        ("word_embeddings_forward", "word_embedding_forward"),
        ("position_embedding_foward", "position_embedding_forward"),
        ("cross_attn_forward", "cross_attention_forward"),
        ("crossattention_forward", "cross_attention_forward"),
        ("routing_foward", "routing_forward"),
        ("linear_foward", "linear_forward"),
    ],
)
def test_a_misspelt_hook_is_refused_with_the_nearest_name(wrong: str, right: str, base: type) -> None:
    with pytest.raises(HookDefinitionError, match=rf"Broken\.{wrong} looks like a hook .*Did you mean '{right}'\?"):
        define(wrong, plain, base)


@pytest.mark.parametrize("mark", [sat.non_conflict, sat.replaceable, sat.non_conflict(stage="bias")])
@pytest.mark.parametrize("name", ["something_else", "_attention_fn", "_helper", "forward"])
def test_a_mark_on_a_method_that_is_no_hook_is_refused(mark: Callable[..., Any], name: str) -> None:
    def method(self: Any, hidden_states: Tensor, *, old_impl: Any = None, **kw_args: Any) -> Tensor:
        return hidden_states

    with pytest.raises(HookDefinitionError, match=rf"Broken\.{name} looks like a hook and is not one.*The hooks are"):
        define(name, mark(method))


@pytest.mark.parametrize("base", [sat.BaseMixin, sat.BaseModel])
@pytest.mark.parametrize(
    "name",
    [
        "forward",
        "reset_parameters",
        "merge",
        "extra_repr",
        "for_config",
        "attention_scores",
        "attention_weights",
        "_attention_forwad",
        "_mlp_foward",
        "encode_image",
        "project",
        "head",
        "final_norm",
        "routing_loss",
        "prefix_forward",
        "training_step",
        "layer_norm",
        "word_embeddings",
        "position_ids",
    ],
)
def test_a_helper_that_no_one_would_take_for_a_hook_is_allowed(name: str, base: type) -> None:
    define(name, plain, base)


def test_names_that_are_no_functions_are_not_taken_for_hooks() -> None:
    class Fine(sat.BaseMixin):
        attention_forwards = 3
        mlp_forwarded = property(lambda self: 1)

    assert Fine.attention_forwards == 3


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_without_keyword_arguments_is_refused_with_the_signature_to_write(hook: str) -> None:
    arguments = ", ".join([*HOOKS[hook].arguments, *(f"{option}=False" for option in HOOKS[hook].options)])
    scope: dict[str, Any] = {}
    exec(f"def method(self, {arguments}): ...", scope)
    with pytest.raises(HookDefinitionError, match=rf"Broken\.{hook}\(.*Write it as `def {hook}\(self, .*\*\*kw_args"):
        define(hook, scope["method"])


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_lacks_an_argument_is_refused(hook: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def method({', '.join(['self', *HOOKS[hook].arguments[1:]])}, **kw_args): ...", scope)
    with pytest.raises(HookDefinitionError, match=rf"Broken\.{hook}.*too many positional arguments.*Write it as"):
        define(hook, scope["method"])


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_needs_an_argument_that_it_is_not_given_is_refused(hook: str) -> None:
    scope: dict[str, Any] = {}
    exec(f"def method(self, {', '.join(HOOKS[hook].arguments)}, something, **kw_args): ...", scope)
    with pytest.raises(HookDefinitionError, match=rf"Broken\.{hook}.*missing a required argument: 'something'"):
        define(hook, scope["method"])


def test_a_hook_without_self_is_refused() -> None:
    def mlp_forward(hidden_states: Tensor, **kw_args: Any) -> Tensor:
        return hidden_states

    with pytest.raises(HookDefinitionError, match=r"Broken\.mlp_forward.*Write it as `def mlp_forward\(self,"):
        define("mlp_forward", mlp_forward)


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_a_hook_that_is_no_plain_method_is_refused(kind: Any) -> None:
    with pytest.raises(HookDefinitionError, match=rf"Broken\.mlp_forward is a {kind.__name__}; .*with self"):
        define("mlp_forward", kind(plain))


def test_a_wrapper_without_old_impl_is_refused() -> None:
    def mlp_forward(self: Any, hidden_states: Tensor) -> Tensor:
        return hidden_states

    with pytest.raises(HookDefinitionError, match=r"Broken\.mlp_forward.*old_impl, \*\*kw_args"):
        define("mlp_forward", sat.non_conflict(mlp_forward))


def test_a_wrapper_may_find_old_impl_in_its_keywords() -> None:
    @sat.non_conflict
    def mlp_forward(self: Any, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        result: Tensor = kw_args.pop("old_impl")(hidden_states, **kw_args)
        return result

    model = tiny_model()
    before = model(tiny_ids())[0]
    assert torch.equal(model.add_mixin("same", hook_mixin("mlp_forward", mlp_forward))(tiny_ids())[0], before)


@pytest.mark.parametrize("mark", [lambda method: method, sat.replaceable])
@pytest.mark.parametrize("keyword_only", [True, False])
def test_old_impl_in_a_method_that_is_not_marked_as_a_wrapper_is_refused(
    mark: Callable[..., Any], keyword_only: bool
) -> None:
    def named(self: Any, hidden_states: Tensor, old_impl: Any = None, **kw_args: Any) -> Tensor:
        return hidden_states

    def keyword(self: Any, hidden_states: Tensor, *, old_impl: Any, **kw_args: Any) -> Tensor:
        return hidden_states

    with pytest.raises(HookDefinitionError, match=r"Broken\.mlp_forward.*(@non_conflict above it|'old_impl')"):
        define("mlp_forward", mark(keyword if keyword_only else named))


def test_an_unknown_stage_is_refused_with_the_stages_and_the_nearest() -> None:
    with pytest.raises(HookDefinitionError, match=r"'extent'.*transform, cache, extend, bias.*Did you mean 'extend'\?"):
        sat.non_conflict(stage="extent")  # type: ignore[call-overload]


def test_a_stage_given_without_its_name_is_refused() -> None:
    with pytest.raises(HookDefinitionError, match=r"was given 'bias'.*@non_conflict\(stage="):
        sat.non_conflict("bias")  # type: ignore[call-overload]


def test_a_stage_on_a_hook_that_has_none_is_refused() -> None:
    @sat.non_conflict(stage="bias")
    def mlp_forward(self: Any, hidden_states: Tensor, *, old_impl: Any, **kw_args: Any) -> Tensor:
        return hidden_states

    with pytest.raises(HookDefinitionError, match=r"Broken\.mlp_forward declares stage='bias'.*only attention_fn"):
        define("mlp_forward", mlp_forward)


def test_arguments_may_have_other_names_and_a_signature_may_ask_for_what_the_call_brings() -> None:
    seen = []

    class Curious(sat.BaseMixin):
        def mlp_forward(self, x: Tensor, layer_id: int, *, mems: Any, **others: Any) -> Tensor:
            seen.append((layer_id, mems))
            return x

    tiny_model({"curious": Curious()})(tiny_ids())
    assert seen == [(0, None), (1, None)]


def test_a_hook_outside_the_layers_cannot_ask_for_the_layer() -> None:
    def final_forward(self: Any, hidden_states: Tensor, *, layer_id: int, **kw_args: Any) -> Tensor:
        return hidden_states

    with pytest.raises(HookDefinitionError, match=r"Broken\.final_forward.*'layer_id'"):
        define("final_forward", final_forward)


@pytest.mark.parametrize(("accepts", "named"), [("image", "'image'"), (["image"], r"\['image'\]"), ((1,), r"\(1,\)")])
def test_accepts_that_is_no_tuple_of_names_is_refused(accepts: Any, named: str) -> None:
    with pytest.raises(HookDefinitionError, match=rf"Broken\.accepts is {named}.*write a tuple"):
        define("accepts", accepts)


@pytest.mark.parametrize("name", ["layer_id", "hidden_states", "mask", "q", "old_impl", "transformer"])
def test_accepts_cannot_name_what_every_call_brings_already(name: str) -> None:
    with pytest.raises(HookDefinitionError, match=f"Broken.accepts names '{name}'"):
        define("accepts", (name,))


def test_a_subclass_of_a_mixin_is_checked_too_and_inherits_its_hooks() -> None:
    class Base(sat.BaseMixin):
        def mlp_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
            return torch.zeros_like(hidden_states)

    class Derived(Base):
        pass

    assert "derived (replaces the default)" in tiny_model({"derived": Derived()}).explain()
    with pytest.raises(HookDefinitionError, match=r"Broken\.mlp_foward"):
        define("mlp_foward", plain, Base)


def test_every_hook_is_in_the_table_and_marks_can_be_read_back() -> None:
    assert list(HookTable.__annotations__) == list(HOOKS)
    assert set(HookContext.__annotations__) <= RESERVED
    assert (mark_of(plain).kind, mark_of(plain).stage) == ("plain", "transform")

    @sat.non_conflict(stage="cache")
    def wrapper() -> None: ...

    @sat.replaceable
    def default() -> None: ...

    assert (mark_of(wrapper).kind, mark_of(wrapper).stage) == ("non_conflict", "cache")
    assert mark_of(default).kind == "replaceable"
