"""Keywords of a call: those that some hook reads are accepted, any other is an error that helps."""

from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.core.errors import HookCallError
from swissarmy.core.hooks import Hook
from tests.helpers import hook_mixin, tiny_ids, tiny_model

IDS = tiny_ids()
ALWAYS = {"attention_bias", "attention_softcap"}


class Image(sat.BaseMixin):
    accepts = ("image", "image_scale")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    @sat.non_conflict
    def layer_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Hook, **kw_args: Any) -> Any:
        self.seen.append(kw_args.get("image"))
        return old_impl(hidden_states, mask, **kw_args)


def test_an_unknown_keyword_lists_those_that_are_accepted_and_the_nearest() -> None:
    model = tiny_model({"image": Image(), "types": sat.TokenTypesMixin(2, 16)})
    with pytest.raises(HookCallError) as caught:
        model(IDS, token_type_id=None)
    message = str(caught.value)
    assert "no hook of this model accepts the keyword 'token_type_id'. Did you mean 'token_type_ids'?" in message
    for name in ("image", "image_scale", "token_type_ids", "padding_mask", "position_ids"):
        assert name in message.partition("Accepted: ")[2]
    assert "`accepts`" in message


def test_a_plain_backbone_accepts_only_what_its_kernel_reads() -> None:
    assert tiny_model().accepted == ALWAYS
    with pytest.raises(HookCallError, match="'labels'"):
        tiny_model()(IDS, labels=IDS)


def test_a_keyword_in_accepts_reaches_the_hooks() -> None:
    image = Image()
    tiny_model({"image": image})(IDS, image="pixels")
    assert image.seen == ["pixels", "pixels"]


@pytest.mark.parametrize("keyword_only", [True, False])
def test_a_keyword_in_a_signature_is_accepted(keyword_only: bool) -> None:
    seen = []

    def by_name(self: Any, hidden_states: Tensor, scale: float = 1.0, **kw_args: Any) -> Tensor:
        seen.append(scale)
        return hidden_states

    def by_keyword(self: Any, hidden_states: Tensor, *, scale: float = 1.0, **kw_args: Any) -> Tensor:
        seen.append(scale)
        return hidden_states

    model = tiny_model({"scaled": hook_mixin("mlp_forward", by_keyword if keyword_only else by_name)})
    assert model.accepted == {"scale"} | ALWAYS
    model(IDS, scale=3.0)
    model(IDS)
    assert seen == [3.0, 3.0, 1.0, 1.0]


def test_a_keyword_that_a_signature_demands_is_accepted_and_missed_by_the_mixins_name() -> None:
    def mlp_forward(self: Any, hidden_states: Tensor, *, image: Tensor, **kw_args: Any) -> Tensor:
        return hidden_states + image

    model = tiny_model({"needs": hook_mixin("mlp_forward", mlp_forward)})
    model(IDS, image=torch.zeros(1))
    with pytest.raises(TypeError, match="'image'") as caught:
        model(IDS)
    assert caught.value.__notes__ == ["in mixin 'needs', hook mlp_forward, layer 0"]


def test_a_keyword_that_a_wrapper_hides_from_its_inner_hook_is_still_accepted() -> None:
    @sat.non_conflict
    def wrapper(self: Any, hidden_states: Tensor, *, old_impl: Hook, gate: float = 0.0, **kw_args: Any) -> Any:
        return old_impl(hidden_states, **kw_args) * gate

    model = tiny_model({"gate": hook_mixin("mlp_forward", wrapper)})
    assert not torch.equal(model(IDS, gate=1.0)[0], model(IDS)[0])


@pytest.mark.parametrize("name", ["x", "others", "arguments", "old_impl", "layer_id", "mems_of_mine"])
def test_names_that_a_signature_only_calls_its_arguments_by_are_not_keywords(name: str) -> None:
    @sat.non_conflict
    def wrapper(self: Any, x: Tensor, *arguments: Any, old_impl: Hook, layer_id: int, **others: Any) -> Any:
        return old_impl(x, layer_id=layer_id, **others)

    model = tiny_model({"odd": hook_mixin("mlp_forward", wrapper)})
    with pytest.raises(HookCallError, match=f"accepts the keyword '{name}'.*Accepted: attention_bias"):
        model(IDS, **{name: 1})


@pytest.mark.parametrize("name", ["transformer", "hooks", "layer", "layer_id", "output_this_layer", "hidden_states"])
def test_what_the_backbone_gives_its_hooks_cannot_come_from_the_caller(name: str) -> None:
    with pytest.raises(HookCallError, match=f"accepts the keyword '{name}'"):
        tiny_model()(IDS, **{name: 1})


def test_accepted_keywords_go_when_their_mixin_goes() -> None:
    model = tiny_model({"image": Image()})
    model.del_mixin("image")
    with pytest.raises(HookCallError, match="'image'"):
        model(IDS, image=1)


def test_a_hook_on_the_model_class_accepts_keywords_too() -> None:
    class Mine(sat.BaseModel):
        accepts = ("extra",)

        @sat.non_conflict
        def mlp_forward(self, hidden_states: Tensor, *, old_impl: Hook, bonus: float = 0.0, **kw_args: Any) -> Any:
            return old_impl(hidden_states, **kw_args) + bonus

    model = Mine(tiny_model().config)
    assert {"extra", "bonus"} <= model.accepted
    model(IDS, extra=1, bonus=2.0)


def test_cross_attention_brings_its_keywords() -> None:
    assert {"encoder_outputs", "cross_attention_mask"} <= tiny_model(cross_attention=True).accepted
    with pytest.raises(HookCallError, match="'encoder_outputs'"):
        tiny_model()(IDS, encoder_outputs=torch.zeros(2, 3, 16))
