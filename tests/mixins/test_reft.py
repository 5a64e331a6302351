"""LoReFT: which hidden states it edits, how, and that generation edits the same as training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.mixins.reft import Intervention, orthonormal
from swissarmy.testing import TINY_CONFIGS, tiny_inputs, tiny_model
from tests.helpers import tiny_ids
from tests.helpers import tiny_model as tiny_backbone
from tests.mixins.helpers import outputs, randomise, reloaded


def loreft_of(model: Any, **options: Any) -> Any:
    return randomise(sat.LoReFTMixin.for_model(model, **{"rank": 3, **options}))


def with_loreft(family: str = "llama", **options: Any) -> Any:
    model = tiny_model(family)
    return model.add_mixin("loreft", loreft_of(model, **options)).double()


def edited_places(model: sat.BaseModel, mixin: sat.LoReFTMixin, **inputs: Any) -> Tensor:
    """Which tokens' states a first layer with an edit changes, `[b, s]`."""
    plain = model.with_mixin("states", sat.HiddenStatesMixin())
    changed = plain.with_mixin("loreft", mixin).with_mixin("more-states", Outer())
    lengths = inputs.pop("prompt_lengths", None)
    before = plain(**inputs)[1]["hidden_states"]
    given = {} if lengths is None else {"prompt_lengths": lengths}
    after = changed(**inputs, **given)[1]["after"]
    return (before != after).any(-1)


class Outer(sat.BaseMixin):
    """Hands out what layers give, edits included."""

    @sat.non_conflict
    def layer_forward(self, hidden_states: Tensor, mask: Any, *, old_impl: Any, **kw_args: Any) -> Tensor:
        result: Tensor = old_impl(hidden_states, mask, **kw_args)
        kw_args["output_this_layer"]["after"] = result
        return result


# What is computed


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_a_new_edit_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    before = outputs(model)
    model.add_mixin("loreft", sat.LoReFTMixin.for_model(model))
    assert torch.equal(outputs(model), before)


def test_it_moves_states_inside_a_subspace_to_where_a_projection_of_them_says() -> None:
    model = tiny_backbone(num_layers=1)
    mixin = loreft_of(model, first=9).double()
    plain = model.with_mixin("states", sat.HiddenStatesMixin())
    h = plain(tiny_ids())[1]["hidden_states"]
    changed = model.with_mixin("loreft", mixin).with_mixin("after", Outer())(tiny_ids())[1]["after"]
    edit = mixin.layers[0]
    basis = orthonormal(edit.rotation)
    expected = h + (h @ edit.weight.t() + edit.bias - h @ basis.t()) @ basis
    torch.testing.assert_close(changed, expected)
    torch.testing.assert_close(changed @ basis.t(), h @ edit.weight.t() + edit.bias)


def test_its_directions_are_orthonormal_span_the_parameters_rows_and_move_smoothly() -> None:
    rows = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    basis = orthonormal(rows)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(rows @ basis.t() @ basis, rows)
    assert (basis * rows).sum(1).gt(0).all()  # of the rows' own orientation: no sudden change of sign
    assert torch.autograd.gradcheck(orthonormal, (rows,))
    assert orthonormal(rows.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("rank", "size"), [(1, 1), (3, 16), (16, 16), (5, 24)])
def test_its_first_directions_are_orthonormal(rank: int, size: int) -> None:
    rows = Intervention(size, rank).rotation.detach()
    torch.testing.assert_close(rows @ rows.t(), torch.eye(rank))


