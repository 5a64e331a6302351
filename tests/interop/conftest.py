"""What several files of tests about PEFT share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from tests.interop.peft_cases import FAMILIES, PICTURES


@pytest.fixture(scope="package")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tiny model in float64 for each family, made when it is asked for."""
    folders: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family) / "base"
            architecture, sizes, *_ = FAMILIES[family]
            torch.manual_seed(0)
            cls = getattr(transformers, architecture)
            words = {} if family in PICTURES else {"vocab_size": 61}
            cls(cls.config_class(**words, **sizes)).double().save_pretrained(folders[family])
        return folders[family]

    return base
