"""Every family, tiny and random, against `transformers`: each file in `cases/` lists what is varied."""

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

from swissarmy.models._family import list_models
from tests.parity import cases
from tests.parity.reference import Case, check_case

FAMILIES = [module.name for module in pkgutil.iter_modules(cases.__path__)]
CASES: list[Case] = [case for name in FAMILIES for case in importlib.import_module(f"tests.parity.cases.{name}").CASES]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, dtype, id=f"{case.name}, {dtype}") for case in CASES for dtype in case.dtypes],
)
def test_outputs_hidden_states_gradients_and_files_equal_the_reference(
    case: Case, dtype: torch.dtype, tmp_path: Path
) -> None:
    check_case(case, dtype, tmp_path)


def test_every_family_has_cases() -> None:
    assert sorted([*FAMILIES, "swissarmy"]) == list_models()
