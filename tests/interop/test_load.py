"""Loading is strict: every tensor has its place, everything wrong is in one report, nothing is half done."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import swissarmy as sat
from swissarmy.core.errors import CheckpointError, ConfigError, HookConflictError
from swissarmy.interop.matching import group_names
from swissarmy.testing import tiny_inputs, tiny_model
from tests.helpers import Scale, rewrite_json, tiny_config, tiny_family_model

WEIGHTS = "model.safetensors"


def saved(folder: Path, model_type: str = "gpt2", architecture: str | None = None, **changes: Any) -> Path:
    """A folder with a tiny model."""
    tiny_family_model(model_type, architecture, **changes).save_pretrained(folder / "model")
    return folder / "model"


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Change the tensors of a saved model."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        sat.load(folder, **options)
    return str(caught.value)


def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )


# Names and shapes


def test_missing_tensors_are_grouped_with_the_nearest_names(tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for layer in range(4):
            tensors[f"transformer.h.{layer}.attn.c_atn.weight"] = tensors.pop(
                f"transformer.h.{layer}.attn.c_attn.weight"
            )
        del (
            tensors["transformer.h.2.ln_1.bias"],
            tensors["transformer.h.0.ln_2.bias"],
            tensors["transformer.h.3.ln_2.bias"],
        )

    message = refused(edit(saved(tmp_path, n_layer=4), drop))
    lines = message.splitlines()
    assert lines[0] == "model.safetensors does not fit BaseModel:"
    assert (
        "  - missing: transformer.h.{0..3}.attn.c_attn.weight. Did you mean 'transformer.h.0.attn.c_atn.weight'?"
        in lines
    )
    assert any(line.startswith("  - missing: transformer.h.2.ln_1.bias.") for line in lines)
    assert any(line.startswith("  - missing: transformer.h.{0,3}.ln_2.bias.") for line in lines)
    assert (
        "  - unexpected: transformer.h.{0..3}.attn.c_atn.weight. Did you mean 'transformer.h.0.attn.c_attn.weight'?"
        in lines
    )


def test_unexpected_tensors_are_refused(tmp_path: Path) -> None:
    message = refused(edit(saved(tmp_path), lambda tensors: tensors.update(adapter=torch.zeros(2))))
    assert message.splitlines()[1:] == ["  - unexpected: adapter."]


def test_a_tensor_of_another_shape_names_have_and_want(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.1.attn.c_attn.weight"] = torch.zeros(96, 32)
        tensors["transformer.wpe.weight"] = torch.zeros(7, 32)

    lines = refused(edit(saved(tmp_path), change)).splitlines()
    assert any(
        line.startswith("  - transformer.h.1.attn.c_attn.weight: have [96, 32], want [32, 96]")
        and "transformer.layers.1.attention.query.weight" in line
        for line in lines
    )
    assert any(line.startswith("  - transformer.wpe.weight: have [7, 32], want [64, 32]") for line in lines)
    assert len(lines) == 3


def test_everything_that_is_wrong_is_in_one_report_and_no_tensor_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swissarmy.interop.safetensors_folder import SafetensorsSource

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["new"] = tensors.pop("transformer.ln_f.bias")
        tensors["transformer.ln_f.weight"] = torch.zeros(3)

    folder = edit(saved(tmp_path), change)
    reads: list[str] = []
    monkeypatch.setattr(SafetensorsSource, "read", lambda self, name: reads.append(name))
    message = refused(folder)
    assert [
        part in message for part in ("missing: transformer.ln_f.bias", "unexpected: new", "have [3], want [32]")
    ] == [True] * 3
    assert not reads


def test_one_tensor_under_two_names_is_refused_unless_ignored(tmp_path: Path) -> None:
    def twice(tensors: dict[str, Tensor]) -> None:
        tensors["wpe.weight"] = tensors["transformer.wpe.weight"] + 1
        for prefix in ("", "transformer."):
            tensors[f"{prefix}h.0.attn.bias"] = torch.zeros(1)

    lines = refused(edit(saved(tmp_path), twice)).splitlines()
    assert len(lines) == 2
    assert "both are transformer.wpe.weight" in lines[1]
    assert "wpe.weight, beside" in lines[1]


@pytest.mark.parametrize("model_type", ["gpt2", "t5"])
def test_a_tied_tensor_stored_twice_must_be_the_same_twice(tmp_path: Path, model_type: str) -> None:
    original = {"gpt2": "transformer.wte.weight", "t5": "shared.weight"}[model_type]
    folder = saved(tmp_path, model_type)
    model = sat.load(folder)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[original].clone()}))
    assert same(sat.load(folder), model)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[original] + 1}))
    message = refused(folder)
    assert f"lm_head.weight differs from {original}" in message
    assert 'overrides={"tie_word_embeddings": False}' in message


def test_a_tied_tensor_stored_only_under_its_other_name_is_found(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = sat.load(folder)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("transformer.wte.weight")}))
    assert same(sat.load(folder), model)


def test_an_untied_model_keeps_both(tmp_path: Path) -> None:
    folder = saved(tmp_path, tie_word_embeddings=False)
    loaded = sat.load(folder)
    assert "transformer.lm_head.weight" in loaded.state_dict()
    assert same(loaded, tiny_family_model("gpt2", tie_word_embeddings=False))
    assert "missing: lm_head.weight" in refused(edit(folder, lambda tensors: tensors.pop("lm_head.weight")))


def test_names_with_and_without_the_prefix_and_ignored_buffers_load(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = sat.load(folder)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    assert same(sat.load(edit(folder, rename)), model)


def test_runs_and_gaps_of_layers_are_written_short() -> None:
    names = [f"layers.{i}.x" for i in (0, 10, 1, 2)] + ["layers.7.y", "head", "a.5.b", "a.4.b"]
    assert group_names(names) == ["layers.{0,1,2,10}.x", "layers.7.y", "head", "a.{4..5}.b"]


# Configuration


def test_an_unknown_field_names_the_file_and_the_nearest_field(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rewrite_json(folder / "config.json", n_hed=4, layer_norm_epsilom=1e-5)
    with pytest.raises(ConfigError) as caught:
        sat.load(folder)
    assert str(caught.value).splitlines() == [
        f"{folder / 'config.json'}: 2 problems",
        "  - unknown field 'n_hed'. Did you mean 'n_head'?",
        "  - unknown field 'layer_norm_epsilom'. Did you mean 'layer_norm_epsilon'?",
    ]


def test_a_field_of_the_wrong_type_names_the_file(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rewrite_json(folder / "config.json", n_head="4")
    with pytest.raises(ConfigError, match=r"config\.json: n_head='4' is not int"):
        sat.load(folder)


def test_a_value_that_would_change_the_network_and_is_not_supported_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rewrite_json(folder / "config.json", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ConfigError, match="scale_attn_by_inverse_layer_idx=True is not one of False"):
        sat.load(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gtp2"}, r"model_type 'gtp2' is not supported\. Did you mean 'gpt2'\?.*The families are: bert"),
        ({"model_type": "../gpt2"}, "is not supported"),
        ({"model_type": "_family"}, "'_family' is not supported"),
        ({"model_type": 7}, "'7' is not supported"),
        (
            {"architectures": ["GPT2LMHead"]},
            r"architecture 'GPT2LMHead' is not supported\. Did you mean 'GPT2LMHeadModel'\?.*Supported: GPT2",
        ),
    ],
)
def test_an_unknown_family_or_architecture_names_the_nearest(tmp_path: Path, changes: Any, named: str) -> None:
    folder = saved(tmp_path)
    rewrite_json(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{named}"):
        sat.load(folder)


def test_a_config_without_a_model_type_lists_the_families(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json: model_type is missing.*gpt2, llama"):
        sat.load(folder)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{\n"model_type": "gpt2",\n"n_head": 4,,\n}', r"config\.json:3: not valid JSON"),
        (b"", r"config\.json:1: not valid JSON"),
        (b'{"model_type": "gpt2"', r"config\.json:1: not valid JSON"),
        (b"\xff\xfe{}", r"config\.json: not valid UTF-8 at byte 0"),
        (b"[1, 2]", r"config\.json: a JSON object is expected, not a list"),
        (b"null", r"config\.json: a JSON object is expected, not a NoneType"),
        (b"[" * 100_000, r"config\.json: not valid JSON: nested too deeply"),
    ],
)
def test_bad_json_names_the_file_and_the_line(tmp_path: Path, content: bytes, named: str) -> None:
    folder = saved(tmp_path)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=named):
        sat.load(folder)


def test_a_folder_without_a_config_says_what_it_holds(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "config.json").unlink()
    assert "has no config.json; it holds: " in refused(folder)
    assert "sat migrate" not in refused(folder)
    assert WEIGHTS in refused(folder)


@pytest.mark.parametrize(
    "names",
    [
        ("latest", "1000/mp_rank_00_model_states.pt", "model_config.json"),
        ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        ("weights.pt",),
    ],
)
def test_a_checkpoint_of_the_older_sat_is_shown_its_way(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert f"bring it along with `sat migrate {tmp_path} NEW`" in refused(tmp_path)


def test_a_file_that_is_no_checkpoint_is_refused_as_a_file(tmp_path: Path) -> None:
    weights = saved(tmp_path) / WEIGHTS
    assert f"{weights} is a file; a checkpoint is a folder with a config.json" in refused(weights)
    assert "sat migrate" not in refused(weights)
    old = tmp_path / "mp_rank_00_model_states.pt"
    old.touch()
    assert f"bring it along with `sat migrate {old} NEW`" in refused(old)


def test_overrides_change_the_configuration_before_building(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", "LlamaForSequenceClassification", num_labels=2)
    model = sat.load(folder, overrides={"max_position_embeddings": 32})
    assert model.config.max_sequence_length == 32
    message = refused(folder, overrides={"num_labels": 3})
    assert "score.weight: have [2, 32], want [3, 32]" in message
    with pytest.raises(ConfigError, match=r"unknown field 'num_lables'. Did you mean 'num_labels'\?"):
        sat.load(folder, overrides={"num_lables": 3})


# What may be missing


def test_what_may_be_missing_starts_anew_and_the_rest_is_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path, dtype="x")
    rewrite_json(folder / "config.json", architectures=["GPT2ForSequenceClassification"], num_labels=3)
    message = refused(folder)
    assert "missing: score.weight" in message
    assert message.endswith("\nTo let what is missing start anew, name it: allow_missing=['score.weight']")
    assert sat.load(folder, allow_missing=["score.*"]).get_parameter("mixins.head.classifier.weight").shape == (3, 32)
    model = sat.load(folder, allow_missing=["mixins.head.*"])
    head = model.get_parameter("mixins.head.classifier.weight")
    assert head.shape == (3, 32)
    assert head.isfinite().all()
    assert head.std() > 0
    original = tiny_family_model("gpt2").state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text"])
def test_norms_that_may_be_missing_start_as_plain_normalisations(tmp_path: Path, model_type: str) -> None:
    folder = saved(tmp_path, model_type)
    names = [name for name in load_file(folder / WEIGHTS) if "ln_" in name or "norm" in name]
    edit(folder, lambda tensors: [tensors.pop(name) for name in names])
    model = sat.load(folder, allow_missing=["*norm*"])
    for name, parameter in model.named_parameters():
        if "norm" in name:
            one = 1.0 if name.endswith("weight") and model_type != "gemma3_text" else 0.0
            assert torch.equal(parameter, torch.full_like(parameter, one)), name


def test_what_starts_anew_has_the_precision_of_the_rest(tmp_path: Path) -> None:
    tiny_family_model("gpt2").bfloat16().save_pretrained(tmp_path / "model")
    rewrite_json(tmp_path / "model" / "config.json", architectures=["GPT2ForSequenceClassification"])
    model = sat.load(tmp_path / "model", allow_missing=["mixins.head.*"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(torch.tensor([[1, 2]]))


def test_part_of_a_joined_tensor_cannot_be_missing(tmp_path: Path) -> None:
    folder = edit(saved(tmp_path), lambda tensors: tensors.pop("transformer.h.0.attn.c_attn.bias"))
    assert "missing: transformer.h.0.attn.c_attn.bias" in refused(folder, allow_missing=["*.query.bias"])
    sat.load(folder, allow_missing=["*.query.bias", "*.key.bias", "*.value.bias"])


# Mixins


class Running(sat.BaseMixin):
    """Has a buffer that is part of its state, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_mixins_round_trip_in_a_folder_of_their_own(tmp_path: Path) -> None:
    model = tiny_family_model("gpt2")
    model.add_mixin("prefix", sat.PrefixTuningMixin.for_model(model, prefix_len=3)).add_mixin("scale", Scale(5.0))
    model.save_pretrained(tmp_path / "model")
    kept = load_file(tmp_path / "model" / "mixins" / WEIGHTS)
    assert {name.split(".")[1] for name in kept} == {"prefix", "scale"}
    assert not any("mixins" in name for name in load_file(tmp_path / "model" / WEIGHTS))
    fresh = {"prefix": sat.PrefixTuningMixin.for_model(model, prefix_len=3), "scale": Scale()}
    loaded = sat.load(tmp_path / "model", mixins=fresh)
    assert same(loaded, model)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert loaded.mixins["scale"] is fresh["scale"]


