"""How mixins combine: conflicts, order, removal, and whose name is on an error."""

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swissarmy as sat
from swissarmy.core.errors import HookCallError, HookConflictError, HookDefinitionError
from swissarmy.core.hooks import HOOKS, Hook
from tests.helpers import DefaultMLP, Scale, ZeroMLP, hook_mixin, tiny_family_model, tiny_ids, tiny_model

IDS = tiny_ids()


class OtherMLP(sat.BaseMixin):
    def mlp_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        return hidden_states * 3


class OtherDefaultMLP(sat.BaseMixin):
    @sat.replaceable
    def mlp_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        return hidden_states * 5


class WithOwnMLP(sat.BaseModel):
    def mlp_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


class WithDefaultMLP(sat.BaseModel):
    @sat.replaceable
    def mlp_forward(self, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        return hidden_states


class WithWrappedMLP(sat.BaseModel):
    @sat.non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        result: Tensor = old_impl(hidden_states, **kw_args) * 2
        return result


def logits(model: Any, ids: Tensor = IDS, **kw_args: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids, **kw_args)[0]
    return result


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


# What combines with what


@pytest.mark.parametrize("first", [ZeroMLP, DefaultMLP])
@pytest.mark.parametrize("swap", [False, True])
def test_a_wrapper_goes_around_a_plain_method_or_a_default_in_either_order(
    first: type[sat.BaseMixin], swap: bool
) -> None:
    mixins = {"inner": first(), "outer": Scale(3.0)}
    model = tiny_model(dict(reversed(mixins.items())) if swap else mixins)
    chain = model.explain().split("mlp_forward")[1].splitlines()[0]
    assert chain.strip() == "outer → inner (replaces the default)"
    expected = torch.zeros(1, 2, 16) if first is ZeroMLP else 3 * torch.ones(1, 2, 16)
    x = torch.ones(1, 2, 16, dtype=torch.float64)
    assert torch.equal(model.hooks.mlp_forward(x, layer_id=0), expected.double())


@pytest.mark.parametrize("swap", [False, True])
def test_a_plain_method_takes_the_place_of_a_replaceable_one_in_either_order(swap: bool) -> None:
    mixins = {"default": DefaultMLP(), "plain": ZeroMLP()}
    model = tiny_model(dict(reversed(mixins.items())) if swap else mixins)
    assert torch.equal(logits(model), logits(tiny_model({"plain": ZeroMLP()})))
    model.del_mixin("plain")
    assert torch.equal(logits(model), logits(tiny_model({"default": DefaultMLP()})))


@pytest.mark.parametrize("swap", [False, True])
def test_two_wrappers_nest_with_the_last_added_outermost(swap: bool) -> None:
    class AddOne(sat.BaseMixin):
        @sat.non_conflict
        def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
            result: Tensor = old_impl(hidden_states, **kw_args) + 1
            return result

    mixins = {"scale": Scale(2.0), "add": AddOne(), "default": DefaultMLP()}
    model = tiny_model(dict(reversed(mixins.items())) if swap else mixins)
    x = torch.ones(1, 1, 16, dtype=torch.float64)
    assert model.hooks.mlp_forward(x, layer_id=0)[0, 0, 0] == (4 if swap else 3)


@pytest.mark.parametrize(
    ("first", "second"),
    [(ZeroMLP, OtherMLP), (OtherMLP, ZeroMLP), (DefaultMLP, OtherDefaultMLP), (OtherDefaultMLP, DefaultMLP)],
)
def test_two_that_replace_one_hook_conflict_and_the_model_stays_as_it_was(
    first: type[sat.BaseMixin], second: type[sat.BaseMixin]
) -> None:
    model = tiny_model({"one": first()})
    before, hooks, keys = logits(model), model.hooks, list(model.state_dict())
    with pytest.raises(HookConflictError) as caught:
        model.add_mixin("two", second())
    message = str(caught.value)
    assert "'one' and 'two' both replace mlp_forward" in message
    assert "del_mixin('one')" in message
    assert "@non_conflict" in message
    assert "old_impl" in message
    assert list(model.mixins) == ["one"]
    assert model.hooks is hooks
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)


