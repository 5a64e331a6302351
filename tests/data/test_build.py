"""From a config to loaders: what is read, split, blended, encoded and packed, and what is refused."""

import json
import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from swissarmy.core.errors import ConfigError
from swissarmy.data.build import Loaders, build_loaders
from swissarmy.data.config import DataConfig
from swissarmy.data.formats import encoder_for
from swissarmy.data.loading.loader import FingerprintError
from swissarmy.data.samples.encoders import TextEncoder
from swissarmy.data.samples.examples import Examples
from swissarmy.data.samples.image_encoder import ImageEncoder
from swissarmy.data.source import DataError, RecordError
from swissarmy.data.sources.stream import Stream
from swissarmy.data.sources.token_file import write_token_file
from swissarmy.data.sources.tokens import TokenDocuments
from tests.data.tiny_data import letters, pairs

TEMPLATE = (
    "{% for m in messages %}{{ m.role[:1] }}:{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def words(tmp_path: Path) -> str:
    """Two hundred texts of one to seven letters."""
    return jsonl(tmp_path / "words.jsonl", [{"text": "abcdefg"[: number % 7 + 1]} for number in range(200)])


def numbered(folder: Path, name: str, length: int) -> str:
    """Records whose first token is 0, 1, 2, ..., so that samples can be told apart."""
    return jsonl(folder / f"{name}.jsonl", [{"input_ids": [number, 1, 2]} for number in range(length)])


def built(batch_size: int = 4, *, num_steps: int | None = 3, **settings: Any) -> Loaders:
    tokenizer = settings.pop("tokenizer", None)
    options = {
        name: settings.pop(name) for name in ("create_dataset", "collate", "rank", "world_size") if name in settings
    }
    config = DataConfig(**settings)
    return build_loaders(config, tokenizer, global_batch_size=batch_size, num_steps=num_steps, **options)


def first_tokens(loader: Any) -> list[int]:
    return [int(token) for batch in loader for token in batch["input_ids"][:, 0]]


# What is read


def test_texts_end_where_the_tokenizer_has_an_end() -> None:
    config = DataConfig(train_data=("a",))
    for tokenizer, has_end in ((pairs(), False), (letters(), True)):
        assert encoder_for("text", config, tokenizer) == TextEncoder(tokenizer=tokenizer, append_eos=has_end)
    with pytest.raises(ConfigError, match="the tokenizer has no eos_token to end texts with: say append_eos=False"):
        encoder_for("text", config.replace(append_eos=True), pairs())


def test_pictures_are_scaled_as_the_config_says() -> None:
    config = DataConfig(train_data=("a",))
    assert encoder_for("images", config, None) == ImageEncoder(size=(224, 224))
    other = config.replace(image_size=(8, 12), image_mean=(0.1,), image_crop=True)
    assert encoder_for("images", other, None) == ImageEncoder(size=(8, 12), mean=(0.1,), std=(0.5,), crop=True)


def test_text_becomes_padded_batches(words: str) -> None:
    loaders = built(train_data=(words,), tokenizer=letters())
    assert loaders.train is not None
    assert (loaders.valid, loaders.test) == (None, None)
    batches = list(loaders.train)
    assert len(batches) == 3
    for batch in batches:
        assert set(batch) == {"input_ids", "loss_mask", "padding_mask", "position_ids", "sample_ids"}
        assert batch["input_ids"].shape[0] == 4
        assert batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        ({"text": "ab"}, {"input_ids", "loss_mask", "padding_mask", "position_ids"}),
        ({"prompt": "ab", "completion": "c"}, {"input_ids", "loss_mask", "padding_mask", "position_ids"}),
        ({"input_ids": [1, 2]}, {"input_ids", "loss_mask", "padding_mask", "position_ids"}),
        (
            {"source": "ab", "target": "c"},
            {"input_ids", "padding_mask", "decoder_input_ids", "decoder_padding_mask", "labels"},
        ),
        ({"text": "ab", "label": 1}, {"input_ids", "token_type_ids", "padding_mask", "labels"}),
    ],
)
def test_the_format_of_records_is_found_by_their_fields(
    tmp_path: Path, record: Mapping[str, Any], fields: set[str]
) -> None:
    data = jsonl(tmp_path / "data.jsonl", [record] * 4)
    loaders = built(train_data=(data,), tokenizer=letters())
    assert loaders.train is not None
    assert set(next(iter(loaders.train))) == fields | {"sample_ids"}


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    data = jsonl(tmp_path / "data.jsonl", [{"messages": messages}] * 4)
    loaders = built(train_data=(data,), tokenizer=letters(chat_template=TEMPLATE))
    assert loaders.train is not None
    batch = next(iter(loaders.train))
    assert 0 < batch["loss_mask"].sum() < batch["padding_mask"].sum()


