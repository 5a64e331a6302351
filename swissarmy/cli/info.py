"""`sat info`: what a checkpoint is, and whether it fits, without loading its weights."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from rich.table import Table

from swissarmy.cli import output
from swissarmy.cli.command import DONE, FAILED, CheckpointPath, Command, Options

if TYPE_CHECKING:
    from swissarmy.cli.outline import Outline


@final
@dataclass(frozen=True, kw_only=True)
class InfoOptions(Options):
    """What `sat info` takes."""

    path: CheckpointPath
    """A Hugging Face folder, a .gguf file, or the name of a model on the hub."""
    json: bool = False
    """Print a JSON object instead."""


def run(options: InfoOptions) -> int:
    """Print what the checkpoint is; 1 if its tensors do not fit its configuration."""
    from swissarmy.cli.outline import outline

    found = outline(options.path)
    facts = gather(options.path, found)
    if options.json:
        output.print_json(facts, indent=2)
    else:
        show(facts)
    if found.misfit is not None:
        output.flush()
        output.print_error(f"sat info: {found.misfit}")
    return DONE if found.misfit is None else FAILED


def gather(path: str, found: "Outline") -> dict[str, Any]:
    """The facts, as `--json` prints them."""
    from swissarmy.cli.outline import mixins_of, parameters_of, parts_of, stored_bytes

    model, by_part, stored = found.model, parameters_of(found.model), stored_bytes(found.source)
    total = sum(by_part.values())
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "kv_heads", "mlp_size", "vocab_size")
    return {
        "path": path,
        "family": model.source.config.model_type,
        "architecture": model.source.config.architecture,
        "fits": found.misfit is None,
        "problems": [] if found.misfit is None else found.misfit.split("\n  - "),
        "sizes": {name: {size: getattr(config, size) for size in sizes} for name, config in parts_of(model).items()},
        "max_sequence_length": {name: config.max_sequence_length for name, config in parts_of(model).items()},
        "parameters": {"total": total, "by_part": by_part},
        "bytes": {"float32": 4 * total, "bfloat16": 2 * total, "as_stored": sum(stored.values())},
        "stored_bytes_by_dtype": stored,
        "tokenizer": _tokenizer(path),
        "mixins": mixins_of(model),
        "mixins_stored_beside": dict(found.added),
        "hooks": model.explain(),
    }


def show(facts: dict[str, Any]) -> None:
    """The facts, for people."""
    console = output.console()
    console.print(facts["path"], style="bold", soft_wrap=True)
    console.print(_summary(facts))
    by_part = facts["parameters"]["by_part"].items()
    console.print(_counts("parameters", [(name, count) for name, count in by_part if "mixins." not in name]))
    mixins = [(f"{mixin['name']} ({mixin['class']})", mixin["parameters"]) for mixin in facts["mixins"]]
    mixins += [(f"{name} (stored beside the model)", count) for name, count in facts["mixins_stored_beside"].items()]
    if mixins:
        console.print(_counts("mixins", mixins))
    console.print("\nhooks", style="bold")
    console.print(_hooks(facts["hooks"]))


def _summary(facts: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    problems = len(facts["problems"]) - 1
    rows = {"model": f"{facts['architecture']}, family {facts['family']}"}
    rows["fits"] = "yes, every tensor" if facts["fits"] else f"no, {problems} problem{'s'[: problems != 1]}: see below"
    for name, sizes in facts["sizes"].items():
        layers, heads, width = sizes["num_layers"], sizes["num_attention_heads"], sizes["hidden_size"]
        rows[name or "size"] = (
            f"{layers} layer{'s'[: layers != 1]}, width {width:,}, {heads} heads ({sizes['kv_heads']} for keys and "
            f"values), MLP {sizes['mlp_size']:,}, {sizes['vocab_size']:,} tokens"
        )
    lengths = sorted(set(facts["max_sequence_length"].values()))
    rows["maximum length"] = ", ".join(f"{length:,}" for length in lengths)
    rows["parameters"] = f"{facts['parameters']['total']:,}"
    by_dtype, stored = facts["stored_bytes_by_dtype"], facts["bytes"]["as_stored"]
    rows["stored as"] = ", ".join(f"{dtype} {_share(size, stored)}" for dtype, size in by_dtype.items())
    sizes = facts["bytes"]
    rows["memory"] = (
        f"{_size(sizes['float32'])} in float32, {_size(sizes['bfloat16'])} in bfloat16, {_size(stored)} as stored"
    )
    rows["tokenizer"] = _tokenizer_line(facts["tokenizer"])
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _counts(title: str, rows: list[tuple[str, int]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=f"\n{title}", title_justify="left")
    table.show_header, table.title_style = False, "bold"
    table.add_column(min_width=48)
    table.add_column(justify="right")
    for name, count in rows:
        table.add_row(name, f"{count:,}")
    return table


def _hooks(explained: str) -> Table:
    """`model.explain()` with long chains folded under themselves."""
    table = Table.grid(padding=(0, 2))
    arrow = "→" if output.is_unicode(output.console().file) else "->"
    for line in explained.splitlines():
        if line.startswith("  "):
            hook, chain = line.split(None, 1)
            table.add_row(hook, chain.replace("→", arrow))
        elif line.startswith("["):  # a part of a model of several
            table.add_row(line.split()[0], "", style="bold")
    return table


def _tokenizer(path: str) -> dict[str, Any]:
    from swissarmy.core.errors import TokenizerError
    from swissarmy.interop.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(path)
    except TokenizerError as error:
        return {"problem": str(error)}
    special = {
        role: {"token": token, "id": tokenizer.token_to_id(token)} for role, token in tokenizer.special_tokens.items()
    }
    return {
        "tokens": len(tokenizer),
        "special_tokens": special,
        "end_token_ids": list(tokenizer.eos_token_ids),
        "chat_template": tokenizer.chat_template is not None,
    }


def _tokenizer_line(facts: dict[str, Any]) -> str:
    if "problem" in facts:
        return f"none: {facts['problem']}"
    special = ", ".join(
        f"{role.removesuffix('_token')} {it['token']} ({it['id']})" for role, it in facts["special_tokens"].items()
    )
    template = "; has a chat template" if facts["chat_template"] else ""
    return f"{facts['tokens']:,} tokens; {special or 'no special tokens'}{template}"


def _size(count: int) -> str:
    """Bytes, with a unit."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} bytes"


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.0%}"


COMMAND = Command(
    summary="what a checkpoint is, and whether its tensors fit; loads no weights",
    examples=("sat info openai-community/gpt2", "sat info model.gguf --json"),
    options=InfoOptions,
    run=run,
)
