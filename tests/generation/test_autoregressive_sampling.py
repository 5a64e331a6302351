"""`fill_sequence`: gaps anywhere, rows of any length, and the cache handed back and forth."""

import pytest
import torch

import swissarmy as sat
from swissarmy.backbone.model import BaseModel, Model
from swissarmy.testing import tiny_model

CAUSAL = ["gpt2", "llama", "gemma3_text", "swissarmy", "bert", "roberta"]
DECODERS = {
    "bert": {"architectures": ["BertLMHeadModel"], "is_decoder": True},
    "roberta": {"architectures": ["RobertaForCausalLM"], "is_decoder": True},
}


def causal_model(family: str) -> Model:
    return tiny_model(family, **DECODERS.get(family, {}))


def greedy_by_hand(model: Model, row: list[int]) -> list[int]:
    """The same without a cache: the whole prefix is read again for each token."""
    tokens = list(row)
    for index, token in enumerate(tokens):
        if token == -1:
            tokens[index] = int(model(torch.tensor([tokens[:index]]))[0][0, -1].argmax())
    return tokens


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize(
    "row",
    [[5, -1, -1, -1, -1], [5, 6, 7, -1], [5, -1, 9, 8, -1, -1, 7], [5, -1, 9, 8, 7], [5, 6, -1, 7, -1, -1, 3, 4]],
)
def test_gaps_anywhere_are_filled_as_without_a_cache_and_given_tokens_stay(family: str, row: list[int]) -> None:
    model = causal_model(family)
    tokens, mems = sat.fill_sequence(model, torch.tensor(row))
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [greedy_by_hand(model, row)]
    config = model.config
    last_read = max(index for index, token in enumerate(row) if token == -1)
    assert mems.shape == (config.num_layers, 1, last_read, 2 * config.kv_heads * config.head_size)


def test_given_tokens_after_a_gap_are_read_together() -> None:
    model = tiny_model("gpt2")
    lengths: list[int] = []
    model.transformer.register_forward_pre_hook(
        lambda module, arguments: lengths.append(arguments[3]["input_ids"].shape[1])
    )
    sat.fill_sequence(model, torch.tensor([5, 6, 7, -1, 9, 8, 7, -1]))
    assert lengths == [3, 4]


def test_a_sequence_without_gaps_is_read_and_returned() -> None:
    model = tiny_model("gpt2")
    tokens, mems = sat.fill_sequence(model, torch.tensor([5, 6, 7]))
    assert tokens.tolist() == [[5, 6, 7]]
    assert mems.shape[2] == 3


@pytest.mark.parametrize("family", CAUSAL)
def test_rows_of_different_lengths_equal_each_row_alone(family: str) -> None:
    model = causal_model(family)
    rows = [[5, -1, -1, -1, 4, -1], [5, 6, 7, 8, -1, -1, -1], [9, -1]]
    tokens, _ = sat.fill_sequence(model, [torch.tensor(row) for row in rows])
    assert tokens.shape == (3, 7)
    for filled, row in zip(tokens.tolist(), rows, strict=True):
        assert filled == greedy_by_hand(model, row) + [-1] * (7 - len(row))


@pytest.mark.parametrize("family", CAUSAL)
def test_mems_continue_where_an_earlier_call_ended(family: str) -> None:
    model = causal_model(family)
    whole, whole_mems = sat.fill_sequence(model, torch.tensor([[5, 6, *[-1] * 8], [7, 8, *[-1] * 8]]))
    first, mems = sat.fill_sequence(model, torch.tensor([[5, 6, *[-1] * 3], [7, 8, *[-1] * 3]]))
    longer = torch.cat((first, torch.full((2, 5), -1)), dim=1)
    second, second_mems = sat.fill_sequence(model, longer, mems=mems)
    assert torch.equal(second, whole)
    torch.testing.assert_close(second_mems, whole_mems, rtol=1e-4, atol=1e-4)


def test_one_sequence_becomes_a_batch() -> None:
    model = tiny_model("gpt2")
    strategy = sat.SamplingStrategy(temperature=5.0, seed=3)
    tokens, _ = sat.fill_sequence(model, torch.tensor([5, *[-1] * 12]), 4, strategy=strategy)
    assert tokens.shape == (4, 13)
    assert len({tuple(row) for row in tokens.tolist()}) == 4


