"""VeRA: two random matrices for all, and the vectors between them."""

from pathlib import Path
from typing import Any

import pytest
import torch

import swissarmy as sat
from swissarmy.core.errors import ConfigError
from swissarmy.testing import TINY_CONFIGS, tiny_model
from tests.mixins.method_cases import check_merging, check_saving, close, logits, with_method


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_a_new_mixin_changes_nothing_bit_for_bit(family: str) -> None:
    assert torch.equal(
        logits(with_method(family, sat.VeRAMixin, trained=False, r=4)), logits(tiny_model(family).double())
    )


def test_what_is_added_is_the_papers_product_of_the_parts_that_fit() -> None:
    model = with_method("gpt2", sat.VeRAMixin, r=4, targets=("query", "mlp.*"))
    mixin = model.get_mixin("method")
    assert (mixin.A.shape, mixin.B.shape) == ((4, 128), (128, 4))
    change, linear = mixin.layers[0]["attention_query"], model.transformer.layers[0].attention.query
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    added = torch.diag(change.b) @ mixin.B[:32] @ torch.diag(change.d) @ mixin.A[:, :32]
    changed = model.hooks.linear_forward(x, linear, "attention.query", layer_id=0)
    close(changed, linear(x) + x @ added.t())


def test_the_matrices_come_from_the_seed_and_do_not_train() -> None:
    first, same, other = (sat.VeRAMixin.for_model(tiny_model("llama"), r=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.A, same.A)
    assert torch.equal(first.B, same.B)
    assert not torch.equal(first.A, other.A)
    assert {name.rpartition(".")[2] for name, _ in first.named_parameters()} == {"b", "d"}
    assert first.A.abs().max() < (6 / 32) ** 0.5
    before = torch.random.get_rng_state()
    sat.VeRAMixin.for_model(tiny_model("llama"), r=4)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5", "vit"])
def test_merging_changes_nothing_and_unmerging_brings_the_weights_back(family: str) -> None:
    check_merging(family, sat.VeRAMixin, r=4, targets="*")


def test_it_is_loaded_again_with_matrices_that_are_not_of_its_seed(tmp_path: Path) -> None:
    check_saving(tmp_path / "model", "t5", sat.VeRAMixin, r=4, first_rows={"attention.key": 8}, targets=("key", "up"))
    model: Any = with_method("gpt2", sat.VeRAMixin, r=4)
    model.get_mixin("method").A.normal_()
    model.save_pretrained(tmp_path / "other")
    assert torch.equal(logits(sat.load(tmp_path / "other", dtype=torch.float64)), logits(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0 is no rank"),
        ({"dropout": 1.0}, "dropout=1.0 must be in"),
        ({"first_rows": {"key": -1}}, "must not be negative"),
        ({"first_rows": {"kye": 1}}, "first_rows: 'kye' matches no projection"),
        ({"targets": ()}, "targets is empty"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sat.VeRAMixin.for_model(tiny_model("gpt2"), **options)
