"""The backbone against written-out references: norms, dropout, cross-attention, masks, experts; copies and threads."""

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swissarmy as sat
from swissarmy.backbone.layer import Residual
from swissarmy.core.errors import ConfigError, HookCallError, HookDefinitionError
from tests.helpers import DefaultMLP, Scale, ZeroMLP, tiny_config, tiny_family_model, tiny_ids, tiny_model

IDS = tiny_ids()


def logits(model: Any, *arguments: Any, **kw_args: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(*(arguments or (IDS,)), **kw_args)[0]
    return result


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


# A layer written out


def attend(block: Any, x: Tensor, source: Tensor, visible: Tensor | None) -> Tensor:
    """Attention with plain loops over heads."""
    q, k, v = block.query(x), block.key(source), block.value(source)
    size = q.shape[-1] // block.num_heads
    group = block.num_heads // block.num_kv_heads
    heads = []
    for head in range(block.num_heads):
        mine, theirs = slice(head * size, (head + 1) * size), slice(head // group * size, (head // group + 1) * size)
        scores = q[..., mine] @ k[..., theirs].transpose(1, 2) / math.sqrt(size)
        if visible is not None:
            scores = scores.masked_fill(~visible.bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ v[..., theirs])
    result: Tensor = block.output(torch.cat(heads, dim=-1))
    return result


def written_out(model: sat.BaseModel, ids: Tensor, visible: Tensor | None, encoder: Tensor | None = None) -> Tensor:
    """The whole network, by its equations."""
    placement = model.config.norm_placement

    def add(residual: Any, x: Tensor, sublayer: Any) -> Tensor:
        match placement:
            case "pre":
                return x + sublayer(residual.input_norm(x))
            case "post":
                return residual.output_norm(x + sublayer(x))
            case "sandwich":
                return x + residual.output_norm(sublayer(residual.input_norm(x)))
            case "both":
                return residual.output_norm(x + sublayer(residual.input_norm(x)))

    stack = model.transformer
    x = stack.word_embeddings(ids)
    for layer in stack.layers:
        x = add(layer.attention_residual, x, lambda y, layer=layer: attend(layer.attention, y, y, visible))
        if layer.cross_attention is not None:
            x = add(
                layer.cross_attention_residual,
                x,
                lambda y, layer=layer: attend(layer.cross_attention, y, encoder, None),
            )
        mlp = layer.mlp
        if mlp.gate is None:
            x = add(layer.mlp_residual, x, lambda y, mlp=mlp: mlp.down(mlp.activation(mlp.up(y))))
        else:
            x = add(layer.mlp_residual, x, lambda y, mlp=mlp: mlp.down(mlp.activation(mlp.gate(y)) * mlp.up(y)))
    head = stack.word_embeddings if stack.lm_head is None else stack.lm_head
    return F.linear(stack.final_norm(x), head.weight)


CAUSAL = torch.ones(5, 5).tril()


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "both"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_every_norm_placement_is_its_equation(placement: str, norm: str) -> None:
    model = tiny_model(norm_placement=placement, norm=norm)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    close(logits(model), written_out(model, IDS, CAUSAL))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 3},
        {"gated_mlp": True, "activation": "silu", "mlp_bias": False},
        {"tie_word_embeddings": False, "query_key_value_bias": False, "attention_output_bias": False},
        {"num_layers": 1, "intermediate_size": 7},
    ],
    ids=str,
)
def test_every_option_of_the_backbone_is_its_equation(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    close(logits(model), written_out(model, IDS, CAUSAL))


def test_cross_attention_is_its_equation_and_needs_an_encoder() -> None:
    model = tiny_model(cross_attention=True, encoder_hidden_size=6)
    encoder = torch.randn(2, 7, 6, dtype=torch.float64)
    close(logits(model, encoder_outputs=encoder), written_out(model, IDS, CAUSAL, encoder))
    with pytest.raises(HookCallError, match=r"cross-attention: call it with encoder_outputs"):
        model(IDS)


def test_cross_attention_sees_only_what_its_mask_shows() -> None:
    model = tiny_model(cross_attention=True)
    encoder = torch.randn(2, 7, 16, dtype=torch.float64)
    real = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    expected = torch.cat(
        [logits(model, IDS[:1], encoder_outputs=encoder[:1]), logits(model, IDS[1:], encoder_outputs=encoder[1:, :3])]
    )
    close(logits(model, encoder_outputs=encoder, cross_attention_mask=sat.Padding(real)), expected)
    dense = real[:, None, None].expand(2, 1, 5, 7)
    close(logits(model, encoder_outputs=encoder, cross_attention_mask=dense), expected)


# Masks


def test_every_way_to_ask_for_the_same_mask_gives_the_same_numbers() -> None:
    model = tiny_model()
    causal = logits(model)
    close(causal, written_out(model, IDS, CAUSAL))
    for mask in (-1, sat.Causal(), CAUSAL, CAUSAL.bool(), CAUSAL[None, None], CAUSAL.expand(2, 2, 5, 5).long()):
        close(logits(model, IDS, None, mask), causal)
    full = logits(model, attention_mask=None)
    close(full, written_out(model, IDS, None))
    for mask in (sat.Full(), torch.ones(5, 5), sat.Padding(torch.ones(2, 5))):
        close(logits(model, attention_mask=mask), full)
    close(logits(tiny_model(causal=False)), full)
    assert not torch.allclose(causal, full)


def test_a_mask_for_each_row_and_head_is_used_for_that_row_and_head() -> None:
    model = tiny_model(num_layers=1)
    mask = torch.rand(2, 2, 5, 5) > 0.4
    mask |= torch.eye(5).bool()
    ours = logits(model, attention_mask=mask)
    rows = [logits(model, IDS[row : row + 1], attention_mask=mask[row : row + 1]) for row in range(2)]
    close(ours, torch.cat(rows))
    assert not torch.allclose(ours, logits(model, attention_mask=mask.flip(1)))


@pytest.mark.parametrize("mask", ["natural", None, -1])
def test_padding_changes_nothing_for_the_real_tokens(mask: Any) -> None:
    model = tiny_model()
    given = {} if mask == "natural" else {"attention_mask": mask}
    padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    real = torch.arange(8).expand(2, 8) < 5
    close(logits(model, padded, padding_mask=real, **given)[:, :5], logits(model, **given))
    left = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
    close(logits(model, left, padding_mask=real.flip(1).long(), **given)[:, 3:], logits(model, **given))


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (torch.ones(4, 4), r"\[1, 1, 4, 4\] for 5 queries and 5 keys"),
        (torch.ones(2, 5), r"\[1, 1, 2, 5\] for 5 queries.*padding_mask="),
        (torch.ones(5), r"attention_mask has shape \[5\]"),
        (torch.ones(2, 5, 5), r"attention_mask has shape \[2, 5, 5\]"),
        (0, "attention_mask=0 is no mask"),
        (True, "attention_mask=True is no mask"),
        ("causal", "attention_mask='causal' is no mask"),
        (sat.Padding(torch.ones(2, 4)), "padding_mask has 4 columns and there are 5 keys"),
    ],
)
def test_a_mask_that_fits_nothing_is_refused(mask: Any, named: str) -> None:
    with pytest.raises(HookCallError, match=named):
        tiny_model()(IDS, attention_mask=mask)


