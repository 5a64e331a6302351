"""IA3, VeRA, BEFT, prefix tuning, prompt tuning and P-tuning of PEFT: the same logits on both sides, both ways."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import swissarmy as sat
from swissarmy.core.errors import CheckpointError, ConfigError
from swissarmy.testing import tiny_model
from tests.helpers import rewrite_json
from tests.interop.peft_cases import CONFIG, FAMILIES, WEIGHTS, close, logits, theirs

pytestmark = [  # what PEFT and transformers say of each other's newest versions
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term"),
    pytest.mark.filterwarnings("ignore:Specified to not save vera_A and vera_B"),
]
TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}
OUTPUTS = {
    "gpt2": ["c_attn"],
    "llama": ["k_proj", "v_proj"],
    "bert": ["key", "value"],
    "t5": ["k", "v"],
    "vit": ["k_proj"],
}
ENCODED = {"projected prefix", "p-tuning", "p-tuning with an lstm", "prefix encoder", "lstm"}
"""What an encoder made, in float64; PEFT reads it in float32."""
INPUTS = {"gpt2": ["mlp.c_proj"], "llama": ["down_proj"], "bert": ["output.dense"], "t5": ["wo"], "vit": ["fc2"]}


def config_of(method: str, family: str) -> peft.PeftConfig:
    modules = {"target_modules": OUTPUTS[family] + INPUTS[family]}
    transposed = {"fan_in_fan_out": family == "gpt2"}
    prompt = {"num_virtual_tokens": 3, "task_type": TASKS.get(family)}
    match method:
        case "ia3":
            return peft.IA3Config(feedforward_modules=INPUTS[family], **modules, **transposed)
        case "vera":
            return peft.VeraConfig(r=4, **modules, **transposed)
        case "vera from a key":
            return peft.VeraConfig(r=4, projection_prng_key=7, save_projection=False, **modules, **transposed)
        case "beft":
            return peft.BeftConfig(**modules)
        case "prefix":
            return peft.PrefixTuningConfig(**prompt)
        case "projected prefix":
            return peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=9, **prompt)
        case "prompt":
            return peft.PromptTuningConfig(**prompt)
        case "p-tuning":
            return peft.PromptEncoderConfig(encoder_hidden_size=9, **prompt)
        case "p-tuning with an lstm":
            return peft.PromptEncoderConfig(encoder_hidden_size=9, encoder_reparameterization_type="LSTM", **prompt)
    raise AssertionError(method)


def in_float64(model: Any) -> Any:
    """PEFT makes what it adds in float32; rotary frequencies stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    for name, buffer in model.named_buffers():
        if "vera_" in name:
            buffer.data = buffer.data.double()
    return model.eval()


