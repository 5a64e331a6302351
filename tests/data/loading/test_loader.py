"""The loader: the same samples whatever the ranks and workers, resumed anywhere, and bad data said and survived."""

import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import ConfigError
from swissarmy.data.loading.batches import Ask, LoaderError
from swissarmy.data.loading.bucketing import Bucketing, bucket
from swissarmy.data.loading.loader import FingerprintError, Loader
from swissarmy.data.order.blend import Blend
from swissarmy.data.order.sample_order import OneByOne, SampleOrder
from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.stream import Stream


@dataclass
class Numbers:
    """Records `name:index`; some are bad, and some end the process that reads them."""

    name: str
    length: int
    bad: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    deadly: frozenset[int] = frozenset()
    slow: frozenset[int] = frozenset()
    reads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        self.reads.append(index)
        if index in self.bad:
            raise RecordError(f"{self.where(index)}: bad")
        if index in self.broken:
            raise ZeroDivisionError("a bug of the user's")
        if index in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.slow:
            time.sleep(2)
        return {"id": f"{self.name}:{index}", "value": torch.tensor(index)}

    @property
    def fingerprint(self) -> str:
        return f"{self.name} of {self.length}"

    def where(self, index: int) -> str:
        return f"{self.name}.jsonl:{index + 1}"