def test_fields_of_no_format_are_an_error_with_the_nearest(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", [{"txet": "ab"}])
    with pytest.raises(RecordError, match=r"data.jsonl:1: the fields 'txet'.*Did you mean 'text'\?"):
        built(train_data=(data,), tokenizer=letters())


def test_text_without_a_tokenizer_is_an_error(words: str) -> None:
    with pytest.raises(ConfigError, match="'text' need a tokenizer"):
        built(train_data=(words,))


def test_formats_that_share_no_batch_are_refused(tmp_path: Path) -> None:
    texts = jsonl(tmp_path / "a.jsonl", [{"text": "ab"}])
    pairs = jsonl(tmp_path / "b.jsonl", [{"source": "a", "target": "b"}])
    with pytest.raises(ConfigError, match=r"a.jsonl is 'text' and .*b.jsonl is 'seq2seq'"):
        built(train_data=(texts, pairs), tokenizer=letters())


def test_a_dataset_of_your_own(tmp_path: Path) -> None:
    class Squares(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Mapping[str, Any]:
            return {"x": torch.tensor(index), "y": torch.tensor(index**2)}

    loaders = built(
        train_data=("squares",),
        valid_data=("squares",),
        record_format="samples",
        create_dataset=lambda path, config: Squares(),
    )
    assert loaders.train is not None
    assert loaders.valid is not None
    assert all((batch["x"] ** 2 == batch["y"]).all() for batch in loaders.train)
    assert torch.cat([batch["x"] for batch in loaders.valid]).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("empty.jsonl", "", "empty"), ("blank.jsonl", "\n\n", "empty"), ("data.parq", "x", r"\.parq")],
)
def test_data_that_is_none_is_an_error_at_the_start(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        built(train_data=(str(tmp_path / name),), tokenizer=letters())


def test_a_pattern_that_matches_nothing_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        built(train_data=(str(tmp_path / "*.jsonl"),), tokenizer=letters())


# Splits


def test_splits_share_out_every_row(tmp_path: Path) -> None:
    data = numbered(tmp_path, "data", 50)
    loaders = built(5, num_steps=8, train_data=(data,), split="8,1,1")
    rows = [first_tokens(loader) for loader in (loaders.train, loaders.valid, loaders.test)]
    assert [len(part) for part in rows] == [40, 5, 5]
    assert sorted(chain.from_iterable(rows)) == list(range(50))


def test_appended_rows_move_none_from_train_to_test(tmp_path: Path) -> None:
    before = set(first_tokens(built(train_data=(numbered(tmp_path, "data", 53),), split="8,1,1").test))
    after = set(first_tokens(built(train_data=(numbered(tmp_path, "data", 97),), split="8,1,1").test))
    assert {row for row in after if row < 53} == before


def test_own_files_and_splits_may_be_combined(tmp_path: Path) -> None:
    data, own = numbered(tmp_path, "data", 50), numbered(tmp_path, "own", 7)
    loaders = built(5, train_data=(data,), valid_data=(own,), split="9,0,1")
    assert first_tokens(loaders.valid) == list(range(7))
    assert len(first_tokens(loaders.test)) == 5


def test_evaluation_alone(tmp_path: Path) -> None:
    loaders = built(train_data=(), test_data=(numbered(tmp_path, "a", 5), numbered(tmp_path, "b", 2)))
    assert loaders.train is None
    assert first_tokens(loaders.test) == [0, 1, 2, 3, 4, 0, 1]


def test_a_file_too_small_to_split_is_an_error_only_for_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = numbered(tmp_path, "data", 1)
    kept = next(key for key in range(50) if not _test_gets_the_row(data, key))
    with caplog.at_level(logging.WARNING):
        loaders = built(train_data=(data,), split="1,0,1", split_seed=kept)
    assert first_tokens(loaders.test) == []
    assert "test: the split leaves no sample" in caplog.text
    lost = next(key for key in range(50) if _test_gets_the_row(data, key))
    with pytest.raises(DataError, match="leaves none of its few records to train on"):
        built(train_data=(data,), split="1,0,1", split_seed=lost)


def _test_gets_the_row(data: str, key: int) -> bool:
    try:
        return bool(first_tokens(built(train_data=(data,), split="1,0,1", split_seed=key).test))
    except DataError:
        return True


# Blending


def test_weights_repeat_sources_or_give_shares(tmp_path: Path) -> None:
    paths = numbered(tmp_path, "a", 30), numbered(tmp_path, "b", 10)
    for mean, share in (("repeats", 60 / 70), ("share", 2 / 3)):
        loaders = built(21, num_steps=20, train_data=paths, train_data_weights=(2, 1), train_data_weights_mean=mean)
        assert loaders.train is not None
        order = loaders.train.batches.order
        parts = order.places(np.arange(420)).parts
        assert (parts == 0).sum() == pytest.approx(420 * share, abs=1)


def test_a_source_of_weight_zero_is_not_even_opened(tmp_path: Path) -> None:
    loaders = built(train_data=(numbered(tmp_path, "a", 3), "missing.jsonl"), train_data_weights=(1, 0))
    assert loaders.train is not None
    assert set(first_tokens(loaders.train)) == {0, 1, 2}


def test_weights_change_with_the_steps(tmp_path: Path) -> None:
    paths = (numbered(tmp_path, "a", 10), numbered(tmp_path, "b", 10))
    loaders = built(
        4, num_steps=5, train_data=paths, train_data_weights=(1, 0), train_data_weights_schedule=("3: 0 1",)
    )
    assert loaders.train is not None
    parts = loaders.train.batches.order.places(np.arange(20)).parts
    assert parts.tolist() == [0] * 12 + [1] * 8


def test_the_same_file_may_be_given_twice(tmp_path: Path) -> None:
    path = numbered(tmp_path, "a", 10)
    loaders = built(num_steps=10, train_data=(path, path), train_data_weights=(1, 1))
    assert sorted(first_tokens(loaders.train)) == sorted(list(range(10)) * 4)


def test_the_log_says_what_a_run_will_see(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = numbered(tmp_path, "a", 10), numbered(tmp_path, "b", 100)
    with caplog.at_level(logging.INFO, logger="swissarmy.data"):
        built(10, num_steps=30, train_data=paths, train_data_weights=(2, 1), train_data_weights_mean="share")
    assert "train: 30 steps of 10 samples, 300 in all" in caplog.text
    assert "a.jsonl: 200 samples (66.67 %), 20.00 epochs of 10" in caplog.text
    assert "b.jsonl: 100 samples (33.33 %), 1.00 epochs of 100" in caplog.text


def test_the_plan_is_what_the_log_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="swissarmy.data"):
        loaders = built(10, num_steps=30, train_data=(numbered(tmp_path, "a", 10),), split="8,2,0")
    assert list(loaders.plan) == [record.message for record in caplog.records]
    assert loaders.plan[1].endswith("a.jsonl: 300 samples (100.00 %), 37.50 epochs of 8")
    assert loaders.plan[2] == "valid: 2 samples, each once, in batches of 10"


# What is opened


def test_sources_of_one_format_share_an_encoder(words: str, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "other.jsonl", [{"text": "ab"}] * 10)
    loaders = built(train_data=(words, other), valid_data=(other,), tokenizer=letters())
    assert loaders.train is not None
    assert loaders.valid is not None
    parts = [*loaders.train.batches.parts, *loaders.valid.batches.parts]
    assert all(isinstance(part, Examples) for part in parts)
    assert len({id(part.encode) for part in parts if isinstance(part, Examples)}) == 1


@pytest.mark.parametrize("name", ["a.txt", "*.txt", "."])
def test_the_unit_of_text_holds_for_folders_and_patterns(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("ab\nc\n\nd\n")
    loaders = built(1, valid_data=(str(tmp_path / name),), text_unit="paragraph", tokenizer=letters())
    assert loaders.valid is not None
    assert [int(batch["padding_mask"].sum()) for batch in loaders.valid] == [len("<ab\nc>"), len("<d>")]


def test_records_of_numbers_are_read_as_tokens(tmp_path: Path) -> None:
    np.arange(12, dtype=np.uint16).tofile(tmp_path / "a.bin")
    settings = {"valid_data": (str(tmp_path / "a.bin"),), "binary_dtype": "uint16", "binary_shape": (4,)}
    loaders = built(2, binary_field="input_ids", **settings)
    assert loaders.valid is not None
    assert first_tokens(loaders.valid) == [0, 4, 8]
    samples = built(3, record_format="samples", **settings).valid
    assert samples is not None
    assert next(iter(samples))["data"].tolist() == np.arange(12).reshape(3, 4).tolist()
    with pytest.raises(ConfigError, match=r"a.bin: .*binary_dtype and binary_shape"):
        built(2, valid_data=settings["valid_data"])


def test_token_files_are_packed_without_reading_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        with write_token_file(tmp_path / f"{name}.tokens", vocab_size=9, made_of=name) as writer:
            for length in range(1, 21):
                writer.add(np.ones(length, np.int64), where=name)
    monkeypatch.setattr(TokenDocuments, "__getitem__", None)  # reading one is an error
    loaders = built(
        train_data=(str(tmp_path),), split="8,2,0", packing=True, sequence_length=64, record_format="tokens"
    )
    assert loaders.train is not None
    assert loaders.valid is not None


# Lengths


def test_packing_fills_rows(words: str) -> None:
    loaders = built(train_data=(words,), tokenizer=letters(), sequence_length=16, packing=True)
    assert loaders.train is not None
    for batch in loaders.train:
        assert batch["input_ids"].shape == (4, 16)
        assert "document_ids" in batch
        assert (batch["document_ids"] >= 0).float().mean() > 0.9


@pytest.mark.parametrize(("truncation", "lengths"), [("right", {4}), ("split", {4, 2}), ("drop", {3}), (None, {4})])
def test_long_samples_are_cut_split_or_dropped(tmp_path: Path, truncation: Any, lengths: set[int]) -> None:
    data = jsonl(tmp_path / "data.jsonl", [{"input_ids": [1] * 6}, {"input_ids": [1] * 3}])
    loaders = built(1, train_data=(), valid_data=(data,), sequence_length=4, truncation=truncation)
    assert loaders.valid is not None
    seen = {batch["input_ids"].shape[1] for batch in loaders.valid}
    assert seen == lengths | {3}


def test_a_long_sample_may_be_an_error(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", [{"input_ids": [1] * 6}])
    loaders = built(1, train_data=(data,), sequence_length=4, truncation="error")
    assert loaders.train is not None
    with pytest.raises(RecordError, match=r"data.jsonl:1.*6 tokens, more than 4"):
        next(iter(loaders.train))


def test_bucketing_brings_like_lengths_together(words: str) -> None:
    widths = []
    for window in (0, 10):
        loaders = built(
            10, num_steps=20, train_data=(words,), tokenizer=letters(), bucketing_window=window, append_eos=False
        )
        assert loaders.train is not None
        widths.append(sum(batch["padding_mask"].logical_not().sum().item() for batch in loaders.train))
    assert widths[1] < widths[0] / 2


def test_bad_records_are_skipped_when_packing_too(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "abc"}\nnot json\n{"text": "abcd"}\n')
    settings = {"train_data": (str(data),), "tokenizer": letters(), "sequence_length": 8, "packing": True}
    with pytest.raises(RecordError, match=r"data.jsonl:2"):
        built(1, **settings)
    loaders = built(1, on_bad_record="skip", **settings)
    assert loaders.train is not None
    assert len(list(loaders.train)) == 3


# Resuming


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2), (4, 2)])
def test_one_stream_of_samples_with_everything_on_resumed_on_any_ranks_and_workers(
    words: str, tmp_path: Path, world_size: int, num_workers: int
) -> None:
    """Two sources, blended, split, packed, one with bad records: run for some steps as it is, then on other ranks."""
    other = tmp_path / "other.jsonl"
    other.write_text("".join(f'{{"text": "{"hij"[: n % 3 + 1]}"}}\n' if n % 9 else "no json\n" for n in range(90)))
    settings = {
        "train_data": (words, str(other)),
        "train_data_weights": (2, 1),
        "split": "9,1,0",
        "sequence_length": 16,
        "packing": True,
        "on_bad_record": "skip",
        "tokenizer": letters(),
    }
    whole = [batch["input_ids"].tolist() for batch in built(8, num_steps=9, **settings).train or ()]
    begun = built(8, num_steps=4, **settings).train
    assert begun is not None
    assert [batch["input_ids"].tolist() for batch in begun] == whole[:4]
    ranks = [
        built(8, num_steps=9, rank=rank, world_size=world_size, num_workers=num_workers, **settings).train
        for rank in range(world_size)
    ]
    pieces = []
    for run in ranks:
        assert run is not None
        run.load_state_dict(json.loads(json.dumps(begun.state_dict())))
        pieces.append([batch["input_ids"].tolist() for batch in run])
    assert [[row for piece in pieces for row in piece[step]] for step in range(5)] == whole[4:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_goes_on(words: str, num_workers: int) -> None:
    settings = {"train_data": (words,), "tokenizer": letters(), "sequence_length": 16, "packing": True}
    whole = [batch["input_ids"].tolist() for batch in built(num_steps=6, **settings).train or ()]
    first = built(num_steps=3, num_workers=num_workers, **settings).train
    second = built(num_steps=6, num_workers=num_workers, **settings).train
    assert first is not None
    assert second is not None
    begun = [batch["input_ids"].tolist() for batch in first]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [batch["input_ids"].tolist() for batch in second] == whole


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"tokenizer": letters(chat_template=TEMPLATE)}, ["tokenizer", "encoding of source 1"]),
        ({"seed": 1}, ["seed"]),
        ({"append_eos": False}, ["encoding of source 1"]),
        ({"split": "9,1,0"}, ["source 1", "weights"]),
    ],
)
def test_what_changed_since_the_checkpoint_is_named(words: str, change: dict[str, Any], names: list[str]) -> None:
    settings: dict[str, Any] = {"train_data": (words,), "tokenizer": letters()}
    before, after = built(**settings).train, built(**{**settings, **change}).train
    assert before is not None
    assert after is not None
    with pytest.raises(FingerprintError) as caught:
        after.load_state_dict(before.state_dict())
    assert any(f"{names[0]} was" in line for line in str(caught.value).splitlines())
    assert "global batch size" not in str(caught.value)


