"""Reading, packing and ordering data beside the usual ways, in one process.

    python benchmarks/data.py [--rounds 9] [--only packing]

Random access to JSONL beside `datasets`; windows of a token file beside a plain loop over a NumPy memory map; our
loader beside torch's over `datasets`; how full packed rows are beside padding and greedy packing, on documents as
people wrote them; and what the order of samples holds in memory, for ten thousand of them and for a hundred million.
"""

import argparse
import ast
import json
import re
import sysconfig
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import tokenizers
from measure import Timing, alternate, describe_machine, ratio
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader

from swissarmy.data.loading.collate import CausalCollator, Padding
from swissarmy.data.loading.loader import Loader
from swissarmy.data.order.blend import Blend
from swissarmy.data.order.sample_order import SampleOrder
from swissarmy.data.samples.encoders import TextEncoder, TokensEncoder
from swissarmy.data.samples.examples import Examples
from swissarmy.data.samples.packing import best_fit
from swissarmy.data.samples.pieces import cut_up
from swissarmy.data.sources.open import open_source
from swissarmy.data.sources.token_file import write_token_file
from swissarmy.data.sources.tokens import TokenWindows
from swissarmy.data.tokenizer import Tokenizer

Sizes = NDArray[np.int64]

KJV = Path(__file__).parents[1] / "examples" / "data" / "kjv_gospels_and_acts.txt"
LENGTH = 2048
READS = 2048
"""Records that are read in one run, at random."""
BATCH = 32


# Reading


def jsonl(folder: Path, rounds: int) -> None:
    """One record at a time, at random, from JSONL; `datasets` has converted the file to Arrow before."""
    verses = [line for line in KJV.read_text(encoding="utf-8").splitlines() if line]
    for per_record in (2, 16):
        path = folder / f"verses-{per_record}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number in range(50_000):
                chosen = (verses[(number + offset) % len(verses)] for offset in range(per_record))
                file.write(json.dumps({"id": number, "text": " ".join(chosen)}) + "\n")
        ours = open_source(path)
        theirs = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "arrow"))
        places = np.random.default_rng(0).integers(0, len(ours), READS).tolist()
        assert len(ours) == len(theirs)
        assert all(ours[place] == theirs[place] for place in places)
        num_bytes = path.stat().st_size / len(ours)
        candidates = {"swissarmy": reader(ours.__getitem__, places), "datasets": reader(theirs.__getitem__, places)}
        title = f"JSONL, random access, {num_bytes:.0f} bytes a record"
        print_rates(title, alternate(candidates, rounds=rounds), num_bytes, baseline="datasets")


def tokens(folder: Path, rounds: int) -> None:
    """Windows of 2049 tokens at random, as int64, from 50 million uint16."""
    path, size = folder / "random.tokens", 50_000_000
    with write_token_file(path, vocab_size=50257, made_of="random") as writer:
        writer.add(np.random.default_rng(0).integers(0, 50257, size), where="random")
    ours = TokenWindows(path, LENGTH + 1, stride=LENGTH)
    plain = np.memmap(path, np.uint16, mode="r", offset=4096, shape=(size,))
    places = np.random.default_rng(1).integers(0, len(ours), READS).tolist()

    def loop() -> None:
        for place in places:
            start = place * LENGTH
            plain[start : start + LENGTH + 1].astype(np.int64)

    assert all((ours[place]["input_ids"] == plain[place * LENGTH :][: LENGTH + 1]).all() for place in places)
    candidates = {"swissarmy": reader(ours.__getitem__, places), "NumPy loop": loop}
    timings = alternate(candidates, rounds=rounds)
    print_rates(f"tokens, random windows of {LENGTH + 1}", timings, 2 * (LENGTH + 1), baseline="NumPy loop")


def reader(read: Callable[[int], object], places: Sequence[int]) -> Callable[[], None]:
    """Reads every place once."""

    def run() -> None:
        for place in places:
            read(place)

    return run


# Loading


