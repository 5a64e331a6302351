"""Old checkpoints, written as SAT wrote them, by hand: from a model of ours to the names, fusions and shares of old.

Nothing of `swissarmy.interop.sat_legacy` is used here, so that both sides of a test are told apart.
"""

import argparse
import collections
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]
LATE_T5 = "late"


def take(parameters: Mapping[str, Tensor], name: str) -> Tensor:
    return parameters[name].detach().clone()


def linear(parameters: Mapping[str, Tensor], name: str, theirs: str) -> State:
    return {
        f"{theirs}.{part}": take(parameters, f"{name}.{part}")
        for part in ("weight", "bias")
        if f"{name}.{part}" in parameters
    }


def fused(parameters: Mapping[str, Tensor], block: str, names: tuple[str, ...], theirs: str) -> State:
    return {
        f"{theirs}.{part}": torch.cat([take(parameters, f"{block}.{name}.{part}") for name in names])
        for part in ("weight", "bias")
        if f"{block}.{names[0]}.{part}" in parameters
    }


def backbone(
    parameters: Mapping[str, Tensor],
    *,
    layers: int,
    order: str = "pre",
    up: str = "up",
    prefix: str = "",
    theirs: str = "",
    late: bool = False,
) -> State:
    """The backbone under its old names, whole; `up` is which of ours is `dense_h_to_4h`."""
    old, state = f"{theirs}transformer", {}
    if f"{prefix}transformer.word_embeddings.weight" in parameters:
        state[f"{old}.word_embeddings.weight"] = take(parameters, f"{prefix}transformer.word_embeddings.weight")
    for i in range(layers):
        ours, to = f"{prefix}transformer.layers.{i}", f"{old}.layers.{i}"
        state |= fused(parameters, f"{ours}.attention", ("query", "key", "value"), f"{to}.attention.query_key_value")
        state |= linear(parameters, f"{ours}.attention.output", f"{to}.attention.dense")
        state |= linear(parameters, f"{ours}.mlp.{up}", f"{to}.mlp.dense_h_to_4h")
        state |= linear(parameters, f"{ours}.mlp.down", f"{to}.mlp.dense_4h_to_h")
        decoder = f"{ours}.cross_attention.query.weight" in parameters
        if decoder:
            state |= linear(parameters, f"{ours}.cross_attention.query", f"{to}.cross_attention.query")
            state |= fused(parameters, f"{ours}.cross_attention", ("key", "value"), f"{to}.cross_attention.key_value")
            state |= linear(parameters, f"{ours}.cross_attention.output", f"{to}.cross_attention.dense")
        if order == "post":
            before = (
                f"{prefix}transformer.embedding_norm"
                if i == 0
                else f"{prefix}transformer.layers.{i - 1}.mlp_residual.output_norm"
            )
            state |= linear(parameters, before, f"{to}.input_layernorm")
            state |= linear(parameters, f"{ours}.attention_residual.output_norm", f"{to}.post_attention_layernorm")
            continue
        names = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
        if decoder:
            cross, mlp = "post_attention_layernorm", "post_cross_attention_layernorm"
            names |= {"cross_attention": mlp, "mlp": cross} if late else {"cross_attention": cross, "mlp": mlp}
        for block, name in names.items():
            state |= linear(parameters, f"{ours}.{block}_residual.input_norm", f"{to}.{name}")
        if order == "sandwich":
            state |= linear(parameters, f"{ours}.attention_residual.output_norm", f"{to}.third_layernorm")
            state |= linear(parameters, f"{ours}.mlp_residual.output_norm", f"{to}.fourth_layernorm")
    last = f"{prefix}transformer.layers.{layers - 1}.mlp_residual.output_norm"
    return state | linear(
        parameters, last if order == "post" else f"{prefix}transformer.final_norm", f"{old}.final_layernorm"
    )


# Families


