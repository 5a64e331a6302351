"""`sat data check`, `sat data tokenize` and `sat data show`."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import swissarmy
from swissarmy.data.source import DataError
from swissarmy.data.sources.open import open_source
from swissarmy.data.sources.token_file import TokenFile

TEXTS = ["once upon a time", "there was a tiny model", "once upon a time", "a tiny\n\tcaf\u00e9"]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    path = tmp_path / "flawed.jsonl"
    path.write_bytes(b'{"text": "there was a tiny model", "n": 1}\n\n{"text": \n{"txt": 1}\n{"text": "\xff"}\n')
    return path


# check


def test_check_counts_and_lists(sat: Any, good: Path, flawed: Path) -> None:
    code, out, err = sat("data", "check", good, flawed, "--json")
    facts = json.loads(out)
    assert (code, err) == (1, "")
    first, second = facts["files"]
    assert (first["records"], first["bad_records"], first["bad"]) == (4, 0, [])
    assert first["fields"] == {"n (int)": 4, "text (str)": 4}
    lengths = sorted(map(len, TEXTS))
    assert first["unit"] == "characters"
    assert (first["lengths"]["total"], first["lengths"]["min"], first["lengths"]["max"]) == (
        sum(lengths),
        lengths[0],
        lengths[-1],
    )
    assert (second["records"], second["bad_records"]) == (4, 2)
    assert [line.split(": ")[0] for line in second["bad"]] == [f"{flawed}:3", f"{flawed}:5"]
    assert facts["duplicates"] == {
        "records": 2,
        "listed": [
            {"record": f"{good}:3", "repeats": f"{good}:1"},
            {"record": f"{flawed}:1", "repeats": f"{good}:2"},
        ],
    }


def test_check_with_a_tokenizer_counts_tokens_and_finds_what_cannot_be_encoded(
    sat: Any, tiny: Path, good: Path, flawed: Path
) -> None:
    code, out, _ = sat("data", "check", good, "--tokenizer", tiny, "--json")
    (facts,) = json.loads(out)["files"]
    tokenizer = swissarmy.load_tokenizer(tiny)
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in TEXTS]
    assert (code, facts["unit"], facts["lengths"]["total"]) == (0, "tokens", sum(map(len, ids)))
    assert facts["tokens"] == {
        "tokens": sum(map(len, ids)),
        "different_tokens": len({token for row in ids for token in row}),
        "vocabulary": 270,
        "characters_per_token": pytest.approx(sum(map(len, TEXTS)) / sum(map(len, ids))),
    }
    code, out, _ = sat("data", "check", flawed, "--tokenizer", tiny, "--json")
    bad = json.loads(out)["files"][0]["bad"]
    assert code == 1
    assert [line.split(": ")[0] for line in bad] == [f"{flawed}:{line}" for line in (3, 4, 5)]
    assert "there is no field 'text'. Did you mean 'txt'?" in bad[1]


def test_check_prints_tables_bars_and_faults(sat: Any, good: Path, flawed: Path) -> None:
    code, out, err = sat("data", "check", good, flawed, "--max-listed", 1)
    assert (code, err) == (1, "")
    for words in (
        "text (str): 4",
        "16 to 16 characters  \N{FULL BLOCK}",
        f"{flawed}:3: not valid JSON",
        "... and 1 more bad records",
        "2 records repeat another one",
        f"{good}:3 repeats {good}:1",
    ):
        assert words in out
    assert f"{flawed}:5" not in out


def test_check_draws_the_lengths(sat: Any, good: Path, flawed: Path, tmp_path: Path) -> None:
    code, _, err = sat("data", "check", good, flawed, "--histogram", tmp_path / "lengths.png")
    assert (code, err) == (1, "")
    with Image.open(tmp_path / "lengths.png") as picture:
        assert (picture.format, min(picture.size) > 300) == ("PNG", True)


def test_check_reads_every_kind_and_verifies_token_files(sat: Any, tiny: Path, good: Path, tmp_path: Path) -> None:
    (tmp_path / "pets" / "cats").mkdir(parents=True)
    for name in "ab":
        Image.new("RGB", (2, 2)).save(tmp_path / "pets" / "cats" / f"{name}.png")
    tokens = tmp_path / "a.tokens"
    assert sat("data", "tokenize", good, "--tokenizer", tiny, "-o", tokens)[0] == 0
    code, out, err = sat("data", "check", tmp_path / "pets", tokens, "--json")
    pets, documents = json.loads(out)["files"]
    assert (code, err) == (0, "")
    assert (pets["records"], pets["lengths"]["max"]) == (2, len("cats"))
    assert (documents["records"], documents["unit"]) == (4, "tokens")
    assert json.loads(out)["duplicates"]["records"] == 2
    damaged = bytearray(tokens.read_bytes())
    damaged[4100] ^= 1
    tokens.write_bytes(damaged)
    code, _, err = sat("data", "check", tokens)
    assert (code, "a.tokens differs from what was written" in err) == (1, True)


@pytest.mark.parametrize(
    ("flags", "code", "names"),
    [
        ([], 2, ["FILES"]),
        (["nowhere.jsonl"], 1, ["nowhere.jsonl: there is no such file"]),
        (["GOOD", "--max-listed", "-1"], 2, ["--max-listed -1"]),
        (["GOOD", "--histogram", "a.jpg"], 2, ["must end with .png"]),
        (["EMPTY"], 1, ["empty.jsonl is empty"]),
        (["GOOD", "--tokenizer", "TINY", "--text-field", "texts"], 1, ["good.jsonl:1: ", "text: texts"]),
    ],
)
def test_check_refuses_what_cannot_be(
    sat: Any, tiny: Path, good: Path, tmp_path: Path, flags: list[str], code: int, names: list[str]
) -> None:
    (tmp_path / "empty.jsonl").touch()
    files = {"GOOD": good, "TINY": tiny, "EMPTY": tmp_path / "empty.jsonl"}
    got, out, err = sat("data", "check", *(files.get(flag, flag) for flag in flags))
    assert (got, out) == (code, "")
    for name in names:
        assert name in err


# tokenize


def test_tokenize_writes_the_texts_of_all_files(sat: Any, tiny: Path, good: Path, flawed: Path, tmp_path: Path) -> None:
    out_path, tokenizer = tmp_path / "a.tokens", swissarmy.load_tokenizer(tiny)
    flags = ("--tokenizer", tiny, "-o", out_path, "--on-bad-record", "skip", "--json")
    code, out, _ = sat("data", "tokenize", good, flawed, *flags)
    facts, file = json.loads(out), TokenFile(out_path)
    assert code == 0
    assert (facts["documents"], facts["skipped"], facts["vocab_size"], facts["dtype"]) == (5, 3, 270, "uint16")
    assert facts["bytes"] == out_path.stat().st_size
    want = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in [*TEXTS, TEXTS[1]]]
    assert [file.document(index).tolist() for index in range(len(file))] == want
    assert open_source(out_path)[0]["input_ids"].tolist() == want[0]
    before = out_path.read_bytes()
    assert sat("data", "tokenize", good, flawed, *flags)[0] == 0
    assert out_path.read_bytes() == before


def test_tokenize_takes_the_flags_of_its_texts(sat: Any, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once\nupon\n\na time\n")
    out_path = tmp_path / "a.tokens"
    code, out, err = sat(
        "data", "tokenize", tmp_path / "a.txt", "--tokenizer", tiny, "-o", out_path, "--text-unit", "paragraph",
        "--no-append-eos", "--num-workers", 1,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "documents  2" in out
    tokenizer, file = swissarmy.load_tokenizer(tiny), TokenFile(out_path)
    assert [tokenizer.decode(file.document(index).tolist()) for index in range(2)] == ["once\nupon", "a time"]


@pytest.mark.parametrize(
    ("flags", "code", "names"),
    [
        (["FLAWED", "-o", "OUT"], 1, ["flawed.jsonl:3: not valid JSON"]),
        (
            ["FLAWED", "-o", "OUT", "--on-bad-record", "skip", "--max-bad-records", "2"],
            1,
            ["flawed.jsonl:5", "More than 2"],
        ),
        (["GOOD", "-o", "OUT", "--text-field", "texts"], 1, ["no field 'texts'. Did you mean 'text'?"]),
        (["GOOD", "-o", "OUT", "--num-workers", "0"], 2, ["--num-workers 0"]),
        (["GOOD", "-o", "GOOD"], 1, ["good.jsonl is no token file"]),
        (["GOOD"], 2, ["--output"]),
        (["-o", "OUT"], 2, ["FILES"]),
    ],
)
def test_tokenize_refuses_what_cannot_be(
    sat: Any, tiny: Path, good: Path, flawed: Path, tmp_path: Path, flags: list[str], code: int, names: list[str]
) -> None:
    before = good.read_bytes()
    files = {"GOOD": good, "FLAWED": flawed, "OUT": tmp_path / "a.tokens"}
    got, out, err = sat("data", "tokenize", *(files.get(flag, flag) for flag in flags), "--tokenizer", tiny)
    assert (got, out) == (code, "")
    for name in names:
        assert name in err
    assert good.read_bytes() == before
    with pytest.raises(DataError):
        TokenFile(tmp_path / "a.tokens")


# show


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    pairs = [("once upon", " a time"), ("there was", " a tiny model")]
    path.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs))
    return path


def test_show_prints_a_packed_batch_with_what_is_not_predicted_in_brackets(sat: Any, tiny: Path, prompts: Path) -> None:
    code, out, err = sat(
        "data", "show", "--train-data", prompts, "--tokenizer", tiny, "--packing", "--sequence-length", 64,
        "--batch-size", 1, "--no-shuffle",
    )  # fmt: skip
    assert (code, err) == (0, "")
    shapes, described, row = out.strip().split("\n")
    assert "input_ids [1, 64], loss_mask [1, 64], document_ids [1, 64]" in shapes
    assert described.startswith("row 0: 2 documents, ")
    assert sorted(row.split(" | ")) == ["[once upon] a time<|end|>", "[there was] a tiny model<|end|>"]


def test_show_colours_what_a_terminal_shows(
    sat: Any, tiny: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    code, out, _ = sat("data", "show", "--train-data", prompts, "--tokenizer", tiny, "--batch-size", 2, "--ids")
    assert code == 0
    dim, bright = "\x1b[2;36m", "\x1b[36m"
    assert dim in out
    assert bright in out
    assert "<0>" in out


def test_show_takes_weights_steps_and_a_file(sat: Any, tiny: Path, good: Path, prompts: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"tokenizer: {tiny}\nbatch-size: 2\ndata:\n  train_data: [{good}, {good}]\n  train_data_weights: [2, 0]\n"
    )
    first, second = (sat("data", "show", "--config", config, "--step", step) for step in (0, 1))
    assert first[0] == second[0] == 0
    assert first[1] != second[1]
    assert sat("data", "show", "--config", config, "--step", 1) == second
    rows = [line for _, out, _ in (first, second) for line in out.split("\n") if line.startswith("row")]
    assert len(rows) == 4


def test_show_says_how_much_a_run_sees_of_each_source(sat: Any, tiny: Path, good: Path, prompts: Path) -> None:
    code, out, err = sat(
        "data", "show", "--train-data", good, prompts, "--train-data-weights", 1, 1, "--train-data-weights-mean",
        "share", "--train-data-weights-schedule", "10: 1 3", "--tokenizer", tiny, "--num-steps", 20,
    )  # fmt: skip
    assert (code, err) == (0, "")
    run, first, second = out.split("\n")[:3]
    assert run == "train: 20 steps of 4 samples, 80 in all"
    assert f"{good}: 30 samples (37.50 %)" in first
    assert f"{prompts}: 50 samples (62.50 %), 25.00 epochs of 2" in second
    code, _, err = sat("data", "show", "--train-data", good, "--tokenizer", tiny, "--num-steps", 3, "--step", 3)
    assert (code, "--num-steps 3 must be above --step" in err) == (2, True)


def test_show_also_shows_what_is_only_evaluated(sat: Any, tiny: Path, good: Path) -> None:
    flags = ("data", "show", "--valid-data", good, "--tokenizer", tiny, "--batch-size", 3)
    code, out, _ = sat(*flags, "--step", 1)
    assert (code, out.count("row ")) == (0, 1)
    assert "a tiny\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n" in out.replace("[", "").replace("]", "")
    code, _, err = sat(*flags, "--step", 2)
    assert (code, "there are 2 steps" in err) == (2, True)


def test_show_prints_the_targets_of_an_encoder_decoder(sat: Any, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "once upon", "target": "a time"}\n')
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>", "pad_token": "<|end|>"}')
    code, out, _ = sat("data", "show", "--train-data", path, "--tokenizer", folder, "--batch-size", 1)
    assert code == 0
    assert out.strip().split("\n")[-2:] == ["[once upon<|end|>]", "a time<|end|>"]


@pytest.mark.parametrize(
    ("flags", "code", "names"),
    [
        ([], 2, ["there is no data"]),
        (["--train-data", "nowhere.jsonl"], 1, ["nowhere.jsonl: there is no such file"]),
        (["--train-data", "GOOD", "--train-data-weights", "1", "2"], 2, ["2 weights for 1 train_data"]),
        (["--train-data", "GOOD", "--batch-size", "0"], 2, ["--batch-size 0"]),
        (["--train-data", "GOOD", "--step", "-1"], 2, ["--step -1"]),
    ],
)
def test_show_refuses_what_cannot_be(
    sat: Any, tiny: Path, good: Path, flags: list[str], code: int, names: list[str]
) -> None:
    got, out, err = sat("data", "show", *(good if flag == "GOOD" else flag for flag in flags), "--tokenizer", tiny)
    assert (got, out) == (code, "")
    for name in names:
        assert name in err


# The group


def test_the_commands_of_the_group_are_listed_and_found(sat: Any) -> None:
    code, out, err = sat("data", "--help")
    assert (code, err) == (0, "")
    assert all(f"  {name} " in out for name in ("check", "tokenize", "show"))
    code, out, err = sat("data")
    assert (code, out) == (2, "")
    assert "usage: sat data COMMAND" in err
    code, out, err = sat("data", "chek")
    assert (code, out) == (2, "")
    assert "there is no command 'data chek'. Did you mean 'check'?" in err
