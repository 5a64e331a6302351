"""`sat plot`: the loss, learning rate, gradient norm and speed of runs in one picture."""

import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, final

import tyro

from swissarmy.cli.command import DONE, Command, Options
from swissarmy.core.errors import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
"""Runs as the command takes them: their folders, or their metrics files."""

_ENDINGS: Final = (".png", ".svg", ".html")
_SHOWN: Final[Mapping[str, str]] = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
"""What the smaller axes show, below the loss."""
_NUMBERS: Final = ("loss", *_SHOWN, "tokens", "mfu")
_HUGE: Final = 1e100
"""Beyond it nothing can be drawn."""


@final
@dataclass(frozen=True, kw_only=True)
class PlotOptions(Options):
    """What `sat plot` takes."""

    runs: Runs
    """The folders of runs; several are drawn into the same picture."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The picture: .png, .svg, or .html for a page that needs no other file."""
    smooth: float = 0.04
    """The share of its points over which the line of the train loss is a mean; the loss itself is drawn pale."""
    log_loss: bool = False
    """Whether the axis of the loss is logarithmic."""

    def problems(self) -> Iterator[str]:
        """No runs, endings that are none, and smoothing out of range."""
        if not self.runs:
            yield "there is no RUN to draw"
        if self.output.suffix.lower() not in _ENDINGS:
            yield f"--output {self.output}: the name must end with {', '.join(_ENDINGS)}"
        if not self.output.parent.is_dir():
            yield f"--output {self.output}: there is no folder {self.output.parent}"
        if not 0 <= self.smooth < 1:
            yield f"--smooth {self.smooth} must be at least 0 and less than 1"


@final
@dataclass(frozen=True)
class Curves:
    """What is drawn of a run."""

    name: str
    steps: list[Mapping[str, Any]] = field(default_factory=list)
    evaluations: list[Mapping[str, Any]] = field(default_factory=list)
    skips: list[int] = field(default_factory=list)

    def of(self, key: str, kind: str = "steps") -> tuple[list[int], list[float]]:
        """The steps that have a number of this name, and the numbers."""
        records = self.steps if kind == "steps" else [each for each in self.evaluations if each["name"] == kind]
        found = {each["step"]: each[key] for each in records if each.get(key) is not None and abs(each[key]) < _HUGE}
        return list(found), list(found.values())

    @property
    def label(self) -> str:
        """The name in a legend, where matplotlib reads dollars as formulas, and leaves out what begins with `_`."""
        name = self.name.replace("$", r"\$")
        return f" {name}" if name.startswith("_") else name


