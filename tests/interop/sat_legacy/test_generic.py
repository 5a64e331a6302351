"""Families without a file of their own, and models of users: the backbone, and every mixin's weights under its name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swissarmy as sat
from swissarmy.core.errors import CheckpointError
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.interop.sat_legacy.families import GENERIC, LAYOUTS, MODEL_CLASSES
from swissarmy.interop.sat_legacy.migrate import migrate
from swissarmy.interop.sat_legacy.plan import Options
from swissarmy.testing import tiny_inputs
from swissarmy.testing import tiny_model as tiny_family
from tests.helpers import tiny_config, tiny_ids, tiny_model
from tests.interop.sat_legacy import legacy

SIZES = {"vocab_size": 13, "hidden_size": 16, "num_attention_heads": 2, "max_sequence_length": 12}


def arguments(model_class: str, **extra: Any) -> dict[str, Any]:
    return legacy.arguments(model_class, **(SIZES | extra))


def positions(config: sat.TransformerConfig) -> sat.LearnedPositionsMixin:
    return sat.LearnedPositionsMixin.for_config(config)


def old_state(model: sat.BaseModel, **options: Any) -> legacy.State:
    return {
        name: tensor.float()
        for name, tensor in legacy.backbone(dict(model.named_parameters()), layers=2, **options).items()
    }


def logits(model: sat.BaseModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tiny_ids())[0]
    return found


def kept(folder: Path) -> set[str]:
    return set(SafetensorsSource(folder / "mixins").names())


class BlockPositions(sat.BaseMixin):
    """GLM's second table of positions, as a user would write it; the first comes from the mixin before."""

    def __init__(self) -> None:
        super().__init__()
        self.block_position_embeddings = nn.Embedding(12, 16)

    @sat.non_conflict
    def position_embedding_forward(self, position_ids: Tensor, *, old_impl: Any, **kw_args: Any) -> Tensor:
        found: Tensor = old_impl(position_ids, **kw_args) + self.block_position_embeddings(position_ids * 0)
        return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_glm_becomes_a_backbone_and_its_two_tables(tmp_path: Path, ranks: int) -> None:
    model = tiny_model({"positions": positions(tiny_config()), "block_position_embedding": BlockPositions()}).float()
    p = dict(model.named_parameters())
    state = old_state(model)
    state["transformer.position_embeddings.weight"] = p["mixins.positions.table.weight"].detach()
    block = "mixins.block_position_embedding.block_position_embeddings.weight"
    state[block] = p[block].detach()
    done = migrate(
        legacy.write(tmp_path / "old", legacy.split(state, ranks), arguments("GLMModel", block_lm=True)),
        tmp_path / "new",
    )
    assert (done.family, done.model_type) == ("glm", "swissarmy")
    assert done.mixins == {"mixins.positions": 12 * 16, "mixins.block_position_embedding": 12 * 16}
    assert kept(tmp_path / "new") == {"mixins.positions.table.weight", block}
    mixins = {"positions": positions(tiny_config()), "block_position_embedding": BlockPositions()}
    assert torch.equal(logits(sat.load(tmp_path / "new", mixins=mixins)), logits(model))


@pytest.mark.parametrize("order", ["pre", "post", "sandwich"])
def test_every_order_of_norms_is_kept(tmp_path: Path, order: str) -> None:
    changes = {"norm_placement": order, **({"embedding_norm": True, "final_norm": False} if order == "post" else {})}
    model = tiny_model(**changes).float()
    config = arguments("MyModel", layernorm_order=order)
    migrate(legacy.write(tmp_path / "old", legacy.split(old_state(model, order=order), 2), config), tmp_path / "new")
    assert torch.equal(logits(sat.load(tmp_path / "new")), logits(model))


def test_sandwich_norms_are_seen_without_a_config(tmp_path: Path) -> None:
    model = tiny_model(norm_placement="sandwich").float()
    old = legacy.write(tmp_path / "old", [old_state(model, order="sandwich")], None)
    migrate(old, tmp_path / "new", Options(family="generic", arguments={"num_attention_heads": 2}))
    assert torch.equal(logits(sat.load(tmp_path / "new")), logits(model))