def test_buffers_of_mixins_round_trip_too(tmp_path: Path) -> None:
    model = tiny_family_model("gpt2").add_mixin("running", Running())
    model.mixins["running"].mean += 3
    model.save_pretrained(tmp_path / "model")
    loaded = sat.load(tmp_path / "model", mixins={"running": Running()})
    assert torch.equal(loaded.mixins["running"].mean, torch.full((4,), 3.0))
    assert "mean" in dict(loaded.mixins["running"].named_buffers())
    assert loaded.mixins["running"].scratch.shape == (2,)


def test_mixins_in_two_parts_round_trip(tmp_path: Path) -> None:
    model = tiny_family_model("t5")
    model.add_mixin("prefix", sat.PrefixTuningMixin.for_model(model, prefix_len=2))
    model.save_pretrained(tmp_path / "model")
    names = load_file(tmp_path / "model" / "mixins" / WEIGHTS)
    assert {name.split(".")[1] for name in names} == {"encoder", "decoder"}
    loaded = sat.load(tmp_path / "model", mixins={"prefix": sat.PrefixTuningMixin.for_model(model, prefix_len=2)})
    assert same(loaded, model)


def test_mixin_weights_without_the_mixin_are_an_error_that_names_the_cure(tmp_path: Path) -> None:
    model = tiny_family_model("gpt2")
    model.add_mixin("scale", Scale(2.0)).save_pretrained(tmp_path / "model")
    message = refused(tmp_path / "model")
    assert "mixins.scale.factor" in message
    assert 'sat.load(path, mixins={"name": MyMixin(...)})' in message
    message = refused(tmp_path / "model", mixins={"scael": Scale(1.0)})
    assert "Did you mean 'mixins.scael.factor'?" in message


