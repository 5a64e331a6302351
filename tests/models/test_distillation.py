"""Teacher and student in one model: who answers, who learns, which layers meet."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.testing import tiny_inputs, tiny_model
from tests.helpers import tiny_ids
from tests.helpers import tiny_model as tiny_backbone


def pair_of(**options: Any) -> sat.DistillationModel:
    """A teacher of four layers and a student of two, of different widths."""
    teacher, student = tiny_backbone(seed=1, num_layers=4, hidden_size=24), tiny_backbone()
    return sat.DistillationModel(teacher=teacher, student=student, **options)


def live(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# What it gives


def test_it_gives_the_logits_of_both_and_pairs_of_hidden_states() -> None:
    teacher, student = tiny_backbone(seed=1, num_layers=4), tiny_backbone()
    expected_teacher, expected_student = teacher(tiny_ids())[0], student(tiny_ids())[0]
    states = {
        name: [each["hidden_states"] for each in model.with_mixin("states", sat.HiddenStatesMixin())(tiny_ids())[1:]]
        for name, model in (("teacher", teacher), ("student", student))
    }
    result = sat.DistillationModel(teacher, student, layers={0: 2, 1: 0})(tiny_ids())
    assert torch.equal(result[0], expected_student)
    assert torch.equal(result.logits, expected_student)
    assert torch.equal(result.teacher_logits, expected_teacher)
    for (ours, theirs), (layer, other) in zip(result.hidden_states, ((0, 2), (1, 0)), strict=True):
        assert torch.equal(ours, states["student"][layer])
        assert torch.equal(theirs, states["teacher"][other])


def test_hidden_states_are_projected_where_widths_differ_or_by_wish() -> None:
    model = pair_of(layers={1: 3})
    ((ours, theirs),) = model(tiny_ids()).hidden_states
    states = model.student(tiny_ids())[2]["hidden_states"]
    assert torch.equal(ours, model.projections["1"](states))
    assert ours.shape == theirs.shape == (2, 5, 24)
    same = sat.DistillationModel(tiny_backbone(), tiny_backbone(), layers="even", project=True)
    assert set(same.projections) == {"0", "1"}
    assert not sat.DistillationModel(tiny_backbone(), tiny_backbone(), layers="even").projections


@pytest.mark.parametrize(
    ("ours", "theirs", "pairs"),
    [(2, 4, {0: 1, 1: 3}), (4, 4, {0: 0, 1: 1, 2: 2, 3: 3}), (2, 3, {0: 1, 1: 2}), (3, 1, {0: 0, 1: 0, 2: 0})],
)
def test_layers_are_spread_with_the_last_on_the_last(ours: int, theirs: int, pairs: dict[int, int]) -> None:
    model = sat.DistillationModel(tiny_backbone(num_layers=theirs), tiny_backbone(num_layers=ours), layers="even")
    assert model.layers == pairs


def test_without_layers_no_hidden_states_are_kept() -> None:
    model = pair_of()
    assert model(tiny_ids()).hidden_states == ()
    assert not model.student.mixins


def test_an_encoder_decoder_is_compared_by_its_decoders_layers() -> None:
    teacher = tiny_model("t5", seed=1, num_layers=3, num_decoder_layers=4).double()
    student = tiny_model("t5").double()
    inputs = tiny_inputs(student)
    expected = teacher(**inputs)[0]
    model = sat.DistillationModel(teacher, student, layers="even")
    assert list(model.parts) == ["teacher-encoder", "teacher-decoder", "student-encoder", "student-decoder"]
    result = model(**inputs)
    torch.testing.assert_close(result.teacher_logits, expected)
    assert [states.shape for pair in result.hidden_states for states in pair] == 4 * [(2, 9, 32)]
    assert not any(name.startswith("parts.teacher") for name in live(model))


def test_images_have_teachers_too() -> None:
    teacher, student = tiny_model("vit", seed=1), tiny_model("deit")
    result = sat.DistillationModel(teacher, student)(**tiny_inputs(student))
    assert result.logits.shape == result.teacher_logits.shape == (2, 5)


def test_a_keyword_that_only_one_accepts_reaches_that_one() -> None:
    model = pair_of()
    model.student.add_mixin("loreft", sat.LoReFTMixin.for_model(model.student, last=1))
    expected = model.student(tiny_ids(), prompt_lengths=torch.tensor([5, 5]))[0]
    assert torch.equal(model(tiny_ids(), prompt_lengths=torch.tensor([5, 5])).logits, expected)
    with pytest.raises(sat.HookCallError, match="no hook of this model accepts the keyword 'prompt_length'"):
        model(tiny_ids(), prompt_length=torch.tensor([5, 5]))


# Who learns


def test_the_teacher_never_trains() -> None:
    model = pair_of(layers="even")
    student = {name for name, _ in model.named_parameters() if name.startswith(("parts.student", "projections"))}
    assert live(model) == student
    result = model.train()(tiny_ids())
    assert not result.teacher_logits.requires_grad
    total: Tensor = result.logits.square().sum() + sum(ours.square().sum() for ours, _ in result.hidden_states)
    total.backward()
    assert {name for name, each in model.named_parameters() if each.grad is not None} == student
    model.freeze_except("layers.*")
    assert live(model) == {name for name in student if ".layers." in name}


def test_the_teacher_evaluates_while_the_student_trains() -> None:
    teacher, student = tiny_backbone(hidden_dropout=0.5), tiny_backbone(hidden_dropout=0.5)
    expected = teacher(tiny_ids())[0]
    model = sat.DistillationModel(teacher, student).train()
    assert torch.equal(model(tiny_ids()).teacher_logits, expected)
    assert not torch.equal(model(tiny_ids()).logits, model(tiny_ids()).logits)
    assert student.training
    assert not teacher.training


def test_a_model_teaches_itself_with_an_adapter() -> None:
    teacher = tiny_backbone()
    student = teacher.with_mixin("lora", sat.LoRAMixin.for_model(teacher, r=2))
    model = sat.DistillationModel(teacher, student, layers="even")
    model(tiny_ids()).logits.square().sum().backward()
    assert {name.split("lora_")[0] for name in live(model)} == {
        f"parts.student.mixins.lora.layers.{i}.attention_{name}." for i in (0, 1) for name in ("query", "value")
    }
    assert torch.equal(model(tiny_ids()).teacher_logits, teacher(tiny_ids())[0])


def test_a_copy_is_a_pair_of_its_own() -> None:
    model = pair_of(layers="even")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.student.parameters():
            parameter.zero_()
    assert not other(tiny_ids()).logits.any()
    assert model(tiny_ids()).logits.any()
    assert other.part("student") is other.student
    torch.testing.assert_close(other.double()(tiny_ids()).teacher_logits, model(tiny_ids()).teacher_logits)


# Files and errors


def test_saving_writes_the_student(tmp_path: Path) -> None:
    teacher, student = tiny_model("gpt2", seed=1), tiny_model("gpt2")
    sat.DistillationModel(teacher, student, layers="even").save_pretrained(tmp_path / "student")
    inputs = tiny_inputs(student)
    again = sat.load(tmp_path / "student")
    assert "hidden-states" not in again.mixins
    assert torch.equal(again(**inputs)[0], student(**inputs)[0])


def test_it_generates_as_its_student() -> None:
    model = sat.DistillationModel(tiny_model("gpt2", seed=1), tiny_model("gpt2"))
    row = torch.tensor([5, 6, 7, -1, -1])
    assert torch.equal(sat.fill_sequence(model, row)[0], sat.fill_sequence(model.student, row)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": {2: 0}}, r"\{2: 0\} is no pair; the student has layers 0 to 1 and the teacher 0 to 3"),
        ({"layers": {0: 4}}, r"\{0: 4\} is no pair"),
        ({"layers": {-1: -1}}, r"\{-1: -1\} is no pair"),
    ],
)
def test_layers_that_there_are_not_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sat.ConfigError, match=message):
        pair_of(**options)


def test_vocabularies_of_different_sizes_are_refused() -> None:
    with pytest.raises(sat.ConfigError, match="the student's vocabulary has 13 tokens and the teacher's 14"):
        sat.DistillationModel(tiny_backbone(vocab_size=14), tiny_backbone())
