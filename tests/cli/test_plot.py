"""`sat plot`."""

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from swissarmy.cli.plot import smoothed


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs, the second with a skipped step and without evaluations."""
    made = tmp_path / "first & best", tmp_path / "second"
    for number, folder in enumerate(made):
        folder.mkdir()
        records: list[dict[str, Any]] = []
        for step in range(1, 41):
            speeds = {"tokens_per_second": 1000.0 + step, "mfu": 0.25, "tokens": 100 * step}
            record = {"kind": "step", "step": step, "loss": 4 / step + number, "lr": 1e-3 / step, "grad_norm": 1.5}
            records.append({**record, **speeds})
        if number == 0:
            records += [{"kind": "evaluation", "step": s, "name": "valid", "loss": 5 / s} for s in (20, 40)]
        else:
            records[9]["loss"] = None
            records.append({"kind": "skip", "step": 10, "reason": "the loss is not finite"})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


def test_one_run_becomes_a_picture(sat: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "loss.png"
    assert sat("plot", runs[0], "-o", target) == (0, "", "")
    with Image.open(target) as picture:
        assert picture.size[0] > 1000
        colors = picture.convert("RGB").getcolors(1 << 24)
    assert colors is not None
    assert (0x1F, 0x77, 0xB4) in {color for _, color in colors}  # the first line


def test_several_runs_are_compared_on_a_page_that_needs_no_other_file(
    sat: Any, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    target = tmp_path / "both.html"
    assert sat("plot", runs[0] / "metrics.jsonl", runs[1], "--output", target)[0] == 0
    page = target.read_text()
    assert "<td>first &amp; best</td><td>40</td><td>0.1000</td><td>0.1250</td><td>0.1250</td><td>0</td>" in page
    assert "<td>second</td><td>40</td><td>1.1000</td><td></td><td></td><td>1</td>" in page
    assert "25.0%" in page
    assert not any(f'{attribute}="http' in page for attribute in ("src", "href"))
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    assert len(svg.findall(".//{http://www.w3.org/2000/svg}g[@id]")) > 20


def test_runs_whose_folders_share_a_name_are_told_apart(sat: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    others = [tmp_path / name / "run" for name in ("a", "b")]
    for other, run in zip(others, runs, strict=True):
        other.parent.mkdir()
        run.rename(other)
    assert sat("plot", *others, "-o", tmp_path / "x.html")[0] == 0
    page = (tmp_path / "x.html").read_text()
    assert all(f"<td>{other}</td>" in page for other in others)


def test_names_of_any_kind_are_in_the_legend(sat: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    named = [run.rename(tmp_path / name) for run, name in zip(runs, ("_hidden", "$a$ and $b"), strict=True)]
    assert sat("plot", *named, "-o", tmp_path / "x.svg")[0] == 0
    comments = (tmp_path / "x.svg").read_text()  # matplotlib writes each text beside its outlines
    assert "<!--  _hidden: train -->" in comments
    assert "<!-- $a$ and $b: train -->" in comments


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"loss": [1.0]}, r"at step 41: loss is \[1.0\], and no number"),
        ({"tokens_per_second": "fast"}, "tokens_per_second is 'fast', and no number"),
        ({"step": None}, "at step None: the step is no number"),
        ({"kind": "evaluation"}, "of kind 'evaluation' at step 41: it has no name"),
    ],
)
def test_records_that_cannot_be_drawn_are_named(
    sat: Any, runs: tuple[Path, Path], tmp_path: Path, values: dict[str, Any], problem: str
) -> None:
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "step", "step": 41, "loss": 1.0, **values}) + "\n")
    code, _, err = sat("plot", runs[0], "-o", tmp_path / "x.html")
    assert code == 1
    assert re.search(problem, err)


def test_numbers_beyond_any_picture_are_left_out(sat: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    with (runs[0] / "metrics.jsonl").open("a") as file:
        for step, loss in ((41, 1e308), (42, 10**400), (43, None)):
            file.write(json.dumps({"kind": "step", "step": step, "loss": loss}) + "\n")
    assert sat("plot", runs[0], "-o", tmp_path / "x.html")[0] == 0
    assert "<td>43</td><td>NaN</td>" in (tmp_path / "x.html").read_text()


def test_a_run_that_goes_on_can_be_drawn(sat: Any, runs: tuple[Path, Path], tmp_path: Path) -> None:
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    assert sat("plot", runs[0], "-o", tmp_path / "x.svg", "--log-loss")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["nowhere", "-o", "x.png"], 1, "nowhere/metrics.jsonl does not exist"),
        (["empty", "-o", "x.png"], 1, "metrics.jsonl has no step yet"),
        (["empty", "-o", "x.gif"], 2, "the name must end with .png, .svg, .html"),
        (["empty", "-o", "x.png", "--smooth", "1"], 2, "--smooth 1.0"),
        (["-o", "x.png"], 2, "there is no RUN to draw"),
        (["empty", "-o", "missing/x.png"], 2, "there is no folder missing"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    sat: Any, arguments: list[str], code: int, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    found, _, err = sat("plot", *arguments)
    assert problem in err
    assert found == code


def test_without_matplotlib_it_says_how_to_install_it(
    sat: Any, runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = sat("plot", runs[0], "-o", tmp_path / "x.png")
    assert code == 1
    assert 'pip install "swissarmy[plots]"' in err


def test_smoothing_neither_lags_nor_bends_at_the_ends() -> None:
    line = [2.0 * place for place in range(50)]
    assert smoothed(line, 0.3) == pytest.approx(line)
    assert smoothed([3.0, 1.0, 8.0], 0) == [3, 1, 8]
    assert smoothed([0.0, 3.0, 0.0], 1) == [0, 1, 0]
    assert smoothed([], 0.5) == []