def test_two_defaults_conflict_even_where_a_plain_method_hides_them() -> None:
    model = tiny_model({"default": DefaultMLP(), "plain": ZeroMLP()})
    with pytest.raises(HookConflictError, match="'default' and 'other' both replace mlp_forward"):
        model.add_mixin("other", OtherDefaultMLP())
    model.del_mixin("plain")
    assert torch.equal(logits(model), logits(tiny_model({"default": DefaultMLP()})))


def test_a_refused_mixin_keeps_its_own_precision_and_mode() -> None:
    model = tiny_model({"one": ZeroMLP()})

    class Heavy(ZeroMLP):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    heavy = Heavy()
    with pytest.raises(HookConflictError):
        model.add_mixin("two", heavy)
    assert heavy.weight.dtype == torch.float32
    assert heavy.training


# Hooks on the model class


def test_a_hook_on_the_model_class_counts_as_the_first_mixin() -> None:
    torch.manual_seed(0)
    model = WithOwnMLP(tiny_model().config)
    with pytest.raises(HookConflictError, match="'WithOwnMLP' and 'mine' both replace mlp_forward"):
        model.add_mixin("mine", OtherMLP())
    model.add_mixin("scale", Scale())
    assert "scale → WithOwnMLP (replaces the default)" in model.explain()


def test_a_default_on_the_model_class_gives_way_to_a_mixin() -> None:
    model = WithDefaultMLP(tiny_model().config).add_mixin("mine", ZeroMLP())
    assert "mine (replaces the default)" in model.explain()


def test_a_wrapper_on_the_model_class_is_the_innermost() -> None:
    model = WithWrappedMLP(tiny_model().config, {"scale": Scale(), "zero": ZeroMLP()})
    assert "scale → WithWrappedMLP → zero (replaces the default)" in model.explain()


def test_a_mixin_cannot_take_the_name_of_the_model_class_whose_hooks_it_would_hide() -> None:
    model = WithOwnMLP(tiny_model().config)
    with pytest.raises(HookDefinitionError, match="mixin name 'WithOwnMLP' has a meaning of its own"):
        model.add_mixin("WithOwnMLP", Scale())


# Stages


class Stage(sat.BaseMixin):
    """Writes its stage's letter, and changes the numbers so that another order would give others."""

    def __init__(self, letter: str, trace: list[str]) -> None:
        super().__init__()
        self.letter, self.trace = letter, trace

    def act(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, old_impl: Hook, *rest: Any, **kw_args: Any) -> Tensor:
        self.trace.append(self.letter)
        if self.letter == "e":
            one = torch.full_like(k[:, :, :1], 0.3)
            k, v, mask = torch.cat((one, k), 2), torch.cat((one, v), 2), mask.with_prefix(1)
        else:
            k, v = k.roll(1, dims=2) * 1.5, v + k.cumsum(dim=2)
        result: Tensor = old_impl(q, k, v, mask, *rest, **kw_args)
        return result


def stage_mixin(stage: str, trace: list[str]) -> sat.BaseMixin:
    @sat.non_conflict(stage=stage)  # type: ignore[call-overload]
    def attention_fn(
        self: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        dropout_fn: Any,
        cross_attention: bool = False,
        *,
        old_impl: Hook,
        **kw_args: Any,
    ) -> Tensor:
        result: Tensor = self.act(q, k, v, mask, old_impl, dropout_fn, cross_attention=cross_attention, **kw_args)
        return result

    mixin: sat.BaseMixin = type("Staged", (Stage,), {"attention_fn": attention_fn})(stage[0], trace)
    return mixin


def test_every_order_of_adding_one_wrapper_of_each_stage_gives_the_same_numbers() -> None:
    results, traces = [], set()
    for order in itertools.permutations(("transform", "cache", "extend", "bias")):
        trace: list[str] = []
        model = tiny_model({stage: stage_mixin(stage, trace) for stage in order})
        results.append(logits(model))
        traces.add("".join(trace))
        assert "transform (transform) → cache (cache) → extend (extend) → bias (bias)" in model.explain()
    assert traces == {"tceb" * 2}
    assert all(torch.equal(result, results[0]) for result in results)


