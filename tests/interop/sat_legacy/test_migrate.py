"""The whole way: a folder complete or not at all, the source untouched, twice the same, hostile files refused."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import swissarmy as sat
from swissarmy.core.errors import CheckpointError
from swissarmy.interop.safe_write import leftovers, verify_manifest
from swissarmy.interop.sat_legacy.migrate import migrate
from swissarmy.interop.sat_legacy.plan import Options
from swissarmy.testing import tiny_model
from tests.interop.sat_legacy import legacy


def old_gpt2(folder: Path, ranks: int = 2, **options: Any) -> Path:
    state, config = legacy.gpt2(tiny_model("gpt2"))
    return legacy.write(folder, legacy.split(legacy.pad_vocabulary(state), ranks), config, **options)


def picture(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file's content and time of change."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refusal(source: Path, target: Path, options: Options | None = None) -> str:
    """The error, after which nothing is there."""
    before = picture(source)
    with pytest.raises(CheckpointError) as caught:
        migrate(source, target, options)
    assert not target.exists()
    assert not leftovers(target)
    assert picture(source) == before
    return str(caught.value)


def test_the_source_is_as_it_was_and_the_target_is_whole(tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old")
    before = picture(old)
    migrate(old, tmp_path / "new")
    assert picture(old) == before
    assert set(verify_manifest(tmp_path / "new")) == {"config.json", "model.safetensors", "migration.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_a_source_that_may_only_be_read_is_enough(tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old")
    for path in [*old.rglob("*"), old]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    migrate(old, tmp_path / "new")
    for path in [old, *old.rglob("*")]:
        path.chmod(0o755)


def test_doing_it_twice_changes_nothing(tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old")
    first = migrate(old, tmp_path / "new")
    before = picture(tmp_path / "new")
    second = migrate(old, tmp_path / "new")
    assert (first.done_before, second.done_before) == (False, True)
    assert picture(tmp_path / "new") == before
    assert migrate(old, tmp_path / "again").vocabulary == first.vocabulary
    assert {name: it[0] for name, it in picture(tmp_path / "again").items()} == {n: it[0] for n, it in before.items()}


def test_asking_for_the_same_in_another_way_is_the_same(tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old")
    migrate(old, tmp_path / "new")
    same = Options(family="gpt2", step="1000", vocab_size=61, arguments={"num_attention_heads": 4}, positions={7: "x"})
    assert migrate(old, tmp_path / "new", same).done_before
    assert migrate(old / "1000", tmp_path / "new").done_before


def test_another_migration_does_not_write_over_the_first(tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old")
    migrate(old, tmp_path / "new")
    before = picture(tmp_path / "new")
    with pytest.raises(CheckpointError, match="exists and is not empty; it is never written over in place"):
        migrate(old, tmp_path / "new", Options(keep_padding=True))
    with pytest.raises(CheckpointError, match="never written over in place"):
        migrate(old_gpt2(tmp_path / "other", ranks=1), tmp_path / "new")
    assert picture(tmp_path / "new") == before


def test_a_result_that_was_damaged_since_is_named(tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old")
    migrate(old, tmp_path / "new")
    weights = tmp_path / "new" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"model\.safetensors differs from what was saved"):
        migrate(old, tmp_path / "new")


def test_a_target_inside_the_source_is_refused(tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old")
    assert "is inside" in refusal(old, old / "new")
    assert "is inside" in refusal(old, old / "1000" / "new")


@pytest.mark.parametrize("point", ["save_safetensors", "_flush", "_move"])
def test_a_run_that_is_killed_leaves_no_target_and_the_next_one_succeeds(tmp_path: Path, point: str) -> None:
    old = old_gpt2(tmp_path / "old")
    module = "swissarmy.interop.sat_legacy.migrate" if point == "save_safetensors" else "swissarmy.interop.safe_write"
    code = f"""
import os, signal, sys
import {module} as module
from swissarmy.interop.sat_legacy.migrate import migrate
original = module.{point}
def dying(*arguments, **keywords):
    if {point!r} == "save_safetensors":
        original(*arguments, **keywords)
    os.kill(os.getpid(), signal.SIGKILL)
