"""The key-value cache against a plain list of everything that was ever written."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swissarmy.core.errors import HookCallError
from swissarmy.nn.kv_cache import KVCache

LAYERS, HEADS, SIZE = 2, 3, 4
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["update", "update", "reorder", "trim", "keep_newest", "mems"]), st.integers(0, 5)),
    max_size=12,
)


def new(batch: int, length: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, HEADS, length, SIZE)
    return [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for _ in range(LAYERS)]


def write(cache: KVCache, layers: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [cache.update(layer_id, k, v) for layer_id, (k, v) in enumerate(layers)]


def filled(batch: int = 2, length: int = 5, *, capacity: int = 0) -> tuple[KVCache, list[tuple[Tensor, Tensor]]]:
    cache, layers = KVCache(LAYERS, capacity=capacity), new(batch, length)
    write(cache, layers)
    return cache, layers


def remembered(cache: KVCache, batch: int) -> list[tuple[Tensor, Tensor]]:
    """What a write of nothing gives back."""
    return [(k.clone(), v.clone()) for k, v in write(cache, new(batch, 0))]


def assert_equal(ours: Sequence[tuple[Tensor, Tensor]], theirs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for (k, v), (expected_k, expected_v) in zip(ours, theirs, strict=True):
        assert torch.equal(k, expected_k)
        assert torch.equal(v, expected_v)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, st.integers(1, 3), st.sampled_from([0, 1, 4, 64]))
def test_any_sequence_of_operations_remembers_what_a_list_would(
    operations: list[tuple[str, int]], batch: int, capacity: int
) -> None:
    cache = KVCache(LAYERS, capacity=capacity)
    expected = new(batch, 1, seed=99)
    write(cache, expected)
    for step, (operation, number) in enumerate(operations):
        if operation == "update":
            added = new(batch, number, seed=step)
            expected = [
                (torch.cat((k, new_k), dim=2), torch.cat((v, new_v), dim=2))
                for (k, v), (new_k, new_v) in zip(expected, added, strict=True)
            ]
            assert_equal(write(cache, added), expected)
        elif operation == "reorder":
            rows = torch.tensor([(number + i * i) % batch for i in range(1 + number % 4)])
            cache.reorder(rows)
            batch, expected = len(rows), [(k[rows], v[rows]) for k, v in expected]
        elif operation == "trim":
            count = min(number, len(cache))
            cache.trim(count)
            keep = len(cache)
            expected = [(k[:, :, :keep], v[:, :, :keep]) for k, v in expected]
        elif operation == "keep_newest":
            cache.keep_newest(number)
            first = max(expected[0][0].shape[2] - number, 0)
            expected = [(k[:, :, first:], v[:, :, first:]) for k, v in expected]
        else:
            cache = KVCache.from_mems(cache.to_mems(), num_key_value_heads=HEADS, capacity=capacity)
        assert len(cache) == expected[0][0].shape[2]
        assert_equal(remembered(cache, batch), expected)


def test_writing_piece_by_piece_equals_writing_at_once() -> None:
    layers = new(2, 9)
    at_once, piecewise = KVCache(LAYERS), KVCache(LAYERS, capacity=2)
    whole = write(at_once, layers)
    for start, stop in ((0, 3), (3, 4), (4, 9)):
        pieces = write(piecewise, [(k[:, :, start:stop], v[:, :, start:stop]) for k, v in layers])
    assert_equal(pieces, whole)


def test_room_is_made_once_and_then_doubled() -> None:
    cache = KVCache(LAYERS, capacity=8)
    assert cache.nbytes == 0
    position = 2 * LAYERS * 2 * HEADS * SIZE * 4
    held = []
    for _ in range(17):
        write(cache, new(2, 1))
        held.append(cache.nbytes // position)
    assert held == [8] * 8 + [16] * 8 + [32]


def test_room_grows_to_what_a_long_write_needs() -> None:
    cache, _ = filled(length=3)
    write(cache, new(2, 100))
    assert cache.nbytes == 2 * LAYERS * 2 * HEADS * SIZE * 4 * 103


def test_constants_count_as_bytes_and_follow_a_reorder() -> None:
    cache, _ = filled()
    before = cache.nbytes
    cache.constants[0, "cross_attention.key"] = torch.arange(6.0).view(2, 3)
    assert cache.nbytes == before + 24
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.constants[0, "cross_attention.key"].tolist() == [[3, 4, 5], [3, 4, 5], [0, 1, 2]]


def test_mems_are_keys_then_values_of_each_position() -> None:
    cache, layers = filled(capacity=32)
    mems = cache.to_mems()
    assert mems.shape == (LAYERS, 2, 5, 2 * HEADS * SIZE)
    for layer, (k, v) in zip(mems, layers, strict=True):
        assert torch.equal(layer[..., : HEADS * SIZE], k.transpose(1, 2).flatten(2))
        assert torch.equal(layer[..., HEADS * SIZE :], v.transpose(1, 2).flatten(2))
    again = KVCache.from_mems(mems, num_key_value_heads=HEADS)
    assert torch.equal(again.to_mems(), mems)
    assert_equal(remembered(again, 2), layers)


def test_an_emptied_cache_goes_on() -> None:
    cache, _ = filled()
    cache.trim(5)
    assert len(cache) == 0
    assert cache.to_mems().shape == (LAYERS, 2, 0, 2 * HEADS * SIZE)
    layers = new(2, 3, seed=5)
    assert_equal(write(cache, layers), layers)


def test_a_layer_that_was_never_written_to_stays_empty() -> None:
    cache = KVCache(LAYERS)
    (k, v), _ = new(2, 4)
    cache.update(0, k, v)
    cache.trim(1)
    cache.keep_newest(2)
    assert torch.equal(cache.update(1, k, v)[0], k)
    assert torch.equal(cache.update(0, k, v)[0], torch.cat((k[:, :, 1:3], k), dim=2))


def test_what_was_given_is_copied() -> None:
    layers = new(2, 3)
    cache = KVCache(LAYERS)
    write(cache, layers)
    kept = [(k.clone(), v.clone()) for k, v in layers]
    for k, v in layers:
        k.zero_()
        v.zero_()
    assert_equal(remembered(cache, 2), kept)


def test_precision_is_that_of_the_first_keys() -> None:
    cache = KVCache(1)
    k, v = (torch.randn(1, 2, 3, 4, dtype=torch.bfloat16) for _ in range(2))
    assert cache.update(0, k, v)[0].dtype == torch.bfloat16
    assert cache.to_mems().dtype == torch.bfloat16


@pytest.mark.parametrize("count", [-1, 6])
def test_forgetting_more_than_there_is_is_refused(count: int) -> None:
    cache, _ = filled()
    with pytest.raises(HookCallError, match=f"cannot forget {count} positions: the cache holds 5"):
        cache.trim(count)


def test_keeping_a_negative_number_is_refused() -> None:
    cache, _ = filled()
    with pytest.raises(HookCallError, match="cannot keep -1 positions"):
        cache.keep_newest(-1)


def test_another_batch_size_is_refused() -> None:
    cache, _ = filled()
    with pytest.raises(HookCallError, match="holds a batch of 2 and this call has 3"):
        write(cache, new(3, 1))


def test_an_empty_cache_has_no_mems() -> None:
    with pytest.raises(HookCallError, match="no layer has written"):
        KVCache(LAYERS).to_mems()


@pytest.mark.parametrize(("shape", "heads"), [((2, 5, 24), 3), ((2, 2, 5, 24), 5)])
def test_mems_of_another_shape_are_refused(shape: tuple[int, ...], heads: int) -> None:
    with pytest.raises(HookCallError, match=f"with {heads} key-value heads it is"):
        KVCache.from_mems(torch.zeros(shape), num_key_value_heads=heads)