def test_shipped_mixins_give_the_same_numbers_in_every_order() -> None:
    torch.manual_seed(1)
    config = tiny_model().config
    mixins = {
        "rotary": sat.RotaryMixin.for_config(config),
        "cache": sat.CachedAutoRegressiveMixin(),
        "prefix": sat.PrefixTuningMixin.for_config(config, prefix_len=3),
        "alibi": sat.ALiBiMixin.for_config(config),
    }
    results = [
        logits(tiny_model({name: copy.deepcopy(mixins[name]) for name in order}))
        for order in itertools.permutations(mixins)
    ]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_transform_that_adds_keys_is_told_to_declare_the_stage_extend(by_keyword: bool) -> None:
    @sat.non_conflict
    def attention_fn(self: Any, q: Any, k: Any, v: Any, mask: Any, dropout_fn: Any, *, old_impl: Any, **kw: Any) -> Any:
        k, v = torch.cat((k[:, :, :2], k), dim=2), torch.cat((v[:, :, :2], v), dim=2)
        if by_keyword:
            return old_impl(q=q, k=k, v=v, mask=mask.with_prefix(2), dropout_fn=dropout_fn, **kw)
        return old_impl(q, k, v, mask.with_prefix(2), dropout_fn, **kw)

    model = tiny_model({"adds": hook_mixin("attention_fn", attention_fn)})
    with pytest.raises(
        HookCallError,
        match=r"mixin 'adds', hook attention_fn, layer 0: turned 5 keys into 7.*@non_conflict\(stage=\"extend\"\)",
    ):
        model(IDS)


def test_a_transform_that_drops_keys_is_refused_too() -> None:
    @sat.non_conflict
    def attention_fn(self: Any, q: Any, k: Any, v: Any, mask: Any, dropout_fn: Any, *, old_impl: Any, **kw: Any) -> Any:
        return old_impl(q, k[:, :, 1:], v[:, :, 1:], mask, dropout_fn, **kw)

    with pytest.raises(HookCallError, match=r"'drops', hook attention_fn, layer 0: turned 5 keys into 4"):
        tiny_model({"drops": hook_mixin("attention_fn", attention_fn)})(IDS)


def test_wrappers_may_pass_the_arguments_on_by_keyword() -> None:
    @sat.non_conflict
    def attention_fn(self: Any, q: Any, k: Any, v: Any, mask: Any, dropout_fn: Any, *, old_impl: Any, **kw: Any) -> Any:
        return old_impl(q=q, k=k, v=v, mask=mask, dropout_fn=dropout_fn, **kw)

    @sat.non_conflict
    def linear_forward(self: Any, x: Any, linear: Any, name: Any, *, old_impl: Any, **kw: Any) -> Any:
        return old_impl(x=x, linear=linear, name=name, **kw)

    mixins = {
        f"{hook}-{number}": hook_mixin(hook, method)
        for hook, method in {"attention_fn": attention_fn, "linear_forward": linear_forward}.items()
        for number in range(2)
    }
    assert torch.equal(logits(tiny_model(mixins)), logits(tiny_model()))


# Removal


@pytest.mark.parametrize(
    "make",
    [
        lambda model: ZeroMLP(),
        lambda model: Scale(),
        lambda model: sat.PrefixTuningMixin.for_model(model),
        lambda model: sat.LMHeadMixin.for_model(model),
        lambda model: sat.MixtureOfExpertsMixin.for_model(model, num_experts=2),
        lambda model: sat.LearnedPositionsMixin.for_model(model),
    ],
)
def test_del_mixin_restores_exactly_the_model_from_before(make: Callable[[Any], sat.BaseMixin]) -> None:
    model = tiny_model({"rotary": sat.RotaryMixin.for_config(tiny_model().config)})
    before, state, chains = logits(model), {k: v.clone() for k, v in model.state_dict().items()}, model.explain()
    accepted, attributes = model.accepted, set(vars(model))
    mixin = make(model)
    model.add_mixin("new", mixin)
    assert not torch.equal(logits(model), before)
    assert model.del_mixin("new") is mixin
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert (model.explain(), model.accepted, set(vars(model))) == (chains, accepted, attributes)
    for hook in HOOKS:
        untouched = tiny_model().hooks
        if hook not in ("position_embedding_forward", "attention_fn"):
            assert getattr(model.hooks, hook) is getattr(untouched, hook)