def loader(folder: Path, rounds: int) -> None:
    """Batches of 32 in shuffled order, padded by the same collator, without workers: from text, and from token ids."""
    chapters = kjv_chapters()
    backend = train_tokenizer(chapters)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": "</s>", "pad_token": "</s>"})
    texts = [line for chapter in chapters for line in chapter.splitlines() if line] * 8
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    encode = TextEncoder(tokenizer=tokenizer)
    ids = [encode({"text": text}, where="")["input_ids"] for text in texts]
    with write_token_file(folder / "lines.tokens", vocab_size=len(tokenizer), made_of="lines") as writer:
        for document in ids:
            writer.add(document, where="lines")

    collate = CausalCollator(padding=Padding(pad_id=0))
    arrow = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "arrow"))
    arrow_ids = datasets.Dataset.from_dict({"input_ids": ids}).with_format("numpy")
    ours = {
        "text": Examples(open_source(path), encode),
        "token ids": Examples(open_source(folder / "lines.tokens"), TokensEncoder()),
    }
    theirs = {"text": (arrow, encode), "token ids": (arrow_ids, TokensEncoder())}
    for kind, samples in ours.items():
        order = SampleOrder([len(samples)], Blend([1]), seed=0)
        own = Loader([samples], order, collate, global_batch_size=BATCH)
        dataset, encoder = theirs[kind]
        usual = DataLoader(
            dataset,
            batch_size=BATCH,
            shuffle=True,
            collate_fn=lambda records, encoder=encoder: collate([encoder(each, where="") for each in records]),
        )
        candidates = {"swissarmy": first_batches(own), "torch + datasets": first_batches(usual)}
        num_bytes = sum(len(text.encode()) for text in texts) / len(texts)
        title = f"batches of {BATCH}, from {kind} ({num_bytes:.0f} bytes of text a record)"
        print_rates(title, alternate(candidates, rounds=rounds), num_bytes, baseline="torch + datasets")