def mixtral(ranks: int) -> tuple[sat.BaseModel, list[legacy.State], dict[str, Any]]:
    """Gated experts, grouped heads, RMS norms, rotary positions; expert 0 has the names of a plain MLP."""
    changes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "norm": "rms",
        "gated_mlp": True,
        "activation": "silu",
    }
    changes |= {
        "query_key_value_bias": False,
        "attention_output_bias": False,
        "mlp_bias": False,
        "intermediate_size": 24,
    }
    config = tiny_config(**changes)
    mixins = {"experts": sat.MixtureOfExpertsMixin(config, num_experts=3), "rotary": sat.RotaryMixin.for_config(config)}
    model = tiny_model(mixins, **changes).float()
    p, state = dict(model.named_parameters()), old_state(model)
    for layer in range(2):
        for expert in range(3):
            suffix = f"_{expert}" if expert else ""
            for ours, theirs in {"up": "h_to_4h", "gate": "h_to_4h_gate", "down": "4h_to_h"}.items():
                name = f"transformer.layers.{layer}.mlp.dense_{theirs}{suffix}.weight"
                state[name] = p[f"mixins.experts.layers.{layer}.experts.{expert}.{ours}.weight"].detach()
        state[f"mixins.mlp.gates.{layer}.weight"] = p[f"mixins.experts.layers.{layer}.router.weight"].detach()
    state["mixins.rotary.rotary_emb.inv_freq"] = torch.ones(2)
    shares = legacy.split(state, ranks, queries=2)
    said = arguments("MixtralModel", num_attention_heads=4, num_multi_query_heads=2, num_experts=3)
    return model, shares, said


def test_experts_become_those_of_the_stock_mixin(tmp_path: Path) -> None:
    model, shares, said = mixtral(1)
    done = migrate(legacy.write(tmp_path / "old", shares, said), tmp_path / "new")
    assert done.generation == 3
    assert done.mixins.keys() == {"mixins.experts"}
    assert done.dropped == ("mixins.rotary.rotary_emb.inv_freq",)
    mixins = {
        "experts": sat.MixtureOfExpertsMixin(model.config, num_experts=3),
        "rotary": sat.RotaryMixin.for_config(model.config),
    }
    assert torch.equal(logits(sat.load(tmp_path / "new", mixins=mixins)), logits(model))


def test_experts_are_merged_over_ranks(tmp_path: Path) -> None:
    model, shares, said = mixtral(1)
    (whole,) = shares
    halves: list[legacy.State] = [{}, {}]
    for name, tensor in whole.items():
        dim = 1 if ".dense_4h_to_h" in name or ".attention.dense." in name else 0
        alone = "norm" in name or name.startswith("mixins.") or "word_embeddings" in name
        if "query_key_value" in name:
            blocks = [block.chunk(2) for block in tensor.split([16, 8, 8])]
            parts = [torch.cat([block[rank] for block in blocks]) for rank in range(2)]
        else:
            parts = [tensor, tensor] if alone else [part.contiguous() for part in tensor.chunk(2, dim=dim)]
        halves[0][name], halves[1][name] = parts
    migrate(legacy.write(tmp_path / "old", halves, said), tmp_path / "new")
    mixins = {
        "experts": sat.MixtureOfExpertsMixin(model.config, num_experts=3),
        "rotary": sat.RotaryMixin.for_config(model.config),
    }
    assert torch.equal(logits(sat.load(tmp_path / "new", mixins=mixins)), logits(model))


def test_chatglm_has_the_rows_of_each_head_together(tmp_path: Path) -> None:
    model = tiny_model().float()
    state = old_state(model)
    for name in [name for name in state if "query_key_value" in name]:
        q, k, v = (block.view(2, 8, *block.shape[1:]) for block in state[name].chunk(3))
        state[name] = torch.stack([q, k, v], dim=1).flatten(0, 2).contiguous()
    state["mixins.chatglm-final.lm_head.weight"] = torch.randn(13, 16)
    old = legacy.write(tmp_path / "old", [state], arguments("ChatGLMModel"))
    done = migrate(old, tmp_path / "new")
    assert done.mixins == {"mixins.chatglm-final": 13 * 16}
    loaded = sat.load(tmp_path / "new", allow_missing=["mixins.chatglm-final.*"])
    assert torch.equal(logits(loaded), logits(model))
    migrate(old, tmp_path / "blocks", Options(fused_rows="blocks"))
    blocks = sat.load(tmp_path / "blocks", allow_missing=["mixins.chatglm-final.*"])
    assert not torch.equal(logits(blocks), logits(model))