@pytest.mark.parametrize(
    ("name", "named"), [("prefix-tunning", "Did you mean 'prefix-tuning'.*The model has: prefix-tuning"), ("", "''")]
)
@pytest.mark.parametrize("action", ["del_mixin", "get_mixin"])
def test_a_mixin_that_is_not_there_is_named_with_the_nearest(action: str, name: str, named: str) -> None:
    model = tiny_model()
    model.add_mixin("prefix-tuning", sat.PrefixTuningMixin.for_model(model))
    with pytest.raises(HookDefinitionError, match=named):
        getattr(model, action)(name)


# Names


def test_a_name_that_is_taken_is_refused_with_the_cure() -> None:
    model = tiny_model({"scale": Scale()})
    hooks = model.hooks
    with pytest.raises(HookConflictError, match=r"there is a mixin 'scale' already.*del_mixin\('scale'\)"):
        model.add_mixin("scale", Scale(3.0))
    assert model.hooks is hooks


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a.b",
        "../up",
        "a/b",
        "a b",
        "ä",
        "a\0",
        "a\n",
        "keys",
        "items",
        "pop",
        "forward",
        "training",
        "BaseModel",
        3,
    ],
)
def test_a_name_that_cannot_be_in_a_state_dict_is_refused(name: Any) -> None:
    model = tiny_model()
    with pytest.raises(HookDefinitionError, match="mixin name"):
        model.add_mixin(name, Scale())
    assert not model.mixins


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), nn.Linear, None, "scale"])
def test_a_thing_that_is_no_mixin_is_refused(thing: Any) -> None:
    with pytest.raises(HookDefinitionError, match=rf"mixin 'x' is a {type(thing).__name__}; .*sat\.BaseMixin"):
        tiny_model().add_mixin("x", thing)


def test_a_class_in_place_of_a_mixin_is_refused_with_what_to_write() -> None:
    with pytest.raises(HookDefinitionError, match=r"'x' is the class Scale; add an instance: Scale.for_model"):
        tiny_model().add_mixin("x", Scale)


def test_one_mixin_under_two_names_and_one_of_another_size_are_refused() -> None:
    model, mixin = tiny_model(), Scale()
    model.add_mixin("x", mixin)
    with pytest.raises(HookConflictError, match="'y' is the very mixin that is here as 'x'"):
        model.add_mixin("y", mixin)
    with pytest.raises(HookDefinitionError, match="mixin 'p' has 3 layers and the model 2"):
        model.add_mixin("p", sat.PrefixTuningMixin(3, 2, 8))


def test_what_a_wrapper_takes_by_name_or_does_not_pass_on_still_reaches_the_hooks_inside() -> None:
    seen: list[Any] = []

    @sat.non_conflict
    def forgetful(self: Any, hidden_states: Tensor, mask: Any, layer_id: int, *, old_impl: Hook, **kw: Any) -> Any:
        return old_impl(hidden_states, mask)

    def mlp_forward(self: Any, hidden_states: Tensor, *, image: Any = None, **kw_args: Any) -> Tensor:
        seen.append((image, kw_args["layer_id"]))
        return hidden_states

    model = tiny_model()
    model.add_mixin("inner", hook_mixin("mlp_forward", mlp_forward))
    model.add_mixin("outer", hook_mixin("layer_forward", forgetful))
    model(tiny_ids(), image="pixels")
    assert seen == [("pixels", 0), ("pixels", 1)]


def test_cross_attention_stays_cross_attention_under_a_wrapper_that_says_nothing_of_it() -> None:
    @sat.non_conflict
    def attention_fn(
        self: Any, q: Any, k: Any, v: Any, mask: Any, dropout_fn: Any, *, old_impl: Hook, **kw: Any
    ) -> Any:
        return old_impl(q, k, v, mask, dropout_fn)

    model = tiny_family_model("t5")
    inputs = {"input_ids": tiny_ids(length=6), "decoder_input_ids": tiny_ids()}
    before = model(**inputs)[0]
    model.add_mixin("silent", hook_mixin("attention_fn", attention_fn), part="decoder")
    assert torch.equal(model(**inputs)[0], before)


