"""`convert`: any checkpoint that `load` reads into a Hugging Face folder that `transformers` reads."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch

from swissarmy.core.errors import CheckpointError, ConfigError, TokenizerError
from swissarmy.interop.load import load, open_checkpoint
from swissarmy.interop.mixin_folder import stored_mixins
from swissarmy.interop.safe_write import write_folder
from swissarmy.interop.save import save_pretrained
from swissarmy.interop.tokenizer import load_tokenizer

COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)
"""Files beside the weights that `transformers` reads and that hold for the converted model too."""


@final
@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was made of a checkpoint."""

    target: str
    family: str
    architecture: str
    """The class of `transformers` that reads it."""
    parameters: int
    dtype: str
    companions: tuple[str, ...]
    """Files of the tokenizer and the like that were written."""
    dropped_mixins: Mapping[str, int]
    """Mixins that were left out, and how many parameters each had."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    drop_mixins: bool = False,
) -> Conversion:
    """Write a Hugging Face folder; it appears complete or not at all.

    Args:
        source: A folder, a `.gguf` file, or the name of a model on the hub.
        target: A new folder.
        dtype: The precision of the weights; as stored when omitted.
        drop_mixins: Leave out mixins that were added to the family's own, which `transformers` does not have.

    Raises:
        CheckpointError: The source does not load, or has mixins that would be lost; or the target exists.
        ConfigError: `transformers` has no such family.
    """
    path = os.fspath(source)
    values, _, where = open_checkpoint(path)
    if values.get("model_type") == "swissarmy":
        raise ConfigError(
            f"{where}: this is the plain backbone of this library, which transformers does not have; sat.load reads it"
        )
    folder = Path(where).parent
    added = {} if path.endswith(".gguf") else stored_mixins(folder)
    if added and not drop_mixins:
        raise CheckpointError(
            f"{folder} holds mixins beside the model, which transformers cannot read: {', '.join(added)}. Merge them "
            "into the weights first where that is possible, or leave them out (drop_mixins, --drop-mixins)"
        )
    model = load(path, dtype=dtype, allow_missing=[pattern for name in added for pattern in _patterns(name)])
    with write_folder(target, manifest=False) as temporary:
        save_pretrained(model, temporary)
        companions = write_companions(path, where, temporary)
    return Conversion(
        target=str(Path(os.path.realpath(target))),
        family=model.source.config.model_type,
        architecture=model.source.config.architecture,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        companions=companions,
        dropped_mixins=added,
    )


def _patterns(mixin: str) -> tuple[str, ...]:
    """What matches a mixin and its tensors, in the model or in a part of it."""
    return f"mixins.{mixin}", f"mixins.{mixin}.*", f"parts.*.mixins.{mixin}", f"parts.*.mixins.{mixin}.*"


def write_companions(path: str, where: str, target: Path) -> tuple[str, ...]:
    """Put what belongs to a checkpoint beside its weights into a folder: tokenizer, chat template, settings.

    Args:
        path: The checkpoint, as people name it.
        where: What `open_checkpoint` says of it.
        target: The folder.

    Returns:
        The names of the files.
    """
    return _write_tokenizer(path, target) if path.endswith(".gguf") else _copy_companions(Path(where).parent, target)


def _copy_companions(source: Path, target: Path) -> tuple[str, ...]:
    found = tuple(name for name in COMPANIONS if (source / name).is_file())
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def _write_tokenizer(path: str, target: Path) -> tuple[str, ...]:
    """The tokenizer inside a GGUF file as files, where it is one that this library reads."""
    before = {file.name for file in target.iterdir()}
    try:
        load_tokenizer(path).save_pretrained(target)
    except TokenizerError:
        return ()
    return tuple(sorted(file.name for file in target.iterdir() if file.name not in before))
