"""What the examples share: the shipped text by verse, chapters that are held out, and how a run is told of."""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

TEXT = Path(__file__).parent / "data" / "kjv_gospels_and_acts.txt"
BOOKS = ("Matthew", "Mark", "Luke", "John", "The Acts")


class Chapter(NamedTuple):
    """A chapter; texts repeat each other within one more than across them, so that examples hold out whole ones."""

    book: str
    verses: tuple[str, ...]
    held_out: bool


def read_chapters(every: int = 5) -> list[Chapter]:
    """All 117 chapters in order, of which every fifth, say, is held out."""
    paragraphs = TEXT.read_text().strip().split("\n\n")
    chapters = []
    for number, (heading, body) in enumerate(zip(paragraphs[::2], paragraphs[1::2], strict=True), start=1):
        verses = tuple(re.sub(r"^\d+ ", "", line) for line in body.splitlines())
        chapters.append(Chapter(heading.rpartition(" ")[0], verses, number % every == 0))
    return chapters


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> str:
    """A `.jsonl` file; gives its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def argument_parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """For `output`, the run's folder, and `smoke`: whether it is to take a moment and prove nothing."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(output), help="the run's folder")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    return parser


def tell(**numbers: object) -> None:
    """The numbers of an example, as the last line that it prints."""
    print(json.dumps({name: round(each, 4) if isinstance(each, float) else each for name, each in numbers.items()}))