def test_a_part_of_a_model_without_parts_is_refused() -> None:
    with pytest.raises(HookDefinitionError, match=r"part='decoder': this model has no parts"):
        tiny_model().add_mixin("x", Scale(), part="decoder")


# What hooks return

IN_LAYER = ["layer_forward", "attention_forward", "attention_fn", "mlp_forward", "linear_forward"]
WRONG: dict[str, tuple[Any, str]] = {
    "None": (None, "returned None"),
    "a tuple": ((torch.zeros(1),), "returned tuple instead of a tensor"),
    "a number": (1.0, "returned float instead of a tensor"),
    "a wrong shape": (torch.zeros(3, 2, 1), r"returned \[3, 2, 1\] where \["),
}


def returns(value: Any, hook: str) -> sat.BaseMixin:
    return hook_mixin(hook, lambda self, *arguments, **kw_args: value)


@pytest.mark.parametrize("hook", IN_LAYER)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_result_names_mixin_hook_and_layer(hook: str, wrong: str) -> None:
    value, problem = WRONG[wrong]
    model = tiny_model({"bad": returns(value, hook)})
    with pytest.raises(HookCallError, match=f"mixin 'bad', hook {hook}, layer 0: {problem}"):
        model(IDS)


@pytest.mark.parametrize(
    ("hook", "value", "problem"),
    [
        ("word_embedding_forward", None, "returned None"),
        ("word_embedding_forward", 3, "returned int instead of a tensor"),
        ("word_embedding_forward", torch.zeros(5, 16), r"returned \[5, 16\] where \[b, s, 16\]"),
        ("position_embedding_forward", "none", "returned str instead of a tensor"),
        ("position_embedding_forward", torch.zeros(5, 16), r"returned \[5, 16\] where \[b, s, 16\]"),
        ("final_forward", None, "returned None"),
    ],
)
def test_a_wrong_result_outside_the_layers_names_mixin_and_hook(hook: str, value: Any, problem: str) -> None:
    with pytest.raises(HookCallError, match=f"mixin 'bad', hook {hook}: {problem}"):
        tiny_model({"bad": returns(value, hook)})(IDS)


@pytest.mark.parametrize("hook", ["word_embedding_forward", "position_embedding_forward"])
def test_embeddings_of_another_width_or_length_are_refused_by_the_hook_that_gave_them(hook: str) -> None:
    with pytest.raises(HookCallError, match=rf"'bad', hook {hook}: returned \[2, 5, 7\].*16"):
        tiny_model({"bad": returns(torch.zeros(2, 5, 7), hook)})(IDS)


def test_positions_of_another_length_than_the_tokens_are_refused() -> None:
    with pytest.raises(
        HookCallError, match=r"position_embedding_forward gave \[1, 4, 16\] for word embeddings \[2, 5, 16\]"
    ):
        tiny_model({"bad": returns(torch.zeros(1, 4, 16), "position_embedding_forward")})(IDS)


def test_a_wrong_result_in_a_later_layer_names_that_layer_and_not_a_wrapper_around_it() -> None:
    def mlp_forward(self: Any, hidden_states: Tensor, *, layer_id: int, **kw_args: Any) -> Tensor | None:
        return hidden_states if layer_id == 0 else None

    model = tiny_model(
        {"bad": hook_mixin("mlp_forward", mlp_forward), "around": Scale(), "all": sat.HiddenStatesMixin()}
    )
    with pytest.raises(HookCallError, match="mixin 'bad', hook mlp_forward, layer 1: returned None") as caught:
        model(IDS)
    assert not notes(caught.value)


def test_position_embeddings_may_be_none() -> None:
    model = tiny_model({"none": returns(None, "position_embedding_forward")})
    assert torch.equal(logits(model), logits(tiny_model()))


# What hooks raise


class BoomError(RuntimeError):
    pass


