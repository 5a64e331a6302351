"""Every fine-tuning method learns, on models of all kinds, and changes nothing but its own parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.core.mixin import BaseMixin
from swissarmy.testing import tiny_inputs, tiny_model
from tests.mixins.helpers import randomise


def of(kind: type[BaseMixin], /, **options: Any) -> Callable[[Model], Any]:
    return lambda model: kind.for_model(model, **options)


def fusion(model: Model) -> Any:
    """Attention over two adapters that have learned something."""
    adapters = {name: randomise(sat.AdapterMixin.for_model(model), seed=seed) for seed, name in enumerate("ab")}
    return sat.AdapterFusionMixin.for_model(model, adapters=adapters)


METHODS: Mapping[str, Callable[[Model], Any]] = {
    "adapter after every sublayer": of(sat.AdapterMixin),
    "adapter after the mlp": of(sat.AdapterMixin, kind="pfeiffer"),
    "adapter beside the mlp": of(sat.AdapterMixin, kind="parallel"),
    "adapter fusion": fusion,
    "bitfit": of(sat.BitFitMixin),
    "compacter": of(sat.CompacterMixin),
    "dora": of(sat.LoRAMixin, dora=True),
    "ffadd": of(sat.FFADDMixin, num_neurons=4),
    "ia3": of(sat.IA3Mixin),
    "layer scaling": of(sat.LayerScalingMixin),
    "layer scaling per channel": of(sat.LayerScalingMixin, per_channel=True),
    "lora": of(sat.LoRAMixin),
    "loreft": of(sat.LoReFTMixin),
    "p-tuning": of(sat.PTuningMixin, prompt_len=4, encoder_size=16),
    "p-tuning with an lstm": of(sat.PTuningMixin, prompt_len=4, encoder="lstm", encoder_size=8),
    "prefix-tuning": of(sat.PrefixTuningMixin, prefix_len=4),
    "prefix-tuning with an mlp": of(sat.PrefixTuningMixin, prefix_len=4, encoder_size=16),
    "prompt tuning": of(sat.PromptTuningMixin, prompt_len=4),
    "vera": of(sat.VeRAMixin, r=16),
}
"""How each method is added to a model."""
FAMILIES = ("gpt2", "bert", "t5", "vit")
STEPS = 12


def loss_of(model: Model) -> Tensor:
    """How badly the model predicts labels that have nothing to do with its weights."""
    logits: Tensor = model(**tiny_inputs(model))[0]
    labels = torch.arange(logits[..., 0].numel()) * 7 % logits.shape[-1]
    return F.cross_entropy(logits.flatten(0, -2), labels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_only_the_methods_parameters_change(family: str, method: str) -> None:
    model = tiny_model(family, scale=2.0)
    torch.manual_seed(0)
    model.add_mixin("added", METHODS[method](model))
    model.freeze_except("mixins.added")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.001, losses
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("mixins.added." in name for name in changed)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert not any("mixins.added." in name for name in frozen)
