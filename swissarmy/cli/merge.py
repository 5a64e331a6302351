"""`sat merge`: an adapter into the weights of its base model, for those who want one checkpoint."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

import tyro

from swissarmy.cli import output
from swissarmy.cli.command import DONE, CheckpointPath, Command, Options
from swissarmy.cli.loading import Dtype

if TYPE_CHECKING:
    pass


@final
@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """What `sat merge` takes."""

    base: Annotated[CheckpointPath, tyro.conf.arg(metavar="BASE")]
    """The model: a Hugging Face folder, a .gguf file, or the name of a model on the hub."""
    adapter: Annotated[CheckpointPath, tyro.conf.arg(metavar="ADAPTER")]
    """The adapter: a folder of PEFT or of `save_adapter`, the `final/` of a run, or its name on the hub."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """The folder to write; it must not be there yet."""
    dtype: Dtype | None = None
    """The precision to write; as the base is stored when left out."""


def run(options: MergeOptions) -> int:
    """Load both, merge in float32, write the model and, beside it, the base's tokenizer."""
    import torch

    from swissarmy.backbone.merging import merge_mixin
    from swissarmy.backbone.model import every_mixin
    from swissarmy.interop.adapter import load_adapter
    from swissarmy.interop.load import load, open_checkpoint, stored_dtype
    from swissarmy.interop.safe_write import write_folder
    from swissarmy.interop.save import save_pretrained

    with output.console(stderr=True).status(f"merging {options.adapter} into {options.base}"):
        _, source, _ = open_checkpoint(options.base)
        dtype = stored_dtype(source) if options.dtype is None else getattr(torch, options.dtype)
        model = load(options.base, dtype=torch.promote_types(dtype, torch.float32))
        before = {name for name, _ in every_mixin(model)}
        load_adapter(model, options.adapter, name="merged-adapter")
        for name in dict.fromkeys(name.rpartition(".")[2] for name, _ in every_mixin(model) if name not in before):
            merge_mixin(model, name)
        with write_folder(options.output, manifest=False) as folder:
            save_pretrained(model.to(dtype), folder)
            copy_companions(options.base, folder)
    print(options.output)
    return DONE


def copy_companions(base: str, folder: Path) -> None:
    """Tokenizer, chat template and generation settings, as they are; what is inside a `.gguf` stays there."""
    from swissarmy.interop.convert import COMPANIONS
    from swissarmy.interop.hub import resolve
    from swissarmy.interop.load import PATTERNS

    root = resolve(base, PATTERNS)
    for name in COMPANIONS:
        if (root / name).is_file():
            shutil.copyfile(root / name, folder / name)


COMMAND = Command(
    summary="put an adapter into the weights of its base model",
    examples=("sat merge openai-community/gpt2 adapter -o merged",),
    options=MergeOptions,
    run=run,
)
