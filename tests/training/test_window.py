"""A window: micro-batches of any number and size add up to the same sums and the same gradients."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.core.errors import ConfigError
from swissarmy.data.loading.collate import CausalCollator, Padding
from swissarmy.data.samples.encoders import TokensEncoder
from swissarmy.data.samples.examples import Examples
from swissarmy.data.sources.wrapped import as_source
from swissarmy.training.precision import LossScaler, PrecisionOptions
from swissarmy.training.ranks import Ranks
from swissarmy.training.window import Accumulator, Window, call_step, run_window, sample_ids_of, samples_of, tokens_of
from tests.training.tiny_runs import Rows, largest_difference, model_of, step

SAMPLES = Examples(as_source(Rows()), TokensEncoder())
COLLATE = CausalCollator(padding=Padding(pad_id=0))


def window_of(model: Model, sizes: Sequence[int], forward_step: Any = step) -> tuple[Window, dict[str, Tensor]]:
    """The window of the first samples, cut into micro-batches of these sizes, and its gradients."""
    numbers = iter(range(sum(sizes)))
    batches = iter([COLLATE([SAMPLES[next(numbers)] for _ in range(size)]) for size in sizes])
    precision = PrecisionOptions()
    window = run_window(
        model,
        batches,
        forward_step,
        accumulation=len(sizes),
        precision=precision,
        scaler=LossScaler(precision),
        totals=Accumulator(Ranks()),
    )
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return window, gradients


@pytest.mark.parametrize("sizes", [(7,), (4, 3), (2, 2, 2, 1), (1,) * 7, (6, 1)])
def test_gradients_and_sums_do_not_depend_on_how_a_window_is_cut(sizes: Sequence[int]) -> None:
    whole, expected = window_of(model_of(), [7])
    parts, gradients = window_of(model_of(), sizes)
    assert largest_difference(gradients, expected) < 1e-12
    assert parts.sums.mean_loss == pytest.approx(whole.sums.mean_loss, rel=1e-13)
    assert parts.sums.squared_norm == pytest.approx(whole.sums.squared_norm, rel=1e-11)
    assert (parts.sums.count, parts.sums.metrics) == (whole.sums.count, whole.sums.metrics)
    assert (parts.sums.tokens, parts.sums.samples) == (whole.sums.tokens, whole.sums.samples) == (42, 7)


def test_the_gradient_is_of_the_sum_of_losses() -> None:
    model = model_of()
    window, gradients = window_of(model, [3, 4])
    loss, count, _ = step(COLLATE([SAMPLES[number] for number in range(7)]), other := model_of())
    loss.backward()
    assert largest_difference(gradients, {name: each.grad for name, each in other.named_parameters()}) < 1e-12
    assert window.sums.loss == pytest.approx(float(loss.detach()), rel=1e-13)
    assert window.sums.count == int(count) == 35


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain = window_of(model_of(), [3, 4])[1]
    recomputed = window_of(model_of().enable_activation_checkpointing(), [3, 4])[1]
    assert largest_difference(plain, recomputed) < 1e-13


def test_a_micro_batch_in_which_nothing_counts_adds_nothing() -> None:
    def without_the_second(batch: dict[str, Tensor], model: Any) -> Any:
        ignored = batch["input_ids"][0, 0] == 3
        return step({**batch, "loss_mask": batch["loss_mask"] & ~ignored}, model)

    window, gradients = window_of(model_of(), [3, 4], without_the_second)
    first, expected = window_of(model_of(), [3])
    assert largest_difference(gradients, expected) < 1e-12
    assert (window.sums.count, window.sums.mean_loss) == (first.sums.count, pytest.approx(first.sums.mean_loss))


def test_metrics_must_be_the_same_in_all_micro_batches() -> None:
    def capricious(batch: dict[str, Tensor], model: Any) -> Any:
        loss, count, _ = step(batch, model)
        return loss, count, {"even" if len(batch["input_ids"]) % 2 == 0 else "odd": (0, 1)}

    with pytest.raises(ConfigError, match=r"metrics \['odd'\], and before \['even'\]"):
        window_of(model_of(), [4, 3], capricious)


def test_the_order_of_metrics_is_no_matter() -> None:
    def capricious(batch: dict[str, Tensor], model: Any) -> Any:
        loss, count, _ = step(batch, model)
        pairs = [("one", (1, 1)), ("two", (2, 1))]
        return loss, count, dict(pairs if len(batch["input_ids"]) % 2 else reversed(pairs))

    window, _ = window_of(model_of(), [4, 3], capricious)
    assert window.sums.mean_metrics == {"one": 1, "two": 2}


def test_a_loss_without_a_gradient_is_refused() -> None:
    def detached(batch: dict[str, Tensor], model: Any) -> Any:
        loss, count, _ = step(batch, model)
        return loss.detach(), count

    with pytest.raises(ConfigError, match="loss_sum has no gradient: no parameter that trains is behind it"):
        window_of(model_of(), [4], detached)


def test_numbers_of_numpy_are_numbers() -> None:
    def counted(batch: dict[str, Tensor], model: Any) -> Any:
        loss, count, _ = step(batch, model)
        return loss, np.int64(int(count)), {"one": (np.float32(1), np.int64(2))}

    window, _ = window_of(model_of(), [4, 3], counted)
    plain, _ = window_of(model_of(), [4, 3])
    assert (window.sums.mean_loss, window.sums.mean_metrics) == (plain.sums.mean_loss, {"one": 0.5})


LOSS = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((LOSS, torch.ones(3)), r"count is a tensor \[3\]; it must be one number"),
        ((LOSS, {"acc": (1, 2)}), "count is a dict; it must be one number"),
        ((LOSS, 2, {"acc": 0.5}), r"metric 'acc' is a float; it must be \(sum, count\), two numbers"),
        ((LOSS, 2, {"acc": (torch.ones(2), 2)}), r"metric 'acc' is \(a tensor \[2\], a int\); it must be"),
        ((LOSS, 2, {"acc": (1, 2, 3)}), r"metric 'acc' is \(a int, a int, a int\); it must be"),
        ((LOSS, 2, {"acc": ("1", 2)}), r"metric 'acc' is \(a str, a int\); it must be"),
        (torch.tensor(1.0), "not a Tensor"),
        ((1.0, 2), r"not \(a float, a int\)"),
        ((torch.ones(2), 2), r"loss_sum is a tensor \[2\]; it must be a scalar"),
        ((torch.tensor(1.0), 2, [("accuracy", 1)]), r"not \(a Tensor, a int, a list\)"),
        (None, "not a NoneType"),
    ],
)
def test_a_forward_step_that_gives_something_else_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call_step(lambda batch, model: given, {}, model_of())


def test_tokens_and_samples_of_batches_of_all_kinds() -> None:
    ids, real = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert tokens_of({"input_ids": ids, "padding_mask": real}) == 3
    assert tokens_of({"input_ids": ids, "padding_mask": real, "decoder_padding_mask": real[:, :2]}) == 6
    assert tokens_of({"input_ids": ids, "document_ids": torch.tensor([[0, 1, -1], [0, 0, 0]])}) == 5
    assert tokens_of({"input_ids": ids}) == 6
    assert tokens_of({"pixel_values": torch.zeros(4, 3, 8, 8), "labels": torch.zeros(4)}) == 4
    assert samples_of((torch.zeros(5, 2), torch.zeros(5))) == samples_of(torch.zeros(5)) == 5
    assert samples_of({"nothing": "here"}) == 0
    assert sample_ids_of({"sample_ids": torch.tensor([7, 9])}) == [7, 9]
    assert sample_ids_of({"input_ids": ids}) == []