def ids(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    return [sample["id"] for sample in samples]


def flat(batches: Sequence[Sequence[str]]) -> list[str]:
    return list(chain.from_iterable(batches))


def loader(*parts: Any, weights: Sequence[float] = (2, 1), seed: int = 5, **options: Any) -> Loader:
    parts = parts or (Numbers("a", 37), Numbers("b", 11))
    lengths = [len(part) if isinstance(part, Numbers) else None for part in parts]
    order = SampleOrder(lengths, Blend(weights[: len(parts)]), seed=seed)
    return Loader(parts, order, ids, **{"global_batch_size": 8, **options})


def steps(loader: Loader, number: int) -> list[list[str]]:
    """The samples of so many steps of one rank, all micro-batches of a step together."""
    accumulation = loader.batches.layout.accumulation
    micro = list(islice(loader, number * accumulation))
    return [flat(micro[step * accumulation : (step + 1) * accumulation]) for step in range(number)]


def global_steps(number: int, world_size: int, accumulation: int = 1, **options: Any) -> list[list[str]]:
    """The same for all ranks, in the documented order: slice by slice."""
    ranks = [
        list(
            islice(
                loader(rank=rank, world_size=world_size, accumulation=accumulation, **options), number * accumulation
            )
        )
        for rank in range(world_size)
    ]
    return [
        [
            sample
            for micro in range(accumulation)
            for rank in range(world_size)
            for sample in ranks[rank][step * accumulation + micro]
        ]
        for step in range(number)
    ]


# The order


@pytest.mark.parametrize(
    ("world_size", "accumulation", "num_workers"), [(1, 4, 0), (2, 1, 0), (4, 1, 0), (2, 2, 0), (1, 1, 2), (2, 2, 2)]
)
def test_the_global_order_is_the_same_for_all_ranks_micro_batches_and_workers(
    world_size: int, accumulation: int, num_workers: int
) -> None:
    assert global_steps(6, world_size, accumulation, num_workers=num_workers) == global_steps(6, 1)


def test_another_seed_is_another_order() -> None:
    assert steps(loader(seed=1), 3) != steps(loader(seed=2), 3)


def test_it_follows_the_order_of_samples() -> None:
    order = SampleOrder([37, 11], Blend([2, 1]), seed=5)
    places = order.places(np.arange(2400))
    rows = [f"{'ab'[part]}:{row}" for part, row in zip(places.parts, order.rows(places), strict=True)]
    assert flat(steps(loader(), 300)) == rows


def test_places_are_found_for_many_steps_at_once_and_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    places = SampleOrder.places

    def counted(self: SampleOrder, samples: Any) -> Any:
        asked.append(len(samples))
        return places(self, samples)

    monkeypatch.setattr(SampleOrder, "places", counted)
    run = loader(rank=1, world_size=2, accumulation=2)
    together = steps(run, 300)
    assert asked == [1024, 1024]
    for step in (0, 255, 256, 299):
        run.load_state_dict({**run.state_dict(), "step": step})
        assert steps(run, 1) == together[step : step + 1]


# The numbers of samples


def named(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"ids": ids(samples)}


def numbered_loader(**options: Any) -> Loader:
    order = SampleOrder([37, 11], Blend([2, 1]), seed=5)
    return Loader((Numbers("a", 37), Numbers("b", 11)), order, named, **{"global_batch_size": 8, **options})


@pytest.mark.parametrize("bucketed", [False, True])
def test_batches_say_which_samples_of_the_run_they_have(bucketed: bool) -> None:
    lengths = [np.arange(37) % 5, np.arange(11) % 5]
    bucketing = Bucketing(lengths=lengths, window=2, seed=1) if bucketed else None
    in_order = flat(steps(loader(), 12))
    found: dict[int, str] = {}
    for rank in range(2):
        run = numbered_loader(rank=rank, world_size=2, accumulation=2, bucketing=bucketing)
        for batch in islice(run, 24):
            assert batch["sample_ids"].dtype == torch.int64
            found |= zip(batch["sample_ids"].tolist(), batch["ids"], strict=True)
    assert [found[number] for number in range(96)] == in_order


def test_samples_carry_their_number_and_what_takes_a_bad_ones_place_has_its() -> None:
    seen: list[list[tuple[int, str]]] = []

    def collate(samples: Sequence[Mapping[str, Any]]) -> None:
        seen.append([(int(sample["sample_ids"]), sample["id"]) for sample in samples])

    source, order = Numbers("a", 8, bad=frozenset({3})), OneByOne([8])
    list(Loader((source,), order, collate, global_batch_size=5, on_bad_record="skip"))
    assert seen == [[(n, f"a:{n}") for n in (0, 1, 2, 4)], [(n, f"a:{n}") for n in (5, 6, 7)]]
    endless = SampleOrder([8], Blend([1]), seed=0)
    list(Loader((source,), endless, collate, global_batch_size=8, num_steps=1, on_bad_record="skip"))
    assert [number for number, _ in seen[2]] == list(range(8))


# Resuming


@settings(max_examples=12)
@given(st.integers(0, 30), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_resuming_at_any_step_equals_the_uninterrupted_stream(done: int, world_size: int, accumulation: int) -> None:
    for rank in range(world_size):
        shape = {"rank": rank, "world_size": world_size, "accumulation": accumulation}
        whole, first, second = (loader(**shape) for _ in range(3))
        steps(first, done)
        second.load_state_dict(first.state_dict())
        assert steps(second, 3) == steps(whole, done + 3)[done:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_with_workers_equals_the_uninterrupted_stream(num_workers: int) -> None:
    first, second = loader(num_workers=num_workers), loader(num_workers=num_workers)
    steps(first, 4)
    assert first.state_dict()["step"] == 4  # not what the workers have read ahead
    second.load_state_dict(first.state_dict())
    assert steps(second, 3) == steps(loader(), 7)[4:]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_resuming_on_other_ranks_keeps_the_global_order(before: int, after: int) -> None:
    state = None
    for rank in range(before):
        run = loader(rank=rank, world_size=before)
        steps(run, 3)
        assert state in (None, run.state_dict())
        state = run.state_dict()
    resumed = [loader(rank=rank, world_size=after) for rank in range(after)]
    for run in resumed:
        run.load_state_dict(state)
    pieces = [steps(run, 2) for run in resumed]
    together = [[sample for piece in pieces for sample in piece[step]] for step in range(2)]
    assert together == steps(loader(), 5)[3:]


def test_resuming_far_away_reads_no_more_than_at_the_start() -> None:
    reads = []
    for step in (0, 1_000_000):
        source = Numbers("a", 1000)
        run = loader(source)
        run.load_state_dict({**run.state_dict(), "step": step})
        steps(run, 2)
        reads.append(len(source.reads))
    assert reads == [16, 16]


def test_a_step_that_was_broken_off_begins_again() -> None:
    run = loader(accumulation=2)
    first = list(islice(run, 3))
    assert run.state_dict()["step"] == 1
    assert next(iter(run)) == first[2]


def test_iterating_again_goes_on() -> None:
    run = loader(num_steps=5)
    assert steps(run, 2) + list(run) == steps(loader(), 5)
    assert list(run) == []


def test_what_goes_to_workers_can_be_sent_to_a_process_that_was_spawned() -> None:
    batches = loader().batches
    copy = pickle.loads(pickle.dumps(batches))
    assert copy[Ask(3, 0, {})] == batches[Ask(3, 0, {})]


def test_a_state_is_small_and_plain() -> None:
    state = loader().state_dict()
    assert len(repr(state)) < 500
    assert state["step"] == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 6}, "seed was 5 and is 6"),
        ({"weights": (1, 1)}, r"weights was .*2/3.* and is .*1/2"),
        ({"global_batch_size": 16}, "global batch size was 8 and is 16"),
        ({"bucketing": Bucketing(lengths=[np.ones(37), np.ones(11)])}, "bucketing was off and is windows of 64"),
    ],
)
def test_changed_settings_are_an_error_that_names_them(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(FingerprintError, match=message):
        loader(**changed).load_state_dict(loader().state_dict())


def test_changed_data_is_an_error_unless_allowed(caplog: pytest.LogCaptureFixture) -> None:
    state = {**loader().state_dict(), "step": 3}
    grown = loader(Numbers("a", 38), Numbers("b", 11))
    with pytest.raises(FingerprintError, match=r"(?s)step 3.*source 1 was a of 37 and is a of 38.*allow"):
        grown.load_state_dict(state)
    assert grown.step == 0
    with caplog.at_level(logging.WARNING):
        grown.load_state_dict(state, allow_data_change=True)
    assert grown.step == 3
    assert "source 1 was a of 37 and is a of 38" in caplog.text


def test_another_batch_size_says_where_the_order_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    other = loader(global_batch_size=4)
    with caplog.at_level(logging.WARNING):
        other.load_state_dict({**loader().state_dict(), "step": 3}, allow_data_change=True)
    assert "goes on at number 12: steps are counted, and before they had 8 samples each" in caplog.text


def test_only_what_changed_is_named() -> None:
    with pytest.raises(FingerprintError) as caught:
        loader(seed=6).load_state_dict(loader().state_dict())
    assert "weights" not in str(caught.value)
    assert "source" not in str(caught.value)


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(DataError, match="no fingerprint, streams"):
        loader().load_state_dict({"step": 1})
    with pytest.raises(DataError, match="step=-1"):
        loader().load_state_dict({**loader().state_dict(), "step": -1})


# Bad records


def test_a_bad_record_ends_the_run_with_its_place() -> None:
    with pytest.raises(RecordError, match=r"^a.jsonl:8: bad"):
        steps(loader(Numbers("a", 20, bad=frozenset({7}))), 5)


def test_a_worker_passes_a_bad_record_on() -> None:
    with pytest.raises(RecordError, match=r"^a.jsonl:8: bad \(worker \d of 2\)$"):
        steps(loader(Numbers("a", 20, bad=frozenset({7})), num_workers=2), 5)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (4, 0), (1, 2)])
