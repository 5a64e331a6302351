"""Reading safetensors and `.bin` files and folders: what is read, what is refused, and how much memory it takes."""

import io
import json
import os
import pickle
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.safetensors_folder import DTYPES, SafetensorsSource
from swissarmy.interop.tensor_source import TensorSource

LARGE = 300_000  # elements of float32: more than a mebibyte, so it is mapped
INDEX = "model.safetensors.index.json"


def _everything(source: TensorSource) -> dict[str, torch.Tensor]:
    return {name: source.read(name) for name in source.names()}


def _assert_equal(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert have[name].dtype == tensor.dtype
        assert have[name].shape == tensor.shape
        flat = [one.contiguous().reshape(-1).view(torch.uint8) for one in (have[name], tensor)]
        assert torch.equal(*flat), name


def _write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], **moved: str) -> None:
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**weight_map, **moved}}))


def _refused(path: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsSource(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# What is read


@pytest.mark.parametrize("mapped", [True, False])
def test_every_dtype_and_shape_reads_as_it_was_saved(tmp_path: Path, mapped: bool) -> None:
    tensors = {name: torch.randint(0, 2, (2, 8)).to(dtype) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "large": torch.randn(LARGE)}
    tensors |= {"large_bf16": torch.randn(3, LARGE).bfloat16(), "odd": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path, mapped=mapped)
    _assert_equal(_everything(source), tensors)
    assert source.shape("large_bf16") == (3, LARGE)
    assert source.dtype("large_bf16") == torch.bfloat16
    assert source.where("scalar") == "model.safetensors"


def test_shards_and_a_single_file_and_its_path_read_the_same(tmp_path: Path) -> None:
    tensors = {f"layers.{i}": torch.randn(4, i + 1) for i in range(5)}
    shards = {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in ("layers.0", "layers.3")},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in ("layers.1", "layers.2", "layers.4")},
    }
    _write_shards(tmp_path, shards)
    sharded = SafetensorsSource(tmp_path)
    assert sharded.where("layers.4") == "model-00002-of-00002.safetensors"
    save_file(tensors, tmp_path / "all.safetensors")
    _assert_equal(_everything(sharded), tensors)
    _assert_equal(_everything(SafetensorsSource(tmp_path / "all.safetensors")), tensors)


def test_what_was_read_can_be_written_to_and_outlives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(LARGE).float()}, path)
    before = path.read_bytes()
    source = SafetensorsSource(path)
    first, second = source.read("weight"), source.read("weight")
    first.zero_()
    assert second[7] == 7
    assert path.read_bytes() == before
    os.replace(_write_raw(tmp_path / "new", {}), path)
    assert second[LARGE - 1] == LARGE - 1
    with pytest.raises(CheckpointError, match="changed or replaced"):
        source.read("weight")


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Did you mean 'model\.norm\.weight'"):
        SafetensorsSource(tmp_path).read("model.norm.weigth")


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert SafetensorsSource(tmp_path).read("weight").tolist() == [1, 1]


def test_a_folder_without_weights_is_listed(tmp_path: Path) -> None:
    _refused(tmp_path, "the folder is empty")
    (tmp_path / "config.json").touch()
    (tmp_path / "adapter.safetensors").touch()
    _refused(tmp_path, "adapter.safetensors, config.json")
    _refused(tmp_path / "nowhere", "nowhere", "No such file")
    _refused(Path("a\0b"), "NUL")


def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    _refused(tmp_path, "not a regular file")


# Damaged headers

_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
_BAD = {
    "not JSON": (b"{nonsense", b"", "not valid JSON"),
    "nested without end": (b"[" * 100_000, b"", "not valid JSON"),
    "a list": ([], b"", "a JSON object is expected, not a list"),
    "a name twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}', b"", "'a' occurs 2 times"),
    "a lone surrogate": (b'{"\\ud800":1}', b"", "not valid JSON"),
    "a huge number": (b'{"a":' + b"9" * 5000 + b"}", b"", "not valid JSON"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "fields": ({"a": {"dtype": "F32"}}, b"", "exactly"),
    "dtype": ({"a": {**_F32, "dtype": "F33"}}, bytes(8), "F33"),
    "dtype size": ({"a": {**_F32, "dtype": "F16"}}, bytes(8), "needs 4 bytes"),
    "negative shape": ({"a": {**_F32, "shape": [-2]}}, bytes(8), "impossible shape"),
    "a boolean shape": ({"a": {**_F32, "shape": [True, 2]}}, bytes(8), "impossible shape"),
    "overflowing shape": ({"a": {**_F32, "shape": [0, 2**62, 2**62]}}, b"", "impossible shape"),
    "absurd size": ({"a": {"dtype": "F32", "shape": [2**50], "data_offsets": [0, 2**52]}}, bytes(8), "truncated"),
    "out of range": ({"a": {**_F32, "data_offsets": [8, 16]}}, bytes(8), "gap"),
    "reversed": ({"a": {**_F32, "data_offsets": [8, 0]}}, bytes(8), "data_offsets"),
    "overlap": ({"a": _F32, "b": {**_F32, "data_offsets": [4, 12]}}, bytes(12), "overlaps"),
    "gap": ({"a": _F32, "b": {**_F32, "data_offsets": [12, 20]}}, bytes(20), "gap"),
    "truncated data": ({"a": _F32}, bytes(7), "truncated"),
    "trailing data": ({"a": _F32}, bytes(9), "longer"),
}


@pytest.mark.parametrize("case", _BAD)
def test_a_damaged_header_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    header, data, words = _BAD[case]
    _refused(_write_raw(tmp_path / "model.safetensors", header, data), "model.safetensors", words)


def test_an_empty_or_truncated_file_or_absurd_header_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    _refused(path, "empty")
    path.write_bytes(b"\x10")
    _refused(path, "truncated (1 bytes)")
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}" * 8)
    tracemalloc.start()
    _refused(path, "9223372036854775808 bytes")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def _valid_file() -> bytes:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "empty": torch.empty(0, 2)}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "f", metadata={"format": "pt"})
        return (Path(folder) / "f").read_bytes()


