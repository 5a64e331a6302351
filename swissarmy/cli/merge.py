"""`sat merge`: adapters into the weights of their model, for those who want one plain checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

import tyro

from swissarmy.cli import output
from swissarmy.cli.command import DONE, CheckpointPath, Command, Options
from swissarmy.cli.loading import Dtype
from swissarmy.core.errors import CheckpointError


@final
@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """What `sat merge` takes."""

    base: Annotated[CheckpointPath, tyro.conf.arg(metavar="BASE")]
    """The model: a Hugging Face folder, a .gguf file, or the name of a model on the hub."""
    adapter: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[ADAPTER]")] = None
    """The adapter: a folder of PEFT or of `save_adapter`, or its name on the hub. Without one, the mixins are merged
    that the model was saved with, as in a run's `final/`."""
    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """The folder to write; it must not be there yet."""
    dtype: Dtype | None = None
    """The precision to write; as the base is stored when left out."""


def run(options: MergeOptions) -> int:
    """Load, merge in float32, write the model and, beside it, the base's tokenizer."""
    import torch

    from swissarmy.backbone.merging import MergeableMixin, merge_mixin
    from swissarmy.backbone.model import every_mixin
    from swissarmy.interop.adapter import load_adapter
    from swissarmy.interop.convert import write_companions
    from swissarmy.interop.load import load, open_checkpoint, stored_dtype
    from swissarmy.interop.mixin_folder import added_mixins
    from swissarmy.interop.safe_write import write_folder
    from swissarmy.interop.save import save_pretrained

    with output.console(stderr=True).status(f"merging into {options.base}"):
        _, source, where = open_checkpoint(options.base)
        dtype = stored_dtype(source) if options.dtype is None else getattr(torch, options.dtype)
        model = load(options.base, dtype=torch.promote_types(dtype, torch.float32))
        if options.adapter is None:
            names = [
                name for name, mixin in added_mixins(model, model.source).items() if isinstance(mixin, MergeableMixin)
            ]
        else:
            before = {name for name, _ in every_mixin(model)}
            load_adapter(model, options.adapter, name="merged-adapter")
            names = [name for name, _ in every_mixin(model) if name not in before]
        if not names:
            raise CheckpointError(f"{options.base} was saved with no mixin that can be merged: name an adapter.")
        for name in dict.fromkeys(name.rpartition(".")[2] for name in names):
            merge_mixin(model, name)
        with write_folder(options.output, manifest=False) as folder:
            save_pretrained(model.to(dtype), folder)
            write_companions(options.base, where, folder)
    print(options.output)
    return DONE


COMMAND = Command(
    summary="put an adapter into the weights of its base model",
    examples=("sat merge openai-community/gpt2 adapter -o merged", "sat merge runs/books/final -o merged"),
    options=MergeOptions,
    run=run,
)
