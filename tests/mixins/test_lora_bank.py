"""Several adapters in one model: for each call, for each row, and weighted."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.core.errors import ConfigError
from swissarmy.testing import tiny_inputs, tiny_model
from tests.mixins.method_cases import check_saving

ADAPTERS: dict[str, dict[str, Any]] = {
    "math": {"r": 3, "targets": "attention.*"},
    "code": {"r": 2, "alpha": 5.0, "targets": ("query", "mlp.*"), "rslora": True},
    "chat": {"r": 2, "targets": "layers.1.attention.value", "init": "pissa"},
}
"""Of different ranks, scales and targets, one with a product that is subtracted."""


def with_adapters(family: str, *names: str) -> Any:
    """A tiny model in float64 with trained LoRAs, each by its own name."""
    model = tiny_model(family).double()
    for name in names:
        model.add_mixin(name, sat.LoRAMixin.for_model(model, **ADAPTERS[name]))
        generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
        for full_name, parameter in model.named_parameters():
            if f"mixins.{name}." in full_name:
                torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return model


def with_bank(family: str) -> Any:
    model = with_adapters(family, *ADAPTERS)
    sat.bundle_adapters(model, *ADAPTERS)
    return model


def inputs_of(model: Any, batch: int = 2) -> dict[str, Tensor]:
    given = tiny_inputs(model, batch=batch)
    return {key: value.double() if value.is_floating_point() else value for key, value in given.items()}


def logits(model: Any, *, batch: int = 2, **kw_args: Any) -> Tensor:
    result: Tensor = model(**inputs_of(model, batch), **kw_args)[0]
    return result


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert", "vit"])
def test_each_call_and_each_row_gives_what_a_model_with_that_adapter_gives(family: str) -> None:
    bank = with_bank(family)
    alone = {name: logits(with_adapters(family, name), batch=5) for name in ADAPTERS}
    plain = logits(tiny_model(family).double(), batch=5)
    assert torch.equal(logits(bank, batch=5), plain)
    for name, expected in alone.items():
        assert (expected - plain).abs().max() > 1e-3
        close(logits(bank, batch=5, adapter=name), expected)
    rows = logits(bank, batch=5, adapter_ids=torch.tensor([2, 0, -1, 1, 0]))
    expected = torch.stack([alone["chat"][0], alone["math"][1], plain[2], alone["code"][3], alone["math"][4]])
    close(rows, expected)


def test_weights_average_adapters() -> None:
    bank = with_bank("gpt2")
    mixed = logits(bank, adapter={"math": 0.25, "code": 0.75})
    model = with_adapters("gpt2", "math", "code")
    for name, weight in (("math", 0.25), ("code", 0.75)):
        for full_name, parameter in model.named_parameters():
            if f"mixins.{name}." in full_name and full_name.endswith("lora_B"):
                parameter.data.mul_(weight)
    close(mixed, logits(model))
    close(logits(bank, adapter={"math": 1.0, "code": 1.0, "chat": 1.0}), logits(with_adapters("gpt2", *ADAPTERS)))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_generation_takes_an_adapter_for_each_row_cached_and_with_beams(family: str) -> None:
    bank = with_bank(family)
    sources = {"input_ids": torch.arange(8).view(2, 4) + 5} if bank.parts else {}
    gaps = torch.full((5,), -1)
    rows = [torch.cat((torch.tensor([3, 4, 5]), gaps)), torch.cat((torch.tensor([6]), gaps))]
    strategies = [sat.GreedyStrategy, lambda: sat.BeamSearchStrategy(num_beams=2)]
    for strategy in strategies:
        together, _ = sat.fill_sequence(bank, rows, strategy=strategy(), adapter_ids=torch.tensor([1, 0]), **sources)
        for index, name in enumerate(("code", "math")):
            own = {key: value[index : index + 1] for key, value in sources.items()}
            alone, _ = sat.fill_sequence(with_adapters(family, name), rows[index], strategy=strategy(), **own)
            assert together[index, : len(rows[index])].tolist() == alone[0].tolist()


def test_a_bank_compiles_in_one_graph() -> None:
    torch.compiler.reset()
    bank = with_bank("gpt2")
    ids = torch.tensor([1, -1])
    expected = logits(bank, adapter_ids=ids)
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager")
    close(compiled(**inputs_of(bank), adapter_ids=ids)[0], expected)


def test_a_bank_trains_each_adapter_by_its_own_rows() -> None:
    model = tiny_model("gpt2")
    model.add_mixin("adapters", sat.LoRABankMixin.for_model(model, adapters=("a", "b", "c"), r=2))
    assert torch.equal(model(**tiny_inputs(model), adapter="a")[0], model(**tiny_inputs(model))[0])
    model.freeze_except("mixins.adapters")
    model(**tiny_inputs(model), adapter_ids=torch.tensor([0, 2]))[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            assert parameter.grad is not None
            assert [bool(grad.any()) for grad in parameter.grad] == [True, False, True]


def test_experts_take_an_adapter_for_the_call_and_refuse_rows() -> None:
    model = tiny_model("gpt2")
    model.add_mixin("experts", sat.MixtureOfExpertsMixin.for_model(model, num_experts=2))
    model.add_mixin("adapters", sat.LoRABankMixin.for_model(model, adapters=("a", "b"), targets=("experts.*",)))
    model(**tiny_inputs(model), adapter="b")
    with pytest.raises(sat.HookCallError, match="one number for each row of the batch; experts"):
        model(**tiny_inputs(model), adapter_ids=torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"adapter": "mth"}, r"no adapter 'mth'. Did you mean 'math'\? There are: math, code, chat"),
        ({"adapter": {"math": 1.0, "cod": 1.0}}, r"no adapter 'cod'"),
        ({"adapter": {0: 1.0}}, r"no adapter '0'. There are: math, code, chat"),
        ({"adapter": ["math", "code"]}, r"adapter is \['math', 'code'\]; it is a name, or weights by name"),
        ({"adapter": 0}, r"adapter is 0; it is a name.*There are: math, code, chat. adapter_ids=tensor"),
        ({"adapter": {"math": "x"}}, r"the weight of 'math' is 'x'; it must be a finite number"),
        ({"adapter": {"math": math.nan}}, r"the weight of 'math' is nan"),
        ({"adapter": {"math": -math.inf}}, r"the weight of 'math' is -inf"),
        ({"adapter": "math", "adapter_ids": torch.tensor([0, 1])}, r"give one of them"),
        ({"adapter_ids": torch.tensor([0, 1, 2])}, r"adapter_ids has 3 rows, and attention.query is given \[2, 9"),
        ({"adapter_ids": torch.tensor([0.0, 1.0])}, r"it is a tensor \[b\] with an adapter's number"),
        ({"adapter_ids": torch.tensor([0, 3])}, r"adapter_ids go from 0 to 3; there are 3 adapters"),
    ],
)  # fmt: skip
def test_a_call_that_asks_for_no_adapter_of_the_bank_is_an_error(call: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.HookCallError, match=message):
        logits(with_bank("gpt2"), **call)


def test_what_no_sum_expresses_is_not_bundled() -> None:
    model = with_adapters("gpt2", "math")
    model.add_mixin("turned", sat.LoRAMixin.for_model(model, dora=True))
    with pytest.raises(sat.HookDefinitionError, match="'turned' is DoRA, and a bank adds up"):
        sat.bundle_adapters(model, "math", "turned")
    with pytest.raises(sat.HookDefinitionError, match="'positions' is a LearnedPositionsMixin"):
        sat.bundle_adapters(model, "positions")
    with pytest.raises(sat.HookDefinitionError, match=r"no mixin 'maths'. Did you mean 'math'\?"):
        sat.bundle_adapters(model, "maths")
    assert {"math", "turned"} <= set(model.mixins)


def test_a_bank_whose_targets_are_in_one_part_only_is_loaded_again(tmp_path: Path) -> None:
    check_saving(tmp_path / "t5", "t5", sat.LoRABankMixin, adapters=("a",), targets=("cross_attention.query", "up"))


def test_bad_options_are_named() -> None:
    for options, message in (
        ({"adapters": ("a", "a")}, "each once"),
        ({"adapters": (), "r": 0}, "2 problems"),
        ({"adapters": ("a",), "targets": ("quer",)}, "targets: 'quer' matches no projection"),
        ({"adapters": ("a",), "targets": ()}, "targets is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            sat.LoRABankMixin.for_model(tiny_model("gpt2"), **options)
