"""Compare a model with the reference implementation: outputs, all hidden states, gradients, and the files between."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

import swissarmy as sat
from swissarmy.backbone.model import Model, iterate_models
from swissarmy.mixins.hidden_states import HiddenStatesMixin

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Inputs:
    """One call, as the reference takes it and as ours does."""

    name: str
    theirs: Mapping[str, Any]
    ours: Mapping[str, Any]
    real: Tensor | None = None
    """Which positions `[b, s]` are compared; all when `None`. An encoder's, in front of a decoder, are all compared."""


@dataclass(frozen=True)
class Case:
    """A tiny random reference model, and calls to compare on."""

    name: str
    make: Callable[[], PreTrainedModel]
    inputs: Callable[[Any], list[Inputs]]
    hidden_states: Callable[[Any], Mapping[str, tuple[Tensor, ...]]] = field(
        default=lambda output: {"": output.hidden_states}
    )
    """The reference's hidden states for each part of the model (`""` for a plain one)."""
    normed: bool = True
    """Whether the reference's last hidden state is what the final norm gives; else what the last layer gives."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
    """Fewer where the reference itself computes in float32 whatever the model's precision."""


def token_inputs(config: Any, *, causal: bool, length: int = 11) -> list[Inputs]:
    """Calls for a model of token ids: plain, padded left and right, with explicit positions, with a dense mask."""
    generator = torch.Generator().manual_seed(1)
    low = 3
    ids = torch.randint(low, config.vocab_size, (3, length), generator=generator)
    right = torch.arange(length)[None] < torch.tensor([length, length - 3, length - 5])[:, None]
    left = right.flip(1)
    positions = torch.randint(0, length, (3, length), generator=generator)
    dense = torch.rand(3, 1, length, length, generator=generator) < 0.7
    dense |= torch.eye(length, dtype=torch.bool)
    if causal:
        dense &= torch.tril(torch.ones(length, length, dtype=torch.bool))
    pad = 0 if config.pad_token_id is None else config.pad_token_id

    def padded(name: str, real: Tensor) -> Inputs:
        filled = torch.where(real, ids, pad)
        return Inputs(
            name,
            {"input_ids": filled, "attention_mask": real.long()},
            {"input_ids": filled, "padding_mask": real},
            real,
        )

    return [
        Inputs("plain", {"input_ids": ids}, {"input_ids": ids}),
        padded("right padding", right),
        padded("left padding", left),
        Inputs("positions", *[{"input_ids": ids, "position_ids": positions}] * 2),
        Inputs("dense mask", *[{"input_ids": ids, "attention_mask": dense}] * 2),
    ]


def source_and_target_inputs(config: Any, *, source_length: int = 11, target_length: int = 7) -> list[Inputs]:
    """Calls for an encoder-decoder: plain, padding on each side of the source and of the target, on both at once."""
    generator = torch.Generator().manual_seed(1)
    source, target = (
        torch.randint(3, config.vocab_size, (3, length), generator=generator)
        for length in (source_length, target_length)
    )

    def real(length: int) -> Tensor:
        return torch.arange(length)[None] < torch.tensor([length, length - 2, length - 5])[:, None]

    def call(name: str, source_mask: Tensor | None = None, target_mask: Tensor | None = None) -> Inputs:
        ids = source if source_mask is None else torch.where(source_mask, source, config.pad_token_id)
        target_ids = target if target_mask is None else torch.where(target_mask, target, config.pad_token_id)
        theirs, ours = ({"input_ids": ids, "decoder_input_ids": target_ids} for _ in range(2))
        if source_mask is not None:
            theirs["attention_mask"], ours["padding_mask"] = source_mask.long(), source_mask
        if target_mask is not None:
            theirs["decoder_attention_mask"], ours["decoder_padding_mask"] = target_mask.long(), target_mask
        return Inputs(name, theirs, ours, target_mask)

    read, written = real(source_length), real(target_length)
    return [
        call("plain"),
        call("source padded right", read),
        call("source padded left", read.flip(1)),
        call("target padded right", None, written),
        call("target padded left", None, written.flip(1)),
        call("both padded", read, written.flip(1)),
    ]


def encoder_inputs(config: Any, *, causal: bool = False) -> list[Inputs]:
    """The calls of `token_inputs`, and one with token types."""
    calls = token_inputs(config, causal=causal)
    ids = calls[0].theirs["input_ids"]
    types = torch.randint(0, config.type_vocab_size, ids.shape, generator=torch.Generator().manual_seed(2))
    return [*calls, Inputs("token types", *[{"input_ids": ids, "token_type_ids": types}] * 2)]


def one_choice(calls: list[Inputs]) -> list[Inputs]:
    """The same calls for a reference that takes `[b, choices, s]`, where ours takes `[b * choices, s]`."""
    return [
        replace(call, theirs={key: value[:, None] for key, value in call.theirs.items()})
        for call in calls
        if call.name != "dense mask"  # the reference flattens it into one of tokens
    ]


