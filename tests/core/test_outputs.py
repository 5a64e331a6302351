"""What hooks hand on: to the caller, to the next layer, from the embeddings to every layer; with gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swissarmy as sat
from swissarmy.core.errors import HookCallError
from swissarmy.core.hooks import Hook
from swissarmy.core.outputs import Outputs
from tests.helpers import hook_mixin, tiny_ids, tiny_model

IDS = tiny_ids()


class Recorder(sat.BaseMixin):
    """Notes which of some keys each layer and the head find in their keywords."""

    def __init__(self, *keys: str) -> None:
        super().__init__()
        self.keys = keys
        self.seen: list[tuple[int | str, tuple[Any, ...]]] = []

    @sat.non_conflict
    def layer_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        self.seen.append((kw_args["layer_id"], tuple(kw_args.get(key) for key in self.keys)))
        result: Tensor = old_impl(hidden_states, mask, **kw_args)
        return result

    @sat.non_conflict
    def final_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Any:
        self.seen.append(("final", tuple(kw_args.get(key) for key in self.keys)))
        return old_impl(hidden_states, **kw_args)


def writer(hook: str, record: str, key: str, value: Any, *, layers: tuple[int, ...] | None = None) -> sat.BaseMixin:
    """A mixin that writes one key in one hook (in some layers), and changes nothing."""

    @sat.non_conflict
    def method(self: Any, *arguments: Any, old_impl: Hook, **kw_args: Any) -> Any:
        if layers is None or kw_args["layer_id"] in layers:
            kw_args[record][key] = value
        return old_impl(*arguments, **kw_args)

    return hook_mixin(hook, method)


IN_LAYER = ["layer_forward", "attention_forward", "attention_fn", "mlp_forward", "linear_forward"]


@pytest.mark.parametrize("hook", IN_LAYER)
def test_output_this_layer_of_any_hook_reaches_the_caller_in_its_layers_place(hook: str) -> None:
    model = tiny_model({"w": writer(hook, "output_this_layer", "mine", "value", layers=(1,))}, num_layers=3)
    _, *outputs = model(IDS)
    assert outputs == [{}, {"mine": "value"}, {}]


def test_there_is_one_dict_a_layer_even_where_nothing_is_written() -> None:
    assert tiny_model(num_layers=3)(IDS)[1:] == ({}, {}, {})


def test_what_the_caller_gets_is_fresh_in_every_call() -> None:
    model = tiny_model({"states": sat.HiddenStatesMixin()})
    first = model(IDS)[1]
    first["mine"] = 1
    assert "mine" not in model(IDS)[1]
    assert model(IDS)[1] is not first


@pytest.mark.parametrize("hook", IN_LAYER)
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_output_cross_layer_reaches_the_next_layer_and_no_further(hook: str, checkpointing: int) -> None:
    recorder = Recorder("note")
    model = tiny_model(
        {"w": writer(hook, "output_cross_layer", "note", "hello", layers=(1,)), "r": recorder}, num_layers=4
    ).enable_activation_checkpointing(checkpointing)
    model(IDS)
    expected = [(0, None), (1, None), (2, "hello"), (3, None), ("final", None)]
    assert recorder.seen == [(where, (value,)) for where, value in expected]


def test_output_cross_layer_of_the_last_layer_reaches_the_head() -> None:
    recorder = Recorder("note")
    tiny_model({"w": writer("mlp_forward", "output_cross_layer", "note", 7, layers=(1,)), "r": recorder})(IDS)
    assert recorder.seen == [(0, (None,)), (1, (None,)), ("final", (7,))]


def test_output_cross_layer_goes_on_where_each_layer_emits_it_again() -> None:
    class Carry(sat.BaseMixin):
        @sat.non_conflict
        def layer_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Any:
            kw_args["output_cross_layer"]["count"] = kw_args.pop("count", 0) + 1
            return old_impl(hidden_states, mask, **kw_args)

    recorder = Recorder("count")
    tiny_model({"carry": Carry(), "r": recorder}, num_layers=3)(IDS)
    assert recorder.seen == [(0, (None,)), (1, (1,)), (2, (2,)), ("final", (3,))]


def test_every_hook_of_the_next_layer_finds_the_key() -> None:
    found = []

    def look(hook: str) -> sat.BaseMixin:
        @sat.non_conflict
        def method(self: Any, *arguments: Any, old_impl: Hook, **kw_args: Any) -> Any:
            if "note" in kw_args:
                found.append(hook)
            return old_impl(*arguments, **kw_args)

        return hook_mixin(hook, method)

    mixins = {hook.replace("_", "-"): look(hook) for hook in IN_LAYER}
    tiny_model({"w": writer("layer_forward", "output_cross_layer", "note", 1, layers=(0,)), **mixins})(IDS)
    assert set(found) == set(IN_LAYER)


@pytest.mark.parametrize("hook", ["word_embedding_forward", "position_embedding_forward"])
@pytest.mark.parametrize("record", ["output_cross_layer", "cross_layer_output"])
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_what_an_embedding_hook_hands_on_reaches_every_layer_and_the_head(
    hook: str, record: str, checkpointing: int
) -> None:
    recorder = Recorder("image")
    model = tiny_model({"w": writer(hook, record, "image", "pixels"), "r": recorder}, num_layers=3)
    model.enable_activation_checkpointing(checkpointing)(IDS)
    assert recorder.seen == [(where, ("pixels",)) for where in (0, 1, 2, "final")]


def test_a_position_hook_sees_what_a_word_hook_handed_on() -> None:
    class Both(sat.BaseMixin):
        @sat.non_conflict
        def word_embedding_forward(self, input_ids: Tensor, *, old_impl: Hook, **kw_args: Any) -> Any:
            kw_args["output_cross_layer"]["grid"] = (1, 5)
            return old_impl(input_ids, **kw_args)

        def position_embedding_forward(self, position_ids: Tensor, **kw_args: Any) -> None:
            assert kw_args["output_cross_layer"]["grid"] == kw_args["cross_layer_output"]["grid"] == (1, 5)

    tiny_model({"both": Both()})(IDS)


# Gradients


class Messenger(sat.BaseMixin):
    """Hands trained tensors on in all three ways, and uses what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.full((1, 1, 16), 0.5))
        self.note = nn.Parameter(torch.full((1, 1, 16), 0.25))
        self.runs = 0

    @sat.non_conflict
    def word_embedding_forward(self, input_ids: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        kw_args["cross_layer_output"]["image"] = self.image.sin()
        result: Tensor = old_impl(input_ids, **kw_args)
        return result

    @sat.non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, **kw_args: Any) -> Tensor:
        self.runs += 1
        hidden_states = hidden_states + kw_args["image"]
        if "note" in kw_args:
            hidden_states = hidden_states * kw_args.pop("note")
        kw_args["output_cross_layer"]["note"] = hidden_states.mean(1, keepdim=True) * self.note
        result: Tensor = old_impl(hidden_states, **kw_args)
        kw_args["output_this_layer"]["square"] = result.square()
        return result


