"""`sat train`."""

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import swissarmy
from swissarmy.cli.command import LaterOptions
from swissarmy.cli.train import COMMAND
from swissarmy.testing import TINY_CONFIGS
from swissarmy.training.checkpoint.lock import RunLock
from swissarmy.training.ranks import Ranks

LINES = ["once upon a time there was a tiny model", "a model that was tiny", "there was a time", "once a time"] * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of lines."""
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(LINES) + "\n")
    return file


@pytest.fixture
def flags(tmp_path: Path, tiny: Path, text: Path) -> list[object]:
    """Three steps of a tiny GPT-2."""
    sizes = ["--train-iters", 3, "--batch-size", 4, "--lr", 1e-2]
    return ["train", "--model", tiny, "--train-data", text, "--output", tmp_path / "run", *sizes]


def changed(before: Path, after: Path) -> set[str]:
    old, new = (dict(swissarmy.load(folder).named_parameters()) for folder in (before, after))
    return {name for name in new if name not in old or not torch.equal(old[name], new[name])}


def test_a_run_ends_with_a_model_that_every_command_takes(sat: Any, flags: list[object], tiny: Path) -> None:
    code, out, err = sat(*flags, "--split", "90,10,0", "--no-live")
    assert code == 0, err
    assert "step 3/3" in out
    folder = Path(str(flags[6]))
    assert changed(tiny, folder / "final")
    code, out, _ = sat("generate", folder / "final", "--prompt", "once", "--max-new-tokens", 2)
    assert (code, out.endswith("\n")) == (0, True)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "evaluation"} <= {record["kind"] for record in records}


def test_flags_win_over_the_file_and_the_written_config_runs_again(
    sat: Any, tmp_path: Path, tiny: Path, text: Path
) -> None:
    file = tmp_path / "run.yaml"
    values = {"model": str(tiny), "train_data": [str(text)], "batch_size": 4, "train_iters": 2, "lr": 3e-3, "seed": 5}
    file.write_text(yaml.safe_dump({**values, "output": str(tmp_path / "first")}))
    code, _, err = sat("train", "--config", file, "--train-iters", 1)
    assert code == 0, err
    written = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert (written["train_iters"], written["lr"], written["seed"], written["objective"]) == (1, 3e-3, 5, "causal_lm")
    assert not {"config", "traceback", "dry_run", "json"} & set(written)
    code, _, err = sat("train", "--config", tmp_path / "first" / "config.yaml", "--output", tmp_path / "second")
    assert code == 0, err
    assert not changed(tmp_path / "first" / "final", tmp_path / "second" / "final")


def test_new_weights_come_from_a_configuration_and_the_seed(sat: Any, tmp_path: Path, tiny: Path, text: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2", **TINY_CONFIGS["gpt2"], "vocab_size": 100}))

    def trained(name: str, *more: object) -> Path:
        code, _, err = sat(
            *("train", "--model-config", config, "--override", "vocab_size=270", "--tokenizer", tiny),
            *("--train-data", text, "--output", tmp_path / name, "--train-iters", 1, "--batch-size", 4, *more),
        )
        assert code == 0, err
        return tmp_path / name / "final"

    first, again, other = trained("first"), trained("again"), trained("other", "--seed", 1)
    assert not changed(first, again)
    assert changed(first, other)
    assert swissarmy.load(first).config.vocab_size == 270


def test_an_objective_brings_its_step_and_hides_what_it_is_to_find(
    sat: Any, tmp_path: Path, tiny: Path, text: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "bert", **TINY_CONFIGS["bert"], "vocab_size": 270}))
    code, _, err = sat(
        *("train", "--model-config", config, "--tokenizer", tiny, "--train-data", text, "--output", tmp_path / "run"),
        *("--train-iters", 1, "--batch-size", 8, "--objective", "masked_lm", "--mask-token", "<|end|>"),
    )
    assert code == 0, err
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.05 < record["count"] / record["tokens"] < 0.3


def test_a_text_and_its_spans_have_room_in_the_model(sat: Any, flags: list[object], tmp_path: Path, text: Path) -> None:
    text.write_text("\n".join(line * 9 for line in LINES))
    marks = ["--mask-token", "z", "--infilling-start-token", "y", "--infilling-end-token", "x"]
    code, _, err = sat(*flags, "--objective", "blank_infilling", "--no-infilling-block-positions", *marks)
    assert code == 0, err
    length = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["sequence_length"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0.8 * length < records[-1]["tokens"] / records[-1]["samples"] <= length == 32


@pytest.mark.parametrize(
    "how",
    [
        ["--lora-rank", 2],
        ["--prefix-len", 3],
        ["--mixin", "lora: {type: LoRAMixin, r: 2}", "second: {type: PrefixTuning, prefix_len: 2}"],
    ],
)
def test_where_mixins_are_added_they_alone_train(sat: Any, flags: list[object], tiny: Path, how: list[object]) -> None:
    code, _, err = sat(*flags, *how)
    assert code == 0, err
    final = Path(str(flags[6])) / "final"
    assert changed(tiny, final)
    assert all("mixins." in name and not name.startswith("mixins.position") for name in changed(tiny, final))
    patterns = yaml.safe_load((final.parent / "config.yaml").read_text())["trainable"]
    assert all(pattern.startswith("mixins.") for pattern in patterns)


def test_mixins_in_a_file_have_a_type_and_its_options(
    sat: Any, flags: list[object], tmp_path: Path, tiny: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("mixins:\n  change:\n    type: LoRAMixin\n    r: 2\n    alpha: 8\ntrainable: ['*']\n")
    code, _, err = sat(*flags, "--config", file)
    assert code == 0, err
    final = Path(str(flags[6])) / "final"
    assert swissarmy.load(final).get_mixin("change").saved_options["r"] == 2
    assert any("mixins." not in name for name in changed(tiny, final))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mixin", "lora: {type: LoraMixin}"], r"mixins.lora: the library has no mixin of type 'LoraMixin'. Did you"),
        (["--mixin", "lora: {type: LoRAMixin, rank: 2}"], r"mixins.lora \(LoRAMixin\): .*'rank'"),
        (["--mixin", "lora"], r"mixin 'lora' is not as in"),
        (["--mixin", "a: {type: LoRA, r: 1, r: 2}"], "duplicate key 'mixin.a.r'"),
        (
            ["--mixin", "lora: {type: LoRAMixin, r: 4}", "--lora-rank", "2"],
            "mixin 'lora: {type: LoRAMixin, r: 4}' and lora_rank both add a mixin 'lora': leave one out, or rename one",
        ),
        (["--override", "num_labels"], r"override 'num_labels' is not FIELD=VALUE"),
        (["--model-config", "a.json"], r"give either model \(a checkpoint to start from\) or model_config"),
        (["--objective", "masked_lm"], "mask_token"),
        (["--epochs", "1"], "give either train_iters or epochs"),
        (["--trainable", "mixins.lora"], "'mixins.lora' matches no parameter"),
        (["--shard", "2"], "torchrun --nproc-per-node 2"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(
    sat: Any, flags: list[object], more: list[object], message: str
) -> None:
    code, _, err = sat(*flags, *more)
    assert code == 2, err
    assert re.search(message, err)
    assert "Traceback" not in err


def test_a_folder_that_is_there_is_not_overwritten(sat: Any, flags: list[object]) -> None:
    assert sat(*flags, "--save-interval", 2)[0] == 0
    code, _, err = sat(*flags)
    assert (code, "holds a run: resume it (--resume auto)" in err) == (2, True)


def test_a_run_that_goes_on_is_named_before_a_model_is_loaded(
    sat: Any, flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swissarmy.cli.train_model.find_model", lambda options: pytest.fail("the model was loaded"))
    with RunLock(tmp_path / "run", Ranks()):
        (tmp_path / "run" / "config.yaml").touch()
        code, _, err = sat(*flags)
    assert code == 1
    assert f"belongs to a run that goes on: process {os.getpid()} on {socket.gethostname()}" in err


def test_missing_flags_and_files_are_usage(sat: Any, flags: list[object], tmp_path: Path) -> None:
    assert sat("train")[0] == 2
    code, _, err = sat(*flags, "--config", tmp_path / "none.yaml")
    assert (code, "cannot read the config file" in err) == (2, True)


def test_values_on_the_command_line_are_those_of_a_file(sat: Any, flags: list[object], tmp_path: Path) -> None:
    lora = "lora: {type: LoRAMixin, r: 2, alpha: 1e1}"
    code, _, err = sat(*flags, "--override", "layer_norm_epsilon=1e-3", "--mixin", lora, "--run-name", "3e-4")
    assert code == 0, err
    model = swissarmy.load(tmp_path / "run" / "final")
    assert model.source.config.layer_norm_epsilon == 1e-3
    assert model.get_mixin("lora").saved_options["alpha"] == 10
    again = ["train", "--config", tmp_path / "run" / "config.yaml", "--output", tmp_path / "again", "--train-iters", 1]
    assert sat(*again)[0] == 0
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["run_name"] == "3e-4"


def test_a_class_that_the_model_does_not_know_is_named_by_its_record(
    sat: Any, flags: list[object], tmp_path: Path
) -> None:
    records = [{"text": line, "label": number % 3} for number, line in enumerate(LINES)]
    (tmp_path / "lines.txt").unlink()
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in [*records[:8], {"text": "a", "label": 3}]))
    changes = ["architectures=[GPT2ForSequenceClassification]", "pad_token_id=0"]
    more = [
        "--train-data",
        file,
        "--objective",
        "classification",
        "--allow-missing",
        "mixins.*",
        "--override",
        *changes,
    ]
    flags = [each for each in flags if each not in ("--train-data", tmp_path / "lines.txt")]
    code, _, err = sat(*flags, *more, "num_labels=3")
    assert (code, "Traceback" in err) == (1, False)
    assert f"{file}:9: the class is number 3, and the model has 3, numbered from 0: give its head more" in err
    code, _, err = sat(*flags, *more, "num_labels=4")
    assert code == 0, err


def test_what_a_file_or_a_default_sets_is_taken_back_by_null(sat: Any, flags: list[object], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("ema_decay: 0.9\nsave_interval: 1\nprofile: [1, 1]\nrun_name: mine\n")
    nulls = ["--ema-decay", "null", "--save-interval=None", "--profile", "null", "--run-name", "null"]
    assert sat(*flags, "--config", tmp_path / "run.yaml", *nulls, "--clip-grad-norm", "None", "--live", "null")[0] == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for name in ("ema_decay", "save_interval", "profile", "run_name", "clip_grad_norm", "live"):
        assert written[name] is None, name
    code, _, err = sat(*flags, "--lr", "null")
    assert (code, "null" in err) == (2, True)


def test_the_objective_says_what_records_are(sat: Any, flags: list[object], text: Path) -> None:
    code, _, err = sat(*flags, "--objective", "classification")
    assert code == 1
    assert re.search(rf"{text}:\d+: there is no field 'label'. Its fields: 'text'", err)


def test_problems_of_a_file_are_in_one_report_with_lines(sat: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: x\nlr: fast\nbatchsize: 3\n")
    code, _, err = sat("train", "--config", file)
    assert code == 2
    assert f"{file}:2: lr: expected a number, not 'fast'." in err
    assert f"{file}:3: unknown key 'batchsize'. Did you mean 'batch_size'?" in err


def test_help_does_not_wait_for_torch() -> None:
    assert isinstance(COMMAND.options, LaterOptions)
    assert COMMAND.options_class.__name__ == "TrainOptions"


def test_what_is_wrong_at_a_glance_is_told_before_the_model_is_loaded(
    sat: Any, flags: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swissarmy.cli.train_model.find_model", lambda options: pytest.fail("the model was loaded"))
    code, _, err = sat(*flags, "--valid-data", tmp_path / "line.txt")
    assert code != 0
    assert "there is no such file or folder. Did you mean 'lines.txt'?" in err
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    code, _, err = sat(*flags)
    assert code != 0
    assert "holds a run" in err


def test_a_dry_run_needs_no_data(sat: Any, tmp_path: Path, tiny: Path) -> None:
    flags = ["--model", tiny, "--output", tmp_path / "run", "--train-iters", 3, "--batch-size", 4]
    code, out, err = sat("train", *flags, "--dry-run")
    assert code == 0, err
    assert "memory of a rank" in out
    code, _, err = sat("train", *flags)
    assert code != 0
    assert "there is no data" in err


def test_adapters_train_over_weights_of_few_bits_and_go_onto_any(
    sat: Any, flags: list[object], tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, _, err = sat(*flags, "--quantize", "int8", "--dtype", "bfloat16", "--lora-rank", 2)
    assert code == 0, err
    assert "holds mixins alone" in caplog.text
    final = tmp_path / "run" / "final"
    assert not (final / "config.json").exists()
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["quantize"], written["dtype"]) == ("int8", "bfloat16")

    prompt = ("--prompt", "once", "--max-new-tokens", 4, "--json")
    code, out, err = sat("generate", tiny, *prompt, "--quantize", "int8", "--adapter", final)
    assert code == 0, err
    model = swissarmy.load_adapter(swissarmy.load(tiny, quantize="int8"), final)
    (want,) = swissarmy.generate(model, swissarmy.load_tokenizer(tiny), ["once"], max_new_tokens=4)
    assert json.loads(out)["text"] == want

    code, _, err = sat("generate", final, *prompt)
    assert code == 1
    assert "It looks like an adapter: load its base, and add it with sat.load_adapter, or as --adapter." in err
    code, _, err = sat("merge", tiny, final, "-o", tmp_path / "merged")
    assert code == 0, err
    assert {name.partition("attention.")[2] for name in changed(tiny, tmp_path / "merged")} == {
        "query.weight",
        "value.weight",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "quantize='int4' leaves weights that cannot train: add a mixin, such as lora_rank=8"),
        (("--lora-rank", 2, "--shard", 2), "quantize and processes that share the weights exclude each other"),
        (("--lora-rank", 2, "--dry-run"), "quantize is not counted by a dry run"),
        (("--mixin", "lora", "--shard", 1), "mixin 'lora' is not as in"),
    ],
)
def test_what_reduced_weights_cannot_do_is_said_before_the_run(
    sat: Any, flags: list[object], more: tuple[object, ...], message: str
) -> None:
    code, _, err = sat(*flags, "--quantize", "int4", *more)
    assert code == 2
    assert message in " ".join(err.split())


def test_weights_are_held_in_the_precision_that_is_asked_for(
    sat: Any, flags: list[object], tiny: Path, tmp_path: Path, text: Path
) -> None:
    assert sat(*flags, "--dtype", "bfloat16")[0] == 0
    assert swissarmy.load(tmp_path / "run" / "final").dtype == torch.bfloat16
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2", **TINY_CONFIGS["gpt2"], "vocab_size": 270}))
    new = ("train", "--model-config", config, "--tokenizer", tiny, "--train-data", text, "--train-iters", 1)
    assert sat(*new, "--batch-size", 4, "--output", tmp_path / "new", "--dtype", "float16")[0] == 0
    assert swissarmy.load(tmp_path / "new" / "final").dtype == torch.float16

    def parameters(*more: object) -> int:
        code, out, err = sat(*flags, "--dry-run", "--json", *more)
        assert code == 0, err
        count: int = json.loads(out)["memory"]["parameters"]
        return count

    assert parameters() == 2 * parameters("--dtype", "bfloat16") == parameters("--dtype", "float32")


def test_a_flag_of_several_values_that_comes_twice_is_refused(sat: Any, flags: list[object], text: Path) -> None:
    code, _, err = sat(*flags, "--train-data", text)
    assert code == 2
    assert "--train-data is given 2 times: give all its values after one, --train-data A B." in " ".join(err.split())


def test_a_dry_run_says_which_batches_cannot_be_shared(sat: Any, flags: list[object]) -> None:
    sizes = ("--global-batch-size", 9, "--dry-run", "--world-size", 2)
    code, _, err = sat(*flags[:-4], "--train-iters", 3, "--accumulation", 1, *sizes)
    assert code == 2
    assert "global_batch_size=9 cannot be shared by 2 ranks in 1 micro-batches; 8 or 10 can." in " ".join(err.split())