def test_mixin_weights_of_another_shape_or_missing_are_named_and_nothing_is_filled(tmp_path: Path) -> None:
    model = tiny_family_model("gpt2")
    model.add_mixin("prefix", sat.PrefixTuningMixin.for_model(model, prefix_len=3)).save_pretrained(tmp_path / "model")
    other, scale = sat.PrefixTuningMixin.for_model(model, prefix_len=4), Scale(3.0)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    message = refused(tmp_path / "model", mixins={"prefix": other, "scale": scale})
    assert "mixins.prefix.layers.0.key: have [4, 3, 8], want [4, 4, 8]" in message
    assert "missing: mixins.scale.factor" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    good = sat.PrefixTuningMixin.for_model(model, prefix_len=3)
    loaded = sat.load(tmp_path / "model", mixins={"prefix": good, "scale": scale}, allow_missing=["mixins.scale.*"])
    assert loaded.get_parameter("mixins.scale.factor").item() == 3.0


def test_new_mixins_join_a_checkpoint_that_has_none_in_its_precision(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: mixins.scale.factor"):
        sat.load(saved(tmp_path), mixins={"scale": Scale(2.0)})
    new = {"mixins": {"scale": Scale(2.0)}, "allow_missing": ["mixins.scale.*"]}
    model = sat.load(tmp_path / "model", **new, dtype=torch.bfloat16)
    assert model.get_parameter("mixins.scale.factor").dtype == torch.bfloat16
    assert not model.mixins["scale"].training


def test_a_mixin_with_a_name_of_the_familys_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HookConflictError, match="there is a mixin 'positions' already"):
        sat.load(saved(tmp_path), mixins={"positions": Scale()})


