"""Mixins beside a checkpoint: the library's own are made again from what was saved, others are never looked up."""

import json
from collections.abc import Callable
from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import swissarmy as sat
from swissarmy.core.errors import CheckpointError
from swissarmy.nn.rotary import RopeParameters
from swissarmy.testing import tiny_inputs, tiny_model
from tests.helpers import Scale, tiny_ids
from tests.helpers import tiny_model as plain_model

RECORDS = Path("mixins") / "mixins.json"


def trained(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora" in name.lower():
            nn.init.normal_(parameter, std=0.4, generator=generator)
    return model


def with_lora(family: str, **options: Any) -> Any:
    model = tiny_model(family)
    return trained(model.add_mixin("lora", sat.LoRAMixin.for_model(model, **options)))


def saved(folder: Path, **options: Any) -> Path:
    with_lora("gpt2", **options).save_pretrained(folder / "model")
    return folder / "model"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    records = json.loads((folder / RECORDS).read_text())
    change(records)
    (folder / RECORDS).write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("family", ["gpt2", "t5", "vit"])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "layers": range(1, 2), "dropout": 0.1},
        {"targets": "*", "rank_pattern": {"mlp.*": 2}, "alpha_pattern": {"layers.1.*": 3.5}, "rslora": True},
        {"dora": True, "init": "pissa"},
    ],
    ids=str,
)
def test_lora_comes_back_by_itself(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = with_lora(family, **options)
    model.save_pretrained(tmp_path / "model")
    loaded = sat.load(tmp_path / "model")
    assert torch.equal(loaded(**tiny_inputs(model))[0], model(**tiny_inputs(model))[0])
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_the_targets_of_one_part_come_back_in_that_part(tmp_path: Path) -> None:
    model = with_lora("t5", targets=("cross_attention.query", "mlp.up"))
    model.save_pretrained(tmp_path / "model")
    assert list(json.loads((tmp_path / "model" / RECORDS).read_text())) == [
        "parts.encoder.mixins.lora",
        "parts.decoder.mixins.lora",
    ]
    loaded: Any = sat.load(tmp_path / "model")
    assert torch.equal(loaded(**tiny_inputs(model))[0], model(**tiny_inputs(model))[0])
    only = with_lora("t5", targets="cross_attention.*")
    only.save_pretrained(tmp_path / "only")
    loaded = sat.load(tmp_path / "only", dtype=torch.float64)
    assert list(loaded.mixins["lora"]) == ["decoder"]
    assert loaded.mixins["lora"]["decoder"].layers[0]["cross_attention_query"].lora_A.dtype == torch.float64


def test_several_come_back_in_their_order_and_a_bank_with_its_names(tmp_path: Path) -> None:
    model = with_lora("gpt2", r=2)
    trained(model.add_mixin("lora2", sat.LoRAMixin.for_model(model, dora=True)))
    model.save_pretrained(tmp_path / "two")
    loaded: Any = sat.load(tmp_path / "two")
    assert [name for name in loaded.mixins if "lora" in name] == ["lora", "lora2"]
    assert torch.equal(loaded(**tiny_inputs(model))[0], model(**tiny_inputs(model))[0])
    model.del_mixin("lora2")
    trained(model.add_mixin("lora3", sat.LoRAMixin.for_model(model, targets="mlp.*")))
    sat.bundle_adapters(model, "lora", "lora3", name="bank")
    model.save_pretrained(tmp_path / "bank")
    loaded = sat.load(tmp_path / "bank")
    ids = torch.tensor([1, -1])
    assert torch.equal(
        loaded(**tiny_inputs(model), adapter_ids=ids)[0], model(**tiny_inputs(model), adapter_ids=ids)[0]
    )


def test_the_mark_of_a_faster_rate_survives_loading(tmp_path: Path) -> None:
    loaded = sat.load(saved(tmp_path, lr_ratio=16.0))
    marks = {name: getattr(each, "lr_scale", None) for name, each in loaded.named_parameters() if "lora_B" in name}
    assert set(marks.values()) == {16.0}


def test_what_the_caller_gives_comes_first(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    own = sat.LoRAMixin.for_model(tiny_model("gpt2"))
    loaded: Any = sat.load(folder, mixins={"lora": own})
    assert loaded.mixins["lora"] is own
    wrong = sat.LoRAMixin.for_model(tiny_model("gpt2"), r=2)
    with pytest.raises(CheckpointError, match=r"lora_A: have \[8, 32\], want \[2, 32\]"):
        sat.load(folder, mixins={"lora": wrong})


def test_a_mixin_that_may_be_missing_stays_away(tmp_path: Path) -> None:
    loaded = sat.load(saved(tmp_path), allow_missing=["mixins.lora", "mixins.lora.*"])
    assert "lora" not in loaded.mixins
    assert torch.equal(loaded(**tiny_inputs(loaded))[0], tiny_model("gpt2")(**tiny_inputs(loaded))[0])


def test_a_class_of_the_users_is_given_by_the_caller_beside_one_that_comes_by_itself(tmp_path: Path) -> None:
    model = with_lora("gpt2").add_mixin("scale", Scale(5.0))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"saved with 'mixins.scale' \(Scale\)"):
        sat.load(tmp_path / "model")
    loaded = sat.load(tmp_path / "model", mixins={"scale": Scale()})
    assert torch.equal(loaded(**tiny_inputs(model))[0], model(**tiny_inputs(model))[0])


@pytest.mark.parametrize("kind", ["os.system", "Scale", "BaseMixin", "LoRALinear", "LoRAConfig", "nn.Linear", "system"])
def test_a_class_that_is_no_mixin_of_the_library_is_not_looked_up(tmp_path: Path, kind: str) -> None:
    folder = edit(saved(tmp_path), lambda records: records["mixins.lora"].update({"class": kind}))
    with pytest.raises(CheckpointError, match=rf"it was saved with 'mixins.lora' \({kind}\), and has none"):
        sat.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["mixins.lora"]["options"].update(rr=3), r"mixins.json: 'mixins.lora' \(LoRAMixin\): .*'rr'"),
        (lambda r: r["mixins.lora"]["options"].update(r="3"), r"'mixins.lora' \(LoRAMixin\): .*r='3' is not int"),
        (lambda r: r["mixins.lora"]["options"].update(r=10**12), r"lora_A: have \[8, 32\], want \[1000000000000, 32\]"),
        (lambda r: r["mixins.lora"]["options"].update(targets=["nothing"]), r"'nothing' matches no projection"),
        (lambda r: r["mixins.lora"].update({"class": "SoftcapMixin"}), r"saved with 'mixins.lora' \(SoftcapMixin\)"),
        (lambda r: r["mixins.lora"].update({"class": "LogitSoftcapMixin"}), r"\(LogitSoftcapMixin\): "),
        (lambda r: r["mixins.lora"].pop("class"), r"neither the name of a class nor an object of"),
        (lambda r: r["mixins.lora"].update(code="x"), r"neither the name of a class nor an object"),
        (lambda r: r.update({"mixins.lora": 3}), r"neither the name of a class nor an object"),
        (lambda r: r.update({"../lora": r.pop("mixins.lora")}), r"saved with '../lora' \(LoRAMixin\), and has none"),
        (lambda r: r.update({"mixins.a/../b": r.pop("mixins.lora")}), r"use letters, digits"),
    ],
)  # fmt: skip
def test_records_that_are_damaged_or_malicious_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = edit(saved(tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        sat.load(folder)


@pytest.mark.parametrize(
    "mixins",
    [
        {"positions": sat.LearnedPositionsMixin(9, 16, padding_id=1), "head": sat.LMHeadMixin(16, 5, bias=True)},
        {"head": sat.MLMHeadMixin(16, 13, activation="relu", eps=0.1, tied=False)},
        {"head": sat.PoolerMixin(16, activation="relu", output_size=3)},
        {"head": sat.ClassificationHeadMixin(16, 3, pooling="mean", activation="tanh", bias=False, padding_id=2)},
        {"head": sat.NoHeadMixin(), "cap": sat.AttentionSoftcapMixin(0.5), "scale": sat.EmbeddingScaleMixin(3.0)},
        {
            "rotary": sat.RotaryMixin(
                8, 32, [RopeParameters(rope_theta=100.0), RopeParameters(rope_type="linear", factor=4.0)],
                parameters_of_layer=(0, 1), interleaved=True,
            ),
            "window": sat.SlidingWindowMixin(2, (True, False)),
        },
    ],
    ids=lambda mixins: "-".join(mixins),
)  # fmt: skip
def test_a_backbone_with_parts_of_the_library_is_loaded_with_nothing_given(
    mixins: dict[str, Any], tmp_path: Path
) -> None:
    model = plain_model(mixins, num_attention_heads=2)
    model.save_pretrained(tmp_path / "model")
    loaded = sat.load(tmp_path / "model")
    want, got = model(tiny_ids())[0], loaded(tiny_ids())[0]
    want, got = (each if isinstance(each, torch.Tensor) else each.pooled for each in (want, got))
    assert torch.equal(got, want)
    assert list(loaded.mixins) == list(mixins)
    assert str(loaded) == str(model)


def test_a_model_of_pictures_built_by_hand_is_loaded_with_nothing_given(tmp_path: Path) -> None:
    mixins = {
        "patches": sat.PatchEmbeddingMixin(16, (4, 2), channels=1),
        "positions": sat.InterpolatedPositionsMixin(16, (2, 4)),
        "head": sat.ClassificationHeadMixin(16, 3),
    }
    model = plain_model(mixins, vocab_size=0)
    model.save_pretrained(tmp_path / "model")
    pixels = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(sat.load(tmp_path / "model")(pixel_values=pixels)[0], model(pixel_values=pixels)[0])


def test_every_mixin_of_the_library_says_what_it_is_made_from() -> None:
    public = [thing for name in sat.__all__ if isinstance(thing := getattr(sat, name), type)]
    kinds = [kind for kind in public if issubclass(kind, sat.BaseMixin) and not isabstract(kind)]
    assert len(kinds) > 30
    silent = {kind.__name__ for kind in kinds if kind.saved_options is sat.BaseMixin.saved_options}
    assert silent == {kind.__name__ for kind in kinds if kind.keeps_outputs} | {"BaseMixin"}