class Bomb(sat.BaseMixin):
    """Raises in layer 1 while it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = True

    @sat.non_conflict
    def attention_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        result: Tensor = old_impl(hidden_states, mask, **kw_args)
        if self.armed and kw_args["layer_id"] == 1:
            raise BoomError("boom")
        return result


def check_bomb(model: Any, call: Callable[..., Any]) -> None:
    bomb = model.mixins["bomb"]
    bomb.armed = False
    clean = call(IDS)[0].detach().clone()
    bomb.armed = True
    for _ in range(2):
        with pytest.raises(BoomError, match="boom") as caught:
            call(IDS)
        assert notes(caught.value) == ["in mixin 'bomb', hook attention_forward, layer 1"]
    bomb.armed = False
    torch.testing.assert_close(call(IDS)[0], clean, rtol=0, atol=0)


def bombed() -> sat.BaseModel:
    return tiny_model({"bomb": Bomb(), "scale": Scale(), "states": sat.HiddenStatesMixin()})


def test_a_mixin_that_raises_signs_the_original_exception_and_the_next_call_works() -> None:
    model = bombed()
    check_bomb(model, model)


def test_a_mixin_that_raises_under_activation_checkpointing_signs_the_exception_too() -> None:
    model = bombed().enable_activation_checkpointing()
    check_bomb(model, model)


def test_a_mixin_that_raises_while_a_layer_is_recomputed_signs_the_exception_too() -> None:
    model = bombed().enable_activation_checkpointing()
    bomb = model.mixins["bomb"]
    bomb.armed = False
    loss = model(IDS)[0].sum()
    bomb.armed = True
    with pytest.raises(BoomError, match="boom") as caught:
        loss.backward()
    assert notes(caught.value) == ["in mixin 'bomb', hook attention_forward, layer 1"]
    bomb.armed = False
    model(IDS)[0].sum().backward()


# torch itself looks at .grad where it resumes after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("backend", "way"), [("eager", "torch.compile"), ("aot_eager", "model.compile")])
def test_a_mixin_that_raises_in_a_compiled_region_signs_the_exception_and_the_next_call_works(
    backend: str, way: str
) -> None:
    torch.compiler.reset()
    model = bombed()
    if way == "model.compile":
        model.compile(backend=backend)
    check_bomb(model, torch.compile(model, backend=backend) if way == "torch.compile" else model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_wrong_result_in_a_compiled_region_names_the_mixin(backend: str) -> None:
    torch.compiler.reset()
    model = torch.compile(tiny_model({"bad": returns(None, "mlp_forward")}), backend=backend)
    with pytest.raises(HookCallError, match="mixin 'bad', hook mlp_forward, layer 0: returned None"):
        model(IDS)


def test_an_exception_that_a_mixin_of_several_raises_is_signed_once_by_the_innermost() -> None:
    def mlp_forward(self: Any, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        raise BoomError("deep")

    model = tiny_model(
        {"deep": hook_mixin("mlp_forward", mlp_forward), "scale": Scale(), "states": sat.HiddenStatesMixin()}
    )
    with pytest.raises(BoomError) as caught:
        model(IDS)
    assert notes(caught.value) == ["in mixin 'deep', hook mlp_forward, layer 0"]


def test_an_exception_in_a_hook_outside_the_layers_is_signed_without_a_layer() -> None:
    def final_forward(self: Any, hidden_states: Tensor, **kw_args: Any) -> Tensor:
        raise BoomError("late")

    with pytest.raises(BoomError) as caught:
        tiny_model({"head": hook_mixin("final_forward", final_forward)})(IDS)
    assert notes(caught.value) == ["in mixin 'head', hook final_forward"]


def test_a_model_compiled_as_a_whole_has_no_graph_break_with_mixins_of_every_stage() -> None:
    torch.compiler.reset()
    config = tiny_model().config
    model = tiny_model(
        {
            "rotary": sat.RotaryMixin.for_config(config),
            "prefix": sat.PrefixTuningMixin.for_config(config),
            "alibi": sat.ALiBiMixin.for_config(config),
            "states": sat.HiddenStatesMixin(),
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled), logits(model), rtol=0, atol=0)
