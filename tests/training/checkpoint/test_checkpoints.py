"""Checkpoints of one process: what is written, what is read back, and what happens when something is wrong."""

import errno
import json
import logging
import os
import pickle
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing._internal.two_tensor import TwoTensor

from swissarmy.core.errors import CheckpointError, ConfigError
from swissarmy.interop import safe_write
from swissarmy.mixins.lora import LoRAMixin
from swissarmy.training.checkpoint import checkpoints as module
from swissarmy.training.checkpoint.checkpoints import Checkpoints
from swissarmy.training.checkpoint.options import CheckpointOptions
from swissarmy.training.checkpoint.state import TrainState
from tests.training.checkpoint.small_runs import SmallRun, are_equal, checkpoints_in
from tests.training.tiny_runs import model_of


def saved(folder: Path, run: SmallRun | None = None, **options: Any) -> SmallRun:
    """A run of two steps, and its checkpoint."""
    run = SmallRun().take_steps(2) if run is None else run
    checkpoints = checkpoints_in(folder, **options)
    checkpoints.save(run.state)
    checkpoints.wait()
    return run


def step_folder(folder: Path, step: int = 2) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def rehash(folder: Path) -> None:
    """Make the manifest fit the files, as somebody would who means harm."""
    (folder / "manifest.json").unlink()
    safe_write.write_manifest(folder, safe_write.hash_files(folder, [p for p in folder.rglob("*") if p.is_file()]))


# There and back


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "schedule_free"])
@pytest.mark.parametrize("save_async", [True, False])
def test_a_run_goes_on_to_the_bit(optimizer: str, save_async: bool, tmp_path: Path) -> None:
    torch.manual_seed(5)
    run = saved(tmp_path, SmallRun(optimizer=optimizer).take_steps(2), save_async=save_async)
    run.take_steps(2)
    other = SmallRun(optimizer=optimizer, seed=1)
    torch.manual_seed(99)
    assert checkpoints_in(tmp_path).load(other.state) == other.state.step == 2
    other.take_steps(2)
    assert are_equal(run.copies(), other.copies())
    assert other.state.ema is not None
    assert run.state.ema is not None
    assert other.state.ema.updates == run.state.ema.updates == 4


def test_plain_values_come_back(tmp_path: Path) -> None:
    run = SmallRun()
    run.state.extra = {"best_loss": 0.1 + 0.2, "shape": (1, 2), "config": {"lr": 1e-3, "resume": "never"}}
    assert run.state.scaler is not None
    run.state.scaler.scale = 2.0**9
    saved(tmp_path, run)
    other = SmallRun()
    other.state.extra = {"config": {"lr": 2e-3, "resume": "auto"}}
    checkpoints_in(tmp_path).load(other.state)
    assert other.state.extra["best_loss"] == 0.1 + 0.2
    assert other.state.extra["shape"] == [1, 2]
    assert other.state.scaler is not None
    assert other.state.scaler.scale == 2.0**9


def test_a_setting_that_changed_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = SmallRun()
    run.state.extra = {"config": {"lr": 1e-3, "train_iters": 10, "betas": (0.9, 0.95), "resume": "never"}}
    saved(tmp_path, run)
    run.state.extra = {"config": {"lr": 2e-3, "train_iters": 10, "betas": (0.9, 0.95), "resume": "must"}}
    checkpoints_in(tmp_path).load(run.state)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["resuming at step 0 with another setting: lr was 0.001 and is 0.002"]


def test_a_new_learning_rate_is_that_of_the_new_run(tmp_path: Path) -> None:
    run = saved(tmp_path)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.125
    checkpoints_in(tmp_path).load(run.state)
    assert {group["lr"] for group in run.optimizer.param_groups} == {0.125}


def test_a_parameter_that_had_no_gradient_has_no_state_afterwards_either(tmp_path: Path) -> None:
    def run_with_unused() -> SmallRun:
        model = model_of()
        model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
        return SmallRun(model, optimizer="adafactor")

    run = run_with_unused().take_steps(1)
    assert not any("unused." in name for name in run.state.tensors())
    saved(tmp_path, run)
    other = run_with_unused()
    checkpoints_in(tmp_path).load(other.state)
    assert are_equal(run.copies(), other.copies())