def test_directions_stay_orthonormal_in_training() -> None:
    model = tiny_backbone()
    model.add_mixin("loreft", sat.LoReFTMixin.for_model(model)).freeze_except("mixins.loreft")
    live = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert set(live) == {f"mixins.loreft.layers.{i}.{name}" for i in (0, 1) for name in ("rotation", "weight", "bias")}
    start = {name: each.detach().clone() for name, each in live.items()}
    optimizer = torch.optim.Adam(live.values(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(tiny_ids())[0].square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(each, start[name]) for name, each in live.items())
    basis = orthonormal(model.get_mixin("loreft").layers[0].rotation)
    torch.testing.assert_close(basis @ basis.t(), torch.eye(4, dtype=torch.float64))


# Where


def test_the_first_and_the_last_tokens_of_the_prompt_are_edited() -> None:
    model = tiny_backbone(causal=False)
    ids = tiny_ids(length=6)
    assert edited_places(model, loreft_of(model, first=2).double(), input_ids=ids).tolist() == 2 * [[1, 1, 0, 0, 0, 0]]
    both = loreft_of(model, first=1, last=2).double()
    assert edited_places(model, both, input_ids=ids).tolist() == 2 * [[1, 0, 0, 0, 1, 1]]
    lengths = torch.tensor([4, 2])
    places = edited_places(model, both, input_ids=ids, prompt_lengths=lengths)
    assert places.tolist() == [[1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]


def test_padding_is_no_part_of_the_prompt() -> None:
    model = tiny_backbone(causal=False)
    padding = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    mixin = loreft_of(model, first=0, last=1).double()
    places = edited_places(model, mixin, input_ids=tiny_ids(), padding_mask=padding)
    assert places.tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]


def test_packed_documents_are_edited_at_the_beginning_of_each() -> None:
    model = tiny_backbone()
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    places = edited_places(model, loreft_of(model, first=1).double(), input_ids=tiny_ids(), position_ids=positions)
    assert places.tolist() == [[1, 0, 0, 1, 0], [1, 0, 0, 0, 0]]


def test_a_model_that_counts_from_two_is_edited_at_the_same_places() -> None:
    model = with_loreft("roberta", first=2, last=1)
    positions = torch.arange(2, 11)[None]
    torch.testing.assert_close(outputs(model, **tiny_inputs(model), position_ids=positions), outputs(model))


def test_layers_can_be_chosen() -> None:
    model = tiny_backbone()
    mixin = loreft_of(model, layers=(1,)).double()
    assert {name.split(".")[1] for name, _ in mixin.named_parameters()} == {"1"}
    assert not edited_places(model, mixin, input_ids=tiny_ids()).any()


def test_two_of_them_agree_on_where_prompts_end() -> None:
    model = tiny_backbone(causal=False)
    for name, last in (("one", 1), ("two", 2)):
        model.add_mixin(name, loreft_of(model, last=last))
    told = model(tiny_ids(), prompt_lengths=torch.tensor([5, 5]))[0]
    assert torch.equal(model(tiny_ids())[0], told)


def test_a_causal_model_has_to_be_told_where_prompts_end() -> None:
    model = with_loreft("llama", last=2)
    with pytest.raises(sat.HookCallError, match=r"last=2 edits the end of the prompt: give prompt_lengths=\[b\]"):
        outputs(model)
    assert torch.isfinite(outputs(model, **tiny_inputs(model), prompt_lengths=torch.tensor([9, 4]))).all()


@pytest.mark.parametrize("order", [("prompt", "loreft"), ("loreft", "prompt")])
def test_trained_embeddings_before_the_tokens_do_not_move_the_places(order: tuple[str, str]) -> None:
    model = tiny_model("bert").double()
    mixins = {
        "prompt": randomise(sat.PromptTuningMixin.for_model(model, prompt_len=3)),
        "loreft": loreft_of(model, first=2, last=1),
    }
    for name in order:
        model.add_mixin(name, mixins[name])
    told = outputs(model, **tiny_inputs(model), prompt_lengths=torch.tensor([9, 9]))
    torch.testing.assert_close(outputs(model), told)


# Generation


def continued(model: Any, prompt: Tensor, steps: int = 4) -> Tensor:
    """Greedy decoding without a cache, told where the prompt ends."""
    ids, lengths = prompt[None], torch.tensor([len(prompt)])
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, prompt_lengths=lengths)[0][:, -1:].argmax(-1)), dim=1)
    return ids[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("with_prompt", [False, True])
@pytest.mark.parametrize("first", [0, 2])
def test_cached_generation_of_rows_of_any_length_edits_what_training_does(
    family: str, first: int, with_prompt: bool
) -> None:
    model = with_loreft(family, first=first, last=2)
    if with_prompt:
        model.add_mixin("prompt", randomise(sat.PromptTuningMixin.for_model(model, prompt_len=3)))
    prompts = [torch.tensor(row) for row in ([7, 9, 11, 13, 5, 6], [21, 22, 23], [8, 9, 10, 4])]
    gaps = torch.full((4,), -1)
    tokens, _ = sat.fill_sequence(model, [torch.cat((prompt, gaps)) for prompt in prompts])
    for row, prompt in zip(tokens, prompts, strict=True):
        assert row[: len(prompt) + 4].tolist() == continued(model, prompt).tolist()


def test_beams_can_be_told_where_prompts_end() -> None:
    model = with_loreft(last=1)
    rows = torch.tensor([[7, 9, 11, -1, -1, -1], [21, 22, 23, -1, -1, -1]])
    strategy = sat.BeamSearchStrategy(num_beams=3)
    told, _ = sat.fill_sequence(model, rows, strategy=strategy, prompt_lengths=torch.tensor([3, 3]))
    counted, _ = sat.fill_sequence(model, rows, strategy=strategy)
    assert torch.equal(told, counted)


def test_a_prompt_that_is_read_in_pieces_is_edited_at_its_told_end() -> None:
    model = with_loreft(last=2)
    ids, lengths = tiny_inputs(model, batch=1)["input_ids"], torch.tensor([6])
    cached, cache = model.with_mixin("cache", sat.CachedAutoRegressiveMixin()), sat.KVCache(2)
    pieces = [cached(piece, mems=cache, prompt_lengths=lengths)[0] for piece in ids.split((3, 2, 4), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids, prompt_lengths=lengths)[0])


def test_the_end_of_the_prompt_is_found_in_compiled_layers_too() -> None:
    torch.compiler.reset()
    model = with_loreft("bert", last=2)
    expected = outputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**tiny_inputs(model))[0], expected)


# Files and errors


def test_it_is_saved_and_made_again(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.add_mixin("loreft", loreft_of(model, layers=(1,), first=1, last=1))
    assert torch.equal(outputs(reloaded(model, tmp_path)), outputs(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": 17}, "rank=17: a width of 16 has no more directions"),
        ({"first": 0}, "not both 0"),
        ({"last": -1}, "must not be negative"),
        ({"layers": (2,)}, "there is no layer 2"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        sat.LoReFTMixin.for_model(tiny_backbone(), **options)