def test_the_next_row_of_the_permutation_stands_in_for_a_skipped_one(world_size: int, num_workers: int) -> None:
    bad = frozenset({3, 7, 8})
    sound = flat(steps(loader(Numbers("a", 20)), 5))

    def stands_in(at: int) -> str:
        start, place = at // 20 * 20, at % 20
        turn = [sound[start + (place + ahead) % 20] for ahead in range(20)]
        return next(sample for sample in turn if int(sample[2:]) not in bad)

    wanted = [stands_in(at) for at in range(40)]
    runs = [
        loader(
            Numbers("a", 20, bad=bad),
            on_bad_record="skip",
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        for rank in range(world_size)
    ]
    pieces = [steps(run, 5) for run in runs]
    assert [sample for step in range(5) for piece in pieces for sample in piece[step]] == wanted


def test_skipped_records_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    run = loader(Numbers("a", 20, bad=frozenset({7, 9})), on_bad_record="skip")
    with caplog.at_level(logging.WARNING):
        steps(run, 10)
    assert sorted(run.bad_records) == ["a.jsonl:10: bad", "a.jsonl:8: bad"]
    assert caplog.text.count("a.jsonl:8: bad") == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_records_end_the_run(num_workers: int) -> None:
    run = loader(
        Numbers("a", 100, bad=frozenset(range(0, 100, 5))),
        on_bad_record="skip",
        max_bad_records=3,
        num_workers=num_workers,
    )
    with pytest.raises(RecordError, match="bad; there are more than max_bad_records=3 like it"):
        steps(run, 20)


def test_a_source_in_which_all_is_bad_ends_the_run() -> None:
    with pytest.raises(RecordError, match="no good record among 5"):
        steps(loader(Numbers("a", 3, bad=frozenset(range(3))), on_bad_record="skip", max_bad_records=5), 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unforeseen_error_names_the_record(num_workers: int) -> None:
    run = loader(Numbers("a", 8, broken=frozenset({3})), num_workers=num_workers)
    with pytest.raises(LoaderError, match=r"a.jsonl:4.*ZeroDivisionError: a bug of the user's"):
        steps(run, 1)


def test_an_error_of_the_collator_names_the_step() -> None:
    def broken(samples: Sequence[Mapping[str, Any]]) -> None:
        raise KeyError("x")

    run = Loader([Numbers("a", 8)], SampleOrder([8], Blend([1])), broken, global_batch_size=8)
    with pytest.raises(
        LoaderError, match=r"step 0, micro-batch 0 \(a.jsonl:\d to a.jsonl:\d\): cannot collate: KeyError"
    ):
        next(iter(run))


def no_process_is_left() -> bool:
    """Within a moment: those that were ended have yet to be collected."""
    end = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.01)
    return not multiprocessing.active_children()


def test_a_worker_that_dies_ends_the_run_and_leaves_no_process() -> None:
    run = loader(Numbers("a", 64, deadly=frozenset({20})), num_workers=2)
    with pytest.raises(LoaderError, match=r"step \d, micro-batch 0 \(a.jsonl:\d+ to a.jsonl:\d+\).*[Ww]orker"):
        steps(run, 8)
    assert no_process_is_left()


def read_and_die(pids: Any) -> None:
    """Tell the numbers of two workers, and be killed while they read on."""
    batches = iter(loader(Numbers("a", 64), num_workers=2))
    next(batches)
    pids.send([each.pid for each in multiprocessing.active_children()])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_the_process_that_they_read_for(method: str) -> None:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    killed = multiprocessing.get_context(method).Process(target=read_and_die, args=(sending,))
    killed.start()
    pids = receiving.recv()
    killed.join()
    assert len(pids) == 2
    while any(is_running(pid) for pid in pids):
        time.sleep(0.01)  # the test's time limit ends this


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_worker_that_hangs_ends_the_run_and_leaves_no_process() -> None:
    run = loader(Numbers("a", 8, slow=frozenset({3})), num_workers=1, worker_timeout=0.5)
    with pytest.raises(LoaderError, match=r"step 0.*timed out"):
        steps(run, 1)
    assert no_process_is_left()


def test_a_run_that_is_left_early_leaves_no_process() -> None:
    batches = iter(loader(num_workers=2))
    next(batches)
    del batches
    assert no_process_is_left()


def test_loading_draws_nothing_from_the_model_s_random_numbers() -> None:
    before = torch.get_rng_state()
    steps(loader(num_workers=1), 1)
    assert torch.equal(torch.get_rng_state(), before)


# Evaluation


def evaluation(world_size: int, *sources: Numbers, **options: Any) -> list[list[list[str]]]:
    """For each rank, its batches."""
    order = OneByOne([len(source) for source in sources])
    return [
        list(Loader(sources, order, ids, global_batch_size=8, rank=rank, world_size=world_size, **options))
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 17, 24])
def test_evaluation_gives_every_row_once_and_every_rank_as_many_batches(world_size: int, length: int) -> None:
    ranks = evaluation(world_size, Numbers("a", length), Numbers("b", 3))
    wanted = [*(f"a:{row}" for row in range(length)), *(f"b:{row}" for row in range(3))]
    assert [sample for batch in zip(*ranks, strict=True) for piece in batch for sample in piece] == wanted
    assert {len(batches) for batches in ranks} == {-(-(length + 3) // 8)}


def test_evaluation_begins_anew_each_time() -> None:
    run = Loader([Numbers("a", 9)], OneByOne([9]), ids, global_batch_size=8)
    assert next(iter(run)) == next(iter(run))
    assert list(run) == list(run)
    assert [len(batch) for batch in run] == [8, 1]
    iterator = iter(run)
    next(iterator)
    assert run.state_dict()["step"] == 1


def test_evaluation_leaves_a_bad_record_out() -> None:
    (batches,) = evaluation(1, Numbers("a", 9, bad=frozenset({4})), on_bad_record="skip")
    assert flat(batches) == [f"a:{row}" for row in range(9) if row != 4]


# Bucketing


def test_bucketing_keeps_the_samples_of_each_window() -> None:
    lengths = [np.arange(37) % 10 + 1, np.arange(11) + 1]
    bucketing = Bucketing(lengths=lengths, window=4)
    plain, bucketed = steps(loader(), 12), steps(loader(bucketing=bucketing), 12)
    spreads = [0, 0]
    for window in range(0, 12, 4):
        pair = plain[window : window + 4], bucketed[window : window + 4]
        assert sorted(flat(pair[0])) == sorted(flat(pair[1]))
        for number, batches in enumerate(pair):
            sizes = [[int(lengths["ab".index(s[0])][int(s[2:])]) for s in batch] for batch in batches]
            spreads[number] += sum(max(batch) - min(batch) for batch in sizes)
    assert spreads[1] < spreads[0] / 2
    assert global_steps(6, 2, 2, bucketing=bucketing) == steps(loader(bucketing=bucketing), 6)


def test_a_window_is_sorted_once_and_not_for_each_of_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_windows: list[int] = []

    def counted(lengths: Any, batch_size: int, key: int) -> Any:
        sorted_windows.append(key)
        return bucket(lengths, batch_size, key)

    monkeypatch.setattr("swissarmy.data.loading.batches.bucket", counted)
    steps(loader(bucketing=Bucketing(lengths=[np.ones(37), np.ones(11)], window=12), accumulation=2), 140)
    assert len(sorted_windows) == len(set(sorted_windows)) >= 140 // 12


# Streams


class Letters:
    """A stream of records that ends after some time."""

    def __init__(self, name: str, length: int, bad: frozenset[int] = frozenset()) -> None:
        self.name, self.length, self.bad = name, length, bad

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.length):
            yield None if index in self.bad else {"id": f"{self.name}:{index}"}


def streaming(bad: frozenset[int] = frozenset(), **options: Any) -> Loader:
    return loader(Numbers("a", 37), Stream(Letters("s", 7, bad), name="s"), **options)


def test_a_stream_is_drawn_from_in_its_own_order_again_and_again() -> None:
    drawn = [sample for sample in flat(steps(streaming(), 6)) if sample.startswith("s")]
    assert drawn == [f"s:{number % 7}" for number in range(16)]


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (4, 0), (1, 2)])
def test_every_rank_and_worker_sees_its_slice_of_the_stream(world_size: int, num_workers: int) -> None:
    ranks = [
        steps(streaming(rank=rank, world_size=world_size, num_workers=num_workers), 5) for rank in range(world_size)
    ]
    assert [[sample for rank in ranks for sample in rank[step]] for step in range(5)] == steps(streaming(), 5)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_resumes_where_the_run_was_and_not_where_reading_was(num_workers: int) -> None:
    whole = steps(streaming(), 9)
    for done in (0, 1, 4):
        first, second = streaming(num_workers=num_workers), streaming(num_workers=num_workers)
        assert steps(first, done) == whole[:done]
        second.load_state_dict(first.state_dict())
        assert steps(second, 4) == whole[done : done + 4]
        assert steps(first, 2) == whole[done : done + 2]  # and so does the first when it is iterated again