@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=3),
    fix_length=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_mutated_file_reads_as_the_safetensors_library_reads_it_or_is_refused(
    edits: list[tuple[int, bytes, int]], fix_length: bool
) -> None:
    data = _valid_file()
    header_end = 8 + int.from_bytes(data[:8], "little")
    header, rest = (data[8:header_end], data[header_end:]) if fix_length else (data, b"")
    for position, inserted, removed in edits:
        at = position % (len(header) + 1)
        header = header[:at] + inserted + header[at + removed :]
    mutated = len(header).to_bytes(8, "little") + header + rest if fix_length else header
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(mutated)
        try:
            have = _everything(SafetensorsSource(path))
        except CheckpointError:
            return
        _assert_equal(have, load_file(path))


@given(st.binary(max_size=64))
@settings(max_examples=200, deadline=None)
def test_arbitrary_header_bytes_are_refused_wherever_the_library_refuses_them(header: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = _write_raw(Path(folder) / "model.safetensors", header)
        try:
            load_file(path)
        except SafetensorError:
            with pytest.raises(CheckpointError):
                SafetensorsSource(path)


# Index files and links


@pytest.mark.parametrize("shard", ["../out.safetensors", "/etc/passwd", "sub/in.safetensors", "a\0b", "", "..", "a\\b"])
def test_an_index_entry_that_is_not_a_plain_name_is_refused(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, tmp_path / "out.safetensors")
    save_file({"a": torch.ones(1)}, folder / "sub" / "in.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    _refused(folder, "'a'", "not a plain file name")


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "shard.safetensors"])
def test_a_link_out_of_the_folder_is_refused_but_its_target_can_be_given(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret")
    if name == "shard.safetensors":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    (folder / name).symlink_to("../secret")
    _refused(folder, "leads out of its folder")
    assert SafetensorsSource(tmp_path / "secret").names() == ("a",)


def test_links_of_a_hub_cache_snapshot_lead_to_its_blobs_and_no_further(tmp_path: Path) -> None:
    repo = tmp_path / "models--someone--something"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    save_file({"a": torch.ones(1)}, repo / "blobs" / "ffee")
    (snapshot / "model.safetensors").symlink_to("../../blobs/ffee")
    assert SafetensorsSource(snapshot).names() == ("a",)
    (tmp_path / "link").symlink_to(snapshot)
    assert SafetensorsSource(tmp_path / "link").where("a") == "model.safetensors"
    save_file({"a": torch.ones(1)}, repo / "outside")
    (repo / "blobs" / "ffee").unlink()
    (repo / "blobs" / "ffee").symlink_to("../outside")
    _refused(snapshot, "leads out of its folder")


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "real.safetensors")
    (tmp_path / "model.safetensors").symlink_to("real.safetensors")
    assert SafetensorsSource(tmp_path).names() == ("a",)


def test_an_index_that_does_not_match_its_shards_is_refused(tmp_path: Path) -> None:
    shards = {"one.safetensors": {"a": torch.ones(1), "b": torch.ones(1)}, "two.safetensors": {"c": torch.ones(1)}}
    _write_shards(tmp_path, shards, d="three.safetensors")
    _refused(tmp_path, "'d'", "'three.safetensors', which is missing", "one.safetensors, two.safetensors")
    _write_shards(tmp_path, shards, a2="one.safetensors")
    _refused(tmp_path, "one.safetensors lacks tensor 'a2'")
    _write_shards(tmp_path, shards, b="two.safetensors")
    _refused(tmp_path, "one.safetensors holds tensor 'b'")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": 3}}')
    _refused(tmp_path, "weight_map")
    (tmp_path / INDEX).write_bytes(b"\xff")
    _refused(tmp_path, INDEX, "not valid UTF-8")


