"""What layers keep for the backward pass, and what they exchange, found out on shapes alone.

A model of few layers runs on tensors without values; each further layer keeps as much as those before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from swissarmy.backbone.model import BaseModel, Model, iterate_models
from swissarmy.backbone.parameters import freeze_except
from swissarmy.training.config import TrainConfig
from swissarmy.training.dry_run.watch import Watch
from swissarmy.training.parallel.mesh import make_mesh, shared_mesh
from swissarmy.training.parallel.shared_samples import plain_tensors_are_whole, share_samples
from swissarmy.training.precision import autocast, prepare_weights


@final
@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What all layers cost in a micro-batch, in bytes of a rank."""

    activations: int
    """Kept for the backward pass."""
    recomputed: int
    """Kept besides while a stretch of layers is recomputed."""
    exchanged: dict[str, int]
    """Sent to the processes that share samples, by kind."""


def layer_cost(config: TrainConfig, build: Callable[[], Model], samples: int, length: int, depth: int) -> LayerCost:
    """What so many layers cost, by those of a few; to be called in the process group of the run.

    Args:
        config: The run's.
        build: Makes the model, with its mixins; called on the meta device.
        samples: Of a micro-batch, on a rank.
        length: Positions of a sample.
        depth: How many layers each part of the model has, at most.
    """
    period = config.checkpoint_every_layers if config.activation_checkpointing != "none" else 1
    few, more = (_run_layers(config, build, samples, length, layers=count * period) for count in (1, 2))
    stretches = depth / period
    kept = few.kept + (more.kept - few.kept) * (stretches - 1)
    exchanged = {
        kind: int(few.exchanged.get(kind, 0) + (count - few.exchanged.get(kind, 0)) * (stretches - 1))
        for kind, count in more.exchanged.items()
    }
    if config.activation_checkpointing == "none":
        return LayerCost(activations=int(kept), recomputed=0, exchanged=exchanged)
    plain = config.replace(activation_checkpointing="none")
    one, two = (_run_layers(plain, build, samples, length, layers=count) for count in (1, 2))
    return LayerCost(activations=int(kept), recomputed=two.kept - one.kept, exchanged=exchanged)


@final
@dataclass(frozen=True)
class _Trace:
    """What a forward and backward pass kept and exchanged, in bytes."""

    kept: int
    exchanged: dict[str, int]


def _run_layers(config: TrainConfig, build: Callable[[], Model], samples: int, length: int, *, layers: int) -> _Trace:
    """Run the model with so many layers of each part, on tensors without values."""
    with torch.device("meta"):
        model = build()
    for _, plain in iterate_models(model):
        plain.transformer.layers = plain.transformer.layers[:layers]
    if config.trainable:
        freeze_except(model, config.trainable)
    prepare_weights(model, config)
    if config.activation_checkpointing != "none":
        selective = config.activation_checkpointing == "selective"
        model.enable_activation_checkpointing(config.checkpoint_every_layers, selective=selective)
    mesh = shared_mesh(make_mesh(config, "cpu"), config) if config.sharing_size > 1 else None
    with FakeTensorMode(allow_non_fake_inputs=True), plain_tensors_are_whole(), Watch(mesh) as watch:
        without_values(model)
        model.train()
        if mesh is not None:
            share_samples(
                model,
                mesh,
                sequence_parallel=config.sequence_parallel,
                shard_vocabulary=config.shard_vocabulary,
            )
        inputs = _inputs(model, config, samples, length)
        before = watch.alive
        with autocast(config, "cpu"):
            loss = model(**inputs)[0].float().sum()
        kept = watch.alive - before
        torch.autograd.backward(loss)
    return _Trace(kept - (watch.cast if config.shard > 1 else 0), watch.exchanged)


def without_values(model: Model) -> None:
    """Put tensors of the CPU in the place of those on the meta device, shared ones once; to be called in fake mode.

    `to_empty` meets what two parts share again, and then tries to swap tensors, which cannot be while anything knows
    of them.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, tensor in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ):
            if tensor not in made:
                empty = torch.empty_like(tensor, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            setattr(module, name, made[tensor])


def _inputs(model: Model, config: TrainConfig, samples: int, length: int) -> dict[str, Any]:
    """What a micro-batch would be; of logits only the last are made, as training makes them a few at a time."""
    ids = torch.zeros(samples, length, dtype=torch.long)
    if not isinstance(model, BaseModel):
        return {"input_ids": ids, "decoder_input_ids": ids, "logits_to_keep": 1}
    if model.config.vocab_size:
        return {"input_ids": ids, "logits_to_keep": 1}
    return {"pixel_values": torch.zeros(samples, *config.image_shape)}
