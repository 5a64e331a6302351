"""`model.compile()`: the same numbers, in few graphs, however long the sequences are."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.backbone.projections import plain_models
from swissarmy.testing import tiny_inputs, tiny_model

# dynamo's own, about what a layer hands to the next; it hides it, unless warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def prompt(length: int, new: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.cat((torch.randint(3, 60, (length,), generator=generator), torch.full((new,), -1)))


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_decoding_takes_two_graphs_a_layer_for_any_lengths(family: str) -> None:
    """One for prompts, one for steps. No length equals a size of the model: dynamo takes equals for the same."""
    model = tiny_model(family)
    sequences = [prompt(7, 12), prompt(9, 17), prompt(11, 29), prompt(23, 5)]
    plain = [sat.fill_sequence(model, each)[0] for each in sequences]
    model.compile(backend="eager")
    compiled = [sat.fill_sequence(model, sequences[0])[0]]
    layers = model.config.num_layers
    assert 0 < graphs() <= 2 * layers
    after_first = graphs()
    compiled += [sat.fill_sequence(model, each)[0] for each in sequences[1:]]
    assert graphs() == after_first
    assert not counters["graph_break"]
    for ours, theirs in zip(compiled, plain, strict=True):
        assert torch.equal(ours, theirs)


def prefix(model: Model) -> Any:
    return sat.PrefixTuningMixin.for_model(model, prefix_len=3)


def reduced(model: Model) -> Any:
    return sat.ReducedWeightsMixin.for_model(model, kind="fp16")


@pytest.mark.parametrize(
    ("family", "mixins"), [("gpt2", [prefix]), ("gpt2", [reduced]), ("t5", []), ("t5", [prefix, reduced])]
)
def test_decoding_takes_no_more_graphs_with_mixins_and_in_an_encoder_decoder(
    family: str, mixins: Sequence[Callable[[Model], Any]]
) -> None:
    """An encoder's layer has a graph for its sources; a decoder's one for prompts and one for steps, as everywhere."""
    model = tiny_model(family)
    for make in mixins:
        model.add_mixin(make.__name__, make(model))
    sources = [{"input_ids": prompt(length, 0)[None]} if model.parts else {} for length in (9, 11, 23)]
    calls = list(zip((prompt(7, 12), prompt(9, 17), prompt(11, 29)), sources, strict=True))
    plain = [sat.fill_sequence(model, each, **source)[0] for each, source in calls]
    model.compile(backend="eager")
    compiled = [sat.fill_sequence(model, calls[0][0], **calls[0][1])[0]]
    layers = {name: part.config.num_layers for name, part in plain_models(model).items()}
    after_first = graphs()
    assert 0 < after_first <= sum(count * (1 if name == "encoder" else 2) for name, count in layers.items())
    compiled += [sat.fill_sequence(model, each, **source)[0] for each, source in calls[1:]]
    assert graphs() == after_first
    assert not counters["graph_break"]
    for ours, theirs in zip(compiled, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_outputs_and_gradients_are_the_same(family: str) -> None:
    model = tiny_model(family).double()
    inputs = tiny_inputs(model)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def run() -> tuple[Tensor, tuple[Tensor | None, ...]]:
        logits = model(**inputs)[0]
        return logits.detach(), torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True)

    logits, gradients = run()
    model.compile(backend="aot_eager", dynamic=False)
    compiled_logits, compiled_gradients = run()
    torch.testing.assert_close(compiled_logits, logits)
    for name, ours, theirs in zip(names, compiled_gradients, gradients, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    assert graphs() > 0


def test_a_mixin_added_afterwards_takes_part() -> None:
    model = tiny_model("gpt2")
    model.compile(backend="eager")
    ids = tiny_inputs(model)["input_ids"]
    plain = model(ids)[0]
    model.add_mixin("prefix-tuning", sat.PrefixTuningMixin.for_model(model, prefix_len=3))
    with_prefix = model(ids)[0]
    assert not torch.allclose(with_prefix, plain)
    model.del_mixin("prefix-tuning")
    torch.testing.assert_close(model(ids)[0], plain)
    assert not counters["graph_break"]


def test_what_a_mixin_raises_inside_is_raised() -> None:
    class Broken(sat.BaseMixin):
        def mlp_forward(self, hidden_states: Tensor, **kw_args: object) -> Tensor:
            return nn.functional.linear(hidden_states, torch.ones(2, 3))

    model = tiny_model("gpt2")
    model.compile(backend="eager")
    ids = tiny_inputs(model)["input_ids"]
    plain = model(ids)[0]
    model.add_mixin("broken", Broken())
    with pytest.raises(Exception, match=r"(?s)mat1 and mat2|size"):
        model(ids)
    model.del_mixin("broken")
    torch.testing.assert_close(model(ids)[0], plain)