def first_batches(batches: Iterable[object]) -> Callable[[], None]:
    """Reads as many batches as make up `READS` records."""

    def run() -> None:
        for _ in zip(range(READS // BATCH), batches, strict=False):
            pass

    return run


# Packing


def packing(folder: Path, rounds: int) -> None:
    """The share of real tokens in rows of 2048: documents as people wrote them, long ones split by all alike."""
    del folder, rounds
    table = Table(title=f"real tokens in rows of {LENGTH}, percent", title_justify="left")
    ways: dict[str, Callable[[Sizes], float]] = {
        "padding": padded,
        "greedy": greedy,
        "first fit": first_fit,
        "swissarmy": packed,
        "at most": at_most,
    }
    for heading in ("documents", "number", "mean", *ways):
        table.add_column(heading, justify="left" if heading == "documents" else "right")
    for name, lengths in real_lengths().items():
        shuffled = np.random.default_rng(0).permutation(lengths)
        sizes = cut_up(shuffled, LENGTH, "split").sizes
        shares = [f"{100 * way(sizes):.2f}" for way in ways.values()]
        table.add_row(name, str(len(lengths)), f"{lengths.mean():.0f}", *shares)
    Console(width=100).print(table)
    for number in (10**4, 10**5, 10**6, 10**7):
        sizes = np.exp(np.random.default_rng(0).normal(5.5, 1.1, number)).astype(np.int64).clip(1, LENGTH)
        start = time.perf_counter()
        best_fit(sizes, LENGTH, key=0)
        print(f"packing {number} documents of log-normal lengths: {time.perf_counter() - start:.2f} s")


def padded(sizes: Sizes) -> float:
    """Batches of 8, padded to the longest."""
    batches = [sizes[start : start + 8] for start in range(0, len(sizes), 8)]
    return float(sizes.sum() / sum(batch.max() * len(batch) for batch in batches))


def greedy(sizes: Sizes) -> float:
    """One row at a time, closed when the next document does not fit."""
    rows, room = 0, 0
    for size in sizes.tolist():
        if size > room:
            rows, room = rows + 1, LENGTH
        room -= size
    return float(sizes.sum() / (rows * LENGTH))


def first_fit(sizes: Sizes) -> float:
    """Each document, as it comes, into the first of all rows that has room."""
    rooms, rows = np.zeros(len(sizes), np.int64), 0
    for size in sizes.tolist():
        row = int(np.argmax(rooms[:rows] >= size)) if rows else 0
        if rows == 0 or rooms[row] < size:
            row, rows = rows, rows + 1
            rooms[row] = LENGTH
        rooms[row] -= size
    return float(sizes.sum() / (rows * LENGTH))


def packed(sizes: Sizes) -> float:
    """Ours."""
    order, row_starts = best_fit(sizes, LENGTH, key=0)
    fills = [int(sizes[order[start:stop]].sum()) for start, stop in pairwise(row_starts)]
    assert max(fills) <= LENGTH
    assert sum(fills) == sizes.sum()
    return sum(fills) / (len(fills) * LENGTH)


def at_most(sizes: Sizes) -> float:
    """What no packing of whole pieces can exceed: rows are whole, and no two pieces over half a row share one."""
    rows = max(-(-int(sizes.sum()) // LENGTH), int((sizes > LENGTH // 2).sum()))
    return float(sizes.sum() / (rows * LENGTH))


def real_lengths() -> dict[str, Sizes]:
    """Token counts of texts that are on every machine, by a tokenizer of 8192 tokens trained on them."""
    chapters = kjv_chapters()
    sources = [path.read_text(encoding="utf-8") for path in Path(sysconfig.get_paths()["stdlib"]).glob("*.py")]
    texts = {
        "verses of the Gospels": [line for chapter in chapters for line in chapter.splitlines() if line],
        "chapters of the Gospels": chapters,
        "definitions in Python": [code for source in sources for code in definitions(source)],
        "files of Python": sources,
    }
    backend = train_tokenizer([*chapters, *sources])
    return {
        name: np.array([max(1, len(each)) for each in backend.encode_batch(documents)], dtype=np.int64)
        for name, documents in texts.items()
    }


def kjv_chapters() -> list[str]:
    """Each with its heading."""
    return re.split(r"^(?=\w+ \d+$)", KJV.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]


def train_tokenizer(texts: Sequence[str]) -> tokenizers.Tokenizer:
    """A byte-level one of 8192 tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def definitions(source: str) -> Iterator[str]:
    """Functions, and classes, of one file of Python."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno is not None:
            yield "".join(lines[node.lineno - 1 : node.end_lineno])


# Order


def order(folder: Path, rounds: int) -> None:
    """What an order over four parts holds, and what finding 4096 samples of it takes at most, in KiB."""
    del folder, rounds
    table = Table(title="memory of the order of samples, KiB", title_justify="left")
    for heading in ("samples", "made", "peak of 4096 samples", "a list of indices"):
        table.add_column(heading, justify="right")
    small = SampleOrder([10], Blend([1]))
    small.rows(small.places(np.arange(10)))  # what is imported and cached once is not counted
    for samples in (10**4, 10**5, 10**6, 10**7, 10**8):
        tracemalloc.start()
        ours = SampleOrder([samples // 4] * 4, Blend([4, 3, 2, 1]), seed=0)
        made = tracemalloc.get_traced_memory()[0]
        ours.rows(ours.places(np.arange(4096) + samples // 2))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        table.add_row(f"{samples:.0e}", f"{made / 1024:.0f}", f"{peak / 1024:.0f}", f"{8 * samples / 1024:.0f}")
    Console(width=100).print(table)


# The command


def print_rates(title: str, timings: Mapping[str, Timing], num_bytes: float, *, baseline: str) -> None:
    """Print thousand records a second (median, least, greatest), MB a second, and the ratio to `baseline`."""
    table = Table(title=title, title_justify="left")
    table.add_column("candidate")
    for heading in ("1000/s", "least", "greatest", "MB/s", f"ratio to {baseline}"):
        table.add_column(heading, justify="right")
    for name, timing in timings.items():
        rates = [READS / seconds / 1000 for seconds in (timing.median, timing.max, timing.min)]
        figures = [*(f"{rate:.1f}" for rate in rates), f"{rates[0] * num_bytes / 1000:.1f}"]
        table.add_row(name, *figures, f"{ratio(timings[baseline], timing):.2f}")
    Console(width=100).print(table)


def main() -> None:
    """Measure and print."""
    sections = {"jsonl": jsonl, "tokens": tokens, "loader": loader, "packing": packing, "order": order}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=sections, help="one section")
    options = parser.parse_args()
    print(f"{describe_machine()}, datasets {datasets.__version__}")
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        for name, section in sections.items():
            if options.only in (None, name):
                section(Path(folder), options.rounds)


if __name__ == "__main__":
    main()