def check_case(case: Case, dtype: torch.dtype, folder: Path) -> None:
    """The reference's folder gives the same numbers here, and ours gives the same numbers there."""
    torch.manual_seed(0)
    reference = case.make().to(dtype).eval()
    reference.save_pretrained(folder / "theirs")
    model = sat.load(folder / "theirs")
    assert model.dtype == dtype
    for inputs in case.inputs(reference.config):
        _check_call(case, inputs, reference, model, TOLERANCE[dtype])
    model.save_pretrained(folder / "ours")
    restored, report = type(reference).from_pretrained(folder / "ours", dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    expected = reference.state_dict()
    for name, tensor in restored.state_dict().items():
        assert torch.equal(tensor, expected[name]), f"{case.name}: {name} changed between two files"


def _check_call(case: Case, inputs: Inputs, reference: PreTrainedModel, model: Model, tolerance: float) -> None:
    what = f"{case.name}, {inputs.name}"
    expected = reference(**inputs.theirs, output_hidden_states=True)
    for _, plain in iterate_models(model):
        plain.add_mixin("record", HiddenStatesMixin())
    with Recorded(model, case.normed) as layers:
        result = model(**inputs.ours)
    ours = list(result[0]) if isinstance(result[0], tuple) else [result[0]]
    _assert_equal(ours, _outputs(expected), tolerance, what, inputs.real)
    for part, states in case.hidden_states(expected).items():
        real = None if part == "encoder" else inputs.real
        _check_hidden_states(layers[part], states, tolerance, f"{what}, {part} hidden states", real)
    _check_gradients(ours, _outputs(expected), reference, model, tolerance, what, inputs.real)
    for _, plain in iterate_models(model):
        plain.del_mixin("record")


class Recorded:
    """What each plain model's layers and, when `normed`, final norm gave during a call."""

    def __init__(self, model: Model, normed: bool) -> None:
        self.model, self.normed = model, normed

    def __enter__(self) -> dict[str, list[Tensor]]:
        self.states: dict[str, list[Tensor]] = {}
        self.handles = [
            plain.transformer.register_forward_hook(self._keep(prefix.removeprefix("parts.").rstrip(".")))
            for prefix, plain in iterate_models(self.model)
        ]
        return self.states

    def _keep(self, part: str) -> Callable[..., None]:
        def keep(module: Any, arguments: Any, result: Any) -> None:
            layers = [outputs["hidden_states"] for outputs in result.outputs_per_layers]
            last = result.hidden_states if self.normed else layers[-1]
            self.states[part] = [result.outputs_per_layers[0]["embeddings"], *layers[:-1], last]

        return keep

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()


def _check_hidden_states(
    ours: list[Tensor], theirs: tuple[Tensor, ...], tolerance: float, what: str, real: Tensor | None
) -> None:
    assert len(ours) == len(theirs), what
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        _assert_equal([a], [b], tolerance, f"{what} {index}", real)


def _check_gradients(
    ours: list[Tensor],
    theirs: list[Tensor],
    reference: PreTrainedModel,
    model: Model,
    tolerance: float,
    what: str,
    real: Tensor | None,
) -> None:
    """The gradients of the same scalar loss with respect to every parameter, through the weight map."""
    for outputs, network in ((ours, model), (theirs, reference)):
        network.zero_grad()
        sum(_loss(output, real) for output in outputs).backward()
    parameters = dict(model.named_parameters())
    their_grads = revert_weight_conversion(reference, {n: _grad(p) for n, p in reference.named_parameters()})
    for entry in model.source.family.weights(model.source.config).entries(model.source.own_names):
        grads = [_grad(parameters[name]) for name in entry.ours]
        expected = their_grads[entry.theirs]
        _assert_equal([entry.rule.join(grads)], [expected], tolerance, f"{what}, gradient of {entry.theirs}", None)


def _loss(output: Tensor, real: Tensor | None) -> Tensor:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    loss = torch.log_softmax(output, dim=-1) * weights
    if real is not None and output.dim() == 3:
        loss = loss * real[..., None]
    return loss.mean()


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _outputs(output: Any) -> list[Tensor]:
    if "start_logits" in output:
        return [torch.stack((output.start_logits, output.end_logits), dim=-1)]
    if "prediction_logits" in output:
        return [output.prediction_logits, output.seq_relationship_logits]
    if "logits" in output:
        return [output.logits]
    pooled = output.get("pooler_output")
    return [output.last_hidden_state] if pooled is None else [output.last_hidden_state, pooled]


def _assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float, what: str, real: Tensor | None) -> None:
    assert len(ours) == len(theirs), what
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape, f"{what}: {a.shape} and {b.shape}"
        if real is not None and a.dim() == 3:
            a, b = a[real], b[real]
        difference = (a - b).abs().max().item()
        assert difference <= tolerance, f"{what}: differ by {difference}"
