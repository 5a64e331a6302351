"""Prefix-tuning, prompt tuning and P-tuning between PEFT's form and ours: one tensor, `prompt_embeddings`.

PEFT keeps what is used in inference: of a reparametrised prefix the keys and values, of P-tuning the embeddings that
its encoder made. They are read as the plain methods, and written in the same form.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from swissarmy.backbone.model import BaseModel, Model
from swissarmy.backbone.projections import plain_models
from swissarmy.core.errors import CheckpointError
from swissarmy.interop.matching import report
from swissarmy.interop.peft_config import PeftPromptConfig
from swissarmy.interop.peft_tensors import raise_for, shape_problems
from swissarmy.interop.peft_whole import whole_modules
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.mixins.heads import ClassificationHeadMixin, PoolerMixin
from swissarmy.mixins.p_tuning import PTuningMixin
from swissarmy.mixins.prefix_tuning import Prefix, PrefixTuningMixin
from swissarmy.mixins.prompt_tuning import PromptMixin, PromptTuningMixin

NAME = "prompt_embeddings"
_LOG = logging.getLogger(__name__)


def read_prompt(
    model: Model, values: Mapping[str, Any], source: SafetensorsSource, where: str
) -> dict[str, PromptTuningMixin]:
    """A prompt; in an encoder-decoder for the encoder.

    Raises:
        CheckpointError: The tensor has another name or shape.
    """
    config = PeftPromptConfig.read(values, where=where)
    key, part = _reader(model)
    count = (config.num_transformer_submodules or 1) * config.num_virtual_tokens
    _check_task(values, model, where)
    tensor = _read(model, source, (count, part.config.hidden_size))[: config.num_virtual_tokens]
    mixin = PromptTuningMixin(
        part.config.hidden_size, prompt_len=config.num_virtual_tokens, reaches_decoder=bool(model.parts)
    ).to(tensor.dtype)
    with torch.no_grad():
        mixin.embedding.weight.copy_(tensor)
    return {key: mixin}


def write_prompt(model: Model, mixins: Mapping[str, PromptMixin]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `adapter_config.json` says, and the tensor.

    Raises:
        CheckpointError: The prompt has no positions, or does not reach the decoder: PEFT's has and does.
    """
    key, part = _reader(model)
    if set(mixins) != {key}:
        raise CheckpointError("PEFT puts a prompt before an encoder's tokens alone: remove it from the other parts.")
    mixin = mixins[key]
    if not mixin.has_positions or mixin.reaches_decoder != bool(model.parts):
        raise CheckpointError(
            f"the prompt has has_positions={mixin.has_positions}, reaches_decoder={mixin.reaches_decoder}; PEFT's has "
            f"True, {bool(model.parts)}, so that the result would be another."
        )
    plain = mixin.fold() if isinstance(mixin, PTuningMixin) else mixin
    config = {
        **_common(model, part),
        "num_virtual_tokens": mixin.prompt_len,
        "token_dim": part.config.hidden_size,
        "num_attention_heads": part.config.num_attention_heads,
    }
    if isinstance(mixin, PTuningMixin):
        config["encoder_hidden_size"] = mixin.options["encoder_size"] or part.config.hidden_size
    return _with_head(model, config, plain.make_prompt().detach())


def read_prefix(
    model: Model, values: Mapping[str, Any], source: SafetensorsSource, where: str
) -> dict[str, PrefixTuningMixin]:
    """A prefix, after which the tokens' positions count.

    Raises:
        CheckpointError: The tensor has another name or shape, or the model is no decoder alone.
    """
    config = PeftPromptConfig.read(values, where=where)
    part = _decoder(model)
    _check_task(values, model, where)
    layers, heads, width = part.config.num_layers, part.config.kv_heads, part.config.head_size
    tensor = _read(model, source, (config.num_virtual_tokens, layers * 2 * heads * width))
    mixin = PrefixTuningMixin.for_config(part.config, prefix_len=config.num_virtual_tokens, shift_positions=True).to(
        tensor.dtype
    )
    keys_and_values = tensor.view(-1, layers, 2, heads, width).permute(1, 2, 3, 0, 4)
    for layer, (key, value) in zip(mixin.layers, keys_and_values, strict=True):
        assert isinstance(layer, Prefix)
        with torch.no_grad():
            layer.key.copy_(key)
            layer.value.copy_(value)
    return {"": mixin}