def run(options: PlotOptions) -> int:
    """Draw the picture."""
    require_extra("matplotlib", extra="plots", purpose="sat plot")
    names = _names(options.runs)
    curves = [_read(path, name) for path, name in zip(options.runs, names, strict=True)]
    _save(_draw(curves, options), curves, options.output)
    return DONE


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path; all of it where two would be the same."""
    folders = [path.parent if path.is_file() else path for path in paths]
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _read(path: Path, name: str) -> Curves:
    from swissarmy.training.callbacks.metrics_file import METRICS, MetricsError, read_metrics

    path, curves = path if path.is_file() else path / METRICS, Curves(name)
    for record in read_metrics(path):
        if wrong := next(_wrong_values(record), None):
            raise MetricsError(f"{path}: a record of kind {record['kind']!r} at step {record['step']!r}: {wrong}.")
        match record["kind"]:
            case "step":
                curves.steps.append(record)
            case "evaluation":
                curves.evaluations.append(record)
            case "skip":
                curves.skips.append(record["step"])
    if not curves.steps:
        raise MetricsError(f"{path} has no step yet.")
    return curves


def _wrong_values(record: Mapping[str, Any]) -> Iterator[str]:
    """What cannot be drawn of a record."""
    if not isinstance(record["step"], int):
        yield "the step is no number"
    if record["kind"] == "evaluation" and not isinstance(record.get("name"), str):
        yield "it has no name"
    for key in _NUMBERS:
        if not isinstance(record.get(key), int | float | None):
            yield f"{key} is {record[key]!r}, and no number"


def _draw(runs: Sequence[Curves], options: PlotOptions) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, len(_SHOWN), height_ratios=(3, 2))
    colors = [f"C{number % 10}" for number in range(len(runs))]
    loss = figure.add_subplot(grid[0, :])
    for curves, color in zip(runs, colors, strict=True):
        _draw_loss(loss, curves, color, options.smooth)
    loss.set(ylabel="loss", xlabel="step", yscale="log" if options.log_loss else "linear")
    loss.legend(frameon=False)
    for column, (key, label) in enumerate(_SHOWN.items()):
        axes = figure.add_subplot(grid[1, column], sharex=loss)
        for curves, color in zip(runs, colors, strict=True):
            axes.plot(*curves.of(key), color=color, linewidth=1.2)
        axes.set(title=label, xlabel="step")
        axes.set_ylim(bottom=0)
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_loss(axes: "Axes", curves: Curves, color: str, smooth: float) -> None:
    """Train loss pale and smoothed, valid and test loss as points, skipped steps as ticks below."""
    steps, losses = curves.of("loss")
    axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smoothed(losses, smooth), color=color, linewidth=1.6, label=f"{curves.label}: train")
    for name, marker in (("valid", "o"), ("test", "D")):
        steps, losses = curves.of("loss", name)
        if steps:
            style = f"{marker}--"
            axes.plot(steps, losses, style, color=color, markersize=4, linewidth=1, label=f"{curves.label}: {name}")
    if curves.skips:
        bottom = axes.get_xaxis_transform()
        axes.plot(
            curves.skips,
            [0.01] * len(curves.skips),
            "|",
            color="red",
            transform=bottom,
            label=f"{curves.label}: skipped",
        )


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """The mean of each value and its neighbours, which are that share of all; as many before it as after it.

    Towards both ends there are fewer, so that the line neither lags behind nor bends.
    """
    sums, last = [0.0, *accumulate(values)], len(values) - 1
    reach = [min(int(share * len(values) / 2), place, last - place) for place in range(len(values))]
    return [(sums[at + n + 1] - sums[at - n]) / (2 * n + 1) for at, n in enumerate(reach)]


def _save(figure: "Figure", runs: Sequence[Curves], path: Path) -> None:
    from swissarmy.core.files import replace_file

    kind = path.suffix.lower().removeprefix(".")
    picture = io.BytesIO()
    figure.savefig(picture, format="svg" if kind == "html" else kind, dpi=130)
    content = _page(picture.getvalue().decode(), runs).encode() if kind == "html" else picture.getvalue()
    with replace_file(path) as file:
        file.write(content)


def _page(svg: str, runs: Sequence[Curves]) -> str:
    """The picture, and where each run stands."""
    heads = ("run", "step", "train loss", "valid loss", "best valid loss", "skipped steps", "tokens", "tokens/s", "MFU")
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(curves)) for curves in runs]
    title = html.escape(", ".join(curves.name for curves in runs))
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>',
            "<style>body{font:15px system-ui,sans-serif;margin:2em auto;max-width:75em}svg{width:100%;height:auto}"
            "table{border-collapse:collapse}td,th{padding:.3em 1em;text-align:right;border-bottom:1px solid #ddd}"
            "td:first-child,th:first-child{text-align:left}</style>",
            f"<h1>{title}</h1>",
            svg[svg.index("<svg") :],
            "<table>",
            "<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>",
            *(f"<tr>{row}</tr>" for row in rows),
            "</table>\n</html>\n",
        ]
    )


def _cells(curves: Curves) -> Iterator[str]:
    last, valid = curves.steps[-1], curves.of("loss", "valid")[1]
    speed, mfu = curves.of("tokens_per_second")[1], curves.of("mfu")[1]
    yield from (curves.name, f"{last['step']:,}", "NaN" if last.get("loss") is None else f"{last['loss']:.4f}")
    yield from (_number(valid[-1:]), _number(sorted(valid)[:1]), f"{len(curves.skips):,}")
    yield f"{last.get('tokens') or 0:,}"
    yield from (f"{sum(speed) / max(len(speed), 1):,.0f}", f"{mfu[-1]:.1%}" if mfu else "")


def _number(values: Sequence[float]) -> str:
    return f"{values[0]:.4f}" if values else ""


COMMAND = Command(
    summary="draw loss, learning rate, gradient norm and speed of runs into one picture",
    examples=("sat plot runs/gpt -o gpt.png", "sat plot runs/gpt runs/gpt-muon -o compared.html"),
    options=PlotOptions,
    run=run,
)
