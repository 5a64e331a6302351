"""Writing folders that are absent or complete, their manifest, and the safetensors layout."""

import errno
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.safe_write import leftovers, verify_manifest, write_folder
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.interop.safetensors_write import LazyTensor, save_safetensors

INDEX = "model.safetensors.index.json"


def _tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _save(target: Path, text: str = "one", *, overwrite: bool = False) -> None:
    with write_folder(target, overwrite=overwrite) as folder:
        (folder / "config.json").write_text(text)
        save_safetensors(folder, {"weight": torch.arange(6.0)})


# Folders


def test_a_folder_appears_complete_with_its_manifest(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    with write_folder(target) as folder:
        assert folder.parent == target.parent
        assert re.fullmatch(r"\.model\.tmp-\d+-[0-9a-f]+", folder.name)
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        (folder / "b.txt").write_text("b")
        assert not target.exists()
    assert _tree(tmp_path / "new") == ["model", "model/b.txt", "model/manifest.json", "model/sub", "model/sub/a.txt"]
    assert verify_manifest(target) == ("b.txt", "sub/a.txt")
    assert leftovers(target) == ()


def test_without_a_manifest_none_is_written_and_verifying_says_so(tmp_path: Path) -> None:
    with write_folder(tmp_path / "model", manifest=False) as folder:
        (folder / "a.txt").write_text("a")
    assert _tree(tmp_path / "model") == ["a.txt"]
    with pytest.raises(CheckpointError, match=r"manifest\.json: No such file"):
        verify_manifest(tmp_path / "model")


def test_an_exception_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    def fail() -> None:
        with write_folder(tmp_path / "model") as folder:
            (folder / "a.txt").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert _tree(tmp_path) == []


def test_an_error_of_the_caller_passes_through_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), write_folder(tmp_path / "model"):
        (tmp_path / "missing").read_text()


def test_an_empty_folder_is_filled_and_a_full_one_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _save(tmp_path / "empty")
    assert verify_manifest(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, words in (
        ("full", "not empty"),
        ("file", "is a file"),
        ("file/below", "Not a directory"),
        ("a\0b", "NUL"),
    ):
        with pytest.raises(CheckpointError, match=words):
            _save(tmp_path / name)
    assert _tree(tmp_path / "full") == ["notes.txt"]


def test_files_that_appear_in_the_target_meanwhile_are_kept(tmp_path: Path) -> None:
    def race() -> None:
        with write_folder(tmp_path / "model") as folder:
            (folder / "a.txt").write_text("a")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "theirs.txt").write_text("theirs")

    with pytest.raises(CheckpointError, match="not empty"):
        race()
    assert _tree(tmp_path) == ["model", "model/theirs.txt"]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to("disk")
    _save(tmp_path / "model")
    assert verify_manifest(tmp_path / "disk")


def test_overwrite_replaces_an_earlier_save_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    _save(target, "one")
    with pytest.raises(CheckpointError, match="not empty"):
        _save(target, "two")
    _save(target, "two", overwrite=True)
    assert (target / "config.json").read_text() == "two"
    assert _tree(tmp_path)[0] == "model"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        _save(target, "three", overwrite=True)
    (target / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        _save(target, "three", overwrite=True)
    assert (target / "config.json").read_text() == "two"


def test_links_in_a_folder_to_be_saved_and_a_second_manifest_are_refused(tmp_path: Path) -> None:
    def linked() -> None:
        with write_folder(tmp_path / "model") as folder:
            (folder / "link").symlink_to("/etc/passwd")

    def listed() -> None:
        with write_folder(tmp_path / "model") as folder:
            (folder / "manifest.json").touch()

    for fill, words in ((linked, "link is not a regular file"), (listed, "another name")):
        with pytest.raises(CheckpointError, match=words):
            fill()
    assert _tree(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_disk_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _save(tmp_path / "old")
    monkeypatch.setattr(os, call, fail)
    for name, overwrite in (("new", False), ("old", True)):
        with pytest.raises(CheckpointError, match="No space left on device"):
            _save(tmp_path / name, overwrite=overwrite)
    monkeypatch.undo()
    assert verify_manifest(tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


# The manifest


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_in_any_file_is_found(tmp_path: Path, data: st.DataObject) -> None:
    if not (tmp_path / "model").exists():
        _save(tmp_path / "model")
    path = data.draw(st.sampled_from(sorted((tmp_path / "model").iterdir())))
    content = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match=r".*" if path.name == "manifest.json" else path.name):
        verify_manifest(tmp_path / "model")
    path.write_bytes(content)


def test_a_missing_or_shortened_file_is_named(tmp_path: Path) -> None:
    _save(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("on")
    with pytest.raises(CheckpointError, match=r"config\.json has 2 bytes"):
        verify_manifest(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        verify_manifest(tmp_path / "model")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "link", "a\0b"])
def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "link").symlink_to("../secret")
    listed = {"format": 1, "files": {name: {"bytes": 0, "sha256": "0" * 64}}}
    (tmp_path / "model" / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match="not a file inside the folder"):
        verify_manifest(tmp_path / "model")


# Safetensors


def _assorted() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).view(4, 6)
    return {
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "transposed": base.t(),
        "sliced": base[1:, ::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "bf16": base.bfloat16(),
        "float8": base.to(torch.float8_e4m3fn).t(),
        "flag": torch.tensor(True),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "complex": torch.view_as_complex(torch.randn(3, 2)).conj(),
        "parameter": torch.nn.Parameter(base.clone()),
        "naïve 名": torch.tensor([1]),
    }


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100, 1])
def test_tensors_round_trip_through_both_readers(tmp_path: Path, max_shard_bytes: int) -> None:
    want = _assorted()
    written = save_safetensors(tmp_path, want, max_shard_bytes=max_shard_bytes)
    assert sorted(written) == _tree(tmp_path)
    source = SafetensorsSource(tmp_path)
    theirs = {name: tensor for file in written if file != INDEX for name, tensor in load_file(tmp_path / file).items()}
    assert set(source.names()) == theirs.keys() == want.keys()
    for name, tensor in want.items():
        for have in (source.read(name), theirs[name]):
            assert have.dtype == tensor.dtype
            assert have.shape == tensor.shape
            assert have.tolist() == tensor.tolist()


