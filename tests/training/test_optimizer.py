"""Optimizers on one rank: which parameters are treated how, and that each takes the steps of its paper."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

import swissarmy as sat
from swissarmy.core.errors import ConfigError, MissingExtraError
from swissarmy.testing import tiny_inputs, tiny_model
from swissarmy.training.optimizer import (
    OptimizerOptions,
    make_optimizer,
    set_learning_rate,
    take_step,
    weights_to_evaluate,
)
from swissarmy.training.optimizers import muon

OPTIMIZERS = ["adamw", "muon", "adafactor", "schedule_free"]


def network(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Module()
    net.word = nn.Embedding(7, 6)
    net.layers = nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 6)])
    net.norm = nn.LayerNorm(6)
    return net.to(dtype)


def give_gradients(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = values.to(parameter.dtype)


def treatment(model, **options):
    """`{name: (weight decay, lr_scale, by Muon)}`."""
    optimizer = make_optimizer(model, OptimizerOptions(lr=1.0, **options))
    return {
        name: (group["weight_decay"], group["lr_scale"], group["muon"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def names_that_decay(model, **options):
    return {name for name, (decay, _, _) in treatment(model, **options).items() if decay}


def assert_same(ours, theirs, **tolerance):
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_only_matrices_decay_by_default():
    model = tiny_model("gpt2")
    decaying = names_that_decay(model)
    assert all(name.startswith("transformer.layers.") and name.endswith("weight") for name in decaying)
    assert len(decaying) == 2 * 6
    assert names_that_decay(model, weight_decay_skips=()) == {name for name, _ in model.named_parameters()}
    without_bias = names_that_decay(model, weight_decay_skips=("bias",))
    assert "transformer.word_embeddings.weight" in without_bias
    assert "transformer.final_norm.bias" in without_bias
    assert "transformer.layers.0.mlp.up.bias" not in without_bias


@pytest.mark.parametrize("family", ["bert", "t5", "vit", "llama"])
def test_norms_biases_and_embeddings_of_every_family_are_found(family):
    decaying = names_that_decay(tiny_model(family))
    assert not [name for name in decaying if "norm" in name or "bias" in name or "embeddings" in name]
    assert any("mlp.up.weight" in name for name in decaying)


def test_a_tied_head_counts_as_the_embedding_that_it_is():
    model = nn.ModuleDict({"head": nn.Linear(3, 5, bias=False), "word": nn.Embedding(5, 3)})
    model["word"].weight = model["head"].weight
    assert treatment(model) == {"head.weight": (0.0, 1.0, False)}


def test_marks_of_a_parameter_are_honoured():
    model = tiny_model("gpt2")
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, r=2, lr_ratio=16.0))
    model.freeze_except("mixins.lora")
    next(model.parameters()).no_weight_decay = True
    found = treatment(model, weight_decay=0.5)
    assert found
    for name, (decay, scale, _) in found.items():
        assert (decay, scale) == (0.5, 16.0 if name.endswith("lora_B") else 1.0)
    for parameter in model.get_mixin("lora").parameters():
        parameter.no_weight_decay = True
    assert not names_that_decay(model)


def test_the_learning_rate_reaches_every_group_with_its_scale():
    net = network()
    net.word.weight.lr_scale = 0.25
    optimizer = make_optimizer(net, OptimizerOptions(lr=0.5))
    assert {group["lr_scale"]: group["lr"] for group in optimizer.param_groups} == {0.25: 0.125, 1.0: 0.5}
    set_learning_rate(optimizer, 2.0)
    assert {group["lr_scale"]: group["lr"] for group in optimizer.param_groups} == {0.25: 0.5, 1.0: 2.0}


def test_muon_takes_the_matrices_of_layers_and_nothing_else():
    model = tiny_model("bert")
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, r=2))
    chosen = {name for name, (_, _, by_muon) in treatment(model, optimizer="muon").items() if by_muon}
    projections = ["attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down"]
    assert chosen == {f"transformer.layers.{i}.{each}.weight" for i in range(2) for each in projections}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_adamw_with_a_factor_is_adamw_on_scaled_gradients(dtype, tolerance):
    ours, theirs = network(dtype), network(dtype)
    optimizer = make_optimizer(ours, OptimizerOptions(lr=0.1, weight_decay=0.2, weight_decay_skips=()))
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.2, foreach=False)
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for parameter in theirs.parameters():
            parameter.grad *= 1 / 37
        take_step(optimizer, 1 / 37)
        reference.step()
        assert all(parameter.grad is None for parameter in ours.parameters())
    assert_same(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_factor_holds_for_its_own_step_only():
    ours, theirs = network(torch.float32), network(torch.float32)
    first, second = (make_optimizer(net, OptimizerOptions(lr=0.1)) for net in (ours, theirs))
    for net, optimizer in ((ours, first), (theirs, second)):
        give_gradients(net, 0)
        take_step(optimizer, 0.5)
        give_gradients(net, 1)
    first.step()
    take_step(second, 1.0)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-7)


def test_adafactor_takes_torchs_steps():
    ours, theirs = network(), network()
    optimizer = make_optimizer(ours, OptimizerOptions(optimizer="adafactor", lr=0.1, weight_decay_skips=()))
    reference = torch.optim.Adafactor(theirs.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        take_step(optimizer, 1.0)
        reference.step()
    assert_same(ours, theirs, rtol=1e-12, atol=1e-14)


def test_muon_takes_torchs_steps_in_bfloat16_to_the_bit(monkeypatch):
    monkeypatch.setattr(muon, "_working_dtype", lambda matrix: torch.bfloat16)
    ours, theirs = network(torch.float32).layers, network(torch.float32).layers
    matrices = [each.weight for each in theirs]
    ours, theirs = nn.ModuleDict({"layers": ours}), nn.ModuleDict({"layers": theirs})
    optimizer = make_optimizer(ours, OptimizerOptions(optimizer="muon", lr=0.1))
    reference = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW([each.bias for each in theirs["layers"]], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        take_step(optimizer, 1.0)
        reference.step()
        rest.step()
    assert_same(ours, theirs, rtol=1e-6, atol=1e-7)
    for a, b in zip(ours["layers"], matrices, strict=True):
        assert torch.equal(a.weight, b)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
def test_the_direction_of_muon_is_nearly_orthogonal(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    direction = muon.orthogonal(matrix)
    values = torch.linalg.svdvals(direction)
    assert 0.4 < values.min() <= values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    change_of_basis = u.T @ direction @ v.T  # its singular vectors are those of the matrix
    torch.testing.assert_close(change_of_basis, change_of_basis.diagonal().diag(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loading_its_state_continues_to_the_bit(name):
    options = OptimizerOptions(optimizer=name, lr=0.05)
    whole = network()
    optimizer = make_optimizer(whole, options)
    for step in range(4):
        if step == 2:
            half, state = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
        give_gradients(whole, step)
        take_step(optimizer, 0.5)
    optimizer = make_optimizer(half, options)
    optimizer.load_state_dict(state)
    for step in (2, 3):
        give_gradients(half, step)
        take_step(optimizer, 0.5)
    assert_same(half, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_model_learns(name):
    model = tiny_model("gpt2", scale=1.0).train()
    inputs = tiny_inputs(model)
    lr = 0.2 if name == "adafactor" else 0.02  # Adafactor's is relative to the size of the weights
    optimizer = make_optimizer(model, OptimizerOptions(optimizer=name, lr=lr))
    losses = []
    for _ in range(60):
        logits = model(**inputs)[0]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten())
        loss.backward()
        take_step(optimizer, 1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_schedule_free_evaluates_with_its_average_and_trains_on_with_what_it_had():
    net = network()
    optimizer = make_optimizer(net, OptimizerOptions(optimizer="schedule_free", lr=0.05))
    for step in range(3):
        give_gradients(net, step)
        take_step(optimizer, 1.0)
    training = [each.detach().clone() for each in net.parameters()]
    with weights_to_evaluate(optimizer):
        assert not any(torch.equal(a, b) for a, b in zip(net.parameters(), training, strict=True))
    assert all(torch.equal(now, before) for now, before in zip(net.parameters(), training, strict=True))


def test_other_optimizers_have_one_set_of_weights():
    net = network()
    before = [each.detach().clone() for each in net.parameters()]
    with weights_to_evaluate(make_optimizer(net, OptimizerOptions())):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


class TensorLearningRates(torch.optim.AdamW):
    """What torchao's optimizer asks of its callers: the learning rate is a tensor, and stays that tensor."""

    def __init__(self, groups, *, lr, betas, eps):
        super().__init__(groups, lr=torch.tensor(lr), betas=betas, eps=eps, foreach=False, capturable=False)
        for group in self.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]))


