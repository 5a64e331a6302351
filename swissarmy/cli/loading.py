"""What `sat generate`, `sat chat` and `sat eval` have in common: a checkpoint that says what comes next, and text."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from swissarmy.cli import output
from swissarmy.cli.command import CheckpointPath, Options, UsageError
from swissarmy.core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from swissarmy.backbone.model import Model

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["cpu", "cuda"]
Quantize = Literal["fp16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """The flags that say which model runs, and how it is held."""

    path: CheckpointPath
    """A Hugging Face folder, a .gguf file, or the name of a model on the hub."""
    dtype: Dtype | None = None
    """The precision of the weights; as stored when left out (float32 for GGUF)."""
    quantize: Quantize | None = None
    """Hold the weights in so many bits: less memory, and faster on a CPU, for a loss that grows from fp16 to int4."""
    adapter: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """An adapter to add: a folder of PEFT or of `save_adapter`, or of a run with `quantize`, or a name on the hub."""
    device: Device = "cpu"
    """Where the model runs."""


def outline_of_generator(path: str) -> "Model":
    """The model of a checkpoint, without its weights: what can be checked is checked before they are read.

    Raises:
        CheckpointError: Its tensors do not fit.
        ConfigError: It cannot generate.
    """
    from swissarmy.cli.outline import outline

    found = outline(path)
    if found.misfit is not None:
        raise CheckpointError(found.misfit)
    check_generates(found.model, path)
    return found.model


def check_generates(model: "Model", path: str) -> None:
    """Refuse encoders, and heads that give no logits over the vocabulary.

    Raises:
        ConfigError: The checkpoint cannot generate.
    """
    from swissarmy.backbone.model import iterate_models
    from swissarmy.mixins.heads import ClassificationHeadMixin, NoHeadMixin

    *_, (_, decoder) = iterate_models(model)
    if decoder.config.causal and not any(decoder.find_mixin(kind) for kind in (ClassificationHeadMixin, NoHeadMixin)):
        return
    name = f"{path}: {model.source.config.architecture}"
    raise ConfigError(f"{name} does not generate text: it is an encoder, or its head does not say what comes next.")


def load_model(options: ModelOptions) -> "Model":
    """The model with its weights.

    Raises:
        ConfigError: There is no such device.
    """
    import torch

    from swissarmy.interop.adapter import load_adapter
    from swissarmy.interop.load import load

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; leave it out to run on the CPU.")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    with output.console(stderr=True).status(f"loading {options.path}"):
        model = load(options.path, dtype=dtype, device=options.device, quantize=options.quantize)
        return model if options.adapter is None else load_adapter(model, options.adapter)


def read_text(path: Path, flag: str) -> bytes:
    """A file's bytes.

    Raises:
        UsageError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from error


def decode_text(data: bytes, place: str) -> str:
    """UTF-8 bytes as text, without a byte order mark.

    Raises:
        UsageError: They are none.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}: not valid UTF-8 at byte {error.start}.") from error
