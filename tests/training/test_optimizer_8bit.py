"""AdamW with its two moments in eight bits, from torchao itself; its own compiled step runs eagerly here."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.core.errors import CheckpointError
from swissarmy.testing import run_distributed, tiny_model
from swissarmy.training.optimizer import OptimizerOptions, make_optimizer, take_step
from tests.training.tiny_runs import Diary, run


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def wide_model() -> Model:
    """Matrices of 4096 entries and more, below which torchao keeps float32."""
    return tiny_model("gpt2", scale=2.0, n_embd=64, n_head=4)


def trained(folder: Path, steps: int, **options: object) -> tuple[Model, Diary]:
    model, diary = wide_model(), Diary()
    settings = {"optimizer": "adamw_8bit", "lr": 1e-2, "save_interval": 2, "resume": "auto", **options}
    run(folder, model=model, callbacks=[diary], train_iters=steps, **settings)
    return model, diary


def weights(model: Model) -> dict[str, Tensor]:
    return {name: getattr(each, "full_tensor", lambda each=each: each)() for name, each in model.state_dict().items()}


def test_moments_take_two_bytes_a_weight_and_a_step_is_nearly_that_of_adamw() -> None:
    steps: dict[str, list[Tensor]] = {}
    for name in ("adamw", "adamw_8bit"):
        model = wide_model()
        before = [each.detach().clone() for each in model.parameters()]
        optimizer = make_optimizer(model, OptimizerOptions(optimizer=name, lr=1e-2))  # type: ignore[arg-type]
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for each in model.parameters():
                each.grad = torch.randn(each.shape, generator=generator)
            take_step(optimizer, 1.0)
        steps[name] = [now.detach() - then for now, then in zip(model.parameters(), before, strict=True)]
    largest = max(model.parameters(), key=Tensor.numel)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[largest][moment].codes.dtype == torch.uint8
    exact, close = (torch.cat([each.flatten() for each in steps[name]]) for name in ("adamw", "adamw_8bit"))
    assert 0 < (close - exact).norm() / exact.norm() < 0.05


def test_a_run_learns_as_with_adamw_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, diary = trained(tmp_path / "whole", 6)
    _, exact = trained(tmp_path / "exact", 6, optimizer="adamw")
    assert diary.reports[-1].loss < 0.9 * diary.reports[0].loss
    assert diary.reports[-1].loss == pytest.approx(exact.reports[-1].loss, rel=0.02)
    trained(tmp_path / "halves", 4)
    halves, _ = trained(tmp_path / "halves", 6)
    assert all(torch.equal(halves.state_dict()[name], value) for name, value in whole.state_dict().items())


def on_a_rank(rank: int, world_size: int, folder: Path) -> tuple[float, bool]:
    with torch.compiler.set_stance("force_eager"):
        whole, diary = trained(folder / "whole", 6, shard=world_size)
        trained(folder / "halves", 4, shard=world_size)
        halves, _ = trained(folder / "halves", 6, shard=world_size)
    kept = weights(halves)
    return diary.reports[-1].loss, all(torch.equal(kept[name], value) for name, value in weights(whole).items())


def test_sharded_it_learns_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    _, diary = trained(tmp_path / "one", 6)
    for loss, same in run_distributed(partial(on_a_rank, folder=tmp_path), 2):
        assert loss == pytest.approx(diary.reports[-1].loss, rel=0.02)
        assert same
    with pytest.raises(
        CheckpointError, match="eight bits is that of 2 ranks, each its own, and there are 1: resume on"
    ):
        trained(tmp_path / "whole", 8)
    with pytest.raises(CheckpointError, match="is of another model or optimizer"):
        trained(tmp_path / "whole", 8, optimizer="adamw")