def test_torchaos_learning_rate_is_changed_where_it_stands(monkeypatch):
    stand_in = types.ModuleType("torchao.optim")
    stand_in.AdamW8bit = TensorLearningRates
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", stand_in)
    net = network()
    net.word.weight.lr_scale = 4.0
    optimizer = make_optimizer(net, OptimizerOptions(optimizer="adamw_8bit", lr=0.5))
    rates = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.25)
    assert [rate.item() for rate in rates] == [1.0, 0.25, 0.25]
    assert all(a is group["lr"] for a, group in zip(rates, optimizer.param_groups, strict=True))


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("adamw_8bit", "torchao", "low_memory"), ("schedule_free", "schedulefree", "schedule_free")],
)
def test_a_missing_extra_is_named(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.optim", raising=False)
    with pytest.raises(MissingExtraError, match=rf'optimizer: {name} needs .* pip install "swissarmy\[{extra}\]"'):
        make_optimizer(network(), OptimizerOptions(optimizer=name))


def test_a_model_of_which_nothing_trains_is_refused():
    with pytest.raises(ConfigError, match="no parameter trains"):
        make_optimizer(network().requires_grad_(False), OptimizerOptions())


def test_options_out_of_range_are_reported_together():
    with pytest.raises(ConfigError) as error:
        OptimizerOptions(lr=0.0, betas=(0.9,), eps=0.0, weight_decay=-1.0, clip_grad_norm=0.0, ema_decay=1.0)
    text = str(error.value)
    assert all(name in text for name in ["lr=", "betas=", "eps=", "weight_decay=", "clip_grad_norm=", "ema_decay="])
