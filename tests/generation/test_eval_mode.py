"""A model in training mode generates without dropout, and is in training mode again afterwards."""

import threading
from typing import Any

import pytest
import torch
from torch import nn

import swissarmy as sat
from swissarmy.backbone.model import Model
from swissarmy.generation.continuations import score_continuations
from swissarmy.generation.eval_mode import in_eval_mode
from swissarmy.testing import tiny_model

DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "t5": {"dropout_rate": 0.5},
}
ROW = torch.tensor([5, 6, *[-1] * 8])


def with_dropout(family: str) -> tuple[Model, dict[str, Any]]:
    model = tiny_model(family, **DROPOUT[family])
    return model, {"input_ids": torch.tensor([[5, 6, 7]])} if model.parts else {}


@pytest.fixture(params=DROPOUT)
def case(request: pytest.FixtureRequest) -> tuple[Model, dict[str, Any]]:
    return with_dropout(request.param)


def strategies() -> list[sat.Strategy]:
    draft = tiny_model("gpt2", seed=3, **DROPOUT["gpt2"]).train()
    return [sat.GreedyStrategy(), sat.BeamSearchStrategy(3), sat.SpeculativeStrategy(draft), sat.ContrastiveStrategy()]


def test_dropout_is_off_and_every_module_is_as_it_was(case: tuple[Model, dict[str, Any]]) -> None:
    model, source = case
    plain = [sat.fill_sequence(model, ROW, strategy=each, **source)[0] for each in strategies()]
    model.train()
    frozen = [module for module in model.modules() if isinstance(module, nn.LayerNorm)][:1]
    for module in frozen:
        module.eval()
    for strategy, expected in zip(strategies(), plain, strict=True):
        tokens, _ = sat.fill_sequence(model, ROW, strategy=strategy, **source)
        assert torch.equal(tokens, expected)
        if isinstance(strategy, sat.SpeculativeStrategy):
            assert strategy.draft_model.training
    assert all(module.training != (module in frozen) for module in model.modules())
    call = {"input_ids": torch.tensor([[5, 6, 7]]), **({"decoder_input_ids": torch.tensor([[5, 6]])} if source else {})}
    assert not torch.equal(model(**call)[0], model(**call)[0])


def test_scores_are_those_of_evaluation_mode(case: tuple[Model, dict[str, Any]]) -> None:
    model, source = case

    def scores() -> list[Any]:
        own = [sat.evaluate_perplexity(model, torch.tensor([5, 6, 9, 4, 7]), **source)]
        return own if source else [*own, *score_continuations(model, [[5, 6]], [[9, 4, 7]])]

    plain = scores()
    model.train()
    assert scores() == plain
    assert all(module.training for module in model.modules())


def test_between_the_pieces_of_a_stream_the_model_trains() -> None:
    class Letters:
        eos_token_ids = ()

        def encode(self, text: str) -> list[int]:
            return [ord(letter) - ord("A") for letter in text]

        def decode(self, ids: Any) -> str:
            return "".join(chr(ord("A") + index) for index in ids)

        def stream(self) -> "Letters":
            return self

        def put(self, token_id: int) -> str:
            return self.decode([token_id])

        def end(self) -> str:
            return ""

    model, _ = with_dropout("gpt2")
    (expected,) = sat.generate(model, Letters(), "HELLO", max_new_tokens=6)
    model.train()
    text = ""
    for piece in sat.stream(model, Letters(), "HELLO", max_new_tokens=6):
        text += piece
        assert all(module.training for module in model.modules())
    assert text == expected


def test_an_error_gives_the_mode_back() -> None:
    model, _ = with_dropout("gpt2")
    model.train()

    def fail() -> None:
        with in_eval_mode(model):
            assert not any(module.training for module in model.modules())
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert all(module.training for module in model.modules())


def test_dropout_that_was_switched_on_inside_a_model_in_evaluation_mode_stays_on() -> None:
    model, _ = with_dropout("gpt2")
    chosen = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    chosen.train()
    with in_eval_mode(model):
        assert chosen.training
    assert chosen.training


def test_of_generations_at_the_same_time_the_last_one_gives_the_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    other = nn.Sequential(model[0]).train()  # shares a module
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with in_eval_mode(model):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with in_eval_mode(other), in_eval_mode(model):
        leave.set()
        thread.join(10)
        assert not any(module.training for module in [*model.modules(), *other.modules()])
    assert all(module.training for module in [*model.modules(), *other.modules()])
