"""`train`: whole runs of a tiny model, from the first step to the folder that they leave."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swissarmy as sat
from swissarmy.cli.config_file import read_config
from swissarmy.core.errors import ConfigError
from swissarmy.data.build import build_loaders
from swissarmy.training.callbacks.base import Callback, Run, StepReport
from swissarmy.training.config import TrainConfig
from swissarmy.training.spikes import TrainingError
from swissarmy.training.train import train
from tests.training.tiny_runs import (
    Diary,
    config_for,
    largest_difference,
    model_of,
    open_rows,
    run,
    step,
    trained_weights,
    with_nan_in,
)

# What a run leaves


def test_a_run_trains_the_model_and_leaves_a_folder_that_loads(tmp_path: Path) -> None:
    model, before = model_of(), model_of()
    diary = Diary()
    result = run(tmp_path / "run", model=model, callbacks=[diary], train_iters=8, lr=1e-2)
    assert (result.step, result.skipped, result.stop_reason) == (8, 0, None)
    assert result.loss == diary.reports[-1].loss < diary.reports[0].loss
    assert not model.training
    loaded = sat.load(tmp_path / "run" / "final")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert not torch.equal(loaded(ids)[0], before(ids)[0])


def test_the_resolved_config_is_a_config_file(tmp_path: Path) -> None:
    run(tmp_path / "run", betas=(0.8, 0.99), eps=1e-9)
    written = read_config(tmp_path / "run" / "config.yaml", TrainConfig)
    longest = model_of().config.max_sequence_length  # it was left to the model
    assert written == config_for(tmp_path / "run", betas=(0.8, 0.99), eps=1e-9, sequence_length=longest)


def test_random_numbers_outside_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(tmp_path / "run", model=model_of(resid_pdrop=0.5))
    assert torch.equal(torch.rand(2), expected)


def test_dropout_follows_the_seed(tmp_path: Path) -> None:
    runs = {
        name: trained_weights(tmp_path / name, model=model_of(resid_pdrop=0.5), seed=seed, shuffle=False)
        for name, seed in (("one", 1), ("again", 1), ("two", 2))
    }
    assert largest_difference(runs["one"], runs["again"]) == 0
    assert largest_difference(runs["one"], runs["two"]) > 0


def test_every_module_gets_its_mode_back(tmp_path: Path) -> None:
    model = model_of().train()
    model.transformer.layers[1].eval()
    run(tmp_path / "run", model=model, train_iters=1)
    assert [model.training, *(layer.training for layer in model.transformer.layers)] == [True, True, False]


# Steps


def test_the_loop_is_what_one_would_write_by_hand(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run", clip_grad_norm=None, weight_decay=0.0, valid_data=())
    by_hand = model_of().train()
    optimizer = torch.optim.AdamW(
        by_hand.parameters(), lr=config.lr, betas=(0.9, 0.95), eps=config.eps, weight_decay=0.0
    )
    loader = build_loaders(config, global_batch_size=8, num_steps=3, create_dataset=open_rows).train
    for batch in loader or ():
        loss, count, _ = step(batch, by_hand)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = trained_weights(tmp_path / "run", clip_grad_norm=None, weight_decay=0.0)
    assert largest_difference(trained, {name: each.detach() for name, each in by_hand.named_parameters()}) < 1e-12


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_weights_do_not_depend_on_accumulation(tmp_path: Path, accumulation: int) -> None:
    whole = trained_weights(tmp_path / "whole", accumulation=1)
    parts = trained_weights(tmp_path / "parts", accumulation=accumulation)
    assert largest_difference(whole, parts) < 1e-12


def test_activation_checkpointing_changes_no_weight(tmp_path: Path) -> None:
    whole = trained_weights(tmp_path / "whole")
    recomputed = trained_weights(tmp_path / "recomputed", activation_checkpointing="full")
    assert largest_difference(whole, recomputed) < 1e-12


def test_clipping_is_of_the_gradient_of_the_mean_loss(tmp_path: Path) -> None:
    """With a large `eps`, a first step of AdamW is as long as the gradient."""

    def step_length(name: str, limit: float | None) -> float:
        options: dict[str, Any] = {"train_iters": 1, "eps": 1e6, "weight_decay": 0.0, "accumulation": 2, "lr": 1e3}
        after = trained_weights(tmp_path / name, clip_grad_norm=limit, callbacks=[diary], **options)
        return float(torch.stack([(after[key] - before[key]).norm() for key in after]).norm())

    before = {name: parameter.detach() for name, parameter in model_of().named_parameters()}
    diary = Diary()
    plain, clipped = step_length("plain", None), step_length("clipped", 1e-2)
    norm = diary.reports[0].grad_norm
    assert diary.reports[1].grad_norm == pytest.approx(norm, rel=1e-12)
    assert plain == pytest.approx(norm * 1e-3, rel=1e-4)
    assert clipped == pytest.approx(1e-2 * 1e-3, rel=1e-4)


def test_the_learning_rate_is_that_of_the_schedule(tmp_path: Path) -> None:
    diary = Diary()
    run(tmp_path / "run", callbacks=[diary], lr=1.0, lr_decay_style="linear", lr_floor=0.0, train_iters=3)
    assert [report.lr for report in diary.reports] == pytest.approx([1.0, 0.5, 0.0])


def test_epochs_count_the_rows_as_their_weights_say(tmp_path: Path) -> None:
    def steps(**changes: Any) -> int:
        name = f"run{len(list(tmp_path.iterdir()))}"
        return run(tmp_path / name, global_batch_size=8, **changes).step

    assert steps(epochs=1) == 5
    assert steps(epochs=0.25) == 2
    two = {"train_data": ("rows:40", "rows:8"), "train_data_weights": (0.5, 1.0)}
    assert steps(epochs=2, **two) == 7
    assert steps(epochs=1, **two, train_data_weights_mean="share") == 6


def test_only_what_matches_trains(tmp_path: Path) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model_of().named_parameters()}
    after = trained_weights(tmp_path / "run", trainable=("*.layers.1.*",))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.1." in name}


def test_the_average_of_the_weights_is_what_is_given_away(tmp_path: Path) -> None:
    last = trained_weights(tmp_path / "plain", lr=1e-2)
    kept = trained_weights(tmp_path / "run", lr=1e-2, ema_decay=0.5)
    final, start = (dict(each.named_parameters()) for each in (sat.load(tmp_path / "run" / "final"), model_of()))
    for name, weight in last.items():
        assert torch.equal(final[name], kept[name]), name
        assert 0 < (final[name] - start[name]).norm() < (weight - start[name]).norm(), name


# Windows that are discarded


def test_a_nan_in_one_micro_batch_discards_the_whole_window(tmp_path: Path) -> None:
    model, diary = model_of(), Diary()
    seen: dict[int, dict[str, Tensor]] = {}

    class Look(Callback):
        def on_step(self, run: Run, report: StepReport) -> None:
            seen[report.step] = {name: each.detach().clone() for name, each in model.named_parameters()}

    result = run(
        tmp_path / "run",
        model=model,
        forward_step=with_nan_in({6}),
        callbacks=[diary, Look()],
        accumulation=4,
        lr_decay_style="linear",
        train_iters=3,
    )
    assert largest_difference(seen[1], seen[2]) == 0 < largest_difference(seen[2], seen[3])
    assert all(bool(torch.isfinite(weight).all()) for weight in seen[3].values())
    assert (result.step, result.skipped) == (3, 1)
    assert [report.skipped is None for report in diary.reports] == [True, False, True]
    assert [report.lr for report in diary.reports] == pytest.approx([1e-3, 5.5e-4, 1e-4])
    assert diary.entries == ["start", "step 1", "skip 2", "step 2", "step 3", "end"]
    skip = diary.skips[0]
    assert (skip.reason, skip.in_a_row, len(skip.ranks)) == ("the loss is nan", 1, 1)
    assert "transformer.word_embeddings.weight" in skip.ranks[0].bad_gradients


def test_what_follows_a_discarded_window_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    """The data goes on: a run over the same rows without the second window ends with the same weights."""
    skipping = trained_weights(tmp_path / "skipping", forward_step=with_nan_in({2}), train_iters=3)

    def without_loss(batch: Mapping[str, Tensor], model: Any) -> Any:
        calls.append(1)
        loss, count, metrics = step(dict(batch), model)
        return (loss * 0, 0, metrics) if len(calls) == 2 else (loss, count, metrics)

    calls: list[int] = []
    nothing_counted = trained_weights(tmp_path / "nothing", forward_step=without_loss, train_iters=3)
    assert largest_difference(skipping, nothing_counted) == 0


def test_gradients_that_are_not_finite_discard_the_window(tmp_path: Path) -> None:
    def with_infinite_gradient(batch: dict[str, Tensor], model: Any) -> Any:
        loss, *rest = step(batch, model)
        root = model.transformer.word_embeddings.weight.sum() * 0
        return (loss + root.sqrt(), *rest)  # finite, with an infinite slope

    diary = Diary()
    result = run(tmp_path / "run", forward_step=with_infinite_gradient, callbacks=[diary], train_iters=1)
    assert result.skipped == 1
    assert diary.skips[0].reason.startswith("the gradient norm is")
    assert torch.isfinite(torch.tensor(diary.reports[0].loss))


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    diary = Diary()
    with pytest.raises(TrainingError, match=r"steps 2 to 4 were all skipped \(max_skipped=3\).*the loss is nan"):
        run(
            tmp_path / "run",
            forward_step=with_nan_in({2, 3, 4}),
            callbacks=[diary],
            train_iters=9,
            max_skipped=3,
        )
    assert diary.entries[-2:] == ["step 4", "end with TrainingError"]
    assert not (tmp_path / "run" / "final").exists()


def test_skips_with_a_good_step_between_them_go_on(tmp_path: Path) -> None:
    result = run(tmp_path / "run", forward_step=with_nan_in({1, 3, 5}), train_iters=6, max_skipped=2)
    assert (result.step, result.skipped) == (6, 3)


def test_a_window_in_which_nothing_counts_is_no_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def ignored(batch: dict[str, Tensor], model: Any) -> Any:
        return step({**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])}, model)

    before = {name: parameter.detach().clone() for name, parameter in model_of().named_parameters()}
    diary = Diary()
    after = trained_weights(tmp_path / "run", forward_step=ignored, callbacks=[diary], train_iters=2)
    assert largest_difference(before, after) == 0
    assert [(report.loss, report.count, report.skipped) for report in diary.reports] == [(0.0, 0.0, None)] * 2
    assert "step 1: nothing was counted on any rank" in caplog.text
    with pytest.raises(TrainingError, match=r"steps 1 to 2 were all skipped.*; of the last, nothing was counted"):
        run(tmp_path / "never", forward_step=ignored, max_skipped=2)


@pytest.mark.parametrize("count", [-3, float("inf"), torch.tensor(float("nan"))])
def test_counts_that_count_nothing_end_the_run(count: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"forward_step's counts add up to {float(count):g}; they are to say of how"):
        run(tmp_path / "run", forward_step=lambda batch, model: (step(batch, model)[0], count))


# What is refused before the first step


class Duck:
    """Has what a callback has."""

    def on_start(self, run: Run) -> None: ...


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, "the model is a Linear: it must be one of this library"),
        (
            {"model": torch.compile(model_of(), backend="eager")},
            "the model was compiled as a whole: give the model itself, and compile",
        ),
        ({"model": model_of().to("meta")}, "parameters are on the meta device, such as .*: give `weights` to fill"),
        ({"config": {"output": "run"}}, r"the config is a dict: it must be a sat\.TrainConfig"),
        ({"callbacks": [Diary]}, "a callback is the class Diary: it must be an instance"),
        ({"callbacks": [Duck()]}, r"a callback is a Duck: it must be .* inherits from sat\.Callback"),
    ],
)
def test_what_is_of_another_kind_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"model": model_of(), "config": config_for(tmp_path / "run"), **changes}
    with pytest.raises(ConfigError, match=message):
        train(given.pop("model"), step, open_rows, given.pop("config"), **given)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run", train_iters=1, save_interval=1)
    with pytest.raises(ConfigError, match=r"holds a run: resume it \(--resume auto\), or name another folder"):
        run(tmp_path / "run", train_iters=1)


@pytest.mark.parametrize("resume", ["never", "auto", "must"])
def test_a_run_that_is_over_and_left_no_checkpoint_is_not_begun_again(resume: str, tmp_path: Path) -> None:
    run(tmp_path / "run", train_iters=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"a run that is over, and no checkpoint to go on from .* start from .*final"):
        run(tmp_path / "run", train_iters=1, resume=resume)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_that_fails_before_its_first_step_is_done_leaves_the_folder_free(tmp_path: Path) -> None:
    def fail(batch: Any, model: Any) -> Any:
        raise ValueError("not so")

    class Refusing(Callback):
        def on_start(self, run: Run) -> None:
            raise ValueError("not so")

    for options in ({"forward_step": fail}, {"callbacks": [Refusing()]}):
        with pytest.raises(ValueError, match="not so"):
            run(tmp_path / "run", **options)
    assert run(tmp_path / "run").step == 3


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        run(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3, "global_batch_size": 8}, r"global_batch_size=8 is not batch_size=3 x 1 ranks: give 6"),
        ({"global_batch_size": 8, "accumulation": 3}, "global_batch_size=8 cannot be shared"),
        ({"trainable": ("transformer.layer",)}, r"'transformer.layer' matches no parameter. Did you mean"),
        ({"shard": 2}, "torchrun --nproc-per-node 2"),
        ({"eval_interval": 1}, "nothing to evaluate on: .* leave out eval_interval"),
        ({"eval_on_start": True}, "nothing to evaluate on: .* leave out eval_on_start"),
        ({"train_data": ("rows:0",)}, "rows:0 is empty"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    diary = Diary()
    with pytest.raises(sat.SwissArmyError, match=message):
        run(tmp_path / "run", callbacks=[diary], **changes)
    assert not any(entry.startswith("step") for entry in diary.entries)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_model_without_anything_to_train_is_refused(tmp_path: Path) -> None:
    frozen = model_of().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter of the model trains"):
        train(frozen, step, open_rows, config_for(tmp_path / "run"))


def test_a_model_that_could_not_be_saved_in_the_end_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = model_of()
    model.del_mixin("positions")
    diary = Diary()
    with pytest.raises(sat.CheckpointError, match="was removed from the model"):
        run(tmp_path / "run", model=model, callbacks=[diary])
    assert not diary.reports


def test_distillation_leaves_the_student(tmp_path: Path) -> None:
    student = model_of(seed=1)
    model = sat.DistillationModel(teacher=model_of(seed=0), student=student)
    run(tmp_path / "run", model=model, forward_step=sat.distillation_step)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(sat.load(tmp_path / "run" / "final")(ids)[0], student(ids)[0])