def test_shards_are_split_by_size_in_order_and_indexed(tmp_path: Path) -> None:
    tensors = {f"layers.{i}": torch.full((10,), float(i)) for i in range(7)}  # 40 bytes each
    tensors["wide"] = torch.zeros(100)
    written = save_safetensors(tmp_path, tensors, max_shard_bytes=120)
    assert written == (*(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)), INDEX)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 680, "total_parameters": 170}
    assert index["weight_map"]["layers.2"] == "model-00001-of-00004.safetensors"
    assert index["weight_map"]["layers.3"] == "model-00002-of-00004.safetensors"
    assert index["weight_map"]["wide"] == "model-00004-of-00004.safetensors"
    with safe_open(tmp_path / written[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_folder_without_tensors_and_its_own_metadata_round_trip(tmp_path: Path) -> None:
    assert save_safetensors(tmp_path, {}, metadata={"made by": "a test"}) == ("model.safetensors",)
    assert SafetensorsSource(tmp_path).names() == ()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"made by": "a test"}


def test_lazy_tensors_and_generators_hold_one_tensor_or_one_shard_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def make(value: int) -> torch.Tensor:
        array = np.full(10, value, dtype=np.float32)
        made.append(weakref.ref(array))
        return torch.from_numpy(array)  # its storage keeps the array alive

    def make_alone(value: int) -> torch.Tensor:
        assert [ref() for ref in made if ref() is not None] == []
        return make(value)

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(6):
            yield str(i), make(i)
            assert len([ref for ref in made if ref() is not None]) <= 3  # a shard of two, and the one after it

    lazy = {str(i): LazyTensor(shape=(10,), dtype=torch.float32, make=partial(make_alone, i)) for i in range(5)}
    save_safetensors(tmp_path, lazy, max_shard_bytes=80)
    assert SafetensorsSource(tmp_path).read("4")[0] == 4
    (tmp_path / "generated").mkdir()
    save_safetensors(tmp_path / "generated", pairs(), max_shard_bytes=80)
    wrong = {"a": LazyTensor(shape=(3,), dtype=torch.float32, make=partial(torch.ones, 2))}
    (tmp_path / "wrong").mkdir()
    with pytest.raises(CheckpointError, match=r"'a' was announced as \(3,\)"):
        save_safetensors(tmp_path / "wrong", wrong)
    assert _tree(tmp_path / "wrong") == []


def test_one_tensor_under_two_names_is_refused_across_shards(tmp_path: Path) -> None:
    shared = torch.randn(4, 4)
    views = {"whole": shared, "turned": shared.t(), "rows": shared[:2]}
    save_safetensors(tmp_path, views)
    (tmp_path / "tied").mkdir()
    with pytest.raises(CheckpointError, match="'embedding' and 'head' are one tensor"):
        save_safetensors(
            tmp_path / "tied",
            {"embedding": shared, "norm": torch.ones(9), "head": shared.view(4, 4)},
            max_shard_bytes=64,
        )
    assert _tree(tmp_path / "tied") == []


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([("a", torch.ones(1)), ("a", torch.ones(2))], "given twice"),
        ([("a", torch.ones(40)), ("b", torch.ones(1, device="meta"))], "'b' is on the meta device"),
        ([("a", torch.ones(40)), ("b", torch.ones(2, 2).to_sparse())], "'b' is of layout"),
        ([("a", torch.ones(1, dtype=torch.complex128))], "complex128"),
        ([("__metadata__", torch.ones(1))], "cannot be called"),
        ([("\ud800", torch.ones(1))], "cannot be called"),
    ],
)
def test_what_cannot_be_saved_is_named_and_leaves_nothing(
    tmp_path: Path, tensors: list[tuple[str, torch.Tensor]], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        save_safetensors(tmp_path, iter(tensors), max_shard_bytes=100)
    assert _tree(tmp_path) == []


def test_weights_that_are_there_are_never_overwritten(tmp_path: Path) -> None:
    save_safetensors(tmp_path, {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"already holds model\.safetensors"):
        save_safetensors(tmp_path, {"a": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="not a folder"):
        save_safetensors(tmp_path / "missing", {})
    (tmp_path / "new").mkdir()
    with pytest.raises(CheckpointError, match="max_shard_bytes"):
        save_safetensors(tmp_path / "new", {}, max_shard_bytes=0)


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_transformers_checkpoints_read_here_and_ours_load_there(tmp_path: Path, shard_size: str) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    source = SafetensorsSource(tmp_path / "theirs")
    want = model.state_dict()
    assert set(source.names()) == want.keys()

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for name in source.names():
            assert torch.equal(source.read(name), want[name])
            yield name, source.read(name)

    with write_folder(tmp_path / "ours") as folder:
        (folder / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
        save_safetensors(folder, pairs(), max_shard_bytes=10**9 if shard_size == "1GB" else 20_000)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in want.items())


# Processes that are killed or run out of space

_CHILD = """
import os, resource, signal, sys
from pathlib import Path
import torch
from swissarmy.core.errors import CheckpointError
from swissarmy.interop.safe_write import leftovers, verify_manifest, write_folder
from swissarmy.interop.safetensors_write import save_safetensors
from swissarmy.interop.safetensors_folder import SafetensorsSource

root, tensors = Path(sys.argv[1]), {f"layers.{i}": torch.full((4096,), float(i)) for i in range(4)}

def save(target, **options):
    with write_folder(target, **options) as folder:
        (folder / "config.json").write_text("{}")
        save_safetensors(folder, tensors, max_shard_bytes=40_000)
"""

_FULL_DISK = """
save(root / "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    save(root / "new")
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
verify_manifest(root / "old")
print(sorted(path.name for path in root.iterdir()))
"""

_KILLED = """
def kill_at(step):
    # Killed before the step-th system call that changes what is on disk.
    calls = 0
    def counted(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        return call
    for name in ("fsync", "rename", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    Path.write_text = counted(Path.write_text)

for overwrite in (False, True):
    for step in range(1, 100):
        target = root / f"{overwrite}-{step}"
        if overwrite:
            save(target)
        child = os.fork()
        if child == 0:
            kill_at(step)
            save(target, overwrite=overwrite)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        complete = target.exists()
        if complete:
            verify_manifest(target)
            assert len(SafetensorsSource(target).names()) == 4
        elif overwrite:
            kept = [path for path in leftovers(target) if ".old-" in path.name]
            assert len(kept) == 1 and verify_manifest(kept[0])
        print(overwrite, step, os.WIFSIGNALED(status), complete, len(leftovers(target)))
        if not os.WIFSIGNALED(status):
            assert complete and not leftovers(target)
            break
"""


def _run_child(code: str, folder: Path) -> list[str]:
    child = subprocess.run([sys.executable, "-c", _CHILD + code, str(folder)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


def test_a_full_disk_is_reported_and_leaves_the_old_save_and_nothing_else(tmp_path: Path) -> None:
    message, names = _run_child(_FULL_DISK, tmp_path)
    assert "File too large" in message
    assert f"{tmp_path}/new/model was not written" in message
    assert "MiB are free" in message
    assert names == "['old']"


def test_a_save_that_is_killed_leaves_the_target_absent_or_complete(tmp_path: Path) -> None:
    lines = [line.split() for line in _run_child(_KILLED, tmp_path)]
    for overwrite in ("False", "True"):
        outcomes = [line for line in lines if line[0] == overwrite]
        assert len(outcomes) > 10  # every step, and the last save ran to its end
        assert outcomes[-1][2:] == ["False", "True", "0"]
    killed = [line for line in lines if line[0] == "False" and line[2] == "True"]
    assert {complete for _, _, _, complete, _ in killed} == {"False", "True"}
