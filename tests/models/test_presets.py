"""Presets of every family: built on the meta device, they have the published number of parameters."""

import pytest
import torch

from swissarmy.models._family import build_model, find_family, list_models

PRESETS = [(family, preset) for family in list_models() for preset in find_family(family).presets]


@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_a_preset_has_its_published_number_of_parameters(family: str, preset: str) -> None:
    published = find_family(family).presets[preset]
    with torch.device("meta"):
        model = build_model({"model_type": family, **published.config})
    assert sum(parameter.numel() for parameter in model.parameters()) == published.parameters
