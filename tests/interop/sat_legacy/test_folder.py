"""Finding a checkpoint: `latest` is believed only where it leads to a step of this folder; no rank may be missing."""

from pathlib import Path

import pytest
import torch

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.sat_legacy.folder import find_checkpoint


def checkpoint(root: Path, *steps: str, ranks: int = 1, latest: str | None = None) -> Path:
    for step in steps:
        (root / step).mkdir(parents=True)
        for rank in range(ranks):
            torch.save({"module": {"w": torch.ones(1)}}, root / step / f"mp_rank_{rank:02d}_model_states.pt")
    if latest is not None:
        (root / "latest").write_text(latest)
    return root


def refusal(root: Path, **options: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(root, **options)
    return str(caught.value)


@pytest.mark.parametrize("step", ["1000", "release", "20-ema"])
def test_latest_names_the_step(tmp_path: Path, step: str) -> None:
    found = find_checkpoint(checkpoint(tmp_path, "5", step, latest=f"{step}\n"))
    assert found.step == step
    assert [file.parent.name for file in found.files] == [step]


def test_a_step_may_be_named_in_place_of_the_latest(tmp_path: Path) -> None:
    root = checkpoint(tmp_path, "5", "10", latest="10")
    assert find_checkpoint(root, step="5").step == "5"
    assert "there is no such folder; the steps that exist are: 5, 10" in refusal(root, step="7")


def test_the_folder_of_a_step_and_a_single_file_are_taken_too(tmp_path: Path) -> None:
    root = checkpoint(tmp_path, "10", ranks=2, latest="10")
    (root / "model_config.json").write_text('{"num_layers": 2}')
    assert len(find_checkpoint(root / "10").files) == 2
    assert find_checkpoint(root / "10").config == {"num_layers": 2}
    alone = find_checkpoint(root / "10" / "mp_rank_00_model_states.pt")
    assert (len(alone.files), alone.step, alone.config) == (1, "", {"num_layers": 2})


@pytest.mark.parametrize(
    ("latest", "says"),
    [
        ("", "latest is empty; the steps that exist are: 9, 10, release"),
        ("ten", "says 'ten', which is neither an iteration nor 'release'; the steps that exist are: 9, 10, release"),
        ("11", "says '11', and there is no such folder; the steps that exist are: 9, 10, release"),
        ("../10", "says '../10', which is neither"),
        ("/etc", "says '/etc', which is neither"),
        ("1\x000", "which is neither"),
        ("9" * 5000, "there is no such folder"),
        ("\udcff", "which is neither"),
    ],
)
def test_a_bad_latest_lists_the_steps_that_exist(tmp_path: Path, latest: str, says: str) -> None:
    root = checkpoint(tmp_path, "9", "10", "release")
    (root / "latest").write_bytes(latest.encode("utf-8", "surrogateescape"))
    assert says in refusal(root)
    assert "--step" in refusal(root)


def test_without_latest_the_steps_are_listed(tmp_path: Path) -> None:
    assert "has no file 'latest', which names the newest step; the steps that exist are: 3" in refusal(
        checkpoint(tmp_path, "3")
    )
    (tmp_path / "empty").mkdir()
    assert "no step is there either" in refusal(tmp_path / "empty")
    assert "there is no such file or folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", [0, 2])
def test_a_missing_rank_is_named(tmp_path: Path, missing: int) -> None:
    root = checkpoint(tmp_path, "10", ranks=4, latest="10")
    (root / "10" / f"mp_rank_{missing:02d}_model_states.pt").unlink()
    assert f"lacks mp_rank_{missing:02d}_model_states.pt: the model was split over 4 ranks" in refusal(root)


def test_a_billion_missing_ranks_are_counted_and_not_listed(tmp_path: Path) -> None:
    root = checkpoint(tmp_path, "10", latest="10")
    (root / "10" / "mp_rank_999999999_model_states.pt").touch()
    message = refusal(root)
    assert "lacks mp_rank_01_model_states.pt, mp_rank_02" in message
    assert "split over 1000000000 ranks" in message
    assert len(message) < 1000


def test_more_than_ten_ranks_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    found = find_checkpoint(checkpoint(tmp_path, "1", ranks=12, latest="1"))
    assert [int(file.name.split("_")[2]) for file in found.files] == list(range(12))


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    outside = checkpoint(tmp_path / "outside", "10")
    root = tmp_path / "root"
    root.mkdir()
    (root / "latest").write_text("10")
    (root / "10").symlink_to(outside / "10")
    assert "leads out of its folder" in refusal(root)
    (root / "10").unlink()
    (root / "10").mkdir()
    (root / "10" / "mp_rank_00_model_states.pt").symlink_to(outside / "10" / "mp_rank_00_model_states.pt")
    assert "leads out of its folder" in refusal(root)


def test_a_path_with_a_nul_is_refused(tmp_path: Path) -> None:
    assert "contains a NUL" in refusal(Path(f"{tmp_path}/a\0b"))


def test_messages_name_the_model_config_that_was_read_or_say_that_there_is_none(tmp_path: Path) -> None:
    root = checkpoint(tmp_path, "10", latest="10")
    assert find_checkpoint(root).config_place == f"{root}, without model_config.json"
    (root / "model_config.json").write_text("{}")
    for place in (root, root / "10", root / "10" / "mp_rank_00_model_states.pt"):
        assert find_checkpoint(place).config_place == str(root / "model_config.json")


def test_a_damaged_model_config_is_an_error_with_its_line(tmp_path: Path) -> None:
    root = checkpoint(tmp_path, "10", latest="10")
    (root / "model_config.json").write_text('{\n"num_layers": }')
    assert "model_config.json:2: not valid JSON" in refusal(root)
