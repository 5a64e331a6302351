"""Losses of tokens without their logits: the same numbers and gradients, on one process and on two."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import swissarmy as sat
from swissarmy.nn import token_losses as module
from swissarmy.nn.token_losses import token_losses
from swissarmy.testing import run_distributed, tiny_inputs, tiny_model

V, H = 40, 8


def example(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head's weight, and targets of which some are not scored."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(3, 7, H, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (3, 7), generator=generator)
    targets[0, 2:5] = targets[2, 0] = -100
    return states, weight, targets


def expected(states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = states @ weight.t()
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return each, logits.argmax(-1) == targets


@pytest.mark.parametrize("at_once", [V, 5 * V, 1 << 25])
@pytest.mark.parametrize("plain", [True, False])
def test_losses_and_gradients_are_those_of_all_logits(
    at_once: int, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 16)
    states, weight, targets = example()
    found = token_losses(states, targets, lambda x: x @ weight.t(), vocabulary=V, weight=weight if plain else None)
    (3 * found.total).backward()
    gradients = states.grad, weight.grad
    other_states, other_weight, _ = example()
    each, correct = expected(other_states, other_weight, targets)
    (3 * each.sum()).backward()
    torch.testing.assert_close(found.each, each.detach())
    torch.testing.assert_close(found.total, each.sum())
    assert torch.equal(found.correct, correct & (targets >= 0))
    for ours, theirs in zip(gradients, (other_states.grad, other_weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["states", "weight", "both"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    states, weight, targets = example()
    states.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "states")
    found = token_losses(states, targets, lambda x: x, vocabulary=V, weight=weight)
    assert found.total.requires_grad == (frozen != "both")
    if frozen != "both":
        found.total.backward()
    assert (states.grad is None) == (frozen != "weight")
    assert (weight.grad is None) == (frozen != "states")


def test_without_gradients_the_head_is_all_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[int] = []

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        products.append(len(x))
        return F.linear(x, weight)

    monkeypatch.setattr(module, "linear", counted)
    states, weight, targets = example()
    with torch.no_grad():
        found = token_losses(states, targets, lambda x: x, vocabulary=V, weight=weight)
    assert products == [int((targets >= 0).sum())]
    torch.testing.assert_close(found.each, expected(states, weight, targets)[0].detach())


def test_nothing_scored_is_zero_with_zero_gradient() -> None:
    states, weight, targets = example()
    found = token_losses(states, torch.full_like(targets, -100), lambda x: x, vocabulary=V, weight=weight)
    found.total.backward()
    assert found.total == 0
    assert not found.correct.any()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_gradients_are_taken_once() -> None:
    states, weight, targets = example()
    total = token_losses(states, targets, lambda x: x, vocabulary=V, weight=weight).total
    total.backward(retain_graph=True)
    with pytest.raises(sat.HookCallError, match="can be taken once"):
        total.backward()


def test_reduced_precision_is_summed_in_float32() -> None:
    states, weight, targets = example(torch.bfloat16)
    found = token_losses(states, targets, lambda x: x, vocabulary=V, weight=weight)
    found.total.backward()
    assert found.each.dtype == torch.float32
    assert states.grad is not None
    assert states.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "bert", "roberta", "t5", "swissarmy"])
def test_a_model_called_with_targets_gives_the_losses_of_its_logits(family: str) -> None:
    model = tiny_model(family).double()
    inputs = tiny_inputs(model)
    targets = torch.randint(3, 61, inputs.get("decoder_input_ids", inputs["input_ids"]).shape)
    targets[:, ::3] = -100
    losses, *outputs_per_layers = model(**inputs, targets=targets)
    losses.total.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    logits, *others = model(**inputs)
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    each.sum().backward()
    torch.testing.assert_close(losses.each, each.detach())
    assert len(outputs_per_layers) == len(others)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad)


def test_a_soft_cap_on_logits_takes_part() -> None:
    model = tiny_model("gpt2").double()
    model.add_mixin("cap", sat.LogitSoftcapMixin(2.0))
    inputs = tiny_inputs(model)
    logits = model(**inputs)[0]
    each = F.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten(), reduction="none")
    torch.testing.assert_close(model(**inputs, targets=inputs["input_ids"])[0].each.flatten(), each)


def test_targets_of_another_shape_and_heads_without_a_vocabulary_are_refused() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(sat.HookCallError, match=r"targets are \[2, 3\] and the model's positions \[2, 9\]"):
        model(**tiny_inputs(model), targets=torch.zeros(2, 3, dtype=torch.long))
    model = tiny_model("vit")
    with pytest.raises(sat.HookCallError, match="needs logits"):
        model(**tiny_inputs(model), targets=torch.zeros(2, 17, dtype=torch.long))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("target", [61, -1])
def test_targets_outside_the_vocabulary_are_refused(family: str, target: int) -> None:
    model = tiny_model(family)
    targets = torch.full((2, 9), -100)
    targets[1, 3] = target
    with pytest.raises(sat.HookCallError, match=rf"targets hold {target}; this model's vocabulary has 61"):
        model(**tiny_inputs(model), targets=targets)


def shared(rank: int, world_size: int) -> list[Any]:
    """Loss, losses and gradients where two processes share the vocabulary, and where they share nothing."""
    mesh = init_device_mesh("cpu", (world_size,))
    found = []
    for placement in (Shard(0), Replicate()):
        states, weight, targets = example()
        spread = distribute_tensor(weight.detach(), mesh, [placement]).requires_grad_()

        def head(x: Tensor, spread: Tensor = spread, mesh: Any = mesh) -> Tensor:
            return DTensor.from_local(x, mesh, [Replicate()]) @ spread.t()

        losses = token_losses(states, targets, head, vocabulary=V)
        losses.total.backward()
        found.append((losses.total.detach(), losses.each, losses.correct, states.grad, spread.grad.full_tensor()))
    return found


def test_a_vocabulary_that_processes_share_gives_the_same() -> None:
    states, weight, targets = example()
    each, correct = expected(states, weight, targets)
    each.sum().backward()
    for result in run_distributed(shared, 2):
        for total, losses, right, grad_states, grad_weight in result:
            torch.testing.assert_close(total, each.sum().detach())
            torch.testing.assert_close(losses, each.detach())
            assert torch.equal(right, correct & (targets >= 0))
            torch.testing.assert_close(grad_states, states.grad)
            torch.testing.assert_close(grad_weight, weight.grad)