def test_chatglm_over_two_ranks_keeps_its_heads_in_order(tmp_path: Path) -> None:
    model = tiny_model().float()
    state = old_state(model)
    shares = legacy.split(state, 2)
    for name in [name for name in state if "query_key_value" in name]:
        q, k, v = (block.view(2, 8, *block.shape[1:]) for block in state[name].chunk(3))
        by_head = torch.stack([q, k, v], dim=1)
        for rank in range(2):
            shares[rank][name] = by_head[rank].flatten(0, 1).contiguous()
    migrate(legacy.write(tmp_path / "old", shares, arguments("ChatGLMModel")), tmp_path / "new")
    assert torch.equal(logits(sat.load(tmp_path / "new")), logits(model))


def test_a_prefix_becomes_that_of_the_stock_mixin(tmp_path: Path) -> None:
    """Old prefixes stood behind all other keys and ours stand in front, which softmax does not tell apart."""
    for family, write in (("gpt2", legacy.gpt2), ("t5", legacy.t5)):
        model = tiny_family(family)
        state, config = write(model)
        model.add_mixin("prefix-tuning", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
        for name, parameter in dict(model.named_parameters()).items():
            if "prefix-tuning" in name and name.endswith("key"):
                value = dict(model.named_parameters())[name.removesuffix("key") + "value"]
                old = name.replace("parts.", "").replace(".layers.", ".prefix.").removesuffix(".key")
                state[old] = torch.stack([parameter.detach(), value.detach()])
        done = migrate(legacy.write(tmp_path / family, [state], config), tmp_path / f"new-{family}")
        assert all("prefix-tuning" in name for name in done.mixins)
        fresh = sat.PrefixTuningMixin.for_model(model, prefix_len=3)
        inputs = tiny_inputs(model)
        with torch.no_grad():
            expected = model(**inputs)[0]
            found = sat.load(tmp_path / f"new-{family}", mixins={"prefix-tuning": fresh})(**inputs)[0]
        assert torch.equal(found, expected)


def test_two_towers_become_a_folder_each(tmp_path: Path) -> None:
    image, text = (
        tiny_model(seed=1, causal=False, activation="quick_gelu").float(),
        tiny_model(seed=2, activation="quick_gelu").float(),
    )
    state = {"logit_scale": torch.tensor(2.6)}
    for part, model in (("image_encoder", image), ("text_encoder", text)):
        state |= {f"{part}.{name}": tensor for name, tensor in old_state(model).items()}
    state["image_encoder.mixins.image_enc.visual_projection.weight"] = torch.randn(4, 16)
    config = arguments("CLIP", text_num_layers=2, text_hidden_size=16)
    done = migrate(legacy.write(tmp_path / "old", legacy.split(state, 2), config), tmp_path / "new")
    assert done.parts == ("image_encoder", "text_encoder")
    assert done.mixins == {"image_encoder.mixins.image_enc": 64}
    loaded = sat.load(tmp_path / "new" / "image_encoder", allow_missing=["mixins.image_enc.*"])
    assert torch.equal(logits(loaded), logits(image))
    assert torch.equal(logits(sat.load(tmp_path / "new" / "text_encoder")), logits(text))
    rest = SafetensorsSource(tmp_path / "new" / "rest")
    assert rest.names() == ("logit_scale",)
    assert rest.read("logit_scale").item() == pytest.approx(2.6)


@pytest.mark.parametrize("prefixed", [True, False])
def test_mixins_of_cogview_by_position_come_along_by_name(tmp_path: Path, prefixed: bool) -> None:
    model = tiny_model(norm_placement="sandwich").float()
    state = old_state(model, order="sandwich")
    state |= {
        "mixins.0.position_embeddings.weight": torch.randn(5, 16),
        "mixins.1.query_key_value.0.weight": torch.arange(96.0).view(48, 2).repeat(1, 8),
        "mixins.1.dense.0.weight": torch.randn(16, 16),
    }
    fused = state["mixins.1.query_key_value.0.weight"]
    shares = legacy.split(state, 2)
    for rank in range(2):
        shares[rank]["mixins.1.dense.0.weight"] = state["mixins.1.dense.0.weight"].chunk(2, dim=1)[rank].contiguous()
        if prefixed:
            shares[rank] = {f"module.{name}": tensor for name, tensor in shares[rank].items()}
    old = legacy.write(tmp_path / "old", shares, arguments("Cuda2dModel", layernorm_order="sandwich"))
    done = migrate(old, tmp_path / "new")
    assert (done.family, done.generation) == ("generic", 1)
    assert kept(tmp_path / "new") == {
        "mixins.extra_position_embedding.position_embeddings.weight",
        "mixins.attention_plus.query_key_value.0.weight",
        "mixins.attention_plus.dense.0.weight",
    }
    stored = SafetensorsSource(tmp_path / "new" / "mixins")
    assert torch.equal(stored.read("mixins.attention_plus.query_key_value.0.weight"), fused)
    assert torch.equal(stored.read("mixins.attention_plus.dense.0.weight"), state["mixins.1.dense.0.weight"])


def test_weights_of_lora_are_kept_and_the_layer_is_what_it_wrapped(tmp_path: Path) -> None:
    model = tiny_model().float()
    state, layer = old_state(model), "transformer.layers.0.attention.dense"
    for part in ("weight", "bias"):
        state[f"{layer}.original.{part}"] = state.pop(f"{layer}.{part}")
    state[f"{layer}.matrix_A.0"], state[f"{layer}.matrix_B.0"] = torch.randn(2, 16), torch.randn(16, 2)
    done = migrate(legacy.write(tmp_path / "old", [state], arguments("MyModel")), tmp_path / "new")
    assert done.mixins == {"mixins.lora": 64}
    assert torch.equal(logits(sat.load(tmp_path / "new", allow_missing=["mixins.lora.*"])), logits(model))


def test_a_tensor_at_the_root_is_kept_as_one_of_the_model(tmp_path: Path) -> None:
    state = old_state(tiny_model().float()) | {"score": torch.randn(3), "head.weight": torch.randn(2, 16)}
    done = migrate(legacy.write(tmp_path / "old", [state], arguments("MyModel")), tmp_path / "new")
    assert kept(tmp_path / "new") == {"mixins.model.score", "mixins.model.head.weight"}
    assert done.mixins == {"mixins.model": 35}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_transformer_inside_a_mixin_is_kept_with_the_mixin(tmp_path: Path, ranks: int) -> None:
    model, inner = tiny_model().float(), old_state(tiny_model(seed=3).float())
    state = old_state(model) | {f"mixins.eva.model.vit.{name}": tensor for name, tensor in inner.items()}
    done = migrate(
        legacy.write(tmp_path / "old", legacy.split(state, ranks), arguments("VisualModel")), tmp_path / "new"
    )
    assert (done.parts, list(done.mixins)) == ((), ["mixins.eva"])
    stored = SafetensorsSource(tmp_path / "new" / "mixins")
    for name, tensor in inner.items():
        assert torch.equal(stored.read(f"mixins.eva.model.vit.{name}"), tensor), name
    assert torch.equal(logits(sat.load(tmp_path / "new", allow_missing=["mixins.eva.*"])), logits(model))


def test_a_users_mixin_that_was_split_is_merged_as_the_user_says(tmp_path: Path) -> None:
    state, up, down = old_state(tiny_model().float()), torch.randn(8, 16), torch.randn(16, 8)
    shares = legacy.split(state, 2)
    for rank in range(2):
        shares[rank]["mixins.mine.up.0.weight"] = up.chunk(2)[rank].contiguous()
        shares[rank]["mixins.mine.down.0.weight"] = down.chunk(2, dim=1)[rank].contiguous()
    old = legacy.write(tmp_path / "old", shares, arguments("MyModel"))
    with pytest.raises(CheckpointError, match=r"say --split 'mixins\.mine\.\w+\.0\.weight=rows'"):
        migrate(old, tmp_path / "new")
    with pytest.raises(CheckpointError, match="on 'rows' or 'columns'"):
        migrate(old, tmp_path / "new", Options(splits={"mixins.mine.*": "rowwise"}))
    migrate(old, tmp_path / "new", Options(splits={"mixins.mine.up.*": "rows", "mixins.mine.down.*": "columns"}))
    stored = SafetensorsSource(tmp_path / "new" / "mixins")
    assert torch.equal(stored.read("mixins.mine.up.0.weight"), up)
    assert torch.equal(stored.read("mixins.mine.down.0.weight"), down)


def test_a_model_wrapped_in_another_is_written_as_itself(tmp_path: Path) -> None:
    model = tiny_model().float()
    state = {f"model.{name}": tensor for name, tensor in old_state(model).items()} | {"model.mixins.x.w": torch.ones(2)}
    done = migrate(legacy.write(tmp_path / "old", [state], arguments("Wrapper")), tmp_path / "new")
    assert (done.parts, done.mixins) == ((), {"mixins.x": 2})
    assert torch.equal(logits(sat.load(tmp_path / "new", allow_missing=["mixins.x.*"])), logits(model))


@pytest.mark.parametrize("part", ["../outside", "/tmp/outside", "a/../../outside", "a\0b", ".hidden.."])
def test_a_part_whose_name_leads_out_of_the_target_is_refused(tmp_path: Path, part: str) -> None:
    state = {f"{prefix}.{name}": t for prefix in (part, "b") for name, t in old_state(tiny_model().float()).items()}
    old = legacy.write(tmp_path / "old", [state], arguments("Towers"))
    with pytest.raises(CheckpointError, match="is no name of a part of a model"):
        migrate(old, tmp_path / "sub" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_gpt_neo_does_not_scale_its_scores(tmp_path: Path) -> None:
    model = tiny_model(attention_scale=1.0).float()
    old = legacy.write(tmp_path / "old", [old_state(model)], arguments("GPTNeoModel", window_size="256"))
    assert migrate(old, tmp_path / "new").family == "gpt_neo"
    assert torch.equal(logits(sat.load(tmp_path / "new")), logits(model))


class SwiGLU(sat.BaseMixin):
    """ChatGLM2's gate, as a user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.w2 = nn.ModuleList(nn.Linear(16, 24, bias=False) for _ in range(2))

    @sat.non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, old_impl: Any, **kw_args: Any) -> Tensor:
        mlp, gate = kw_args["layer"].mlp, self.w2[kw_args["layer_id"]]
        found: Tensor = mlp.down(nn.functional.silu(mlp.up(hidden_states)) * gate(hidden_states))
        return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model_class", ["ChatGLM2Model", "ChatGLM3Model", "ChatGLM4Model"])
def test_later_chatglms_become_a_backbone_with_grouped_heads_and_their_gate(
    tmp_path: Path, model_class: str, ranks: int
) -> None:
    changes = {"num_attention_heads": 4, "num_key_value_heads": 2, "norm": "rms", "activation": "silu"}
    changes |= {"attention_output_bias": False, "mlp_bias": False, "intermediate_size": 24}
    mixins = {"rotary": sat.RotaryMixin.for_config(tiny_config(**changes)), "mlp": SwiGLU()}
    model = tiny_model(mixins, **changes).float()
    state = old_state(model)
    shares = legacy.split(state, ranks, queries=2)
    for layer, gate in enumerate(mixins["mlp"].w2):
        for rank, share in enumerate(shares):
            share[f"mixins.mlp.w2.{layer}.weight"] = gate.weight.detach().float().chunk(ranks)[rank].clone()
    config = arguments(model_class, num_attention_heads=4, num_multi_query_heads=2, use_qkv_bias=True)
    done = migrate(legacy.write(tmp_path / "old", shares, config), tmp_path / "new")
    assert (done.model_type, done.generation) == ("swissarmy", 3)
    assert done.family == model_class.removesuffix("Model").lower()
    assert done.mixins == {"mixins.mlp": 2 * 24 * 16}
    again = {"rotary": sat.RotaryMixin.for_config(model.config), "mlp": SwiGLU()}
    assert torch.equal(logits(sat.load(tmp_path / "new", mixins=again)), logits(model))


@pytest.mark.parametrize("prefix", ["", "image_encoder."])
def test_eva_clip_sees_everything_and_keeps_its_patches(tmp_path: Path, prefix: str) -> None:
    model = tiny_model(causal=False, activation="gelu").float()
    state = {f"{prefix}{name}": tensor for name, tensor in old_state(model).items()}
    patches = f"{prefix}mixins.patch_embedding.proj.weight"
    state[patches] = torch.randn(16, 3, 4, 4)
    done = migrate(legacy.write(tmp_path / "old", [state], arguments("EVA2CLIPModel")), tmp_path / "new")
    assert (done.family, done.model_type, list(done.mixins)) == ("eva_clip", "swissarmy", ["mixins.patch_embedding"])
    loaded = sat.load(tmp_path / "new", allow_missing=["mixins.patch_embedding.*"])
    assert torch.equal(logits(loaded), logits(model))
    stored = SafetensorsSource(tmp_path / "new" / "mixins")
    assert torch.equal(stored.read("mixins.patch_embedding.proj.weight"), state[patches])


def test_every_family_that_is_named_can_be_asked_for() -> None:
    assert set(MODEL_CLASSES.values()) == {*LAYOUTS, *GENERIC} - {"generic"}


def test_a_file_that_is_no_transformer_is_refused(tmp_path: Path) -> None:
    old = legacy.write(tmp_path / "old", [{"encoder.conv.weight": torch.ones(3)}], arguments("VQVAE"))
    with pytest.raises(CheckpointError, match=r"has no transformer\.layers: it is no SAT model"):
        migrate(old, tmp_path / "new")
