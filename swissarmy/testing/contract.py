"""The contract of mixins, as checks that any mixin can be put to, on any family: ours and yours.

    check_mixin(Addition(MyMixin, {"size": 4}, same_at_start=True))

Each check raises `AssertionError` with what differs. Models are tiny, in float64, with weights that show.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from swissarmy.backbone.model import BaseModel, Model, iterate_models
from swissarmy.core.errors import SwissArmyError
from swissarmy.core.mixin import BaseMixin
from swissarmy.generation.autoregressive_sampling import fill_sequence
from swissarmy.generation.beam_search import BeamSearchStrategy
from swissarmy.generation.strategies import GreedyStrategy
from swissarmy.interop.load import load
from swissarmy.mixins.cache import CachedAutoRegressiveMixin
from swissarmy.nn.kv_cache import KVCache
from swissarmy.testing.tiny import TINY_CONFIGS, tiny_inputs, tiny_model

CAUSAL = ("gemma3_text", "gpt2", "llama", "swissarmy", "t5")
"""Families that generate."""


@final
@dataclass(frozen=True)
class Addition:
    """A mixin to be added: what `for_model` makes, and what it promises."""

    kind: type[BaseMixin]
    options: Mapping[str, Any] = field(default_factory=dict)
    same_at_start: bool = False
    """Whether a new one changes nothing yet."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Other mixins that have to be there before, by name: each an `Addition`."""

    @property
    def name(self) -> str:
        """What it is called in a model under test."""
        return self.kind.__name__

    def add_to(self, model: Model) -> str:
        """Add a new one, and what it needs, whose values do not depend on the order of adding; gives its name."""
        for other in self.needs.values():
            other.add_to(model)
        present = {name for _, plain in iterate_models(model) for name in plain.mixins}
        name = self.name if self.name not in present else f"{self.name}-added"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(map(ord, self.name)))
            model.add_mixin(name, self.kind.for_model(model, **self.options))
        return name


class Check(Protocol):
    """One promise of the contract."""

    def __call__(self, family: str, additions: Sequence[Addition]) -> None:
        """Raise `AssertionError` where the mixins, added in this order, break it."""
        ...


def check_mixin(
    addition: Addition, families: Iterable[str] = tuple(TINY_CONFIGS), leave_out: Iterable[str] = ()
) -> None:
    """Put a mixin to every check on every family.

    Args:
        addition: The mixin.
        families: The families that it is for.
        leave_out: Names of checks in `CHECKS` that mean nothing for it.

    Raises:
        AssertionError: A promise is broken; a note names family and check.
    """
    for name in leave_out:
        if name not in CHECKS:
            raise SwissArmyError(f"leave_out: there is no check '{name}'. There are: {', '.join(CHECKS)}.")
    for family in families:
        for name, check in CHECKS.items():
            if name in leave_out or not applies(name, family, [addition]):
                continue
            try:
                check(family, [addition])
            except Exception as error:
                error.add_note(f"in check '{name}' of {addition.name} on {family}")
                raise


def applies(check: str, family: str, additions: Sequence[Addition]) -> bool:
    """Whether a check says something about a family: generation about those that generate, and so on."""
    if check in GENERATING:
        return family in CAUSAL
    return check != "same at start" or all(addition.same_at_start for addition in additions)


def forward_and_backward(family: str, additions: Sequence[Addition]) -> None:
    """Every parameter of the mixins takes part, and its gradient is finite."""
    model, names = mixed(family, additions)
    backward(loss_of(model))
    gradients = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    for name, gradient in gradients.items():
        if any(f"mixins.{added}." in name for added in names):
            assert gradient is not None, f"'{name}' has no gradient"
            assert torch.isfinite(gradient).all(), f"the gradient of '{name}' is not finite"


def same_at_start(family: str, additions: Sequence[Addition]) -> None:
    """A new mixin changes nothing."""
    model = tiny_model(family).double()
    before = logits_of(model)
    for addition in additions:
        addition.add_to(model)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-10, atol=1e-10)


def detaching_restores(family: str, additions: Sequence[Addition]) -> None:
    """Without the mixins the model is, bit for bit, what it was."""
    model = tiny_model(family).double()
    before, keys = logits_of(model), list(model.state_dict())
    names = add(model, additions)
    logits_of(model)
    for name in reversed(names):
        model.del_mixin(name)  # type: ignore[operator]  # every model has it
    for addition in additions:
        for other in addition.needs.values():
            model.del_mixin(other.name)  # type: ignore[operator]
    assert torch.equal(logits_of(model), before)
    assert list(model.state_dict()) == keys


def recomputing_changes_nothing(family: str, additions: Sequence[Addition]) -> None:
    """Activation checkpointing gives the same loss and gradients."""
    results = []
    for every in (0, 1):
        model, _ = mixed(family, additions)
        loss = loss_of(model.enable_activation_checkpointing(every))
        backward(loss)
        results.append([loss, *(each.grad for each in model.parameters() if each.grad is not None)])
    for kept, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(kept, recomputed)


def cached_equals_uncached(family: str, additions: Sequence[Addition]) -> None:
    """Logits of a prompt, of two tokens and of one at a time are those of the whole text."""
    model, _ = mixed(family, additions)
    torch.testing.assert_close(cached_logits(model), logits_of(model), rtol=1e-4, atol=1e-4)


