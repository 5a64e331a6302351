"""`sat merge`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import swissarmy as sat_library


@pytest.fixture
def adapter(tiny: Path, tmp_path: Path) -> Path:
    """A trained adapter of the tiny GPT-2."""
    model = sat_library.load(tiny)
    model.add_mixin("lora", sat_library.LoRAMixin.for_model(model, targets="*"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    model.save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_merged_model_does_what_base_and_adapter_do(sat: Any, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    code, out, err = sat("merge", tiny, adapter, "-o", tmp_path / "merged")
    assert (code, err) == (0, "")
    assert out == f"{tmp_path / 'merged'}\n"
    merged = sat_library.load(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = sat_library.load_adapter(sat_library.load(tiny), adapter)(ids)[0]
    torch.testing.assert_close(merged(ids)[0], expected, rtol=1e-5, atol=1e-5)
    assert (merged(ids)[0] - sat_library.load(tiny)(ids)[0]).abs().max() > 1e-2


def test_the_merged_folder_stands_alone_with_its_tokenizer(sat: Any, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    sat("merge", tiny, adapter, "--output", tmp_path / "merged", "--dtype", "bfloat16")
    code, out, _ = sat("generate", tmp_path / "merged", "--prompt", "once upon", "--max-new-tokens", "3", "--json")
    assert code == 0
    assert json.loads(out)["prompt"] == "once upon"
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "merged" / "tokenizer_config.json").read_text() == (tiny / "tokenizer_config.json").read_text()


def test_the_precision_of_the_base_is_kept_and_the_sum_is_made_in_float32(
    sat: Any, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    sat_library.load(tiny, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert sat("merge", tmp_path / "half", adapter, "-o", tmp_path / "merged")[0] == 0
    exact = sat_library.load_adapter(sat_library.load(tmp_path / "half", dtype=torch.float32), adapter)
    sat_library.merge_mixin(exact, "lora")
    merged = sat_library.load(tmp_path / "merged")
    for name, parameter in exact.named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter.bfloat16())


def test_a_model_that_was_saved_with_an_adapter_is_merged_in_place(
    sat: Any, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    model: Any = sat_library.load_adapter(sat_library.load(tiny), adapter)
    model.add_mixin("compacter", sat_library.CompacterMixin.for_model(model))
    with torch.no_grad():
        model.transformer.word_embeddings.weight.mul_(1.5)  # as a run that trains more than mixins does
    model.save_pretrained(tmp_path / "final")
    code, _, err = sat("merge", tmp_path / "final", "-o", tmp_path / "merged")
    assert (code, err) == (0, "")
    merged = sat_library.load(tmp_path / "merged")
    assert list(merged.mixins)[-1] == "compacter"
    assert "lora" not in merged.mixins
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(merged(ids)[0], model(ids)[0], rtol=1e-4, atol=1e-4)
    code, _, err = sat("merge", tiny, tmp_path / "final", "-o", tmp_path / "again")
    assert code == 1
    assert "load it with sat.load" in err


def test_what_cannot_be_merged_is_said_and_nothing_is_written(
    sat: Any, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    code, _, err = sat("merge", tiny, tmp_path / "adaptr", "-o", tmp_path / "merged")
    assert code == 1
    assert "Did you mean 'adapter'?" in err
    code, _, err = sat("merge", tiny, tiny, "-o", tmp_path / "merged")
    assert code == 1
    assert "is a whole model, of which more than mixins may have been trained" in err
    code, _, err = sat("merge", tiny, "-o", tmp_path / "merged")
    assert code == 1
    assert "was saved with no mixin that can be merged: name an adapter" in err
    assert not (tmp_path / "merged").exists()
    code, _, err = sat("merge", tiny, adapter, "-o", tiny)
    assert code == 1
    assert "exists and is not empty" in err
    code, _, err = sat("merge", tiny, adapter)
    assert code == 2
    assert "--output" in err