def gradients(every: int, *, dropout: float = 0.0) -> tuple[list[Tensor], list[dict[str, Any]], int]:
    messenger = Messenger()
    model = tiny_model({"messenger": messenger}, num_layers=3, hidden_dropout=dropout).train()
    model.enable_activation_checkpointing(every)
    torch.manual_seed(3)
    logits, *outputs = model(IDS)
    (logits.square().mean() + sum(output["square"].mean() for output in outputs)).backward()
    return [parameter.grad for parameter in model.parameters()], outputs, messenger.runs


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_through_all_outputs_are_the_same_with_and_without_activation_checkpointing(
    every: int, dropout: float
) -> None:
    plain, outputs, runs = gradients(0, dropout=dropout)
    recomputed, again, more_runs = gradients(every, dropout=dropout)
    assert (runs, more_runs) == (3, 6 if every == 1 else 5)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain)
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for one, other in zip(outputs, again, strict=True):
        assert list(one) == list(other) == ["square"]
        assert torch.equal(one["square"], other["square"])


def test_an_output_under_recomputation_is_one_value_that_stays_the_same_after_the_backward_pass() -> None:
    model = tiny_model({"m": Messenger()}).enable_activation_checkpointing()
    logits, first, _ = model(IDS)
    value, copy = first["square"], first["square"].detach().clone()
    logits.sum().backward(retain_graph=True)
    assert first["square"] is value
    assert list(first) == ["square"]
    assert torch.equal(value, copy)
    value.sum().backward()