# Saving


@pytest.mark.parametrize("inside", ["config.json", "notes.txt"])
def test_saving_refuses_a_folder_that_holds_something_and_leaves_it(tmp_path: Path, inside: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / inside).write_text("mine")
    with pytest.raises(CheckpointError, match="model"):
        tiny_family_model("gpt2").save_pretrained(tmp_path / "model")
    assert [(item.name, item.read_text()) for item in (tmp_path / "model").iterdir()] == [(inside, "mine")]
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("model_type", "mixin"), [("gpt2", "positions"), ("llama", "rotary"), ("gemma3_text", "sliding-window")]
)
def test_saving_refuses_a_model_that_lost_a_part_of_its_family(tmp_path: Path, model_type: str, mixin: str) -> None:
    model = tiny_family_model(model_type)
    model.del_mixin(mixin)
    with pytest.raises(CheckpointError, match=rf"'mixins\.{mixin}.* was removed from the model"):
        model.save_pretrained(tmp_path / "model")
    model.add_mixin(mixin, Scale())
    with pytest.raises(CheckpointError, match=rf"'mixins\.{mixin}.* was removed from the model"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_saving_refuses_a_parameter_of_another_shape(tmp_path: Path) -> None:
    model = tiny_family_model("gpt2")
    model.transformer.word_embeddings.weight = nn.Parameter(torch.zeros(70, 32))
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight' is \[70, 32\].*says \[61, 32\]"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("model_type", sat.list_models())
def test_every_family_round_trips_bit_for_bit_in_every_precision(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    model = tiny_family_model(model_type).to(dtype)
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded = sat.load(tmp_path / "model")
    assert same(loaded, model)
    assert not loaded.training
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "model" / WEIGHTS).read_bytes()


def test_tensors_that_are_views_or_transposed_round_trip(tmp_path: Path) -> None:
    model = tiny_family_model("gpt2")
    weight = model.transformer.layers[0].mlp.up.weight
    model.transformer.layers[0].mlp.up.weight = nn.Parameter(weight.detach().t().contiguous().t())
    block = torch.randn(2, 32)
    model.transformer.final_norm.weight, model.transformer.final_norm.bias = map(nn.Parameter, block)
    model.save_pretrained(tmp_path / "model")
    assert same(sat.load(tmp_path / "model"), model)


def test_ties_are_restored_and_stored_once(tmp_path: Path) -> None:
    folder = saved(tmp_path, "t5")
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    model = sat.load(folder)
    encoder, decoder = (model.part(name).transformer.word_embeddings for name in ("encoder", "decoder"))
    assert encoder.weight is decoder.weight
    again = sat.load(folder, dtype=torch.bfloat16)
    assert (
        again.part("encoder").transformer.word_embeddings.weight
        is again.part("decoder").transformer.word_embeddings.weight
    )


def test_loaded_weights_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", vocab_size=10_000)
    before = (folder / WEIGHTS).read_bytes()
    model = sat.load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / WEIGHTS).read_bytes() == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_old_name_of_the_precision_goes_when_a_model_is_saved_again(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rewrite_json(folder / "config.json", torch_dtype="float16")
    sat.load(folder).save_pretrained(tmp_path / "again")
    values = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (values["dtype"], "torch_dtype" in values) == ("float32", False)


def test_a_plain_backbone_saves_and_loads(tmp_path: Path) -> None:
    model = sat.BaseModel(tiny_config(tie_word_embeddings=False), {"scale": Scale(2.0)}).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = sat.load(tmp_path / "model", mixins={"scale": Scale()})
    assert loaded.config == model.config
    assert same(loaded, model)


# Memory

PEAK = """
import sys, torch
import swissarmy.api as sat
model = sat.load(sys.argv[1])
total = sum(float(parameter.detach().sum()) for parameter in model.parameters())
status = open("/proc/self/status").read()
print([int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")][0] * 1024)
"""

LARGE: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 10, "n_embd": 768, "n_head": 12, "vocab_size": 4000, "n_positions": 64},
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 8,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 4000,
    },
}