def test_an_end_token_ends_the_row_and_all_ended_rows_end_the_run() -> None:
    model = tiny_model("gpt2")
    free, _ = sat.fill_sequence(model, torch.tensor([5, 6, *[-1] * 10]))
    end = free[0, 4].item()
    first = free[0].tolist().index(end)
    tokens, _ = sat.fill_sequence(model, torch.tensor([5, 6, *[-1] * 10]), strategy=sat.GreedyStrategy([end]))
    assert tokens[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(tokens[0, first + 1 :].tolist()) <= {end, -1}


def test_a_model_that_has_the_cache_mixin_uses_it_and_one_that_has_not_stays_as_it_was() -> None:
    model = tiny_model("gpt2")
    keys = list(model.mixins)
    plain, _ = sat.fill_sequence(model, torch.tensor([5, -1, -1]))
    assert list(model.mixins) == keys
    model.add_mixin("auto-regressive", sat.CachedAutoRegressiveMixin())
    assert torch.equal(sat.fill_sequence(model, torch.tensor([5, -1, -1]))[0], plain)


def test_the_encoder_is_read_once_and_its_projections_are_computed_once() -> None:
    model = tiny_model("t5")
    calls = {"encoder": 0, "projections": 0}
    count = lambda key: lambda *_: calls.__setitem__(key, calls[key] + 1)  # noqa: E731
    model.part("encoder").register_forward_hook(count("encoder"))
    layer = model.get_submodule("parts.decoder.transformer.layers.0.cross_attention.key")
    layer.register_forward_hook(count("projections"))
    sat.fill_sequence(model, torch.tensor([0, *[-1] * 6]), input_ids=torch.tensor([[5, 6, 7]]))
    assert calls == {"encoder": 1, "projections": 1}


@pytest.mark.parametrize(
    ("seq", "options", "message"),
    [
        (torch.tensor([-1, 5]), {}, "row 0 is empty or begins with a gap"),
        (torch.tensor([], dtype=torch.long), {}, "row 0 is empty"),
        (torch.tensor([5, -2]), {}, "row 0 holds -2"),
        (torch.tensor([[5, -1], [6, -1]]), {"batch_size": 3}, "batch_size=3 and 2 sequences"),
        (torch.zeros(1, 1, 1, dtype=torch.long), {}, "seq is one sequence"),
        (torch.tensor([5, -1]), {"mems": torch.zeros(1, 1, 1, 1)}, "mems are [1, 1, 1, 1]"),
        (torch.tensor([5, -1]), {"mems": torch.zeros(2, 1, 1, 64)}, "nothing is left to read"),
        (torch.tensor([5] * 60 + [-1] * 6), {}, "65 tokens, and the model has 64 positions"),
    ],
)
def test_bad_input_is_named(seq: torch.Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(sat.HookCallError) as error:
        sat.fill_sequence(tiny_model("gpt2"), seq, **options)
    assert message in str(error.value)


def test_only_the_last_position_goes_through_the_head() -> None:
    model = tiny_model("gpt2")
    assert isinstance(model, BaseModel)
    ids = torch.arange(6)[None]
    torch.testing.assert_close(model(ids, logits_to_keep=1)[0], model(ids)[0][:, -1:])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny_model("bert"), "BertForMaskedLM is not causal and continues no text"),
        (tiny_model("vit"), "ViTForImageClassification is not causal"),
        (tiny_model("gpt2", architectures=["GPT2Model"]), "the model's head gives [1, 1, 32], not logits"),
        (tiny_model("gpt2", architectures=["GPT2ForSequenceClassification"]), "the model's head gives [1, 2]"),
    ],
    ids=["masked", "image", "headless", "classifier"],
)
def test_a_model_that_continues_no_text_is_refused_by_name(model: Model, message: str) -> None:
    with pytest.raises(sat.HookCallError) as error:
        sat.fill_sequence(model, torch.tensor([5, -1]))
    assert message in str(error.value)