def test_a_bad_record_of_a_stream_is_passed_over() -> None:
    run = streaming(frozenset({2, 3}), on_bad_record="skip")
    drawn = [sample for sample in flat(steps(run, 4)) if sample.startswith("s")]
    assert drawn[:6] == ["s:0", "s:1", "s:4", "s:5", "s:6", "s:0"]
    with pytest.raises(RecordError, match="record 2"):
        steps(streaming(frozenset({2})), 4)


def test_a_stream_without_records_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(DataError, match="no good records"):
        steps(loader(Numbers("a", 5), Stream(Letters("s", 0), name="s")), 1)


def test_a_stream_in_which_all_is_bad_is_an_error_and_no_endless_loop() -> None:
    class Hopeless:
        fingerprint = "hopeless"

        def __iter__(self) -> Iterator[Any]:
            raise RecordError("hopeless: bad")

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            pass

        def where(self) -> str:
            return "hopeless"

    with pytest.raises(DataError, match="hopeless: the stream has no good records"):
        steps(loader(Numbers("a", 5), Hopeless(), on_bad_record="skip", max_bad_records=9), 1)


# What does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 3}, r"global_batch_size=8 cannot be shared by 3 ranks in 1 micro-batches; 6 or 9 can"),
        ({"world_size": 4, "accumulation": 4}, "16 can"),
        ({"rank": 2, "world_size": 2}, "rank=2 is none of 0 to 1"),
        ({"global_batch_size": 0}, "must be at least 1"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(**options)


def test_a_dataset_that_is_no_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="list is neither a source nor a stream; `as_source`"):
        Loader([[1, 2]], SampleOrder([2], Blend([1])), ids, global_batch_size=1)  # type: ignore[list-item]
