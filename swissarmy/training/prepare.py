"""What a run needs before its first step: data, a model that fits the processes, and ranks that agree on all of it."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from swissarmy.backbone.model import Model, iterate_models
from swissarmy.backbone.parameters import freeze_except
from swissarmy.core.config import report
from swissarmy.core.errors import ConfigError
from swissarmy.data.build import Loaders, build_loaders
from swissarmy.data.loading.batches import Collate
from swissarmy.data.prepare import CreateDataset
from swissarmy.data.prepare import create_dataset as open_by_extension
from swissarmy.data.samples.function_encoder import Encode
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.interop.save import check_savable
from swissarmy.training.callbacks.base import Callback
from swissarmy.training.config import TrainConfig
from swissarmy.training.evaluate import has_samples
from swissarmy.training.parallel.materialize import Weights, materialize
from swissarmy.training.parallel.mesh import check_plan
from swissarmy.training.parallel.parallelize import parallelize
from swissarmy.training.precision import mixed_precision_policy, prepare_weights
from swissarmy.training.ranks import Ranks
from swissarmy.training.steps.labels import known_labels
from swissarmy.training.steps.tokens import check_step
from swissarmy.training.window import ForwardStep


def check_arguments(model: Any, config: Any, callbacks: Sequence[Any], weights: Weights | None) -> None:
    """Refuse what is of another kind than `train` takes.

    Raises:
        ConfigError: With what to give instead.
    """
    report("train:", _wrong_arguments(model, config, callbacks, weights))


def _wrong_arguments(model: Any, config: Any, callbacks: Sequence[Any], weights: Weights | None) -> Iterator[str]:
    if isinstance(model, nn.Module) and hasattr(model, "_orig_mod"):  # torch's name; to ask for its class takes seconds
        yield "the model was compiled as a whole: give the model itself, and compile=True in the config"
    elif not isinstance(model, Model):
        yield f"the model is a {type(model).__name__}: it must be one of this library (sat.BaseModel, sat.load, ...)"
    elif weights is None:
        empty = [name for name, each in model.named_parameters() if each.is_meta and each.requires_grad]
        if empty:
            yield f"{len(empty)} parameters are on the meta device, such as {empty[0]}: give `weights` to fill them"
    if not isinstance(config, TrainConfig):
        yield f"the config is a {type(config).__name__}: it must be a sat.TrainConfig"
    for callback in callbacks:
        if not isinstance(callback, Callback):
            kind = f"the class {callback.__name__}" if isinstance(callback, type) else f"a {type(callback).__name__}"
            yield f"a callback is {kind}: it must be an instance of a class that inherits from sat.Callback"


def make_loaders(
    config: TrainConfig,
    model: Model,
    forward_step: ForwardStep,
    ranks: Ranks,
    tokenizer: Tokenizer | None,
    create_dataset: CreateDataset | None,
    encode: Encode | None,
    collate: Collate | None,
) -> Loaders:
    """The loaders of this rank.

    Raises:
        ConfigError: Sizes, data, tokenizer and model do not fit each other, or there is nothing to evaluate on.
        DataError: Data cannot be read.
    """
    sizes = config.batch_sizes(ranks.data_size)
    *_, (_, decoder) = iterate_models(model)
    loaders = build_loaders(
        config,
        tokenizer,
        global_batch_size=sizes.global_batch_size,
        accumulation=sizes.accumulation,
        eval_batch_size=config.eval_batch_size,
        rank=ranks.data_rank,
        world_size=ranks.data_size,
        num_steps=config.train_iters,
        epochs=config.epochs,
        vocab_size=decoder.config.vocab_size or None,
        num_labels=known_labels(forward_step, model),
        create_dataset=create_dataset or open_by_extension,
        encode=encode,
        collate=collate,
    )
    assert loaders.train is not None, "the config refuses a run without train data"
    if (config.eval_on_start or config.eval_interval is not None) and not has_samples(loaders.valid):
        setting = "eval_on_start" if config.eval_interval is None else "eval_interval"
        raise ConfigError(f"there is nothing to evaluate on: give valid_data or split, or leave out {setting}.")
    return loaders


def check_model(model: Model, forward_step: ForwardStep, config: TrainConfig, ranks: Ranks) -> None:
    """Refuse a model that does not fit the processes or the forward step, or patterns that fit nothing in it; freeze
    what does not train.

    Raises:
        ConfigError: All that does not fit.
        CheckpointError: It could not be saved in the end.
    """
    configs = [plain.config for _, plain in iterate_models(model)]
    check_plan(config, configs, ranks.world_size)
    check_step(forward_step, model)
    check_savable(model.saved)  # a run that ends without a model to keep should not begin
    if config.trainable:
        freeze_except(model, config.trainable)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no parameter of the model trains: unfreeze some (requires_grad), or give `trainable`.")


def check_ranks_agree(config: TrainConfig, model: Model, loaders: Loaders, ranks: Ranks) -> None:
    """Refuse ranks that would not compute the same thing.

    Raises:
        ConfigError: With what differs, and on which rank.
    """
    if ranks.world_size == 1:
        return
    assert loaders.train is not None
    shapes = [(name, tuple(each.shape), each.dtype, each.requires_grad) for name, each in model.named_parameters()]
    evaluated = {name: loader for name, loader in (("valid", loaders.valid), ("test", loaders.test)) if loader}
    ranks.check_agreement("the config", config.to_save())
    ranks.check_agreement(
        "the data",
        {
            **loaders.train.state_dict()["fingerprint"],
            **{f"samples of {name}": loader.batches.order.num_samples for name, loader in evaluated.items()},
        },
    )
    ranks.check_agreement(
        "the model and the code",
        {
            "the model": hashlib.sha256(repr(shapes).encode()).hexdigest()[:16],
            "torch": torch.__version__,
            "swissarmy": _hash_of_the_code(),
        },
    )


def prepare_model(model: Model, config: TrainConfig, ranks: Ranks, weights: Weights | None) -> None:
    """Bring a model to its device and precision, the same on every rank, and spread it over them."""
    if weights is None:
        if model.device != ranks.device:
            model.to(ranks.device)
        _copy_from_first(model, ranks)
    prepare_weights(model, config)
    parallelize(
        model,
        config,
        ranks.mesh,
        compile=config.compile,
        activation_checkpointing=config.activation_checkpointing,
        checkpoint_every_layers=config.checkpoint_every_layers,
        mixed_precision=mixed_precision_policy(config),
    )
    if weights is not None:
        materialize(model, weights, ranks.device)


@contextmanager
def in_training_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and the like are on inside; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers inside come from a seed, and those outside go on as if nothing had happened."""
    with torch.random.fork_rng(
        devices=[] if device.type == "cpu" else [device],
        device_type="cuda" if device.type == "cpu" else device.type,
    ):
        python_state, numpy_state = random.getstate(), np.random.get_state()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@torch.no_grad()
def _copy_from_first(model: nn.Module, ranks: Ranks) -> None:
    """Every rank starts from the first one's weights, as new weights may have been drawn differently."""
    if ranks.world_size == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor, src=0)


def _hash_of_the_code() -> str:
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()[:16]
