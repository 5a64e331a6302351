"""What several tests of fine-tuning methods do: add one with random parameters, merge it, save it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import swissarmy as sat
from swissarmy.core.mixin import BaseMixin
from swissarmy.testing import tiny_inputs, tiny_model


def with_method(family: str, kind: type[BaseMixin], *, trained: bool = True, **options: Any) -> Any:
    """A tiny model in float64 with a method, whose parameters are random if it is `trained`."""
    model: Any = tiny_model(family).double()
    torch.manual_seed(3)
    model.add_mixin("method", kind.for_model(model, **options))
    for name, parameter in model.named_parameters():
        if trained and "mixins.method." in name:
            nn.init.normal_(parameter, mean=0.3, std=0.5)
    return model


def logits(model: Any, **kw_args: Any) -> Tensor:
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in tiny_inputs(model).items()}
    with torch.no_grad():
        result: Tensor = model(**{**inputs, **kw_args})[0]
    return result


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max().item()))


def check_merging(family: str, kind: type[BaseMixin], **options: Any) -> None:
    """Merging changes weights and no result, and is undone."""
    plain = {name: tensor.clone() for name, tensor in tiny_model(family).double().state_dict().items()}
    model = with_method(family, kind, **options)
    expected = logits(model)
    assert not torch.allclose(expected, logits(tiny_model(family).double()))
    removed = sat.merge_mixin(model, "method")
    assert model.state_dict().keys() == plain.keys()
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())
    close(logits(model), expected)
    sat.unmerge_mixin(model, "method", removed)
    close(logits(model), expected)
    for name, tensor in plain.items():
        close(model.state_dict()[name], tensor)


def check_saving(folder: Path, family: str, kind: type[BaseMixin], **options: Any) -> None:
    """A folder brings the method back, without being told what it is."""
    model = with_method(family, kind, **options)
    model.save_pretrained(folder)
    again: Any = sat.load(folder, dtype=torch.float64)
    assert torch.equal(logits(again), logits(model))