# pytorch_model.bin


def test_bin_files_read_with_independent_tensors(tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    tensors = {"tied.a": shared, "tied.b": shared, "transposed": shared.t(), "half": shared[:2].bfloat16()}
    tensors |= {"scalar": torch.tensor(2), "parameter": torch.nn.Parameter(torch.ones(3)), "empty": torch.empty(0)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    source = SafetensorsSource(tmp_path)
    have = _everything(source)
    _assert_equal(have, {name: tensor.detach() for name, tensor in tensors.items()})
    have["tied.a"].zero_()
    assert torch.equal(have["tied.b"], shared)
    assert have["transposed"].is_contiguous()
    assert not have["parameter"].requires_grad
    assert source.where("half") == "pytorch_model.bin"


def test_bin_shards_follow_their_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{i}-of-00002.bin" for i, name in ((1, "a"), (2, "b"))}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert {name: tensor.sum() for name, tensor in _everything(SafetensorsSource(tmp_path)).items()} == {"a": 2, "b": 0}


class _Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_bin_is_refused_and_runs_nothing(tmp_path: Path, legacy: bool) -> None:
    canary = tmp_path / "canary"
    content = {"weight": torch.ones(2), "evil": _Malicious(canary)}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    message = _refused(tmp_path, "pytorch_model.bin")
    assert ("not a zip archive" if legacy else "posix.system") in message
    assert not canary.exists()


def test_a_bin_that_is_no_flat_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    for content, words in (([1], "list"), ({"model": {"a": torch.ones(1)}}, "'model'"), ({3: torch.ones(1)}, "3")):
        torch.save(content, path)
        _refused(path, words)
    torch.save({"a": torch.ones(1, device="meta")}, path)
    _refused(path, "'a'")


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    plain = io.BytesIO()
    torch.save({"a": torch.ones(1)}, plain)
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    _refused(path, "compressed")


class _Huge:
    """Pickles as a tensor of 4 TB over a storage of 16 bytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.ones(4).untyped_storage(), dtype=torch.float32, _internal=True
        )
        return torch._utils._rebuild_tensor_v2, (storage, 0, (10**12,), (1,), False, OrderedDict())


def test_a_bin_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"a": _Huge()}, tmp_path / "pytorch_model.bin")
    _refused(tmp_path, "pytorch_model.bin", "resize storage")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of odd protocols and reads on
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4), st.booleans())
@example(303, b"X", False)  # a struct.error inside torch's unpickler
@settings(max_examples=150, deadline=None)
def test_any_mutated_bin_reads_or_is_refused(position: int, replacement: bytes, truncated: bool) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(8.0), "b": torch.ones(2, 2).half()}, buffer)
    data = buffer.getvalue()
    at = position % len(data)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pytorch_model.bin"
        path.write_bytes(data[:at] if truncated else data[:at] + replacement + data[at + len(replacement) :])
        with suppress(CheckpointError):
            _everything(SafetensorsSource(path))


def test_a_bare_pickle_called_bin_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Malicious(canary)))
    _refused(tmp_path, "not a zip archive")
    assert not canary.exists()


# Memory

_CHILD = """
import re, sys
import torch
from pathlib import Path
from swissarmy.interop.safetensors_folder import SafetensorsSource

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

path, transposed, mapped = sys.argv[1], sys.argv[2] == "transposed", sys.argv[3] == "mapped"
torch.ones(1000, 1000).t().contiguous()  # the thread pool's own memory
before = peak()
source, kept = SafetensorsSource(path, mapped=mapped), []
for name in source.names():
    tensor = source.read(name)
    kept.append(tensor.t().contiguous() if transposed else tensor)
touched = [tensor.flatten()[::512].sum().item() for tensor in kept]
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("name", "how"), [("model.safetensors", "mapped"), ("model.safetensors", "copied"), ("a.bin", "")]
)
def test_reading_holds_the_weights_once_kept_as_they_are_or_transposed(tmp_path: Path, name: str, how: str) -> None:
    tensors = {f"layers.{i}": torch.ones(2560, (1 + i % 3) * 1024) for i in range(10)}  # 10, 20, 30 MiB
    path = tmp_path / name
    if name.endswith(".bin"):
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    total, largest = sum(one.nbytes for one in tensors.values()), max(one.nbytes for one in tensors.values())
    for kept in ("as they are", "transposed"):
        command = [sys.executable, "-c", _CHILD, str(path), kept, how]
        child = subprocess.run(command, capture_output=True, text=True, check=True)
        # A .bin is mapped whole by torch, and let go after 32 MiB.
        allowed = 1.15 * total + largest + (32 << 20 if name.endswith(".bin") else 0)
        assert int(child.stdout) <= allowed, kept
