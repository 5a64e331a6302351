"""From records to a token file: the same bytes however it was made, and whatever happened on the way."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from swissarmy.data import tokenize
from swissarmy.data.samples.encoders import TextEncoder
from swissarmy.data.samples.examples import Examples
from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.jsonl import JsonlSource
from swissarmy.data.sources.token_file import TokenFile
from swissarmy.data.tokenize import write_tokens
from swissarmy.data.tokenizer import Tokenizer

RECORDS = 40


def tokenizer() -> Tokenizer:
    """A word for each number, and one that ends a text."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<end>": 0} | {str(n): n + 1 for n in range(100)}, "<end>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend, special_tokens={"eos_token": "<end>"})


@pytest.fixture
def samples(tmp_path: Path) -> Examples:
    path = tmp_path / "a.jsonl"
    texts = (" ".join(str((n * k) % 100) for k in range(n % 7 + 1)) for n in range(RECORDS))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return examples(path)


def examples(path: Path) -> Examples:
    return Examples(JsonlSource(path), TextEncoder(tokenizer=tokenizer()), vocab_size=101)


def test_every_document_is_there_in_its_order(samples: Examples, tmp_path: Path) -> None:
    header = write_tokens(samples, tmp_path / "a.tokens", vocab_size=101, part_records=7)
    file = TokenFile(tmp_path / "a.tokens")
    file.verify()
    assert len(file) == header.documents == RECORDS
    for index in range(RECORDS):
        assert file.document(index).tolist() == samples[index]["input_ids"].tolist()
        assert file.document(index)[-1] == 0
    assert (header.made_of, header.vocab_size, header.dtype) == (samples.fingerprint, 101, "uint16")
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.tokens"]


def test_workers_write_what_one_process_writes_and_say_what_they_left_out(
    samples: Examples, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{\n")
    samples = examples(tmp_path / "a.jsonl")
    write_tokens(samples, tmp_path / "one", vocab_size=101, max_bad_records=1)
    write_tokens(samples, tmp_path / "two", vocab_size=101, max_bad_records=1, num_workers=2, part_records=9)
    assert [message.split(": ")[0] for message in caplog.messages] == ["left out"] * 2
    assert caplog.messages[0] == caplog.messages[1]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


class CountingSource:
    """Counts the records that are read; may fail at one."""

    def __init__(self, samples: Examples, fails_at: int | None = None) -> None:
        self.samples, self.fails_at, self.read = samples, fails_at, 0
        self.fingerprint = samples.fingerprint

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index == self.fails_at:
            raise KeyboardInterrupt
        self.read += 1
        return self.samples[index]

    def where(self, index: int) -> str:
        return self.samples.where(index)


def test_an_interrupted_run_keeps_what_is_done(samples: Examples, tmp_path: Path) -> None:
    out = tmp_path / "a.tokens"
    with pytest.raises(KeyboardInterrupt):
        write_tokens(CountingSource(samples, fails_at=25), out, vocab_size=101, part_records=10)
    assert not out.exists()
    again = CountingSource(samples)
    write_tokens(again, out, vocab_size=101, part_records=10)
    assert again.read == RECORDS - 20
    write_tokens(samples, tmp_path / "whole", vocab_size=101)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:4100] + bytes([data[4100] ^ 1]) + data[4101:], lambda _: b""]
)
def test_a_part_that_is_damaged_is_made_again(samples: Examples, tmp_path: Path, damage: Any) -> None:
    out = tmp_path / "a.tokens"
    with pytest.raises(KeyboardInterrupt):
        write_tokens(CountingSource(samples, fails_at=39), out, vocab_size=101, part_records=20)
    part = tmp_path / "a.tokens.parts" / "000000.tokens"
    assert TokenFile(part).header.documents == 20
    part.write_bytes(damage(part.read_bytes()))
    again = CountingSource(samples)
    write_tokens(again, out, vocab_size=101, part_records=20)
    assert again.read == RECORDS


def test_parts_of_other_data_are_not_used(samples: Examples, tmp_path: Path) -> None:
    out = tmp_path / "a.tokens"
    with pytest.raises(KeyboardInterrupt):
        write_tokens(CountingSource(samples, fails_at=25), out, vocab_size=101, part_records=10)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "7"}\n')
    changed = CountingSource(examples(tmp_path / "a.jsonl"))
    assert write_tokens(changed, out, vocab_size=101, part_records=10).documents == RECORDS + 1
    assert changed.read == RECORDS + 1


KILLED = """
import sys
from pathlib import Path
from tests.data.test_tokenize import examples
from swissarmy.data.tokenize import write_tokens

class Slow:
    # Says when it has got so far, and then waits for its end.
    def __init__(self, samples):
        self.samples, self.fingerprint, self.where = samples, samples.fingerprint, samples.where
    def __len__(self):
        return len(self.samples)
    def __getitem__(self, index):
        if index == 33:
            print("here", flush=True)
            import time; time.sleep(600)
        return self.samples[index]

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_tokens(Slow(examples(folder / "a.jsonl")), folder / "a.tokens", vocab_size=101, part_records=10,
                 num_workers=2)
"""


def children_of(process: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()}