def batched_equals_single(family: str, additions: Sequence[Addition]) -> None:
    """Rows of different lengths, filled together, are what each is alone."""
    model, _ = mixed(family, additions)
    rows = [torch.cat((torch.arange(3, 3 + length), torch.full((5,), -1))) for length in (2, 6, 4)]
    sources: dict[str, Any] = {"input_ids": torch.arange(12).view(3, 4) + 5} if model.parts else {}
    together, _ = fill_sequence(model, rows, **sources)
    for index, row in enumerate(rows):
        source: dict[str, Any] = {key: value[index : index + 1] for key, value in sources.items()}
        alone, _ = fill_sequence(model, row, strategy=GreedyStrategy(), **source)
        assert together[index, : len(row)].tolist() == alone[0].tolist(), f"row {index}"


def beams_are_scored_right(family: str, additions: Sequence[Addition]) -> None:
    """The score of each beam is the log-probability of its tokens, recomputed without a cache."""
    model, _ = mixed(family, additions)
    prompts = torch.tensor([[5, 6, *[-1] * 5], [9, 3, *[-1] * 5]])
    sources: dict[str, Any] = {"input_ids": torch.arange(8).view(2, 4) + 5} if model.parts else {}
    strategy = BeamSearchStrategy(3)
    tokens, _ = fill_sequence(model, prompts, strategy=strategy, **sources)
    key = "decoder_input_ids" if model.parts else "input_ids"
    with torch.no_grad():
        logits = model(**{**sources, key: tokens[:, :-1]})[0].double().log_softmax(dim=-1)
    scores = logits.gather(2, tokens[:, 1:, None])[:, 1:, 0].sum(dim=1)
    assert strategy.scores is not None
    torch.testing.assert_close(strategy.scores, scores, rtol=1e-4, atol=1e-4)


def saving_and_loading(family: str, additions: Sequence[Addition]) -> None:
    """A saved model comes back whole: by itself where the mixin says what it was made from, else with the mixin."""
    model, names = mixed(family, additions)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "saved")
        again = load(Path(folder) / "saved", mixins=_unnamed(model, names, additions))
        torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-10, atol=1e-10)


def _unnamed(model: Model, names: Sequence[str], additions: Sequence[Addition]) -> dict[str, Any]:
    """New mixins in place of those that a file cannot bring back."""
    fresh = tiny_model(model.source.config.model_type).double()
    by_name = dict(zip(names, additions, strict=True))
    found = {name: plain.mixins[name] for _, plain in iterate_models(model) for name in names if name in plain.mixins}
    return {
        name: by_name[name].kind.for_model(fresh, **by_name[name].options)
        for name, mixin in found.items()
        if isinstance(mixin, BaseMixin) and mixin.saved_options is None
    }


def compiles_whole(family: str, additions: Sequence[Addition]) -> None:
    """One graph without a break, forward and backward, which gives the same."""
    torch.compiler.reset()
    model, _ = mixed(family, additions)
    eager = loss_of(model)
    backward(eager)
    expected = {name: each.grad for name, each in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**inputs_of(model))[0].square().mean()
    backward(loss)
    torch.testing.assert_close(loss, eager, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


CHECKS: Mapping[str, Check] = {
    "forward and backward": forward_and_backward,
    "same at start": same_at_start,
    "detaching restores": detaching_restores,
    "recomputing": recomputing_changes_nothing,
    "cached = uncached": cached_equals_uncached,
    "batched = single": batched_equals_single,
    "beam search": beams_are_scored_right,
    "save and load": saving_and_loading,
    "compiles whole": compiles_whole,
}
"""Every check by its name, in the order in which they are run."""
GENERATING = frozenset({"cached = uncached", "batched = single", "beam search"})
"""Checks that say something about families that generate."""


def mixed(family: str, additions: Sequence[Addition], *, scale: float = 8.0) -> tuple[Model, list[str]]:
    """A tiny model with mixins whose values are large enough to show, and their names in it."""
    model = tiny_model(family, scale=scale).double()
    names = add(model, additions)
    for _, plain in iterate_models(model):
        for name in names:
            if name in plain.mixins:
                _enlarge(plain.mixins[name], name)
    return model.eval(), names


def add(model: Model, additions: Sequence[Addition]) -> list[str]:
    """Add each; their names in the model."""
    return [addition.add_to(model) for addition in additions]


def _enlarge(mixin: nn.Module, name: str) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in mixin.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)


def inputs_of(model: Model) -> dict[str, Tensor]:
    """Inputs in the model's precision."""
    return {key: value.double() if value.is_floating_point() else value for key, value in tiny_inputs(model).items()}


def loss_of(model: Model) -> Tensor:
    """A number that everything in the model has a part in."""
    loss: Tensor = model(**inputs_of(model))[0].square().mean()
    return loss


def backward(loss: Tensor) -> None:
    """Gradients of every parameter that trains."""
    torch.autograd.backward(loss)


def logits_of(model: Model) -> Tensor:
    """What the model gives."""
    with torch.no_grad():
        logits: Tensor = model(**inputs_of(model))[0]
    return logits


def cached_logits(model: Model) -> Tensor:
    """Logits of the same tokens, read as one prefill, a pair, and one by one."""
    inputs = inputs_of(model)
    ids = inputs.pop("decoder_input_ids", None)
    if ids is None:
        ids = inputs.pop("input_ids")
    with torch.no_grad():
        decoder, kw_args = model.for_decoding(**inputs)
        assert isinstance(decoder, BaseModel)
        if decoder.find_mixin(CachedAutoRegressiveMixin) is None:
            decoder = decoder.with_mixin("the-cache", CachedAutoRegressiveMixin())
        cache = KVCache(decoder.config.num_layers)
        pieces = [ids[:, :4], ids[:, 4:6], *torch.split(ids[:, 6:], 1, dim=1)]
        return torch.cat([decoder(input_ids=piece, mems=cache, **kw_args)[0] for piece in pieces], dim=1)