def make_random(parameters: Any) -> None:
    """Numbers that float32 holds, for PEFT reads a prompt in that precision."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.5).to(parameter.dtype)


def adapted(base: Path, method: str, family: str) -> Any:
    """Their model with an adapter whose tensors are random."""
    model = peft.get_peft_model(theirs(base, family), config_of(method, family), autocast_adapter_dtype=False)
    make_random(parameter for parameter in model.parameters() if parameter.requires_grad)
    return in_float64(model)


def read_by_peft(base: Path, family: str, folder: Path) -> Any:
    return in_float64(peft.PeftModel.from_pretrained(theirs(base, family), folder, autocast_adapter_dtype=False))


def their_logits(model: Any, family: str) -> Tensor:
    """Those of the tokens."""
    return logits(model, family)[:, -7:]


PAIRS = [
    (method, family)
    for method, families in {
        "ia3": (*TASKS, "vit"),
        "vera": (*TASKS, "vit"),
        "vera from a key": ("gpt2", "bert"),
        "beft": ("llama", "bert", "t5"),
        "prefix": ("gpt2", "llama"),
        "projected prefix": ("gpt2", "llama"),
        "prompt": TASKS,
        "p-tuning": TASKS,
        "p-tuning with an lstm": ("llama", "t5"),
    }.items()
    for family in families
]


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_an_adapter_of_peft_gives_the_same_logits_and_goes_back(
    method: str,
    family: str,
    bases: Any,
    tmp_path: Path,
) -> None:
    base = bases(family)
    reference = adapted(base, method, family)
    reference.save_pretrained(tmp_path / "theirs")
    expected, plain = their_logits(reference, family), logits(theirs(base, family), family)
    assert (expected - plain).abs().max() > 1e-3
    ours: Any = sat.load_adapter(sat.load(base), tmp_path / "theirs")
    close(logits(ours, family), expected)
    ours.save_adapter(tmp_path / "ours")
    again = their_logits(read_by_peft(base, family, tmp_path / "ours"), family)
    close(again, expected, tolerance=1e-5 if method in ENCODED else 1e-9)
    ours.save_pretrained(tmp_path / "whole")
    close(logits(sat.load(tmp_path / "whole"), family), expected)


OURS: dict[str, Any] = {
    "ia3": (sat.IA3Mixin, {}, ("gpt2", "llama", "bert", "t5")),
    "ia3 of some layers": (sat.IA3Mixin, {"targets": "layers.1.attention.value"}, ("gpt2", "llama", "t5")),
    "vera": (sat.VeRAMixin, {"r": 3, "targets": ("query", "mlp.up")}, ("gpt2", "llama", "bert", "t5")),
    "bitfit": (sat.BitFitMixin, {}, ("llama", "bert", "t5")),
    "prefix": (sat.PrefixTuningMixin, {"prefix_len": 3, "shift_positions": True}, ("gpt2", "llama")),
    "prefix encoder": (
        sat.PrefixTuningMixin,
        {"prefix_len": 3, "encoder_size": 5, "shift_positions": True},
        ("gpt2", "llama"),
    ),
    "prompt": (sat.PromptTuningMixin, {"prompt_len": 3}, ("gpt2", "llama", "bert", "t5")),
    "p-tuning": (sat.PTuningMixin, {"prompt_len": 3, "encoder_size": 5}, ("gpt2", "bert", "t5")),
    "lstm": (sat.PTuningMixin, {"prompt_len": 3, "encoder": "lstm", "encoder_size": 5}, ("llama",)),
}


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name, (*_, families) in OURS.items() for family in families]
)
def test_peft_reads_what_we_trained(name: str, family: str, bases: Any, tmp_path: Path) -> None:
    kind, options, _ = OURS[name]
    model: Any = sat.load(bases(family))
    model.add_mixin("own", kind.for_model(model, **options))
    make_random(parameter for name, parameter in model.named_parameters() if "mixins.own." in name)
    expected = logits(model, family)
    assert (expected - logits(sat.load(bases(family)), family)).abs().max() > 1e-3
    model.save_adapter(tmp_path / "ours")
    read = their_logits(read_by_peft(bases(family), family, tmp_path / "ours"), family)
    close(read, expected, tolerance=1e-5 if name in ENCODED else 1e-9)
    close(logits(sat.load_adapter(sat.load(bases(family)), tmp_path / "ours"), family), expected)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_padding_and_generation_go_on_as_with_peft(method: str, bases: Any, tmp_path: Path) -> None:
    reference = adapted(bases("llama"), method, "llama")
    reference.save_pretrained(tmp_path / "theirs")
    model = sat.load_adapter(sat.load(bases("llama")), tmp_path / "theirs")
    tokens = torch.tensor([3, 9, 27])
    for _ in range(4):
        following = logits_of_one(reference, tokens)[-1].argmax()
        tokens = torch.cat((tokens, following[None]))
    rows, _ = sat.fill_sequence(model, [torch.tensor([3, 9, 27, -1, -1, -1, -1]), torch.tensor([5, -1])])
    assert rows[0].tolist() == tokens.tolist()


def logits_of_one(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens[None]).logits[0]
    return result


# Strictness


def refused(bases: Any, folder: Path, family: str = "llama") -> str:
    """The message of the error; nothing was added."""
    model = sat.load(bases(family))
    names = list(model.state_dict())
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        sat.load_adapter(model, folder)
    assert list(model.state_dict()) == names
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("ia3", "base_model.model.model.layers.1.mlp.down_proj.ia3_l"),
        ("beft", "base_model.model.model.layers.1.mlp.down_proj.beft_bias"),
        ("vera", "base_model.model.model.layers.1.mlp.down_proj.vera_lambda_d"),
        ("vera", "base_model.vera_B"),
        ("prefix", "prompt_embeddings"),
        ("prompt", "prompt_embeddings"),
    ],
)
def test_every_tensor_must_have_its_place_and_shape(
    method: str,
    name: str,
    bases: Any,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "adapter"
    adapted(bases("llama"), method, "llama").save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    stranger = name.replace("layers.1", "layers.7") + ("" if "layers.1" in name else "x")
    save_file({stranger if key == name else key: tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    message = refused(bases, folder)
    assert f"unexpected: {stranger}" in message
    assert f"missing: {name}" in message or name == "base_model.vera_B"
    save_file(
        {key: tensor[:-1].clone() if key == name else tensor for key, tensor in tensors.items()}, folder / WEIGHTS
    )
    assert f"{name}: have [" in refused(bases, folder)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("ia3", {"modules_to_save": ["lm_head"]}, "missing: base_model.model.lm_head.weight"),
        ("ia3", {"feedforward_modules": []}, "down_proj.ia3_l: have [1, 40], want [24, 1]"),
        ("ia3", {"feedforward_modules": "(a+)+b"}, "repeats too much to be tried"),
        ("vera", {"r": 5}, "have [4], want [5]"),
        ("vera", {"save_projection": False}, "unexpected: base_model.vera_A"),
        ("prompt", {"task_type": None}, "task_type is missing, without which PEFT leaves the prompt away"),
        ("prompt", {"num_virtual_tokens": 4}, "prompt_embeddings: have [3, 24], want [4, 24]"),
        ("prompt", {"num_virtual_tokens": "3"}, "num_virtual_tokens='3'"),
    ],
)
def test_the_configuration_must_be_that_of_the_tensors(
    method: str,
    changes: dict[str, Any],
    message: str,
    bases: Any,
    tmp_path: Path,
) -> None:
    adapted(bases("llama"), method, "llama").save_pretrained(tmp_path / "adapter")
    rewrite_json(tmp_path / "adapter" / CONFIG, **changes)
    assert message in refused(bases, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("family", "kind", "options", "message"),
    [
        ("gpt2", sat.PrefixTuningMixin, {}, "shift_positions=False, and PEFT counts positions after its prefix"),
        ("t5", sat.PrefixTuningMixin, {"shift_positions": True}, "of encoder-decoders are not exchanged"),
        ("gpt2", sat.PromptTuningMixin, {"has_positions": False}, "has has_positions=False"),
        ("t5", sat.PromptTuningMixin, {"reaches_decoder": False}, "reaches_decoder=False; PEFT's has True, True"),
        ("gpt2", sat.BitFitMixin, {}, "is a Conv1D, and PEFT has BEFT for Linear only"),
        ("gpt2", sat.VeRAMixin, {"r": 2, "targets": "value"}, "begins at row 48 of B, and here at 0"),
        ("gpt2", sat.IA3Mixin, {"targets": ("query", "key"), "inputs": "query"}, "stretch its input or its outputs"),
        ("gpt2", sat.IA3Mixin, {"targets": "query", "inputs": "query"}, "has one vector where its projections have"),
    ],
)
def test_what_peft_would_compute_otherwise_is_not_written(
    family: str,
    kind: Any,
    options: dict[str, Any],
    message: str,
    bases: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Any = sat.load(bases(family))
    model.add_mixin("own", kind.for_model(model, **options))
    pattern = message.replace("(", r"\(")
    with pytest.raises(CheckpointError, match=rf'(?s){pattern}.* With layout="mixins" it is kept for this library'):
        model.save_adapter(tmp_path / "ours", layout="peft")
    assert not (tmp_path / "ours").exists()
    model.save_adapter(tmp_path / "ours")
    assert "is written for this library alone" in caplog.text
    again = sat.load_adapter(sat.load(bases(family)), tmp_path / "ours")
    close(logits(again, family), logits(model, family))


@pytest.mark.parametrize("architecture", ["GPT2ForSequenceClassification", "LlamaForSequenceClassification"])
@pytest.mark.parametrize("method", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_prompts_of_classifiers_that_look_at_the_last_token_are_exchanged(
    architecture: str, method: Any, tmp_path: Path
) -> None:
    cls = getattr(transformers, architecture)
    sizes = FAMILIES["gpt2" if "GPT2" in architecture else "llama"][1]
    torch.manual_seed(0)
    config = cls.config_class(vocab_size=61, num_labels=3, pad_token_id=0, **sizes)
    cls(config).double().save_pretrained(tmp_path / "base")

    def base() -> Any:
        return cls.from_pretrained(tmp_path / "base", dtype=torch.float64).eval()

    reference = peft.get_peft_model(
        base(), method(num_virtual_tokens=3, task_type="SEQ_CLS"), autocast_adapter_dtype=False
    )
    make_random(parameter for parameter in reference.parameters() if parameter.requires_grad)
    reference = in_float64(reference)
    reference.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(14).view(2, 7) * 4 + 3
    ours: Any = sat.load_adapter(sat.load(tmp_path / "base"), tmp_path / "theirs")
    close(ours(ids)[0].detach(), reference(ids).logits.detach())
    ours = sat.load(tmp_path / "base")
    kind = sat.PromptTuningMixin if method is peft.PromptTuningConfig else sat.PrefixTuningMixin
    options = {"prompt_len": 3} if method is peft.PromptTuningConfig else {"prefix_len": 3, "shift_positions": True}
    ours.add_mixin("own", kind.for_model(ours, **options))
    make_random(parameter for name, parameter in ours.named_parameters() if "mixins.own." in name)
    ours.save_adapter(tmp_path / "ours", "own", layout="peft")
    read = in_float64(peft.PeftModel.from_pretrained(base(), tmp_path / "ours", autocast_adapter_dtype=False))
    close(read(ids).logits.detach(), ours(ids)[0].detach())


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_prompts_of_other_classifiers_would_be_others(family: str, tmp_path: Path) -> None:
    architecture = {"bert": "BertForSequenceClassification", "t5": "T5ForSequenceClassification"}[family]
    model: Any = tiny_model(family, architectures=[architecture], eos_token_id=1)
    model.add_mixin("own", sat.PromptTuningMixin.for_model(model, prompt_len=3))
    with pytest.raises(CheckpointError, match="classifies by other states than the last one"):
        model.save_adapter(tmp_path / "ours", layout="peft")


def test_the_name_of_the_mixin_is_that_of_the_method(bases: Any, tmp_path: Path) -> None:
    adapted(bases("llama"), "p-tuning", "llama").save_pretrained(tmp_path / "adapter")
    model: Any = sat.load_adapter(sat.load(bases("llama")), tmp_path / "adapter")
    assert isinstance(model.get_mixin("prompt-tuning"), sat.PromptTuningMixin)
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["peft_type"] == "P_TUNING"