def test_a_model_without_input_says_what_it_needs() -> None:
    with pytest.raises(HookCallError, match="needs input_ids"):
        tiny_model()()
    with pytest.raises(HookCallError, match="needs input_ids"):
        tiny_model(vocab_size=0)(IDS)


def test_only_the_last_positions_are_given_to_the_head_on_demand() -> None:
    model = tiny_model()
    close(logits(model, logits_to_keep=2), logits(model)[:, -2:])


# Dropout


class Recorded(nn.Module):
    """In place of a dropout: multiplies by a fixed mask."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.p = factor, 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    options = {"embedding_dropout": 0.5, "attention_dropout": 0.5, "hidden_dropout": 0.5, "drop_path": 0.5}
    model = tiny_model(**options)
    close(logits(model), logits(tiny_model()))
    model.train()
    torch.manual_seed(0)
    first = logits(model)
    assert not torch.equal(first, logits(model))
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "both"])
def test_hidden_dropout_falls_on_what_a_sublayer_adds(placement: str) -> None:
    residual = Residual(tiny_config(norm_placement=placement), 0.0).double().train()
    x, change = torch.randn(2, 2, 5, 16, dtype=torch.float64)
    residual.dropout = Recorded(3.0)  # type: ignore[assignment]
    norm = residual.output_norm
    expected = {
        "pre": lambda: x + 3 * change,
        "post": lambda: norm(x + 3 * change),
        "sandwich": lambda: x + 3 * norm(change),
        "both": lambda: norm(x + 3 * change),
    }[placement]()
    close(residual.add(x, change), expected)
    residual.eval()
    residual.dropout = Recorded(1.0)  # type: ignore[assignment]
    assert not torch.equal(residual.add(x, change), expected)


def test_drop_path_skips_whole_rows_and_keeps_the_mean() -> None:
    residual = Residual(tiny_config(), 0.25).double().train()
    x, change = torch.zeros(4000, 2, 16, dtype=torch.float64), torch.ones(4000, 2, 16, dtype=torch.float64)
    torch.manual_seed(0)
    result = residual.add(x, change)
    rows = result[:, 0, 0]
    assert torch.equal(result, rows[:, None, None].expand_as(result))
    assert set(rows.tolist()) == {0.0, 1 / 0.75}
    assert abs(rows.mean().item() - 1) < 0.05
    assert torch.equal(residual.eval().add(x, change), change)


def test_drop_path_grows_linearly_to_the_last_layer() -> None:
    layers = tiny_model(num_layers=5, drop_path=0.4).transformer.layers
    rates = [layer.mlp_residual.drop_path for layer in layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [layer.attention_residual.drop_path for layer in layers] == rates


# Experts


def test_a_mixture_of_experts_is_a_loop_over_tokens() -> None:
    experts = sat.MixtureOfExpertsMixin(tiny_config(gated_mlp=True), num_experts=4, top_k=2)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    model = tiny_model({"experts": experts}, gated_mlp=True)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    ours = model.hooks.mlp_forward(x, layer_id=1, hooks=model.hooks)
    layer = experts.layers[1]
    for row in range(2):
        for position in range(5):
            token = x[row, position]
            scores = (layer.router.weight @ token).float().softmax(-1)  # in float32, as published models do
            best = sorted(range(4), key=lambda expert: -scores[expert])[:2]
            total = sum(scores[expert] for expert in best)
            expected = torch.zeros(16, dtype=torch.float64)
            for expert in best:
                mlp = layer.experts[expert]
                expected += (scores[expert] / total).double() * mlp.down(
                    mlp.activation(mlp.gate(token)) * mlp.up(token)
                )
            close(ours[row, position], expected)


def test_another_mixin_may_route_otherwise_in_either_order() -> None:
    class FirstExpert(sat.BaseMixin):
        def routing_forward(self, hidden_states: Tensor, **kw_args: Any) -> tuple[Tensor, Tensor]:
            return hidden_states.new_ones(len(hidden_states), 1), torch.zeros(len(hidden_states), 1, dtype=torch.long)

    experts = sat.MixtureOfExpertsMixin(tiny_config(), num_experts=3)
    for mixins in ({"experts": experts, "route": FirstExpert()}, {"route": FirstExpert(), "experts": experts}):
        model = tiny_model(mixins)
        x = torch.randn(1, 3, 16, dtype=torch.float64)
        mlp = experts.layers[0].experts[0]
        close(model.hooks.mlp_forward(x, layer_id=0, hooks=model.hooks), mlp.down(mlp.activation(mlp.up(x))))


def test_routing_without_experts_says_what_is_missing() -> None:
    with pytest.raises(HookCallError, match=r"sat\.MixtureOfExpertsMixin"):
        tiny_model().hooks.routing_forward(torch.zeros(1, 16))


# Activation checkpointing


@pytest.mark.parametrize(("every", "recomputed"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3]), (0, [])])
def test_every_nth_layer_is_recomputed(every: int, recomputed: list[int]) -> None:
    runs: list[int] = []

    class Count(sat.BaseMixin):
        @sat.non_conflict
        def mlp_forward(self, hidden_states: Tensor, *, old_impl: Any, layer_id: int, **kw_args: Any) -> Any:
            runs.append(layer_id)
            return old_impl(hidden_states, layer_id=layer_id, **kw_args)

    model = tiny_model({"count": Count()}, num_layers=4)
    assert model.enable_activation_checkpointing(every) is model
    model(IDS)[0].sum().backward()
    assert sorted(runs) == sorted([0, 1, 2, 3, *recomputed])
    runs.clear()
    logits(model)
    assert runs == [0, 1, 2, 3]


def test_a_negative_distance_is_refused() -> None:
    with pytest.raises(HookCallError, match="every=-1"):
        tiny_model().enable_activation_checkpointing(-1)


# Sharing, copying


def test_two_models_share_one_backbone_from_two_threads() -> None:
    base = tiny_model({"rotary": sat.RotaryMixin.for_config(tiny_config())}, num_layers=3)
    scaled, zeroed = base.with_mixin("scale", Scale(2.0)), base.with_mixin("zero", ZeroMLP())
    models = [base, scaled, zeroed]
    inputs = [tiny_ids(2, 6, seed=seed) for seed in range(3)]
    alone = [[logits(model, ids) for ids in inputs] for model in models]
    assert not torch.allclose(alone[0][0], alone[1][0])
    assert not torch.allclose(alone[0][0], alone[2][0])
    assert list(base.mixins) == ["rotary"]
    assert scaled.transformer is zeroed.transformer is base.transformer
    jobs = [(m, i) for _ in range(40) for m in range(3) for i in range(3)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: logits(models[job[0]], inputs[job[1]]), jobs))
    assert all(torch.equal(result, alone[m][i]) for (m, i), result in zip(jobs, results, strict=True))


def test_a_second_model_leaves_the_first_as_it_is_and_outlives_its_changes() -> None:
    base = tiny_model()
    before, keys = logits(base), list(base.state_dict())
    view = base.with_mixin("zero", ZeroMLP())
    base.add_mixin("scale", Scale(3.0))
    assert list(view.mixins) == ["zero"]
    base.del_mixin("scale")
    assert torch.equal(logits(base), before)
    assert list(base.state_dict()) == keys
    view.del_mixin("zero")
    assert torch.equal(logits(view), before)
    view.enable_activation_checkpointing(1)
    assert base.checkpoint_every == 0


def test_a_second_model_of_a_compiled_one_runs_its_own_hooks() -> None:
    torch.compiler.reset()
    base = tiny_model()
    expected = logits(base.with_mixin("zero", ZeroMLP()))
    base.compile(backend="eager")
    logits(base)
    assert torch.equal(logits(base.with_mixin("zero", ZeroMLP())), expected)


def test_a_compiled_model_notices_mixins_that_come_and_go() -> None:
    torch.compiler.reset()
    model = tiny_model()
    before, zeroed = logits(model), logits(tiny_model({"zero": ZeroMLP()}))
    model.compile(backend="eager")
    assert torch.equal(logits(model), before)
    model.add_mixin("zero", ZeroMLP())
    assert torch.equal(logits(model), zeroed)
    model.del_mixin("zero")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_gives_the_same_and_is_independent(how: str, compiled: bool) -> None:
    model = tiny_model({"scale": Scale(2.0), "default": DefaultMLP()})
    before = logits(model)
    if compiled:
        model.compile(backend="eager")
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(other), before)
    assert other.explain() == model.explain()
    with torch.no_grad():
        other.mixins["scale"].factor.fill_(7.0)
    assert not torch.equal(logits(other), before)
    other.add_mixin("zero", ZeroMLP())
    assert list(model.mixins) == ["scale", "default"]
    other.del_mixin("scale")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", sat.list_models())
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_every_family_can_be_copied(family: str, how: str) -> None:
    model = tiny_family_model(family)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}
    assert len(list(model.parameters())) == len(list(other.parameters()))
    assert other.explain() == model.explain()


# Parameters


def test_only_what_is_named_trains() -> None:
    model = tiny_model({"scale": Scale(), "positions": sat.LearnedPositionsMixin(12, 16)})
    assert model.freeze_except("mixins.scale") is model
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["mixins.scale.factor"]
    model.freeze_except("*.layers.1.mlp.*", "mixins.*")
    live = {name for name, p in model.named_parameters() if p.requires_grad}
    assert live == {f"transformer.layers.1.mlp.{m}.{p}" for m in ("up", "down") for p in ("weight", "bias")} | {
        "mixins.scale.factor",
        "mixins.positions.table.weight",
    }
    model(IDS)[0].sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == live


def test_freezing_all_but_nothing_freezes_everything() -> None:
    assert tiny_model().freeze_except().trainable_summary().trainable == 0


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("mixins.scal", r"'mixins\.scal' matches no parameter\. Did you mean 'mixins\.scale'\?"),
        ("", "''"),
        ("scale", "'scale' matches no parameter"),
    ],
)
def test_a_pattern_that_matches_nothing_changes_nothing(pattern: str, named: str) -> None:
    model = tiny_model({"scale": Scale()})
    with pytest.raises(ConfigError, match=named):
        model.freeze_except("transformer", pattern)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_summary_counts_each_parameter_once() -> None:
    model = tiny_model({"scale": Scale()}).freeze_except("mixins.scale")
    summary = model.trainable_summary()
    assert summary.total == sum(parameter.numel() for parameter in model.parameters())
    assert summary.trainable == 1
    assert ("mixins.scale", 1, 1) in summary.by_module
    assert ("transformer.word_embeddings", 13 * 16, 0) in summary.by_module
    text = str(summary)
    assert text.startswith(f"1 of {summary.total:,} parameters train (")
    assert "transformer.layers" in text
    shared = tiny_family_model("t5")
    assert shared.trainable_summary().total == sum(parameter.numel() for parameter in shared.parameters())


# Models of parts


def test_a_mixin_goes_to_every_part_it_suits_each_with_its_own_parameters() -> None:
    model = tiny_family_model("t5").add_mixin("mine", Scale(2.0))
    assert [name for name in model.state_dict() if "mine" in name] == [
        "parts.encoder.mixins.mine.factor",
        "parts.decoder.mixins.mine.factor",
    ]
    assert model.get_mixin("mine", "encoder") is not model.get_mixin("mine", "decoder")
    model.add_mixin("cache", sat.CachedAutoRegressiveMixin())
    assert "cache" not in model.part("encoder").mixins
    model.add_mixin("only", Scale(), part="encoder")
    assert "only" not in model.part("decoder").mixins


def test_a_mixin_that_one_part_refuses_is_in_no_part() -> None:
    model = tiny_family_model("t5")
    model.add_mixin("zero", ZeroMLP(), part="decoder")
    before = model.explain()
    with pytest.raises(ValueError, match="'zero' and 'other' both replace mlp_forward"):
        model.add_mixin("other", ZeroMLP())
    assert model.explain() == before


@pytest.mark.parametrize(
    ("action", "named"),
    [
        (lambda model: model.add_mixin("x", Scale(), part="decodr"), r"no part 'decodr'. Did you mean 'decoder'\?"),
        (lambda model: model.get_mixin("min"), r"no part has a mixin 'min'. Did you mean 'mine'\?"),
        (lambda model: model.del_mixin("x"), "no part has a mixin 'x'"),
        (lambda model: model.add_mixin("x", {"encoder": Scale()}, part="decoder"), "is not for part 'decoder'"),
        (lambda model: model.add_mixin("x", {}), "suits no part"),
    ],
)
def test_a_part_or_mixin_that_is_not_there_is_named_with_the_nearest(action: Any, named: str) -> None:
    with pytest.raises(HookDefinitionError, match=named):
        action(tiny_family_model("t5").add_mixin("mine", Scale()))