def write_prefix(model: Model, mixins: Mapping[str, PrefixTuningMixin]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `adapter_config.json` says, and the tensor.

    Raises:
        CheckpointError: The tokens' positions do not count after the prefix, or the model is no decoder alone.
    """
    part, mixin = _decoder(model), mixins[""]
    if not mixin.shift_positions:
        raise CheckpointError(
            "the prefix has shift_positions=False, and PEFT counts positions after its prefix, so that the result "
            "would be another: train it with shift_positions=True."
        )
    plain = mixin if mixin.encoder is None else mixin.fold()
    parts = [
        torch.stack((layer.key.detach(), layer.value.detach())) for layer in plain.layers if isinstance(layer, Prefix)
    ]
    config = {
        **_common(model, part),
        "num_virtual_tokens": mixin.prefix_len,
        "token_dim": part.config.kv_heads * part.config.head_size,
        "num_attention_heads": part.config.kv_heads,
        "prefix_projection": mixin.encoder is not None,
        "encoder_hidden_size": mixin.encoder_size,
    }
    return _with_head(model, config, torch.stack(parts).permute(3, 0, 1, 2, 4).flatten(1).contiguous())


def _reader(model: Model) -> tuple[str, BaseModel]:
    """The part whose tokens a prompt stands before."""
    parts = plain_models(model)
    key = "encoder" if model.parts else ""
    if key not in parts or not parts[key].config.vocab_size:
        raise CheckpointError(f"{type(model).__name__} reads no tokens that a prompt of PEFT could stand before.")
    return key, parts[key]


def _decoder(model: Model) -> BaseModel:
    if isinstance(model, BaseModel) and model.config.causal:
        return model
    raise CheckpointError(
        "PEFT hands a prefix to a decoder as a cache of earlier tokens; prefixes of encoders and of encoder-decoders "
        "are not exchanged."
    )


def _task(model: Model) -> str:
    """Which of PEFT's classes puts the prompt before the tokens, and computes what we do.

    Raises:
        CheckpointError: The head looks at a place that is the prompt's in PEFT's model.
    """
    *_, last = plain_models(model).values()
    name = last.find_mixin(ClassificationHeadMixin)
    head = None if name is None else last.get_mixin(name)
    if isinstance(head, ClassificationHeadMixin):
        if head.pooling == "last" and not model.parts:
            return "SEQ_CLS"
        raise CheckpointError(
            f"{model.source.config.architecture} classifies by other states than the last one, and in PEFT's model the "
            "prompt is among them, so that the result would be another."
        )
    if last.find_mixin(PoolerMixin) is not None:
        _LOG.warning("with a prompt PEFT pools the prompt's first state, and this library the first token's")
    if model.parts:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if last.config.causal else "FEATURE_EXTRACTION"


def _with_head(model: Model, config: dict[str, Any], prompt: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files; PEFT takes a classifier for trained, and wants it in them."""
    if config["task_type"] != "SEQ_CLS":
        return config, {NAME: prompt}
    modules, whole = whole_modules(model, "mixins.head.")
    tensors = {f"base_model.{theirs}": tensor for theirs, tensor in whole.items()}
    return {**config, "modules_to_save": modules}, {**tensors, NAME: prompt}


def _common(model: Model, part: BaseModel) -> dict[str, Any]:
    return {
        "task_type": _task(model),
        "num_layers": part.config.num_layers,
        "num_transformer_submodules": 1,
    }


def _check_task(values: Mapping[str, Any], model: Model, where: str) -> None:
    """PEFT without a task leaves a prompt away."""
    task = _task(model)
    if values.get("task_type") is None:
        raise CheckpointError(
            f"{where}: task_type is missing, without which PEFT leaves the prompt away; for this model it is '{task}'."
        )


def _read(model: Model, source: SafetensorsSource, shape: tuple[int, ...]) -> Tensor:
    strangers = [name for name in source.names() if name != NAME]
    problems = report("unexpected", strangers, [NAME])
    if NAME not in source.names():
        problems += report("missing", [NAME], strangers)
    else:
        problems += shape_problems(NAME, shape, source)
    raise_for(problems, model, source)
    return source.read(NAME)
