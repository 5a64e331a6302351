"""Adapters of PEFT: read and written so that logits are the same on both sides, and strictly."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import swissarmy as sat
from swissarmy.core.errors import CheckpointError, ConfigError
from swissarmy.interop.peft_config import PeftLoRAConfig
from swissarmy.testing import tiny_model
from tests.helpers import rewrite_json
from tests.interop.peft_cases import CONFIG, FAMILIES, PICTURES, WEIGHTS, close, logits, theirs

pytestmark = [  # what PEFT and transformers say of each other's newest versions
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.1},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "patterns": {"layers_to_transform": [1]},
}


def adapted(base: Path, family: str, **options: Any) -> Any:
    """Their model with an adapter of PEFT whose tensors are random."""
    torch.manual_seed(1)
    options = {"r": 3, "target_modules": FAMILIES[family][2], "fan_in_fan_out": family == "gpt2", **options}
    model = peft.get_peft_model(theirs(base, family), peft.LoraConfig(**options), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def written(base: Path, folder: Path, family: str = "gpt2", **options: Any) -> Path:
    """The folder of such an adapter."""
    adapted(base, family, **options).save_pretrained(folder)
    return folder


def train(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "mixins.lora." in name:
            nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


# Both ways


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_peft_gives_the_same_logits_and_goes_back(
    family: str, variant: str, bases: Any, tmp_path: Path
) -> None:
    base = bases(family)
    options = dict(VARIANTS[variant])
    if variant == "patterns":
        first = FAMILIES[family][2][0]
        options |= {"rank_pattern": {first: 2}, "alpha_pattern": {rf"^.*\.{first}": 5}}
    reference = adapted(base, family, **options)
    reference.save_pretrained(tmp_path / "theirs")
    expected, plain = logits(reference, family), logits(theirs(base, family), family)
    assert (expected - plain).abs().max() > 1e-2
    ours: Any = sat.load_adapter(sat.load(base), tmp_path / "theirs")
    close(logits(ours, family), expected)
    ours.save_adapter(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(theirs(base, family), tmp_path / "ours", autocast_adapter_dtype=False)
    close(logits(again.eval(), family), expected)
    stored, original = (load_file(tmp_path / side / WEIGHTS) for side in ("ours", "theirs"))
    assert stored.keys() == original.keys()
    for name, tensor in original.items():
        close(stored[name], tensor)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rslora": True, "rank_pattern": {"layers.1.*": 1}, "alpha_pattern": {"layers.0.*": 2.5}},
        {"dora": True},
        {"init": "pissa"},
        {"init": "olora", "dora": True, "rslora": True},
    ],
    ids=str,
)
def test_peft_reads_what_we_trained(family: str, options: dict[str, Any], bases: Any, tmp_path: Path) -> None:
    base = bases(family)
    model: Any = sat.load(base)
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, targets=FAMILIES[family][3], r=2, **options))
    train(model).save_adapter(tmp_path / "ours")
    expected = logits(model, family)
    assert (expected - logits(sat.load(base), family)).abs().max() > 1e-2
    read = peft.PeftModel.from_pretrained(theirs(base, family), tmp_path / "ours", autocast_adapter_dtype=False)
    close(logits(read.eval(), family), expected)
    close(logits(sat.load_adapter(sat.load(base), tmp_path / "ours"), family), expected)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_gradients_are_those_of_peft(variant: str, bases: Any, tmp_path: Path) -> None:
    reference = adapted(bases("bert"), "bert", **VARIANTS[variant])
    reference.save_pretrained(tmp_path / "theirs")
    model: Any = sat.load_adapter(sat.load(bases("bert")), tmp_path / "theirs")
    ids = torch.arange(14).view(2, 7) * 4 + 3
    model(ids)[0].square().sum().backward()
    reference(ids).logits.square().sum().backward()
    theirs_of = dict(reference.named_parameters())
    change = model.get_mixin("lora").layers[1]["attention_query"]
    module = "base_model.model.bert.encoder.layer.1.attention.self.query"
    close(change.lora_A.grad, theirs_of[f"{module}.lora_A.default.weight"].grad)
    close(change.lora_B.grad, theirs_of[f"{module}.lora_B.default.weight"].grad)
    if variant == "dora":
        close(change.magnitude.grad, theirs_of[f"{module}.lora_magnitude_vector.default.weight"].grad)


def test_the_joined_projection_of_gpt2_becomes_three_and_one_again(bases: Any, tmp_path: Path) -> None:
    folder = written(bases("gpt2"), tmp_path / "theirs", target_modules=["c_attn"])
    model: Any = sat.load_adapter(sat.load(bases("gpt2")), folder)
    layer = model.get_mixin("lora").layers[0]
    assert model.get_mixin("lora").config.targets == tuple(f"layers.*.attention.{p}" for p in ("query", "key", "value"))
    assert torch.equal(layer["attention_query"].lora_A, layer["attention_value"].lora_A)
    model.save_adapter(tmp_path / "shared")
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    assert load_file(tmp_path / "shared" / WEIGHTS)[name].shape == (3, 24)
    train(model).save_adapter(tmp_path / "apart")  # three A that differ: one of the sum of their ranks
    assert load_file(tmp_path / "apart" / WEIGHTS)[name].shape == (9, 24)
    b = load_file(tmp_path / "apart" / WEIGHTS)[name.replace("lora_A", "lora_B")]
    assert torch.equal(b[24:48, 3:6], model.get_mixin("lora").layers[0]["attention_key"].lora_B)
    assert not b[24:48, :3].any()


@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"alpha_pattern": {"^encoder.layer.0.attention.self.query": 64}},
        {"rank_pattern": {"^encoder.layer.1.attention.self.query": 1}},
    ],
    ids=str,
)
def test_an_adapter_of_the_base_model_fits_the_model_with_a_head_and_the_other_way_round(
    patterns: dict[str, Any], bases: Any, tmp_path: Path
) -> None:
    base = bases("bert")
    bare = transformers.BertModel.from_pretrained(base, dtype=torch.float64, add_pooling_layer=False)
    bare.save_pretrained(tmp_path / "bare")
    options = peft.LoraConfig(r=2, target_modules=["query"], **patterns)
    reference = peft.get_peft_model(bare, options, autocast_adapter_dtype=False)
    for parameter in reference.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    reference.save_pretrained(tmp_path / "adapter")
    assert "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight" in load_file(
        tmp_path / "adapter" / WEIGHTS
    )
    model = sat.load(base)
    plain = logits(model, "bert")
    assert not torch.equal(logits(sat.load_adapter(model, tmp_path / "adapter"), "bert"), plain)
    model.save_adapter(tmp_path / "headed")
    bare_ours = sat.load(tmp_path / "bare", overrides={"add_pooling_layer": False})
    hidden = logits(sat.load_adapter(bare_ours, tmp_path / "headed"), "bert")
    expected = reference.eval()(torch.arange(14).view(2, 7) * 4 + 3).last_hidden_state
    close(hidden, expected.detach())


WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "a head": ("GPT2ForSequenceClassification", {"task_type": "SEQ_CLS"}),
    "a head of BERT": ("BertForSequenceClassification", {"task_type": "SEQ_CLS", "target_modules": ["query"]}),
    "biases": ("GPT2LMHeadModel", {"bias": "all"}),
    "biases of the modules": ("GPT2LMHeadModel", {"bias": "lora_only"}),
    "a head and biases of pictures": (
        "ViTForImageClassification",
        {"modules_to_save": ["classifier"], "bias": "all", "target_modules": ["q_proj"]},
    ),
    "positions and norm": ("GPT2LMHeadModel", {"modules_to_save": ["wpe", "ln_f"]}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_modules_that_trained_beside_an_adapter_come_along(case: str, tmp_path: Path) -> None:
    architecture, options = WHOLE[case]
    cls = getattr(transformers, architecture)
    family = cls.config_class.model_type
    words = {} if family in PICTURES else {"vocab_size": 61, "num_labels": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    base = cls(cls.config_class(**words, **FAMILIES[family][1])).double().eval()
    base.save_pretrained(tmp_path / "base")
    transposed = "GPT2" in architecture
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": transposed, **options})
    reference = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for parameter in reference.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    reference.save_pretrained(tmp_path / "adapter")
    expected = logits(reference.eval(), family)
    ours: Any = sat.load_adapter(sat.load(tmp_path / "base"), tmp_path / "adapter")
    close(logits(ours, family), expected)
    if "SEQ_CLS" in options.values():
        ours.save_adapter(tmp_path / "ours", modules_to_save=["mixins.head"])
        again = cls.from_pretrained(tmp_path / "base", dtype=torch.float64)
        again = peft.PeftModel.from_pretrained(again, tmp_path / "ours", autocast_adapter_dtype=False).eval()
        close(logits(again, family), expected)
    ours.del_mixin("lora")
    assert (logits(ours, family) - logits(sat.load(tmp_path / "base"), family)).abs().max() > 1e-2


def test_several_adapters_load_side_by_side_and_are_written_by_name(bases: Any, tmp_path: Path) -> None:
    base = bases("llama")
    first = written(base, tmp_path / "first", "llama", target_modules=["q_proj"])
    second = written(base, tmp_path / "second", "llama", target_modules=["up_proj"], r=2)
    model: Any = sat.load(base)
    sat.load_adapter(model, first, name="first")
    alone = logits(model, "llama")
    sat.load_adapter(model, str(second), name="second")
    with pytest.raises(CheckpointError, match="several mixins that PEFT has: say name='first' or another"):
        model.save_adapter(tmp_path / "which")
    with pytest.raises(CheckpointError, match=r"no mixin 'frist' that was added. Did you mean 'first'\?"):
        model.save_adapter(tmp_path / "which", name="frist")
    model.save_adapter(tmp_path / "back", name="first")
    close(logits(sat.load_adapter(sat.load(base), tmp_path / "back"), "llama"), alone)
    sat.bundle_adapters(model, "first", "second")
    ids = torch.arange(14).view(2, 7) * 4 + 3
    close(model(ids, adapter="first")[0], alone)


def test_a_model_in_low_precision_takes_an_adapter_of_float32(bases: Any, tmp_path: Path) -> None:
    folder = written(bases("gpt2"), tmp_path / "theirs", use_dora=True)
    model = sat.load_adapter(sat.load(bases("gpt2"), dtype=torch.bfloat16), folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model, "gpt2")).all()


# Strictness


@pytest.fixture
def folder(bases: Any, tmp_path: Path) -> Path:
    """An adapter on `c_attn` of GPT-2."""
    return written(bases("gpt2"), tmp_path / "adapter", target_modules=["c_attn"])


def refused(bases: Any, folder: Path, family: str = "gpt2") -> str:
    """The message of the error; nothing was added."""
    model = sat.load(bases(family))
    names = list(model.state_dict())
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        sat.load_adapter(model, folder)
    assert list(model.state_dict()) == names
    return str(caught.value)


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    kept = {change(name): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in kept.items() if name is not None}, folder / WEIGHTS)


def test_a_key_without_a_place_is_an_error_with_the_nearest_name(bases: Any, folder: Path) -> None:
    rename(folder, lambda name: name.replace("c_attn", "c_atn"))
    message = refused(bases, folder)
    assert "unexpected: base_model.model.transformer.h.{0..1}.attn.c_atn.lora_A.weight" in message
    assert "Did you mean 'base_model.model.transformer.h.0.attn.c_attn.lora_A.weight'?" in message
    assert "missing: base_model.model.transformer.h.{0..1}.attn.c_attn.lora_A.weight" in message


@pytest.mark.parametrize(
    "old", ["base_model.model.", "lora_A.weight", "transformer.h.1.attn.c_attn", "attn.c_attn.lora_B"]
)
def test_keys_of_another_kind_are_errors(bases: Any, folder: Path, old: str) -> None:
    strange = {"base_model.model.": "", "lora_A.weight": "lora_embedding_A"}.get(old, "lm_head")
    rename(folder, lambda name: name.replace(old, strange))
    assert "unexpected: " in refused(bases, folder)


def test_a_layer_that_was_left_out_is_missing_unless_the_configuration_leaves_it_out(bases: Any, folder: Path) -> None:
    rename(folder, lambda name: None if ".h.1." in name else name)
    assert "missing: base_model.model.transformer.h.1.attn.c_attn.lora_A.weight" in refused(bases, folder)
    rewrite_json(folder / CONFIG, target_modules=r".*\.h\.[01]\.attn\.c_attn")
    assert "missing: " in refused(bases, folder)
    rewrite_json(folder / CONFIG, target_modules="all-linear")
    assert "missing: base_model.model.transformer.h.{0..1}.mlp.c_fc.lora_A.weight" in refused(bases, folder)
    rewrite_json(folder / CONFIG, target_modules=["c_attn"], layers_to_transform=[0])
    sat.load_adapter(sat.load(bases("gpt2")), folder)
    rewrite_json(folder / CONFIG, layers_to_transform=None, exclude_modules=["h.1.attn.c_attn"])
    sat.load_adapter(sat.load(bases("gpt2")), folder)


def test_half_an_adapter_and_other_shapes_are_errors(bases: Any, folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    rename(folder, lambda name: None if name.endswith("h.0.attn.c_attn.lora_B.weight") else name)
    assert "missing: base_model.model.transformer.h.0.attn.c_attn.lora_B.weight" in refused(bases, folder)
    save_file({name: tensor[:, :2].contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    assert "lora_B.weight: have [72, 2], want [72, 3]" in refused(bases, folder)
    save_file({name: tensor.long() for name, tensor in tensors.items()}, folder / WEIGHTS)
    assert "torch.int64 is no precision of weights" in refused(bases, folder)
    save_file({}, folder / WEIGHTS)
    assert "missing: " in refused(bases, folder)


def test_magnitudes_and_the_configuration_must_agree(bases: Any, tmp_path: Path) -> None:
    turned = written(bases("gpt2"), tmp_path / "adapter", target_modules=["c_attn"], use_dora=True)
    rewrite_json(turned / CONFIG, use_dora=False)
    assert "lora_magnitude_vector, without use_dora" in refused(bases, turned)
    rewrite_json(turned / CONFIG, use_dora=True)
    rename(turned, lambda name: None if "magnitude" in name else name)
    assert "missing: base_model.model.transformer.h.{0..1}.attn.c_attn.lora_magnitude_vector" in refused(bases, turned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADALORA"}, "peft_type='ADALORA' is not supported; 'BEFT', 'IA3', 'LORA', "),
        ({"peft_type": "IA3"}, "init_lora_weights=True, lora_alpha=8, r=3: not supported"),
        ({"bias": "some"}, "bias='some' is not known; there are none, all and lora_only"),
        ({"bias": "all"}, "missing: base_model.model.transformer.h.{0..1}.attn.c_attn.bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']: it holds none of them"),
        ({"modules_to_save": ["wpe"]}, "missing: base_model.model.transformer.wpe.weight"),
        ({"modules_to_save": "ln_f"}, "modules_to_save='ln_f' is no list of names of modules"),
        ({"lora_bias": True, "a_field_of_tomorrow": 1}, "lora_bias=True, a_field_of_tomorrow=1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base model's weights"),
        ({"r": 0}, "ranks are integers of at least 1"),
        ({"lora_alpha": "x"}, "lora_alpha='x'"),
        ({"lora_alpha": 0}, "alphas are numbers above 0"),
        ({"alpha_pattern": {"c_attn": "x"}}, "alphas are numbers above 0"),
        ({"target_modules": "(a"}, "'(a' is no regular expression"),
        ({"rank_pattern": {"(a+)+b": 2}}, "repeats too much to be tried"),
        ({"rank_pattern": {".*a.*b.*c.*": 2}}, "repeats too much to be tried"),
        ({"rank_pattern": {"c_attn": 2}}, "have [3, 24], want [2, 24]"),
    ],
)
def test_a_configuration_that_says_more_than_lora_is_refused(
    bases: Any, folder: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite_json(folder / CONFIG, **changes)
    assert message in refused(bases, folder)


def test_only_safetensors_are_read(bases: Any, folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle" in refused(bases, folder)
    (folder / CONFIG).unlink()
    assert f"it needs {CONFIG} and {WEIGHTS}; {folder} holds README.md" in refused(bases, folder)
    assert "there is no such file or folder" in refused(bases, tmp_path / "adaptor")
    (folder / "adapter_model.bin").rename(folder / WEIGHTS)
    (folder / CONFIG).write_text("[1")
    assert f"{CONFIG}:1: not valid JSON" in refused(bases, folder)


def test_an_adapter_of_another_family_or_size_is_refused(bases: Any, folder: Path) -> None:
    assert "unexpected: base_model.model.transformer.h." in refused(bases, folder, "llama")


def test_a_name_that_is_taken_is_refused(bases: Any, folder: Path) -> None:
    model = sat.load_adapter(sat.load(bases("gpt2")), folder)
    with pytest.raises(sat.HookConflictError, match="there is a mixin 'lora' already"):
        sat.load_adapter(model, folder)


def test_what_peft_has_no_place_for_is_not_written(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt2")
    with pytest.raises(
        CheckpointError, match="the model has no mixin of these; for PEFT are written: LoRAMixin, IA3Mixin"
    ):
        model.save_adapter(tmp_path / "none", layout="peft")
    model.add_mixin("experts", sat.MixtureOfExpertsMixin.for_model(model, num_experts=2))
    model.add_mixin("lora", sat.LoRAMixin.for_model(model, targets=("query", "experts.*")))
    with pytest.raises(CheckpointError, match=r"'mixins.experts.layers.0.experts.0.up' has no module"):
        model.save_adapter(tmp_path / "none", "lora", layout="peft")
    plain = sat.BaseModel(model.config)
    plain.add_mixin("lora", sat.LoRAMixin.for_model(plain))
    with pytest.raises(CheckpointError, match="BaseModel is of no family"):
        plain.save_adapter(tmp_path / "none", layout="peft")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_holds_something_is_not_written_over(bases: Any, folder: Path) -> None:
    model: Any = sat.load_adapter(sat.load(bases("gpt2")), folder)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        model.save_adapter(folder)


# The configuration alone


def paths() -> Iterator[str]:
    for layer in (0, 1, 10):
        for end in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            yield f"model.layers.{layer}.{end}"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "mlp.up_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj"]},
        {"target_modules": r".*\.1\.self_attn\..*_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 10], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
    ],
    ids=str,
)
def test_targets_are_those_that_peft_finds(fields: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    ours = PeftLoRAConfig.read({"peft_type": "LORA", **json.loads(json.dumps(fields))}, where="config")
    reference = peft.LoraConfig(**fields)
    found = {path for path in paths() if check_target_module_exists(reference, path)}
    excluded = {
        path for path in found if type(check_target_module_exists(reference, path)).__name__ == "_ExcludedModule"
    }
    assert found - excluded == {path for path in paths() if ours.targets(path)}


@pytest.mark.parametrize("pattern", ["q_proj", r"layers\.1\.self_attn\.q_proj", "^model.layers.10.*", "1.mlp.up_proj"])
def test_patterns_are_matched_as_peft_does(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    ours = PeftLoRAConfig.read({"peft_type": "LORA", "rank_pattern": {pattern: 5}}, where="config")
    for path in paths():
        assert (ours.rank_and_alpha(path)[0] == 5) is (get_pattern_key([pattern], path) == pattern)


def test_a_copy_of_tied_weights_is_refused(bases: Any, tmp_path: Path) -> None:
    adapted(bases("gpt2"), "gpt2", modules_to_save=["wte"]).save_pretrained(tmp_path / "adapter")
    message = refused(bases, tmp_path / "adapter")
    assert "wte.weight: PEFT trains a copy of it apart from lm_head.weight, and here the two are one" in message


def test_where_an_adapter_with_a_name_lies_is_told(bases: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "mine")
    message = refused(bases, tmp_path / "run")
    assert f"An adapter that has a name of its own lies in {tmp_path / 'run' / 'mine'}." in message


def test_an_expression_that_could_take_for_ever_is_not_tried(bases: Any, tmp_path: Path) -> None:
    pattern = r"(?:.*?(?:h).*?(?:attn|mlp).*?(?:c_attn|c_fc).*?)|(?:.*x.*y.*)"
    reference = adapted(bases("gpt2"), "gpt2", target_modules=pattern)
    reference.save_pretrained(tmp_path / "adapter")
    ours = sat.load_adapter(sat.load(bases("gpt2")), tmp_path / "adapter")
    close(logits(ours, "gpt2"), logits(reference, "gpt2"))


def test_what_cannot_go_along_is_told(bases: Any, tmp_path: Path) -> None:
    model: Any = sat.load(bases("gpt2"))
    model.add_mixin("lora", sat.LoRAMixin.for_model(model))
    with pytest.raises(CheckpointError, match=r"'mixins.hed\.\*' is no parameter of the model's family"):
        model.save_adapter(tmp_path / "none", modules_to_save=["mixins.hed"])
    with pytest.raises(CheckpointError, match=r"'transformer.wte.weight' is the head as well"):
        model.save_adapter(tmp_path / "none", modules_to_save=["transformer.word_embeddings"])
    with pytest.raises(ConfigError, match="modules_to_save goes with PEFT's layout alone"):
        model.save_adapter(tmp_path / "none", layout="mixins", modules_to_save=["transformer.final_norm"])