module.{point} = dying
migrate(sys.argv[1], sys.argv[2])
"""
    done = subprocess.run([sys.executable, "-c", code, str(old), str(tmp_path / "new")], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "new").exists()
    assert len(leftovers(tmp_path / "new")) == 1
    migrate(old, tmp_path / "new")
    sat.load(tmp_path / "new")


# Hostile and damaged sources


class Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize("key", ["optimizer", "module"])
def test_a_hostile_pickle_is_refused_and_its_canary_lives(tmp_path: Path, zip_file: bool, key: str) -> None:
    canary = tmp_path / "canary"

    def poison(content: dict[str, Any], rank: int) -> None:
        if rank == 1 and key == "module":
            content["module"]["evil"] = Evil(canary)
        elif rank == 1:
            content[key] = {"state": [Evil(canary)]}

    old = old_gpt2(tmp_path / "old", change=poison, zip_file=zip_file)
    message = refusal(old, tmp_path / "new")
    assert "mp_rank_01_model_states.pt was refused, and nothing in it was run" in message
    assert "it asks for posix.system." in message
    assert not canary.exists()


def damage(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def apply(folder: Path) -> Path:
        old = old_gpt2(folder)
        change(old / "1000" / "mp_rank_01_model_states.pt")
        return old

    return apply


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (damage(lambda path: path.unlink()), "lacks mp_rank_01_model_states.pt: the model was split over 2 ranks"),
        (damage(lambda path: path.write_bytes(path.read_bytes()[:-1000])), "truncated or corrupt zip archive"),
        (damage(lambda path: path.write_bytes(b"")), "it is empty"),
        (damage(lambda path: torch.save({"module": {}}, path)), "no state dict under 'module'"),
        (damage(lambda path: path.rename(path.with_name("mp_rank_02_model_states.pt"))), "lacks mp_rank_01"),
    ],
    ids=["missing", "truncated", "empty", "no weights", "misnumbered"],
)
def test_a_damaged_rank_is_refused_with_its_reason(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    assert says in refusal(make(tmp_path / "old"), tmp_path / "new")


def test_ranks_of_different_steps_are_refused(tmp_path: Path) -> None:
    def later(content: dict[str, Any], rank: int) -> None:
        content["iteration"] += rank

    message = refusal(old_gpt2(tmp_path / "old", change=later), tmp_path / "new")
    assert "the ranks are of different steps (iteration mp_rank_00_model_states.pt: 1000, mp_rank_01" in message
    assert "1001" in message


def test_ranks_of_different_runs_are_refused(tmp_path: Path) -> None:
    def other_run(content: dict[str, Any], rank: int) -> None:
        name = "transformer.final_layernorm.weight"
        content["module"][name] = content["module"][name] + rank

    message = refusal(old_gpt2(tmp_path / "old", change=other_run), tmp_path / "new")
    assert "'transformer.final_layernorm.weight' differs between mp_rank_00_model_states.pt and mp_rank_01" in message


def test_uneven_shares_are_refused(tmp_path: Path) -> None:
    def cut(content: dict[str, Any], rank: int) -> None:
        name = "transformer.layers.1.mlp.dense_h_to_4h.weight"
        content["module"][name] = content["module"][name][: 64 - rank]

    assert "the shares of 'transformer.layers.1.mlp.dense_h_to_4h.weight' are uneven" in refusal(
        old_gpt2(tmp_path / "old", change=cut), tmp_path / "new"
    )


def test_fewer_files_than_the_model_was_split_into_are_refused(tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old", ranks=4)
    for rank in (2, 3):
        (old / "1000" / f"mp_rank_{rank:02d}_model_states.pt").unlink()
    assert "lacks mp_rank_02_model_states.pt, mp_rank_03_model_states.pt: the model was split over 4 ranks" in refusal(
        old, tmp_path / "new"
    )


def test_files_of_another_run_beside_the_ranks_are_refused(tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old", ranks=1)
    file = old / "1000" / "mp_rank_00_model_states.pt"
    file.with_name("mp_rank_01_model_states.pt").write_bytes(file.read_bytes())
    assert "has 2 files mp_rank_XX, and the model was split over 1 ranks" in refusal(old, tmp_path / "new")


def test_a_flipped_bit_is_found_before_anything_is_written(tmp_path: Path) -> None:
    old = old_gpt2(tmp_path / "old")
    file = old / "1000" / "mp_rank_00_model_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(bytes(data))
    assert "Bad CRC-32" in refusal(old, tmp_path / "new")


def test_an_unmapped_index_is_refused_with_the_cure(tmp_path: Path) -> None:
    state, config = legacy.gpt2(tiny_model("gpt2"))
    state["mixins.3.weight"] = torch.ones(2)
    old = legacy.write(tmp_path / "old", [state], config)
    assert "say --map 3=NAME" in refusal(old, tmp_path / "new")


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from swissarmy.core.errors import CheckpointError
from swissarmy.interop.sat_legacy.migrate import migrate
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    migrate(sys.argv[1], sys.argv[2])
except CheckpointError as error:
    print(error)
"""
    old = old_gpt2(tmp_path / "old")
    command = [sys.executable, "-c", code, str(old), str(tmp_path / "new")]
    done = subprocess.run(command, timeout=120, check=True, capture_output=True, text=True)
    assert "was not written: File too large" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


# Memory


def test_memory_stays_below_a_file_and_a_fifth_and_one_tensor(tmp_path: Path) -> None:
    """The measurement of `benchmarks/migrate_memory.py` at 100 MB; here far less than promised is asked for."""
    hidden, layers, ranks = 512, 8, 2
    state: legacy.State = {"transformer.word_embeddings.weight": torch.zeros(2048, hidden)}
    state["transformer.position_embeddings.weight"] = torch.zeros(64, hidden)
    for layer in range(layers):
        start = f"transformer.layers.{layer}"
        for name, shape in {
            "input_layernorm": (hidden,),
            "attention.query_key_value": (3 * hidden, hidden),
            "attention.dense": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.dense_h_to_4h": (4 * hidden, hidden),
            "mlp.dense_4h_to_h": (hidden, 4 * hidden),
        }.items():
            state |= {f"{start}.{name}.weight": torch.ones(shape), f"{start}.{name}.bias": torch.ones(shape[0])}
    state |= {
        "transformer.final_layernorm.weight": torch.ones(hidden),
        "transformer.final_layernorm.bias": torch.ones(hidden),
    }
    config = {"model_class": "GPT2Model", "num_attention_heads": 8}
    old = legacy.write(tmp_path / "old", legacy.split(state, ranks), config)
    small = old_gpt2(tmp_path / "small")
    code = """
import re, sys
from swissarmy.interop.sat_legacy.migrate import migrate
def peak():  # not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
migrate(sys.argv[1], sys.argv[2])
before = peak()
migrate(sys.argv[3], sys.argv[4])
print(peak() - before)
"""
    arguments = [str(small), str(tmp_path / "small-new"), str(old), str(tmp_path / "new")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], timeout=120, check=True, capture_output=True, text=True
    )
    file = max(path.stat().st_size for path in (old / "1000").iterdir())
    assert 100e6 / ranks < file
    assert int(done.stdout) < 0.6 * file + 4 * hidden * hidden * 4  # half of a file, and what the process needs itself
