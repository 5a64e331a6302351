"""The folder that a run gives away."""

from pathlib import Path

import pytest
import tokenizers
import torch

import swissarmy as sat
from swissarmy.core.errors import CheckpointError
from swissarmy.data.tokenizer import Tokenizer
from swissarmy.interop.safe_write import verify_manifest
from swissarmy.mixins.lora import LoRAMixin
from swissarmy.mixins.reduced_weights import reduce_weights
from swissarmy.testing import tiny_model
from swissarmy.training.checkpoint.final import save_final
from swissarmy.training.ranks import Ranks

IDS = torch.tensor([[1, 2, 3]])


def words_tokenizer() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"abc": 3, "?": 0}, unk_token="?")))


def test_it_is_what_every_command_loads(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.add_mixin("lora", LoRAMixin.for_model(model, r=2))
    tokenizer = words_tokenizer()
    save_final(model, tmp_path / "final", tokenizer, Ranks())
    loaded = sat.load(tmp_path / "final")
    assert torch.equal(loaded(IDS)[0], model(IDS)[0])
    assert "lora" in loaded.mixins
    assert sat.load_tokenizer(tmp_path / "final").encode("abc") == tokenizer.encode("abc")
    assert {"config.json", "model.safetensors", "tokenizer.json", "mixins/mixins.json"} <= {
        *verify_manifest(tmp_path / "final")
    }


def test_an_earlier_one_is_replaced_whole_and_what_others_put_there_is_not(tmp_path: Path) -> None:
    save_final(tiny_model("gpt2", seed=1), tmp_path / "final", words_tokenizer(), Ranks())
    model = tiny_model("gpt2", seed=2)
    save_final(model, tmp_path / "final", None, Ranks())
    assert torch.equal(sat.load(tmp_path / "final")(IDS)[0], model(IDS)[0])
    assert not (tmp_path / "final" / "tokenizer.json").exists()
    (tmp_path / "final" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds 'notes\.txt', which no save wrote"):
        save_final(tiny_model("gpt2", seed=3), tmp_path / "final", None, Ranks())
    assert torch.equal(sat.load(tmp_path / "final")(IDS)[0], model(IDS)[0])


def test_over_reduced_weights_only_the_mixins_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.add_mixin("lora", LoRAMixin.for_model(model, r=2))
    reduce_weights(model, "int8")
    save_final(model, tmp_path / "final", None, Ranks())
    names = verify_manifest(tmp_path / "final")
    assert set(names) == {"mixins/mixins.json", "mixins/model.safetensors"}
    assert "holds mixins alone" in caplog.text
