"""Errors: one base, the nearest name, and the extra that cures a missing dependency."""

import pytest

import swissarmy as sat
from swissarmy.core import errors
from swissarmy.core.errors import MissingExtraError, nearest, require_extra

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_a_value_error_and_public_and_documented(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.SwissArmyError)
    assert issubclass(kind, ValueError)
    assert getattr(sat, kind.__name__) is kind
    assert kind.__doc__


@pytest.mark.parametrize(
    ("name", "candidates", "expected"),
    [
        ("prefix", ["prefix", "suffix"], " Did you mean 'prefix'?"),
        ("prefx", ["suffix", "prefix"], " Did you mean 'prefix'?"),
        ("xyz", ["prefix"], ""),
        ("", ["prefix"], ""),
        ("prefix", [], ""),
    ],
)
def test_the_nearest_name_is_given_where_there_is_one(name: str, candidates: list[str], expected: str) -> None:
    assert nearest(name, candidates) == expected
    assert nearest(name, dict.fromkeys(candidates)) == expected
    assert nearest(name, iter(candidates)) == expected


def test_an_extra_that_is_there_is_imported() -> None:
    assert require_extra("json", extra="x", purpose="x").__name__ == "json"


@pytest.mark.parametrize("module", ["there_is_no_such_module", "there_is_no_such_module.inner"])
def test_a_missing_extra_says_what_to_install(module: str) -> None:
    with pytest.raises(MissingExtraError, match=rf'Plotting needs `{module}`: pip install "swissarmy\[plots\]"'):
        require_extra(module, extra="plots", purpose="Plotting")
    with pytest.raises(ImportError):
        require_extra(module, extra="plots", purpose="Plotting")


def test_an_extra_that_is_broken_itself_is_not_reported_as_missing(
    tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_extra.py").write_text("import there_is_no_such_module")  # type: ignore[operator]
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module") as caught:
        require_extra("broken_extra", extra="plots", purpose="Plotting")
    assert not isinstance(caught.value, MissingExtraError)
