"""`sat models`: the families that can be loaded."""

from dataclasses import dataclass
from typing import Any, final

from rich.table import Table

from swissarmy.cli import output
from swissarmy.cli.command import DONE, Command, Options


@final
@dataclass(frozen=True, kw_only=True)
class ModelsOptions(Options):
    """What `sat models` takes."""

    json: bool = False
    """Print a JSON list instead."""


def run(options: ModelsOptions) -> int:
    """Print every family, its heads and its presets."""
    families = gather()
    if options.json:
        output.print_json(families, indent=2)
    else:
        output.console().print(_table(families))
    return DONE


def gather() -> list[dict[str, Any]]:
    """The families, as `--json` prints them."""
    import sys

    from swissarmy.models._family import find_family, list_models

    families = []
    for name in list_models():
        family = find_family(name)
        docstring = sys.modules[f"swissarmy.models.{name}"].__doc__ or ""
        families.append(
            {
                "name": name,
                "description": docstring.split("\n")[0].removesuffix("."),
                "architectures": list(family.architectures),
                "presets": {preset: published.parameters for preset, published in family.presets.items()},
            }
        )
    return families


def _table(families: list[dict[str, Any]]) -> Table:
    table = Table(show_lines=True)
    table.add_column("family", style="bold", no_wrap=True)
    table.add_column("what it is, its heads, its presets")
    for family in families:
        lines = [family["description"], ", ".join(family["architectures"])]
        presets = ", ".join(f"{name}\N{NO-BREAK SPACE}({_short(count)})" for name, count in family["presets"].items())
        table.add_row(family["name"], "\n".join([*lines, *([presets] if presets else [])]))
    return table


def _short(count: int) -> str:
    """`124 M` for 124,439,808."""
    if count >= 999_500_000:
        return f"{count / 1e9:.3g}\N{NO-BREAK SPACE}B"
    return f"{count / 1e6:.3g}\N{NO-BREAK SPACE}M"


COMMAND = Command(
    summary="the families that can be loaded, their heads and presets",
    examples=("sat models", "sat models --json"),
    options=ModelsOptions,
    run=run,
)