def test_gradients_of_an_output_alone_are_the_same_under_recomputation() -> None:
    def alone(every: int) -> dict[str, Tensor | None]:
        model = tiny_model({"m": Messenger()}, num_layers=3).enable_activation_checkpointing(every)
        model(IDS)[2]["square"].mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, recomputed = alone(0), alone(1)
    for name, gradient in plain.items():
        if gradient is None:
            assert recomputed[name] is None or not recomputed[name].any(), name  # type: ignore[union-attr]
        else:
            torch.testing.assert_close(recomputed[name], gradient, rtol=0, atol=0)


# Clashes


@pytest.mark.parametrize("record", ["output_this_layer", "output_cross_layer"])
def test_two_mixins_that_write_one_key_are_both_named(record: str) -> None:
    model = tiny_model({name: writer("mlp_forward", record, "key", name) for name in ("first", "second")})
    with pytest.raises(HookCallError, match=rf"{record}\['key'\] is written by 'second' and by 'first': rename"):
        model(IDS)


def test_two_mixins_may_write_one_key_in_different_layers() -> None:
    mixins = {
        name: writer("mlp_forward", "output_this_layer", "key", name, layers=(layer,))
        for layer, name in enumerate(("first", "second"))
    }
    assert tiny_model(mixins)(IDS)[1:] == ({"key": "first"}, {"key": "second"})


def test_two_embedding_hooks_that_write_one_key_are_both_named() -> None:
    model = tiny_model(
        {
            "words": writer("word_embedding_forward", "output_cross_layer", "key", 1),
            "positions": writer("position_embedding_forward", "cross_layer_output", "key", 2),
        }
    )
    with pytest.raises(HookCallError, match=r"output_cross_layer\['key'\] is written by 'words' and by 'positions'"):
        model(IDS)


def test_a_mixin_may_change_its_own_value() -> None:
    model = tiny_model({"states": writer("linear_forward", "output_this_layer", "last", 1)})
    assert model(IDS)[1] == {"last": 1}


@pytest.mark.parametrize("hook", ["mlp_forward", "word_embedding_forward"])
def test_a_mixin_that_writes_what_the_caller_gave_is_named_beside_the_caller(hook: str) -> None:
    mixin = writer(hook, "output_cross_layer", "image", 1)
    type(mixin).accepts = ("image",)
    with pytest.raises(HookCallError, match=r"kw_args\['image'\] is written by 'the caller' and by 'mine'"):
        tiny_model({"mine": mixin})(IDS, image=2)


def test_a_layer_key_that_an_embedding_hook_wrote_names_both() -> None:
    model = tiny_model(
        {
            "embeds": writer("word_embedding_forward", "output_cross_layer", "key", 1),
            "layers": writer("mlp_forward", "output_cross_layer", "key", 2),
        }
    )
    with pytest.raises(HookCallError, match=r"kw_args\['key'\] is written by 'embeds' and by 'layers': rename"):
        model(IDS)


@pytest.mark.parametrize("key", ["hidden_states", "mask", "q", "layer_id", "layer", "mems", "position_ids", "hooks"])
@pytest.mark.parametrize("hook", ["mlp_forward", "position_embedding_forward"])
def test_a_key_that_hooks_are_given_anyway_cannot_be_handed_on(key: str, hook: str) -> None:
    model = tiny_model({"mine": writer(hook, "output_cross_layer", key, 1)})
    with pytest.raises(HookCallError, match=rf"output_cross_layer\['{key}'\], written by 'mine'.*rename the key"):
        model(IDS)


def test_such_a_key_may_go_to_the_caller() -> None:
    model = tiny_model({"mine": writer("mlp_forward", "output_this_layer", "hidden_states", 1)})
    assert model(IDS)[1] == {"hidden_states": 1}


# The record itself


def test_a_record_behaves_as_a_dict_that_knows_its_writers() -> None:
    outputs = Outputs.empty("output_this_layer")
    mine, yours = outputs.written_by("mine"), outputs.written_by("yours")
    mine["a"] = 1
    mine["a"] = 2
    assert (dict(yours), len(outputs), list(outputs), yours["a"], "a" in yours) == ({"a": 2}, 1, ["a"], 2, True)
    with pytest.raises(HookCallError, match="'mine' and by 'yours'"):
        yours["a"] = 3
    assert outputs["a"] == 2
    del yours["a"]
    yours["a"] = 4
    assert dict(mine) == {"a": 4}
    with pytest.raises(KeyError):
        outputs["b"]
