"""Shares of several ranks are whole again, block by block, and any slice of the whole is read without the rest."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.sat_legacy.merge import MergedSource
from swissarmy.interop.sat_legacy.torch_file import TorchFile
from swissarmy.interop.tensor_source import TensorSource
from tests.interop.sat_legacy.legacy import split

LAYER = "transformer.layers.0"
NAMES = {
    f"{LAYER}.attention.query_key_value.weight": (24, 8),
    f"{LAYER}.attention.query_key_value.bias": (24,),
    f"{LAYER}.attention.dense.weight": (8, 8),
    f"{LAYER}.attention.dense.bias": (8,),
    f"{LAYER}.cross_attention.query.weight": (8, 8),
    f"{LAYER}.cross_attention.key_value.weight": (16, 8),
    f"{LAYER}.cross_attention.dense.weight": (8, 8),
    f"{LAYER}.mlp.dense_h_to_4h.weight": (32, 8),
    f"{LAYER}.mlp.dense_h_to_4h_gate.weight": (32, 8),
    f"{LAYER}.mlp.dense_4h_to_h.weight": (8, 32),
    f"{LAYER}.input_layernorm.weight": (8,),
    "transformer.word_embeddings.weight": (16, 8),
    "mixins.mlp.gate_proj.0.weight": (32, 8),
    "mixins.user.scale": (),
}


def whole(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in NAMES.items()}


def source(folder: Path, shares: list[dict[str, Tensor]], blocks: dict[str, list[int]] | None = None) -> MergedSource:
    files = []
    for rank, share in enumerate(shares):
        path = folder / f"mp_rank_{rank:02d}_model_states.pt"
        torch.save({"module": share}, path)
        files.append(TorchFile(path))
    return MergedSource(files, [{name: name for name in share} for share in shares], blocks=blocks)


def refusal(folder: Path, shares: list[dict[str, Tensor]], *, name: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        source(folder, shares).read(name or next(iter(shares[0])))
    return str(caught.value)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_are_whole_again(tmp_path: Path, ranks: int) -> None:
    tensors = whole()
    merged: TensorSource = source(tmp_path, split(tensors, ranks))
    assert set(merged.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert merged.shape(name) == tensor.shape
        assert torch.equal(merged.read(name), tensor), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("wanted", [2, 4, 8])
def test_each_rank_of_another_run_reads_its_own_slice(tmp_path: Path, ranks: int, wanted: int) -> None:
    tensors = whole()
    merged = source(tmp_path, split(tensors, ranks))
    for name, tensor in tensors.items():
        for dim in range(tensor.dim()):
            size = tensor.shape[dim] // wanted
            for rank in range(wanted):
                found = merged.read_slice(name, dim, rank * size, (rank + 1) * size)
                assert torch.equal(found, tensor.narrow(dim, rank * size, size)), (name, dim, rank)


def test_a_slice_touches_no_more_than_its_own_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = source(tmp_path, split(whole(), 4))
    read: list[tuple[int, int, int]] = []
    for rank, file in enumerate(merged.files):
        original = file.read_rows
        monkeypatch.setattr(
            file,
            "read_rows",
            lambda name, a, b, rank=rank, original=original: read.append((rank, a, b)) or original(name, a, b),
        )
    merged.read_slice(f"{LAYER}.mlp.dense_h_to_4h.weight", 0, 8, 12)
    assert read == [(1, 0, 4)]
    read.clear()
    merged.read_slice(f"{LAYER}.attention.query_key_value.weight", 0, 8, 16)  # K: the second two rows of every rank
    assert read == [(rank, 2, 4) for rank in range(4)]


def test_blocks_of_multi_query_attention_are_of_different_sizes(tmp_path: Path) -> None:
    name = f"{LAYER}.attention.query_key_value.weight"
    tensors = {name: torch.randn(32, 4)}
    shares = split(tensors, 2, queries=2)
    assert torch.equal(source(tmp_path, shares, {name: [16, 8, 8]}).read(name), tensors[name])
    assert not torch.equal(source(tmp_path, shares, {name: [32]}).read(name), tensors[name])


def test_a_small_vocabulary_that_was_not_split_stays_as_it_is(tmp_path: Path) -> None:
    words = {"transformer.word_embeddings.weight": torch.randn(61, 4)}
    merged = source(tmp_path, [words, words])
    assert torch.equal(merged.read("transformer.word_embeddings.weight"), words["transformer.word_embeddings.weight"])


@pytest.mark.parametrize("split_heads", [True, False])
def test_the_biases_of_t5_may_or_may_not_be_split_by_heads(tmp_path: Path, split_heads: bool) -> None:
    tensors = {"encoder.mixins.t5-attention.relative_attention_bias.weight": torch.randn(8, 4)}
    ((name, tensor),) = tensors.items()
    assert torch.equal(source(tmp_path, split(tensors, 2, split_heads=split_heads)).read(name), tensor)


def test_zero_biases_are_merged_though_all_shares_are_equal(tmp_path: Path) -> None:
    name = f"{LAYER}.mlp.dense_h_to_4h.bias"
    assert source(tmp_path, split({name: torch.zeros(32)}, 4)).read(name).shape == (32,)


def test_tensors_are_compared_to_the_bit_and_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swissarmy.interop.sat_legacy.merge._CHUNK_BYTES", 64)
    words = torch.randn(24, 8)
    words[3, 3] = torch.nan
    tensors = {"transformer.word_embeddings.weight": words, "a": words.clone(), "b": words.clone(), "c": words[:23]}
    tensors["b"][23, 7] += 1
    merged = source(tmp_path, split(tensors, 2))
    assert torch.equal(merged.read("a").nan_to_num(), words.nan_to_num())
    assert [merged.is_same("transformer.word_embeddings.weight", name) for name in "abc"] == [True, False, False]


# Refusals


def test_uneven_shares_are_refused_with_both_sizes(tmp_path: Path) -> None:
    shares = split(whole(), 2)
    shares[1][f"{LAYER}.mlp.dense_h_to_4h.weight"] = torch.randn(15, 8)
    message = refusal(tmp_path, shares)
    assert f"the shares of '{LAYER}.mlp.dense_h_to_4h.weight' are uneven" in message
    assert "[16, 8] torch.float32 in mp_rank_00_model_states.pt, [15, 8] torch.float32 in mp_rank_01" in message


def test_shares_of_different_precision_are_refused(tmp_path: Path) -> None:
    shares = split(whole(), 2)
    shares[1] = {name: tensor.half() for name, tensor in shares[1].items()}
    assert "are uneven" in refusal(tmp_path, shares)


def test_a_tensor_that_one_rank_lacks_is_named(tmp_path: Path) -> None:
    shares = split(whole(), 2)
    del shares[1]["mixins.user.scale"]
    assert "mp_rank_00_model_states.pt holds 'mixins.user.scale' and mp_rank_01_model_states.pt does not" in refusal(
        tmp_path, shares
    )


@pytest.mark.parametrize(
    "name", [f"{LAYER}.input_layernorm.weight", "mixins.user.scale", f"{LAYER}.attention.dense.bias"]
)
def test_a_whole_tensor_that_differs_between_ranks_is_refused(tmp_path: Path, name: str) -> None:
    shares = split(whole(), 2)
    shares[1][name] = shares[1][name] + 1
    assert f"'{name}' differs between mp_rank_00_model_states.pt and mp_rank_01_model_states.pt" in refusal(
        tmp_path, shares, name=name
    )


def test_a_slice_outside_of_the_tensor_is_refused(tmp_path: Path) -> None:
    merged = source(tmp_path, split(whole(), 2))
    for dim, start, stop in ((0, 0, 33), (0, -1, 3), (2, 0, 1), (0, 5, 4)):
        with pytest.raises(CheckpointError, match="has no slice"):
            merged.read_slice(f"{LAYER}.mlp.dense_h_to_4h.weight", dim, start, stop)