class Composite(torch.optim.Optimizer):
    """Keeps its state in tensors made of tensors, as 8-bit optimizers do, and counts in Python."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["pair"] = TwoTensor(torch.zeros_like(parameter), torch.zeros_like(parameter))
                    state["steps"] = 0
                state["pair"].a.add_(parameter.grad)
                state["pair"].b.sub_(parameter.grad)
                state["steps"] += 1


def test_state_made_of_several_tensors_and_numbers_comes_back(tmp_path: Path) -> None:
    def run_of() -> tuple[torch.nn.Linear, TrainState]:
        layer = torch.nn.Linear(2, 3)
        return layer, TrainState(model=layer, optimizer=Composite(layer.parameters()))

    layer, state = run_of()
    layer(torch.ones(2)).sum().backward()
    state.optimizer.step()
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(state)
    other, other_state = run_of()
    checkpoints.load(other_state)
    ours, theirs = state.optimizer.state[layer.weight], other_state.optimizer.state[other.weight]
    assert torch.equal(ours["pair"].b, theirs["pair"].b)
    assert float(theirs["pair"].b.sum()) != 0
    assert theirs["steps"] == 1
    assert other_state.optimizer.param_groups[0]["k"] == 1


def test_what_changes_after_a_save_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write_step = threading.Event(), module.write_step

    def late(*args: Any) -> None:
        assert may_write.wait(30)
        write_step(*args)

    monkeypatch.setattr(module, "write_step", late)
    run, checkpoints = SmallRun().take_steps(1), checkpoints_in(tmp_path)
    before = run.copies()
    checkpoints.save(run.state)
    run.take_steps(1)
    assert checkpoints.steps() == ()
    may_write.set()
    checkpoints.wait()
    checkpoints.load(run.state)
    assert run.state.step == 1
    assert are_equal(run.copies(), before)


# What lies on disk


def test_a_step_is_safetensors_and_json_with_a_manifest(tmp_path: Path) -> None:
    run = saved(tmp_path)
    folder = step_folder(tmp_path)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {"manifest.json", "metadata.json", "state.json", "rank-00000/model.safetensors"}
    assert set(safe_write.verify_manifest(folder)) == names - {"manifest.json"}
    stored = load_file(folder / "rank-00000" / "model.safetensors")
    weight = "model." + next(iter(dict(run.model.named_parameters())))
    assert torch.equal(stored[weight], run.state.tensors()[weight])
    assert json.loads((folder / "state.json").read_text())["step"] == 2
    assert (folder.parent / "latest").read_text() == "2\n"


def test_only_the_newest_steps_are_kept_and_round_ones_and_the_one_resumed_from(tmp_path: Path) -> None:
    run, checkpoints = SmallRun(), checkpoints_in(tmp_path, keep_last=2, keep_every=4)
    for _ in range(7):
        checkpoints.save(run.take_steps(1).state)
    checkpoints.wait()
    assert checkpoints.steps() == (4, 6, 7)

    later = checkpoints_in(tmp_path, keep_last=1)
    assert later.load(run.state, 6) == 6
    (folder := step_folder(tmp_path, 7)).rename(folder.with_name("put-aside"))
    for _ in range(3):
        later.save(run.take_steps(1).state)
    later.wait()
    assert later.steps() == (6, 9)
    assert checkpoints_in(tmp_path, keep_last=None).steps() == (6, 9)


def test_old_steps_stay_when_the_new_one_cannot_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, write_step = saved(tmp_path), module.write_step

    def damaging(target: Path, *args: Any) -> None:
        write_step(target, *args)
        flip_a_bit(target / "rank-00000" / "model.safetensors")

    monkeypatch.setattr(module, "write_step", damaging)
    checkpoints = checkpoints_in(tmp_path, keep_last=1)
    checkpoints.save(run.take_steps(1).state)
    with pytest.raises(CheckpointError, match=r"rank-00000/model\.safetensors differs from what was saved"):
        checkpoints.wait()
    assert checkpoints.steps() == (2, 3)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "2\n"


def test_a_step_that_exists_is_not_written_over(tmp_path: Path) -> None:
    run = saved(tmp_path)
    before = (step_folder(tmp_path) / "manifest.json").read_bytes()
    checkpoints = checkpoints_in(tmp_path, save_async=False)
    with pytest.raises(CheckpointError, match="exists and is not empty; it is never written over"):
        checkpoints.save(run.state)
    assert (step_folder(tmp_path) / "manifest.json").read_bytes() == before


def test_the_step_just_saved_or_resumed_from_is_not_saved_again(tmp_path: Path) -> None:
    run, checkpoints = SmallRun().take_steps(2), checkpoints_in(tmp_path, save_async=False)
    assert checkpoints.save(run.state) == checkpoints.save(run.state) == step_folder(tmp_path)
    again = checkpoints_in(tmp_path, save_async=False)
    again.load(run.state)
    again.save(run.state)


# What cannot be written


def test_a_full_disk_is_said_and_leaves_the_step_before(tmp_path: Path) -> None:
    run, checkpoints = saved(tmp_path), checkpoints_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        checkpoints.save(run.take_steps(1).state)
        assert checkpoints._thread is not None
        checkpoints._thread.join()
        assert checkpoints.failed
        with pytest.raises(CheckpointError, match=r"step-00000003/.* was not written: File too large.*MiB are free"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    assert not checkpoints.failed
    checkpoints.load(run.state)


def test_a_failure_in_the_background_is_raised_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run, checkpoints = SmallRun(), checkpoints_in(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    checkpoints.save(run.state)
    with pytest.raises(CheckpointError, match="step-00000000 was not written: No space left on device"):
        checkpoints.save(run.take_steps(1).state)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_is_not_plain_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = SmallRun()
    run.state.extra = {"callbacks": {"Mine": {"best": torch.ones(1)}}}
    with pytest.raises(CheckpointError, match="of plain values: Object of type Tensor is not JSON serializable"):
        checkpoints_in(tmp_path).save(run.state)
    assert not (tmp_path / "checkpoints").exists()


# Which step is loaded


def test_leftovers_of_a_killed_save_are_told_of_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path)
    for name in (".step-00000003.tmp-12-0a1b", ".step-00000001.old-12-0a1b"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-00000009").symlink_to(step_folder(tmp_path))
    (tmp_path / "checkpoints" / "step-00000008").write_text("a file")
    assert checkpoints_in(tmp_path).load(SmallRun().state) == 2
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 2
    assert all("left by a save that was broken off" in message for message in messages)


def test_a_step_that_was_complete_when_the_run_was_killed_counts(tmp_path: Path) -> None:
    run = saved(tmp_path)
    saved(tmp_path, run.take_steps(1))
    latest = tmp_path / "checkpoints" / "latest"
    for text in ("2\n", None):
        latest.unlink() if text is None else latest.write_text(text)
        assert checkpoints_in(tmp_path).load(SmallRun().state) == 3
    assert checkpoints_in(tmp_path).load(SmallRun().state, 2) == 2


@pytest.mark.parametrize(
    "text", ["", "\n", "release", "7", "-2", "2.0", "../../etc", "step-00000002", "٢", "2\0", "9" * 300]
)
def test_a_latest_that_says_no_step_lists_the_steps(text: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "checkpoints" / "latest").write_text(text)
    with pytest.raises(CheckpointError, match=r"latest says .* no step that is here; there is step 2\."):
        checkpoints_in(tmp_path).load(SmallRun().state)


def test_a_latest_that_is_a_folder_or_leads_nowhere_lists_the_steps(tmp_path: Path) -> None:
    saved(tmp_path)
    latest = tmp_path / "checkpoints" / "latest"
    latest.unlink()
    latest.symlink_to("/nowhere/at/all")
    with pytest.raises(CheckpointError, match="there is step 2"):
        checkpoints_in(tmp_path).load(SmallRun().state)
    latest.unlink()
    latest.mkdir()
    with pytest.raises(CheckpointError, match="there is step 2"):
        checkpoints_in(tmp_path).load(SmallRun().state)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no step 7; it has step 2\."):
        checkpoints_in(tmp_path).load(SmallRun().state, 7)


def test_resume_does_what_its_option_says(tmp_path: Path) -> None:
    run = SmallRun()
    assert checkpoints_in(tmp_path, resume="never").resume(run.state) is None
    assert checkpoints_in(tmp_path, resume="auto").resume(run.state) is None
    with pytest.raises(CheckpointError, match="no step to resume from, and resume=must"):
        checkpoints_in(tmp_path, resume="must").resume(run.state)
    saved(tmp_path)
    assert checkpoints_in(tmp_path, resume="auto").resume(run.state) == 2
    assert checkpoints_in(tmp_path, resume="must").resume(run.state) == 2
    with pytest.raises(CheckpointError, match=r"has steps already .step 2.: resume the run"):
        checkpoints_in(tmp_path, resume="never").resume(run.state)


# What does not fit


def refused(folder: Path, run: SmallRun, message: str) -> None:
    """Loading fails, and nothing of the run has changed."""
    weights = {name: each.detach().clone() for name, each in run.model.named_parameters()}
    with pytest.raises(CheckpointError, match=message):
        checkpoints_in(folder).load(run.state)
    assert all(torch.equal(weights[name], each) for name, each in run.model.named_parameters())
    assert run.state.step == 0


def test_a_model_of_another_size_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    refused(tmp_path, SmallRun(model_of(n_embd=64)), r"of another model.*nothing was loaded(.|\n)*have \[.*want \[")
    refused(tmp_path, SmallRun(model_of(n_layer=3)), r"missing: model\.transformer\.layers\.2")
    refused(tmp_path, SmallRun(model_of().float()), "float64, want .* float32")


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    refused(tmp_path, SmallRun(optimizer="adafactor"), r"(missing: optimizer\.(.|\n)*row_var)")
    refused(tmp_path, SmallRun(ema=False), r"unexpected: ema\.")


def flip_a_bit(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["rank-00000/model.safetensors", "metadata.json", "state.json"])
def test_one_flipped_bit_names_the_file(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    flip_a_bit(step_folder(tmp_path) / name)
    refused(tmp_path, SmallRun(seed=1), f"{name} differs from what was saved")


def test_a_run_goes_on_from_an_older_step_where_the_newest_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = saved(tmp_path)
    for _ in range(2):
        saved(tmp_path, run.take_steps(1), keep_last=None)
    folder = tmp_path / "checkpoints"
    flip_a_bit(folder / "step-00000004" / "state.json")
    (folder / "step-00000003" / "manifest.json").unlink()
    kept = (folder / "step-00000004" / "state.json").read_bytes()
    with pytest.raises(CheckpointError, match="differs from what was saved"):
        checkpoints_in(tmp_path).load(SmallRun().state, 4)
    resumed = SmallRun()
    assert checkpoints_in(tmp_path).load(resumed.state) == 2
    assert "state.json differs from what was saved" in caplog.text
    assert "going on from step 2; what is left of it is now" in caplog.text
    (aside,) = folder.glob(".step-00000004.damaged-*")
    assert (aside / "state.json").read_bytes() == kept
    saved(tmp_path, resumed.take_steps(2))
    assert checkpoints_in(tmp_path).load(SmallRun().state) == 4


def test_where_all_steps_are_damaged_the_newest_is_named_and_nothing_moves(tmp_path: Path) -> None:
    run = saved(tmp_path)
    saved(tmp_path, run.take_steps(1))
    for step in ("step-00000002", "step-00000003"):
        flip_a_bit(tmp_path / "checkpoints" / step / "state.json")
    refused(tmp_path, SmallRun(seed=1), "step-00000003/state.json differs from what was saved")
    assert checkpoints_in(tmp_path).steps() == (2, 3)


def test_a_manifest_that_is_damaged_or_gone_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    manifest = step_folder(tmp_path) / "manifest.json"
    flip_a_bit(manifest)
    refused(tmp_path, SmallRun(seed=1), "step-00000002/")
    manifest.unlink()
    refused(tmp_path, SmallRun(seed=1), r"cannot read .*manifest\.json")


class Canary:
    """Runs something when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("place", ["checkpoints/step-00000002", "checkpoints", ""])
