"""Selective recomputation: the same gradients, without a product computed twice."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swissarmy.backbone.model import Model
from swissarmy.backbone.recomputation import KEPT
from swissarmy.testing import tiny_inputs, tiny_model

FAMILIES = ["gpt2", "llama", "t5", "vit"]


class Counting(TorchDispatchMode):
    """Counts the operators that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def backward_calls(model: Model) -> Counter[str]:
    """The operators of a backward pass; the gradients are in the model."""
    model.zero_grad()
    loss = model(**tiny_inputs(model))[0].square().sum()
    with Counting() as counting:
        loss.backward()
    return counting.calls


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_and_no_product_or_attention_runs_again(family: str) -> None:
    model = tiny_model(family).train()
    plain = backward_calls(model)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    full = backward_calls(model.enable_activation_checkpointing())
    selective = backward_calls(model.enable_activation_checkpointing(selective=True))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    for calls, again in ((full, True), (selective, False)):
        products = {name: calls[name] - plain[name] for name in KEPT if calls[name] != plain[name]}
        assert bool(products) is again, products
    assert sum(plain.values()) < sum(selective.values()) < sum(full.values()), "cheap operators do run again"


def test_it_can_be_turned_off_and_holds_for_every_part() -> None:
    model = tiny_model("t5").enable_activation_checkpointing(2, selective=True)
    assert all(part.checkpoint_selective and part.checkpoint_every == 2 for part in model.parts.values())
    model.enable_activation_checkpointing(0)
    assert not any(part.checkpoint_selective or part.checkpoint_every for part in model.parts.values())


def test_only_every_nth_layer_is_recomputed() -> None:
    model = tiny_model("gpt2").train()
    plain, half = backward_calls(model), backward_calls(model.enable_activation_checkpointing(2))
    full = backward_calls(model.enable_activation_checkpointing(1))
    product = "aten::addmm"
    assert full[product] - plain[product] == 2 * (half[product] - plain[product]) > 0
