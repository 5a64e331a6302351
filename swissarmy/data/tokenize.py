"""From a source of token samples to a token file: in parallel, and restartable at any point.

The records are cut into parts of a fixed number. Each part becomes a token file of its own in `<out>.parts`, complete
or absent; when all are there they are joined. A run that was killed is continued by running it again: parts that are
there are verified and kept. Which process made a part, and when, does not show in the result.
"""

import logging
import multiprocessing
import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from typing import Any, final

from swissarmy.data.source import DataError, RecordError, Source, digest
from swissarmy.data.sources.token_file import TokenFile, TokenFileWriter, TokenHeader, write_token_file

log = logging.getLogger(__name__)

_MOST_PARTS = 1000
_SMALLEST_PART, _LARGEST_PART = 256, 65536
"""Records."""


@final
@dataclass(frozen=True)
class _Job:
    """What a worker is told once."""

    samples: Source
    folder: Path
    vocab_size: int
    part_records: int
    max_bad_records: int

    def path(self, part: int) -> Path:
        return self.folder / f"{part:06d}.tokens"

    def made_of(self, part: int) -> str:
        return digest("part", self.samples.fingerprint, self.part_records, part)

    def parts(self) -> range:
        return range(-(-len(self.samples) // self.part_records))

    def records(self, part: int) -> range:
        start = part * self.part_records
        return range(start, min(start + self.part_records, len(self.samples)))


def write_tokens(
    samples: Source,
    out: str | os.PathLike[str],
    *,
    vocab_size: int,
    num_workers: int = 1,
    max_bad_records: int = 0,
    part_records: int | None = None,
    progress: bool = False,
) -> TokenHeader:
    """Write the `input_ids` of every sample to a token file, in their order.

    With several workers, the script that calls this must be importable: `if __name__ == "__main__":` around the call.

    Args:
        samples: such as `Examples(open_source("a.jsonl"), TextEncoder(tokenizer=tokenizer))`.
        out: the file, by custom with the ending `.tokens`. One that was made of the same samples is kept as it is.
        vocab_size: every id must be below; decides whether an id takes two bytes or four.
        num_workers: processes.
        max_bad_records: how many bad records are left out, and logged, before the next one is an error.
        part_records: records in a part, for tests and odd cases; chosen by the length when omitted.
        progress: show a bar on standard error.

    Raises:
        RecordError: a record is bad.
        DataError: there are no samples, they are more than ids, `out` is something else, or a worker died.
        OSError: the file cannot be written.
    """
    target = Path(out)
    if num_workers < 1 or max_bad_records < 0 or (part_records is not None and part_records < 1):
        raise DataError(f"{num_workers=}, {max_bad_records=} and {part_records=} must be at least 1, 0 and 1")
    if target.exists():
        return _already(target, samples, vocab_size)
    if not len(samples):
        raise DataError("there are no samples to write")
    size = part_records or min(max(_SMALLEST_PART, -(-len(samples) // _MOST_PARTS)), _LARGEST_PART)
    job = _Job(samples, target.with_name(target.name + ".parts"), vocab_size, size, max_bad_records)
    job.folder.mkdir(parents=True, exist_ok=True)
    with _bar(len(job.parts()), shown=progress) as tick:
        for skipped in _make_parts(job, num_workers):
            tick()
            for message in skipped:
                log.warning("left out: %s", message)
    header = _join(job, target)
    shutil.rmtree(job.folder, ignore_errors=True)
    return header


def _already(target: Path, samples: Source, vocab_size: int) -> TokenHeader:
    header = TokenFile(target).header
    if (header.made_of, header.vocab_size) != (samples.fingerprint, vocab_size):
        raise DataError(f"{target} exists and was made of other data or settings: delete it, or choose another name")
    return header


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A bar on standard error, if wanted; gives what is called after each part."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console  # not before it is needed: importing it draws from the process's random numbers
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokenizing"), BarColumn(), MofNCompleteColumn(), TextColumn("parts"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=total)
        yield lambda: bar.advance(task)


def _make_parts(job: _Job, num_workers: int) -> Iterator[Sequence[str]]:
    """Make the parts that are missing; for each part, also those that are there, the bad records that it left out.

    Raises:
        RecordError: one record more is bad than may be.
    """
    left_out, missing = 0, []
    for part in job.parts():
        kept = _kept(job, part)
        if kept is None:
            missing.append(part)
        else:
            left_out += kept.skipped
            yield ()
    for bad in _run(job, missing, num_workers):
        left_out += len(bad)
        if left_out > job.max_bad_records:
            raise RecordError(_too_many(bad[-1], job.max_bad_records))
        yield bad


def _kept(job: _Job, part: int) -> TokenHeader | None:
    """What an earlier run made of a part, if that is whole and of the same data."""
    if not job.path(part).exists():
        return None
    try:
        file = TokenFile(job.path(part))
        if (file.header.made_of, file.header.vocab_size) != (job.made_of(part), job.vocab_size):
            return None
        file.verify()
    except DataError:
        return None
    return file.header


def _run(job: _Job, parts: Sequence[int], num_workers: int) -> Iterator[Sequence[str]]:
    """Make the parts, and give what was left out of each in their order, so that the first error is the first."""
    if num_workers == 1 or len(parts) < 2:
        yield from (_make(job, part) for part in parts)
        return
    workers = min(num_workers, len(parts))
    context = multiprocessing.get_context("spawn")
    running: deque[Future[Sequence[str]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            for part in parts:
                running.append(pool.submit(_make_here, part))
                if len(running) == 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was ended from outside (is the memory full?); what is done is kept: run it again"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_job: _Job | None = None
"""In a worker process, what it works at: sent once, not with every part."""


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_any([parent.sentinel])
        os._exit(1)


def _make_here(part: int) -> Sequence[str]:
    assert _job is not None
    return _make(_job, part)


def _make(job: _Job, part: int) -> Sequence[str]:
    """Write one part; gives what was said of the records that were left out.

    Raises:
        RecordError: this part alone has too many bad records.
    """
    bad: list[str] = []
    with write_token_file(job.path(part), vocab_size=job.vocab_size, made_of=job.made_of(part)) as writer:
        for index in job.records(part):
            try:
                _add(writer, job.samples[index], job.samples.where(index))
            except RecordError as error:
                bad.append(str(error))
                if len(bad) > job.max_bad_records:
                    raise RecordError(_too_many(str(error), job.max_bad_records)) from error
        writer.skipped = len(bad)
    return bad


def _add(writer: TokenFileWriter, sample: Any, where: str) -> None:
    others = sample.keys() - {"input_ids", "loss_mask"}
    if "input_ids" not in sample or others:
        raise DataError(f"{where}: a token file holds input_ids alone, and this sample has {', '.join(sample)}")
    if "loss_mask" in sample and not sample["loss_mask"][1:].all():
        raise DataError(f"{where}: a token file holds no loss mask, and part of this sample is not to be predicted")
    writer.add(sample["input_ids"], where=where)


def _too_many(message: str, allowed: int) -> str:
    return message if allowed == 0 else f"{message}\nMore than {allowed} records are bad; this was the last"


def _join(job: _Job, target: Path) -> TokenHeader:
    parts = [TokenFile(job.path(part)) for part in job.parts()]
    if not any(part.header.tokens for part in parts):
        raise DataError(f"{target} would be empty: no sample has a token")
    with write_token_file(target, vocab_size=job.vocab_size, made_of=job.samples.fingerprint) as writer:
        for part in parts:
            writer.append(part)
    return TokenFile(target).header