def gpt2(model: Any) -> tuple[State, dict[str, Any]]:
    p = dict(model.named_parameters())
    state = backbone(p, layers=2)
    state["transformer.position_embeddings.weight"] = take(p, "mixins.positions.table.weight")
    state["mixins.gpt2-final.lm_head.weight"] = p.get(
        "transformer.lm_head.weight", state["transformer.word_embeddings.weight"]
    ).detach()
    state["mixins.gpt2-attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    return state, arguments("GPT2Model", vocab_size=61, max_sequence_length=64)


def encoder(model: Any, kind: str) -> tuple[State, dict[str, Any]]:
    p = dict(model.named_parameters())
    state = backbone(p, layers=2, order="post")
    state["transformer.position_embeddings.weight"] = take(p, "mixins.positions.table.weight")
    head = "roberta-final" if kind == "roberta" else "bert-final"
    state |= linear(p, "mixins.head.dense", f"mixins.{head}.lm_head.dense")
    state |= linear(p, "mixins.head.norm", f"mixins.{head}.lm_head.layer_norm")
    state[f"mixins.{head}.lm_head.decoder.weight"] = p.get(
        "mixins.head.decoder.weight", state["transformer.word_embeddings.weight"]
    ).detach()
    state[f"mixins.{head}.lm_head.decoder.bias"] = take(p, "mixins.head.bias")
    extra: dict[str, Any] = {"layernorm_order": "post", "layernorm_epsilon": 1e-12}
    if kind == "bert":
        state["mixins.bert-type.type_embeddings.weight"] = take(p, "mixins.token-types.table.weight")
        extra["num_types"] = 2
    model_class = "RobertaModel" if kind == "roberta" else "BertModel"
    return state, arguments(model_class, vocab_size=61, max_sequence_length=64, **extra)


def bert(model: Any) -> tuple[State, dict[str, Any]]:
    return encoder(model, "bert")


def roberta(model: Any) -> tuple[State, dict[str, Any]]:
    return encoder(model, "roberta")


def llama(model: Any, *, gate: str = "mixin") -> tuple[State, dict[str, Any]]:
    p = dict(model.named_parameters())
    state = backbone(p, layers=2)
    for i in range(2):
        old = f"mixins.mlp.gate_proj.{i}" if gate == "mixin" else f"transformer.layers.{i}.mlp.dense_h_to_4h_gate"
        state |= linear(p, f"transformer.layers.{i}.mlp.gate", old)
    state["mixins.lm.lm_head.weight"] = take(p, "transformer.lm_head.weight")
    state["mixins.rotary.rotary_emb.inv_freq"] = 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)
    heads = {"num_multi_query_heads": 2} if p["transformer.layers.0.attention.key.weight"].shape[0] == 16 else {}
    extra = {
        "use_bias": False,
        "inner_hidden_size": 48,
        "layernorm_epsilon": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return state, arguments("LLaMAModel", vocab_size=61, max_sequence_length=64, pad_token_id=-1, **extra, **heads)


def t5(model: Any, *, late: bool = False) -> tuple[State, dict[str, Any]]:
    p = dict(model.named_parameters())
    gated = "parts.encoder.transformer.layers.0.mlp.gate.weight" in p
    state: State = {}
    for part in ("encoder", "decoder"):
        ours = f"parts.{part}."
        state |= backbone(p, layers=2, up="gate" if gated else "up", prefix=ours, theirs=f"{part}.", late=late)
        table = f"{part}.mixins.t5-attention.relative_attention_bias.weight"
        state[table] = take(p, f"{ours}mixins.positions.table.weight")
        for i in range(2 if gated else 0):
            old = f"{part}.mixins.gated-mlp.gated_h_to_4h_list.{i}"
            state |= linear(p, f"{ours}transformer.layers.{i}.mlp.up", old)
    state["decoder.transformer.word_embeddings.weight"] = state["encoder.transformer.word_embeddings.weight"]
    if "parts.decoder.transformer.lm_head.weight" in p:
        state["decoder.mixins.t5-final.lm_head.weight"] = take(p, "parts.decoder.transformer.lm_head.weight")
    return state, arguments("T5Model", vocab_size=61, max_sequence_length=512, relative_attention_num_buckets=8)


def vit(model: Any, *, named: bool = False) -> tuple[State, dict[str, Any]]:
    p = dict(model.named_parameters())
    state = backbone(p, layers=2)
    state["transformer.word_embeddings.weight"] = torch.stack(
        [take(p, "mixins.patches.first_tokens.0"), torch.zeros(32)]
    )
    table = torch.cat([take(p, "mixins.positions.first"), take(p, "mixins.positions.table")])
    state["transformer.position_embeddings.weight"] = torch.zeros_like(table) if named else table
    if named:
        state["mixins.pos_embedding.position_embeddings.4x4_pre1_post0.weight"] = table
    state |= linear(p, "mixins.patches.projection", "mixins.patch_embedding.proj")
    state |= linear(p, "mixins.head.classifier", "classifier" if named else "mixins.cls.classifier")
    extra = {"image_size": [16, 16], "patch_size": 4, "pre_len": 1, "post_len": 0, "in_channels": 3, "num_classes": 5}
    return state, arguments("ViTModel", vocab_size=2, max_sequence_length=17, layernorm_epsilon=1e-12, **extra)


def arguments(model_class: str, **extra: Any) -> dict[str, Any]:
    """A `model_config.json`."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "layernorm_order": "pre"}
    return {"model_class": model_class, "tokenizer_type": "fake", "model_parallel_size": 1, **sizes, **extra}


# Generations


def pad_vocabulary(state: State, multiple: int = 128) -> State:
    """Rows of junk after the last token, as SAT padded."""
    padded = dict(state)
    for name, tensor in state.items():
        if name.endswith(("word_embeddings.weight", "lm_head.weight", "decoder.weight", "decoder.bias")):
            rows = -len(tensor) % multiple
            padded[name] = torch.cat([tensor, torch.full((rows, *tensor.shape[1:]), 7.0, dtype=tensor.dtype)])
    for name, tensor in state.items():  # what was one tensor stays one
        twin = next(other for other, value in state.items() if value is tensor)
        padded[name] = padded[twin]
    return padded


def first_generation(state: State, order: Mapping[str, int]) -> State:
    """Mixins by position, and the word embeddings at the root."""
    renamed = {}
    for name, tensor in state.items():
        for mixin, index in order.items():
            name = name.replace(f"mixins.{mixin}.", f"mixins.{index}.")
        renamed[name.replace("transformer.word_embeddings.weight", "word_embeddings.weight")] = tensor
    return renamed


# Model parallelism

ROWS = (
    ".query_key_value.",
    ".cross_attention.query.",
    ".key_value.",
    ".dense_h_to_4h",
    ".gate_proj.",
    ".gated_h_to_4h_list.",
)
BLOCKS = {".query_key_value.": 3, ".key_value.": 2}


def split(state: State, ranks: int, *, queries: int = 1, split_heads: bool = False) -> list[State]:
    """The shares of each rank; `queries` is how many times more rows Q has than K and V."""
    shares: list[State] = [{} for _ in range(ranks)]
    for name, tensor in state.items():
        for rank, share in enumerate(_shares(name, tensor, ranks, queries, split_heads)):
            shares[rank][name] = share
    for share in shares:  # what was one tensor stays one
        for name, tensor in state.items():
            share[name] = share[next(other for other, value in state.items() if value is tensor)]
    return shares


def _shares(name: str, tensor: Tensor, ranks: int, queries: int, split_heads: bool) -> list[Tensor]:
    blocks = next((count for part, count in BLOCKS.items() if part in name), 1)
    if any(part in name for part in ROWS):
        sizes = [len(tensor) // blocks] * blocks
        if blocks == 3:
            unit = len(tensor) // (queries + 2)
            sizes = [queries * unit, unit, unit]
        parts = [block.chunk(ranks) for block in tensor.split(sizes)]
        return [torch.cat([part[rank] for part in parts]) for rank in range(ranks)]
    if name.endswith("word_embeddings.weight") and len(tensor) % ranks == 0 and len(tensor) > 2:
        return list(tensor.chunk(ranks))
    if (
        ".attention.dense.weight" in name or ".cross_attention.dense.weight" in name
    ) or ".dense_4h_to_h.weight" in name:
        return [share.contiguous() for share in tensor.chunk(ranks, dim=1)]
    if split_heads and ("relative_attention_bias" in name):
        return [share.contiguous() for share in tensor.chunk(ranks, dim=1)]
    return [tensor] * ranks


# Files


def extras(iteration: int, ranks: int) -> dict[str, Any]:
    """What DeepSpeed and SAT pickled beside the state dict."""
    return {
        "iteration": iteration,
        "client_lr_scheduler": {"start_lr": 1e-4, "warmup_iter": 10, "num_iters": iteration, "decay_style": "cosine"},
        "random_rng_state": random.Random(0).getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "rng_tracker_states": {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8)},
        "optimizer": None,
        "lr_scheduler": None,
        "csr_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": iteration,
        "global_samples": np.int64(8 * iteration),
        "dp_world_size": 1,
        "mp_world_size": ranks,
        "args": argparse.Namespace(lr=1e-4, dtype=torch.float16, fp16=True),
    }


def write(
    folder: Path,
    shares: list[State],
    config: Mapping[str, Any] | None,
    *,
    iteration: int = 1000,
    zip_file: bool = True,
    change: Callable[[dict[str, Any], int], Any] | None = None,
) -> Path:
    """An experiment's folder; `change` may alter what a rank's file holds."""
    step = folder / str(iteration)
    step.mkdir(parents=True)
    (folder / "latest").write_text(str(iteration))
    if config is not None:
        values = {**config, "model_parallel_size": len(shares)}
        (folder / "model_config.json").write_text(json.dumps(values, indent=4))
    for rank, share in enumerate(shares):
        content = {"module": collections.OrderedDict(share), **extras(iteration, len(shares))}
        if change is not None:
            change(content, rank)
        file = step / f"mp_rank_{rank:02d}_model_states.pt"
        torch.save(content, file, _use_new_zipfile_serialization=zip_file)
    return folder
