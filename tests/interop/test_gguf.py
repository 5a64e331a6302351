"""GGUF files, written here from tiny random transformers models, against the state dict they came from."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.gguf import GGUFSource

LAYERS = 2
LLAMA_NAMES = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

Edit = Callable[[gguf.GGUFWriter], object]


def llama(**changes: Any) -> LlamaForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    torch.manual_seed(0)
    return randomised(LlamaForCausalLM(LlamaConfig(**settings | changes)))


def gemma3(**changes: Any) -> Gemma3ForCausalLM:
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    return randomised(Gemma3ForCausalLM(Gemma3TextConfig(**settings | changes)))


def randomised(model: Any) -> Any:
    """Every parameter random, norms too, and on a grid of 1/1024 so that 1 + weight is exact in float32."""
    for parameter in model.parameters():
        parameter.data = torch.randint(-512, 512, parameter.shape) / 1024
    return model


def gguf_name(name: str, layer_names: dict[str, str]) -> str:
    part, _, suffix = name.rpartition(".")
    if not part.startswith("model.layers."):
        return f"{NAMES[part]}.{suffix}"
    _, _, layer, inner = part.split(".", 3)
    return f"blk.{layer}.{(NAMES | layer_names)[inner]}.{suffix}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the query and key projections of a llama."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: Any, *edits: Edit, kind: gguf.GGMLQuantizationType | None = None) -> Path:
    """Write `model` as llama.cpp's converter would; `edits` add what is under test."""
    config = model.config
    is_llama = config.model_type == "llama"
    writer = gguf.GGUFWriter(path, "llama" if is_llama else "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_token_list([f"token {index}" for index in range(config.vocab_size)])
    if is_llama:
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(1000000.0)
    for edit in edits:
        edit(writer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        add_weight(writer, name, tensor.numpy(), config, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_weight(
    writer: gguf.GGUFWriter, name: str, weight: np.ndarray, config: Any, kind: gguf.GGMLQuantizationType | None
) -> None:
    is_llama = config.model_type == "llama"
    if is_llama and ".q_proj." in name:
        weight = permuted(weight, config.num_attention_heads)
    if is_llama and ".k_proj." in name:
        weight = permuted(weight, config.num_key_value_heads)
    if not is_llama and name.endswith("norm.weight"):
        weight = weight + 1
    target = gguf_name(name, LLAMA_NAMES if is_llama else GEMMA_NAMES)
    if kind is None or weight.ndim == 1:
        writer.add_tensor(target, np.ascontiguousarray(weight, dtype=np.float32))
    else:
        writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)


def assert_same_tensors(source: GGUFSource, state: dict[str, torch.Tensor]) -> None:
    assert set(source.names()) == set(state)
    for name, tensor in state.items():
        assert source.shape(name) == tensor.shape
        assert torch.equal(source.read(name), tensor), name


def without_head(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def assert_config_agrees(source: GGUFSource, model: Any) -> None:
    want = model.config.to_dict()
    different = {key: (value, want.get(key)) for key, value in source.config.items() if want.get(key) != value}
    assert set(different) <= {"architectures", "dtype", "rms_norm_eps", "bos_token_id", "eos_token_id"}
    assert source.config["rms_norm_eps"] == pytest.approx(want["rms_norm_eps"], rel=1e-6)
    assert source.config["architectures"] == [type(model).__name__]
    assert type(model.config)(**source.config).to_dict()["rope_parameters"] == want["rope_parameters"]


def test_a_llama_file_gives_the_tensors_of_the_model_it_was_made_from(tmp_path: Path) -> None:
    model = llama()
    source = GGUFSource(write(tmp_path / "llama.gguf", model))
    assert_same_tensors(source, model.state_dict())
    assert_config_agrees(source, model)
    assert source.config["tie_word_embeddings"] is False


def test_biases_of_a_llama_are_read_and_unpermuted_too(tmp_path: Path) -> None:
    model = llama(attention_bias=True, mlp_bias=True)
    source = GGUFSource(write(tmp_path / "llama.gguf", model))
    assert_same_tensors(source, model.state_dict())
    assert_config_agrees(source, model)


def test_a_gemma3_file_gives_the_tensors_of_the_model_it_was_made_from(tmp_path: Path) -> None:
    model = gemma3(num_hidden_layers=7)
    source = GGUFSource(write(tmp_path / "gemma.gguf", model))
    assert_same_tensors(source, without_head(model))
    assert_config_agrees(source, model)
    assert source.config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert source.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("make", [llama, gemma3])
def test_a_quantised_file_is_dequantised_as_gguf_does(tmp_path: Path, make: Callable[[], Any]) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    model = make()
    source = GGUFSource(write(tmp_path / "model.gguf", model, kind=kind))
    for name in source.names():
        want = model.state_dict()[name]
        if want.ndim == 2:  # permuting rows commutes with quantising along them
            want = torch.from_numpy(gguf.dequantize(gguf.quantize(want.numpy(), kind), kind))
        assert torch.equal(source.read(name), want), name


def test_tensors_come_in_the_type_that_was_asked_for(tmp_path: Path) -> None:
    model = gemma3()
    source = GGUFSource(write(tmp_path / "gemma.gguf", model), dtype=torch.bfloat16)
    assert source.config["dtype"] == "bfloat16"
    for name, tensor in without_head(model).items():
        assert source.dtype(name) is torch.bfloat16
        assert torch.equal(source.read(name), tensor.bfloat16()), name


def test_a_message_can_say_where_a_tensor_is(tmp_path: Path) -> None:
    path = write(tmp_path / "llama.gguf", llama())
    assert GGUFSource(path).where("model.layers.1.mlp.up_proj.weight") == str(path)


def test_a_name_that_is_not_there_is_told_with_the_nearest_one(tmp_path: Path) -> None:
    source = GGUFSource(write(tmp_path / "llama.gguf", llama()))
    with pytest.raises(CheckpointError, match=r"Did you mean 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        source.read("model.layers.0.mlp.up_project.weight")


def test_linear_and_yarn_scaling_become_rope_parameters(tmp_path: Path) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    full = GGUFSource(write(tmp_path / "gemma.gguf", gemma3(), linear)).config["rope_parameters"]
    assert full["full_attention"] == {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
    assert full["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    rope = GGUFSource(write(tmp_path / "llama.gguf", llama(), yarn)).config["rope_parameters"]
    assert rope == {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


@pytest.mark.parametrize(("head_dim", "factor", "original"), [(64, 32.0, 8192), (128, 8.0, 8192), (64, 4.0, 2048)])
def test_llama3_scaling_is_recovered_from_its_divisors(
    tmp_path: Path, head_dim: int, factor: float, original: int
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    model = llama(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)

    def divisors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
        writer.add_key_length(head_dim)

    source = GGUFSource(write(tmp_path / "llama.gguf", model, divisors))
    assert source.config["rope_parameters"] == rope
    assert "rope_freqs.weight" not in source.names()


def test_other_rotary_divisors_are_refused(tmp_path: Path) -> None:
    def divisors(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", np.array([1, 3, 1, 4, 1, 5, 2, 2], dtype=np.float32))

    with pytest.raises(CheckpointError, match="not those of the scaling 'llama3'"):
        GGUFSource(write(tmp_path / "llama.gguf", llama(), divisors))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.add_uint32("llama.shiny_new_feature", 1), "does not know: llama.shiny_new_feature"),
        (lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((4, 4), np.float32)), "ffn_gate_exps"),
        (lambda w: w.add_tensor("blk.2.ffn_up.weight", np.zeros((4, 4), np.float32)), "blk.2.ffn_up.weight"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope.scaling.factor is None"),
        (lambda w: w.add_expert_count(8), "experts"),
        (lambda w: w.add_key_length(8), "rope.dimension_count differs"),
        (lambda w: w.add_uint16("split.count", 3), "one of 3 parts"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, edit: Edit, message: str) -> None:
    path = tmp_path / "llama.gguf"
    with pytest.raises(CheckpointError, match=message) as caught:
        GGUFSource(write(path, llama(), edit))
    assert str(path) in str(caught.value)


def test_another_architecture_is_refused_with_those_that_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'gemma2' is not read; these are: llama, gemma3\. Did you mean"):
        GGUFSource(tmp_path / "model.gguf")


def test_a_file_that_is_missing_empty_or_not_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        GGUFSource(tmp_path / "absent.gguf")
    for content, message in ((b"", "too short"), (b"GGML" + bytes(40), "not a GGUF file")):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            GGUFSource(tmp_path / "bad.gguf")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "llama.gguf", llama())
    content = path.read_bytes()
    for length in [*range(0, 4000, 7), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"llama\.gguf: "):
            GGUFSource(path)


def test_counts_that_lie_are_refused_and_never_allocated(tmp_path: Path) -> None:
    path = write(tmp_path / "llama.gguf", llama())
    content = path.read_bytes()
    huge = struct.pack("<Q", 2**62)
    tokens = content.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    dims = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    blocks = content.index(b"llama.block_count") + len(b"llama.block_count") + 4
    for at, value in ((8, huge), (16, huge), (24, huge), (tokens, huge), (dims, huge), (blocks, b"\xff" * 4)):
        path.write_bytes(content[:at] + value + content[at + len(value) :])
        with pytest.raises(CheckpointError, match=r"llama\.gguf: "):
            GGUFSource(path)


def test_no_damaged_byte_of_the_header_gives_another_error_than_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "llama.gguf", llama())
    content = path.read_bytes()
    header = content.index(b"blk.0.attn_q.weight") + 200
    for at in range(0, header, 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            source = GGUFSource(path)
        except CheckpointError:
            continue
        assert source.names()  # a byte of a description or of a token is nothing that can be seen here


def test_a_period_or_flags_may_say_which_layers_slide(tmp_path: Path) -> None:
    flags = [True, False, True]
    key = "gemma3.attention.sliding_window_pattern"
    for edit in (lambda w: w.add_uint32(key, 2), lambda w: w.add_array(key, flags)):
        source = GGUFSource(write(tmp_path / "gemma.gguf", gemma3(num_hidden_layers=3), edit))
        assert source.config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]


def test_the_real_gemma_has_the_config_and_the_tensors_that_transformers_reads(gemma_gguf: Path) -> None:
    source = GGUFSource(gemma_gguf)
    config = Gemma3TextConfig(**source.config)
    with torch.device("meta"):
        skeleton = Gemma3ForCausalLM(config)
    parsed = load_gguf_checkpoint(str(gemma_gguf), return_tensors=True, model_to_load=skeleton)
    assert {key: source.config[key] for key in parsed["config"] if key in source.config} == {
        key: value for key, value in parsed["config"].items() if key in source.config
    }
    assert source.config["query_pre_attn_scalar"] == 256
    assert source.config["layer_types"] == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert source.config["rope_parameters"] == {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    }
    assert_same_tensors(source, parsed["tensors"])