def test_a_run_that_is_killed_is_continued_and_leaves_no_process(samples: Examples, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        parts = tmp_path / "a.tokens.parts"
        while sum(path.name.startswith("0") for path in parts.iterdir()) < 3:
            time.sleep(0.01)
        processes = children_of(child.pid)
        os.kill(child.pid, signal.SIGKILL)
    while any(Path(f"/proc/{process}").exists() for process in processes):
        time.sleep(0.01)  # the test's time limit ends this
    assert not (tmp_path / "a.tokens").exists()
    again = CountingSource(samples)
    write_tokens(again, tmp_path / "a.tokens", vocab_size=101, part_records=10)
    assert again.read == 10
    write_tokens(samples, tmp_path / "whole", vocab_size=101)
    assert (tmp_path / "a.tokens").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not parts.exists()


class Dies:
    """Ends the process that reads its last record, as a full memory would."""

    fingerprint = "dies"

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"input_ids": np.array([index])}

    def where(self, index: int) -> str:
        return f"record {index}"


def test_a_worker_that_dies_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a worker process was ended from outside.*run it again"):
        write_tokens(Dies(), tmp_path / "a.tokens", vocab_size=9, num_workers=2, part_records=2)


# Bad records


@pytest.fixture
def flawed(tmp_path: Path) -> Examples:
    lines = ['{"text": "1 2"}', "{", '{"txt": "3"}', '{"text": "4"}']
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    return examples(tmp_path / "b.jsonl")


def test_the_first_bad_record_is_an_error_with_its_line(flawed: Examples, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"^\S*b\.jsonl:2: not valid JSON"):
        write_tokens(flawed, tmp_path / "b.tokens", vocab_size=101, part_records=2)


def test_so_many_bad_records_are_left_out_and_logged(
    flawed: Examples, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=tokenize.__name__):
        header = write_tokens(flawed, tmp_path / "b.tokens", vocab_size=101, max_bad_records=2, part_records=1)
    assert (header.documents, header.skipped) == (2, 2)
    assert [line.split(": ", 1)[0] for line in caplog.messages] == ["left out"] * 2
    assert "b.jsonl:2: " in caplog.messages[0]
    assert "b.jsonl:3: there is no field 'text'. Did you mean 'txt'?" in caplog.messages[1]


@pytest.mark.parametrize("part_records", [1, 4])
def test_one_bad_record_too_many_is_an_error(flawed: Examples, tmp_path: Path, part_records: int) -> None:
    with pytest.raises(RecordError, match=r"b\.jsonl:3: (.|\n)*More than 1 records are bad"):
        write_tokens(flawed, tmp_path / "b.tokens", vocab_size=101, max_bad_records=1, part_records=part_records)


def test_an_id_outside_the_vocabulary_is_named_by_its_record(samples: Examples, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:\d+: token id \d+ is outside the vocabulary of 50"):
        write_tokens(Examples(samples.source, samples.encode), tmp_path / "a.tokens", vocab_size=50)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"input_ids": np.array([1]), "labels": np.array([1])}, "holds input_ids alone, and this sample has"),
        ({"pixel_values": np.zeros(3)}, "this sample has pixel_values"),
        ({"input_ids": np.arange(3), "loss_mask": np.array([False, False, True])}, "holds no loss mask"),
    ],
)
def test_what_a_token_file_cannot_hold_is_refused(tmp_path: Path, sample: dict[str, Any], words: str) -> None:
    class One:
        fingerprint = "one"

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Mapping[str, Any]:
            return sample

        def where(self, index: int) -> str:
            return "one[0]"

    with pytest.raises(DataError, match=rf"one\[0\]: .*{words}"):
        write_tokens(One(), tmp_path / "a.tokens", vocab_size=9)


# The target


def test_a_file_of_the_same_samples_is_kept_and_any_other_is_not_touched(samples: Examples, tmp_path: Path) -> None:
    out = tmp_path / "a.tokens"
    write_tokens(samples, out, vocab_size=101)
    again = CountingSource(samples)
    assert write_tokens(again, out, vocab_size=101) == TokenFile(out).header
    assert again.read == 0
    before = out.read_bytes()
    with pytest.raises(DataError, match=r"a\.tokens exists and was made of other data or settings"):
        write_tokens(samples, out, vocab_size=102)
    assert out.read_bytes() == before
    (tmp_path / "text").write_text("mine")
    with pytest.raises(DataError, match="text is no token file"):
        write_tokens(samples, tmp_path / "text", vocab_size=101)


def test_no_samples_and_no_tokens_are_errors(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text("{\n{\n")
    with pytest.raises(DataError, match="there are no samples"):
        write_tokens(examples(tmp_path / "none.jsonl"), tmp_path / "a.tokens", vocab_size=101)
    with pytest.raises(DataError, match=r"a\.tokens would be empty"):
        write_tokens(examples(tmp_path / "bad.jsonl"), tmp_path / "a.tokens", vocab_size=101, max_bad_records=9)
    for options in ({"num_workers": 0}, {"max_bad_records": -1}, {"part_records": 0}):
        with pytest.raises(DataError, match=f"{next(iter(options))}="):
            write_tokens(examples(tmp_path / "bad.jsonl"), tmp_path / "a.tokens", vocab_size=101, **options)


def test_a_folder_that_is_not_there_is_made(samples: Examples, tmp_path: Path) -> None:
    write_tokens(samples, tmp_path / "new" / "a.tokens", vocab_size=101)
    assert os.listdir(tmp_path / "new") == ["a.tokens"]


def test_the_bar_is_on_standard_error(
    samples: Examples, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokens(samples, tmp_path / "quiet", vocab_size=101)
    assert capfd.readouterr() == ("", "")
    write_tokens(samples, tmp_path / "loud", vocab_size=101, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "1/1" in err or err.strip() == ""  # a terminal shows it, a file is spared