@pytest.mark.parametrize("model_type", LARGE)
def test_loading_never_holds_much_more_than_the_weights(tmp_path: Path, model_type: str) -> None:
    """The same process with a tiny model of the family is what the interpreter and its libraries take."""
    tiny = saved(tmp_path / "tiny", model_type)
    sat.AutoModel.from_config(LARGE[model_type]).save_pretrained(tmp_path / "model")
    weights = (tmp_path / "model" / WEIGHTS).stat().st_size

    def peak(folder: Path) -> int:
        command = [sys.executable, "-c", PEAK, str(folder)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout)

    assert weights > 290e6
    assert peak(tmp_path / "model") - peak(tiny) <= 1.15 * weights


class Double(sat.BaseMixin):
    @sat.non_conflict
    def mlp_forward(self, hidden_states: Any, *, old_impl: Any, **kw_args: Any) -> Any:
        return 2 * old_impl(hidden_states, **kw_args)


def test_a_mixin_without_parameters_leaves_a_trace_and_loading_without_it_is_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.add_mixin("twice", Double())
    model.add_mixin("record", sat.HiddenStatesMixin())
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(sat.CheckpointError, match=r"saved with 'mixins.twice' \(Double\)"):
        sat.load(tmp_path / "saved")
    restored = sat.load(tmp_path / "saved", mixins={"twice": Double()})
    inputs = tiny_inputs(model)
    assert torch.equal(restored(**inputs)[0], model(**inputs)[0])
    sat.load(tmp_path / "saved", allow_missing=["mixins.twice"])
