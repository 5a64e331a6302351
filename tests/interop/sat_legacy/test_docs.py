"""Every block of the migration guide runs, on old checkpoints of the names that it uses."""

import re
from pathlib import Path

import pytest
import torch

from swissarmy.cli.main import main
from swissarmy.testing import tiny_model as tiny_family
from tests.helpers import tiny_model
from tests.interop.sat_legacy import legacy

PAGE = (Path(__file__).parents[3] / "docs" / "migrate_from_sat.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_the_blocks_of_the_guide_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state, config = legacy.gpt2(tiny_family("gpt2"))
    legacy.write(tmp_path / "gpt2-old", legacy.split(legacy.pad_vocabulary(state), 2), config)
    mine = {name: t.float() for name, t in legacy.backbone(dict(tiny_model().named_parameters()), layers=2).items()}
    mine |= {"mixins.0.factor": torch.tensor([2.0]), "transformer.position_embeddings.weight": torch.randn(12, 16)}
    legacy.write(tmp_path / "mine-old", [mine], None)
    names: dict[str, object] = {}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "migrate_from_sat.md", "exec"), names)
        else:
            assert language == "sh"
            for line in block.splitlines():
                program, *arguments = line.partition("#")[0].split()
                assert program == "sat"
                assert main(arguments) == 0
    assert (tmp_path / "gpt2-hf" / "model.safetensors").is_file()
    assert len(BLOCKS) == 7