def test_torchs_own_checkpoint_is_refused_and_nothing_in_it_runs(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / place
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    refused(tmp_path / "run", SmallRun(), "is a pickle, and to read it is to run whatever is in it")
    assert not (tmp_path / "canary").exists()


def change_metadata(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "metadata.json").read_text())
    change(content["tensors"][min(content["tensors"])])
    (folder / "metadata.json").write_text(json.dumps(content))
    rehash(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor["chunks"][0].update(file="../../../secret"), "is not the file of a rank"),
        (lambda tensor: tensor["chunks"][0].update(file="/etc/passwd"), "is not the file of a rank"),
        (lambda tensor: tensor["chunks"][0].update(file="rank-00009/model.safetensors"), "does not list rank-00009"),
        (lambda tensor: tensor["chunks"][0].update(sizes=[1 << 62] * len(tensor["shape"])), "leads out of"),
        (lambda tensor: tensor["chunks"][0].update(offsets=[-1] * len(tensor["shape"])), "not a list of sizes"),
        (lambda tensor: tensor["chunks"].clear(), "its chunks hold 0 elements"),
        (lambda tensor: tensor.update(dtype="PICKLE"), "is not understood"),
        (lambda tensor: tensor.pop("shape"), "is not understood"),
        (lambda tensor: tensor["chunks"][0].update(key="no such tensor"), "has no tensor 'no such tensor'"),
    ],
)
def test_metadata_that_somebody_made_up_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    change_metadata(step_folder(tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        checkpoints_in(tmp_path).load(SmallRun().state)


def test_a_file_outside_the_folder_is_never_read(tmp_path: Path) -> None:
    saved(tmp_path)
    file = step_folder(tmp_path) / "rank-00000" / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused(tmp_path, SmallRun(seed=1), "is not a file inside the folder")


# Only mixins train


def lora_run(seed: int = 0) -> SmallRun:
    model = model_of(seed=seed)
    model.add_mixin("lora", LoRAMixin.for_model(model, r=2))
    model.freeze_except("mixins.lora")
    return SmallRun(model.double())


def test_what_does_not_train_is_not_saved(tmp_path: Path) -> None:
    run = saved(tmp_path, lora_run().take_steps(2))
    stored = load_file(step_folder(tmp_path) / "rank-00000" / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"model", "optimizer", "ema", "random"}
    assert all("mixins.lora." in name for name in stored if not name.startswith("random."))
    expected, other = run.take_steps(1).copies(), lora_run()
    checkpoints_in(tmp_path).load(other.state)
    assert are_equal(other.take_steps(1).copies(), expected)


def test_another_base_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, lora_run())
    refused(tmp_path, lora_run(seed=1), "weights that do not train are not those of the checkpoint(.|\n)*other values")
    whole = lora_run()
    whole.model.requires_grad_(True)
    refused(tmp_path, whole, "did not train, and does now")


# Options


def test_options_say_what_is_out_of_range() -> None:
    with pytest.raises(ConfigError, match="3 problems"):
        CheckpointOptions(save_interval=0, keep_last=0, keep_every=-1)


def test_the_steps_of_a_folder_that_is_not_there_are_none(tmp_path: Path) -> None:
    checkpoints: Checkpoints = checkpoints_in(tmp_path / "none")
    assert checkpoints.steps() == ()
    assert checkpoints.load(SmallRun().state) is None