def test_a_file_that_moved_is_the_same_and_one_that_grew_is_not(tmp_path: Path) -> None:
    first = built(train_data=(numbered(tmp_path, "data", 10),)).train
    assert first is not None
    moved = built(train_data=(numbered(tmp_path, "moved", 10),)).train
    assert moved is not None
    moved.load_state_dict(first.state_dict())
    grown = built(train_data=(numbered(tmp_path, "data", 11),)).train
    assert grown is not None
    with pytest.raises(FingerprintError, match="source 1 was"):
        grown.load_state_dict(first.state_dict())


# Streams


class Endless:
    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return ({"text": "abcdefg"[: number % 7 + 1]} for number in range(1000))


def streamed(path: str, config: DataConfig) -> Stream:
    return Stream(Endless(), name=path)


def test_a_stream_is_encoded_and_resumed() -> None:
    settings: dict[str, Any] = {
        "train_data": ("s",),
        "train_data_weights_mean": "share",
        "tokenizer": letters(),
        "create_dataset": streamed,
    }
    whole = [batch["input_ids"].tolist() for batch in built(num_steps=5, **settings).train or ()]
    first, second = built(num_steps=2, **settings).train, built(num_steps=5, **settings).train
    assert first is not None
    assert second is not None
    begun = [batch["input_ids"].tolist() for batch in first]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [batch["input_ids"].tolist() for batch in second] == whole


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_data": ("s",)}, "is a stream of no known length"),
        ({"train_data": ("s",), "train_data_weights_mean": "share", "split": "1,1,1"}, "cannot|no row numbers"),
        ({"valid_data": ("s",)}, "evaluation and epochs need data of known length"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(tokenizer=letters(), create_dataset=streamed, **settings)
