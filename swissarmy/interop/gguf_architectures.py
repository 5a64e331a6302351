"""What a GGUF file of each architecture means in the names of Hugging Face: its config, its tensors."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from swissarmy.core.errors import nearest
from swissarmy.interop.gguf_file import GGUFArray, GGUFFile


@final
class GGUFFields:
    """The metadata of the file's architecture; it remembers what was asked for, so that the rest can be refused."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file = file
        self.prefix = f"{architecture}."
        self._unread = {key for key in file.metadata if key.startswith(self.prefix)}

    def get(self, key: str, default: Any = None) -> Any:
        self._unread.discard(self.prefix + key)
        return self.file.metadata.get(self.prefix + key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            self.file.fail(f"{self.prefix}{key} is {value!r}, not a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.file.fail(f"{self.prefix}{key} is {value!r}, not a number above 0")
        return float(value)

    def refuse_unread(self) -> None:
        if self._unread:
            self.file.fail(f"metadata that this library does not know: {', '.join(sorted(self._unread))}")


def _check_heads(file: GGUFFile, layers: int, want: Mapping[str, int]) -> None:
    for layer in range(layers):
        for part, rows in want.items():
            tensor = file.tensors.get(f"blk.{layer}.{part}.weight")
            if tensor is not None and tensor.rows != rows:
                file.fail(f"{tensor.name} has {tensor.rows} rows; its heads need {rows}")


def _common_config(fields: GGUFFields, head_dim: int) -> dict[str, Any]:
    """What every architecture here has, in the names of a Hugging Face config.json."""
    tensors = fields.file.tensors
    layers = fields.integer("block_count")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or layers > len(tensors) or f"blk.{layers - 1}.attn_norm.weight" not in tensors:
        fields.file.fail(f"it has no token_embd.weight, or no tensors for the last of its {layers} layers")
    fields.get("vocab_size")  # what counts is the embedding: some files give the size without padding
    if fields.integer("attention.value_length", head_dim) != head_dim:
        fields.file.fail("attention.value_length differs from the head dimension")
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        fields.file.fail("rope.dimension_count differs from the head dimension")
    heads = fields.integer("attention.head_count")
    kv_heads = fields.integer("attention.head_count_kv", heads)
    _check_heads(fields.file, layers, {"attn_q": heads * head_dim, "attn_k": kv_heads * head_dim})
    config = {
        "vocab_size": embedding.rows,
        "hidden_size": fields.integer("embedding_length"),
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "attention_dropout": 0.0,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = fields.file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int:
            config[f"{name}_token_id"] = token
    return config


def _rope(fields: GGUFFields, theta: float) -> dict[str, Any]:
    """Hugging Face's `rope_parameters` from the keys `rope.scaling.*`."""
    fields.get("rope.scaling.finetuned")
    factor = fields.get("rope.scaling.factor")
    kind = fields.get("rope.scaling.type", "none" if factor is None else "linear")
    rope = {"rope_type": "default" if kind == "none" else kind, "rope_theta": theta}
    if kind == "none":
        return rope
    rope["factor"] = fields.number("rope.scaling.factor")
    original = fields.integer("rope.scaling.original_context_length", fields.integer("context_length"))
    if kind == "yarn":
        rope["original_max_position_embeddings"] = original
        rope["beta_fast"] = fields.number("rope.scaling.yarn_beta_fast", 32.0)
        rope["beta_slow"] = fields.number("rope.scaling.yarn_beta_slow", 1.0)
    elif kind != "linear":
        fields.file.fail(f"rope scaling of type {kind!r} is not known (none, linear and yarn are)")
    return rope


def _llama3_divisors(rope: Mapping[str, Any], frequencies: torch.Tensor) -> torch.Tensor:
    """By how much the scaling `llama3` divides each rotary frequency, [head_dim / 2], in float64."""
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    slowed: torch.Tensor = (1 - smooth) / rope["factor"] + smooth
    return 1 / slowed


def _llama3_rope(file: GGUFFile, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Find the settings of the scaling `llama3` that gave the divisors in `rope_freqs.weight`.

    Only the ratios of the low and high frequency factors to the original context count, so the low one is
    taken as 1, which it is in every published model. With f the divisor and t the turns a frequency makes per
    position, (1/f - 1/factor) / (1 - 1/factor) = (original * t - 1) / (high - 1): a straight line in t.
    """
    divisors = file.dequantise(file.tensors["rope_freqs.weight"], torch.float64)
    frequencies = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    in_range = bool(((divisors > 0.9999) & divisors.isfinite()).all())
    if divisors.shape != frequencies.shape or not in_range or rope["rope_type"] != "default":
        file.fail(f"rope_freqs.weight does not fit a head of {head_dim} without other scaling")
    factor = float(divisors.max())
    if factor < 1.0001:
        return rope
    original, high = 8192.0, 4.0
    sloped = ((divisors > 1.0001) & (divisors < factor * 0.9999)).nonzero().flatten()
    if len(sloped) >= 2:
        ends = sloped[[0, -1]]
        t1, t2 = (frequencies[ends] / (2 * math.pi)).tolist()
        y1, y2 = ((1 / divisors[ends] - 1 / factor) / (1 - 1 / factor)).tolist()
        slope = (y1 - y2) / (t1 - t2)
        # a line without an intercept is no scaling of this kind; the check below then says so
        high = round(1 + 1 / max(slope * t1 - y1, 1e-6), 2)
        original = round(slope * (high - 1))
    found = rope | {"rope_type": "llama3", "factor": round(factor, 4), "low_freq_factor": 1.0}
    found |= {"high_freq_factor": high, "original_max_position_embeddings": int(original)}
    if not torch.allclose(_llama3_divisors(found, frequencies), divisors, rtol=1e-4, atol=0.0):
        file.fail("rope_freqs.weight holds rotary divisors that are not those of the scaling 'llama3'")
    return found


def _llama_config(fields: GGUFFields) -> dict[str, Any]:
    per_head = fields.integer("embedding_length") // fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", per_head)
    rope = _rope(fields, fields.number("rope.freq_base", 10000.0))
    if "rope_freqs.weight" in fields.file.tensors:
        rope = _llama3_rope(fields.file, rope, head_dim)
    if fields.get("expert_count", 0) or fields.get("expert_used_count", 0):
        fields.file.fail("a llama with experts (Mixtral) is not read")
    fields.get("tensor_data_layout")
    return _common_config(fields, head_dim) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "mlp_bias": "blk.0.ffn_up.bias" in fields.file.tensors,
        "rope_parameters": rope,
    }


def _gemma3_layer_types(fields: GGUFFields, layers: int) -> list[str]:
    """Every sixth layer sees everything, unless the file says otherwise: a period, or one flag a layer."""
    pattern = fields.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, GGUFArray) and pattern.count == layers:
        sliding = fields.file.values(pattern)
    elif type(pattern) is int and pattern >= 1:
        sliding = [(layer + 1) % pattern for layer in range(layers)]
    else:
        fields.file.fail(f"attention.sliding_window_pattern is {pattern!r}, not a period or a flag for each layer")
    return ["sliding_attention" if flag else "full_attention" for flag in sliding]


def _gemma3_config(fields: GGUFFields) -> dict[str, Any]:
    config = _common_config(fields, fields.integer("attention.key_length", 256))
    layers = config["num_hidden_layers"]
    # the 27B model alone, the one with 62 layers, scales by its width per head; llama.cpp tells it in this way too
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else config["head_dim"]
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.get(cap):
            config[cap] = fields.number(cap)
    return config | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": fields.integer("attention.sliding_window"),
        "layer_types": _gemma3_layer_types(fields, layers),
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": fields.number("rope.freq_base_swa", 10000.0),
            },
            "full_attention": _rope(fields, fields.number("rope.freq_base")),
        },
        "use_bidirectional_attention": False,
    }


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """From rotary pairs side by side, as ggml turns them, to Hugging Face's two halves of each head.

    Shapes: `[heads * d, ...]` to the same.
    """
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _restore_llama(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    part = name.split(".")[-2]
    if part not in ("q_proj", "k_proj"):
        return tensor
    return _unpermute(tensor, config["num_attention_heads" if part == "q_proj" else "num_key_value_heads"])


def _restore_gemma3(name: str, tensor: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """GGUF holds the factor that a norm applies; Hugging Face's Gemma holds what is added to 1."""
    return tensor - 1 if name.endswith("norm.weight") else tensor


_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@final
@dataclass(frozen=True)
class Architecture:
    """What one value of `general.architecture` means: names, config, and how to undo what the converter did."""

    layer_names: Mapping[str, str]
    config: Callable[[GGUFFields], dict[str, Any]]
    restore: Callable[[str, torch.Tensor, Mapping[str, Any]], torch.Tensor]
    consumed: frozenset[str] = frozenset()
    """Tensors that the config was made from, and that are no weights."""

    def hugging_face_name(self, name: str, layers: int) -> str | None:
        """The Hugging Face name of a GGUF tensor, or None where it has none."""
        if match := re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)", name):
            part = self.layer_names.get(match[2])
            return f"model.layers.{match[1]}.{part}.{match[3]}" if part and int(match[1]) < layers else None
        part, _, suffix = name.rpartition(".")
        return f"{_MODEL_NAMES[part]}.weight" if part in _MODEL_NAMES and suffix == "weight" else None


ARCHITECTURES = {
    "llama": Architecture(
        layer_names=_LAYER_NAMES | {"ffn_norm": "post_attention_layernorm"},
        config=_llama_config,
        restore=_restore_llama,
        consumed=frozenset({"rope_freqs.weight"}),
    ),
    "gemma3": Architecture(
        layer_names=_LAYER_NAMES
        | {
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        config=_gemma3_config,
        restore=_restore_gemma3,
    ),
}


def find_architecture(file: GGUFFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        hint = nearest(name, ARCHITECTURES) if isinstance(name, str) else ""
        file.fail(f"architecture {name!r} is not read; these are: {', '.join(ARCHITECTURES)}.{hint}")
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        file.fail(f"it is one of {parts} parts of a split model; merge them first (llama-gguf-split --merge)")
    return ARCHITECTURES[name]
