"""Both containers of `torch.save`: every tensor is what was saved, and no claim of a damaged file is believed."""

import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.sat_legacy.torch_file import TorchFile

ZIP_AND_STREAM = pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "stream"])


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    return {
        "matrix": base,
        "tied": base,
        "rows": base[2:5],
        "transposed": base.t(),
        "columns": base[:, 1:3],
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(3, 3).bfloat16(),
        "flags": torch.tensor([True, False]),
        "ids": torch.arange(7),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "large": torch.randn(600, 512),
    }


def save(path: Path, module: object, *, zip_file: bool = True) -> Path:
    torch.save({"module": module}, path, _use_new_zipfile_serialization=zip_file)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TorchFile(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@ZIP_AND_STREAM
def test_every_tensor_is_what_was_saved(tmp_path: Path, zip_file: bool) -> None:
    saved = tensors()
    file = TorchFile(save(tmp_path / "file.pt", saved, zip_file=zip_file))
    for name, tensor in saved.items():
        found = file.read(name)
        assert torch.equal(found, tensor)
        assert found.dtype == tensor.dtype
        assert found.is_contiguous()
        if tensor.dim() and len(tensor):
            assert torch.equal(file.read_rows(name, 1, len(tensor)), tensor[1:])
    assert file.tensors["matrix"] == file.tensors["tied"]
    assert file.tensors["matrix"] != file.tensors["rows"]


def test_what_is_read_may_be_written_to_and_the_file_does_not_change(tmp_path: Path) -> None:
    path = save(tmp_path / "file.pt", tensors())
    before = path.read_bytes()
    file = TorchFile(path)
    for name in tensors():
        file.read(name).zero_()
    assert path.read_bytes() == before


# Damage


@ZIP_AND_STREAM
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, zip_file: bool, share: float) -> None:
    path = save(tmp_path / "file.pt", tensors(), zip_file=zip_file)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    message = refusal(path)
    assert "truncated" in message


def test_a_text_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_text("version https://git-lfs.github.com/spec/v1")
    assert "neither a zip archive nor a pickle" in refusal(path)


def test_a_file_without_a_state_dict_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"model": {}, "step": 3}, path)
    assert "no state dict under 'module'; it holds: model, step" in refusal(path)


def test_a_value_that_is_no_tensor_is_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "file.pt", {"a.weight": torch.ones(2), "a.quant_state": [1, 2]})
    assert "'a.quant_state' of its state dict is a list, no tensor" in refusal(path)


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    good, bomb = save(tmp_path / "good.pt", {"w": torch.zeros(1 << 20)}), tmp_path / "bomb.pt"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename.replace("good", "bomb"), source.read(record))
    assert bomb.stat().st_size < good.stat().st_size / 100
    assert "is compressed; torch.save stores plainly" in refusal(bomb)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "bomb.pt", {"w": torch.zeros(1).expand(1 << 20, 1 << 20)})
    assert "larger than its storage, which has 1 elements: a decompression bomb" in refusal(path)


def test_an_empty_tensor_of_absurd_shape_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "bomb.pt", {"w": torch.zeros(0, 1).expand(0, 1 << 40)})
    assert "claims the shape [0, 1099511627776]; refused" in refusal(path)


def test_a_file_that_names_one_storage_a_thousand_times_is_refused(tmp_path: Path) -> None:
    base = torch.zeros(1 << 16)
    path = save(tmp_path / "bomb.pt", {f"w{i}": base.view(-1) for i in range(1000)})
    assert "a decompression bomb" in refusal(path)


def test_a_storage_that_claims_more_than_its_record_has_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "file.pt", {"w": torch.zeros(300)})
    data = path.read_bytes()
    claimed = data.replace(b"M,\x01", b"J\x00\x00\x00\x7f", 1)  # 300 becomes two billion, with two bytes more
    assert claimed != data
    path.write_bytes(claimed)
    refusal(path)


def test_a_storage_of_the_stream_that_claims_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "file.pt", {"w": torch.zeros(300)}, zip_file=False)
    data = path.read_bytes()
    start = data.rindex(struct.pack("<q", 300))
    path.write_bytes(data[:start] + struct.pack("<q", 1 << 50) + data[start + 8 :])
    assert "does not fit into it" in refusal(path)


def test_a_flipped_bit_in_a_record_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = save(tmp_path / "file.pt", {"w": torch.randn(1000)})
    TorchFile(path).check_records()
    data = bytearray(path.read_bytes())
    start = TorchFile(path).tensors["w"].start
    data[start + 100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="corrupt zip archive: Bad CRC-32"):
        TorchFile(path).check_records()


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with (
        zipfile.ZipFile(save(tmp_path / "good.pt", {"w": torch.ones(2)})) as source,
        zipfile.ZipFile(path, "w") as target,
    ):
        for record in source.infolist():
            data = b"big" if record.filename.endswith("byteorder") else source.read(record)
            target.writestr(record.filename, data)
    assert "big-endian" in refusal(path)


def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "file.pt")
    assert "not a regular file" in refusal(tmp_path / "file.pt")


@settings(max_examples=60)
@given(st.data())
def test_any_flipped_byte_gives_tensors_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    zip_file = data.draw(st.booleans())
    path = save(
        tmp_path_factory.mktemp("flip") / "file.pt", {"w": torch.ones(4, 3), "b": torch.ones(2)}, zip_file=zip_file
    )
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        file = TorchFile(path)
        for name in file.tensors:
            file.read(name)
    except CheckpointError:
        pass
