"""Adapters as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`, read and written.

PEFT names modules as Hugging Face's models do; what one of its methods is here, and in which form, is the business of
`peft_lora`, `peft_vectors` (IA3, VeRA, BEFT) and `peft_prompts` (prefix and prompt tuning, P-tuning).
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from swissarmy.backbone.model import Model
from swissarmy.backbone.projections import plain_models, projections_of
from swissarmy.backbone.targets import TargetedMixin
from swissarmy.core.errors import CheckpointError, nearest
from swissarmy.core.mixin import BaseMixin
from swissarmy.interop.hub import describe_folder
from swissarmy.interop.json_object import read_json_object
from swissarmy.interop.peft_lora import read_lora, write_lora
from swissarmy.interop.peft_modules import peft_modules
from swissarmy.interop.peft_prompts import read_prefix, read_prompt, write_prefix, write_prompt
from swissarmy.interop.peft_tensors import BASE
from swissarmy.interop.peft_vectors import read_bias, read_ia3, read_vera, write_bias, write_ia3, write_vera
from swissarmy.interop.peft_whole import put_whole, read_whole, whole_modules
from swissarmy.interop.safe_write import write_folder
from swissarmy.interop.safetensors_folder import SafetensorsSource
from swissarmy.interop.safetensors_write import save_safetensors
from swissarmy.mixins.bitfit import BitFitMixin
from swissarmy.mixins.ia3 import IA3Mixin
from swissarmy.mixins.lora import LoRAMixin
from swissarmy.mixins.p_tuning import PTuningMixin
from swissarmy.mixins.prefix_tuning import PrefixTuningMixin
from swissarmy.mixins.prompt_tuning import PromptTuningMixin
from swissarmy.mixins.vera import VeRAMixin

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@final
@dataclass(frozen=True)
class Method:
    """One of PEFT's methods that is one of ours."""

    name: str
    """What its mixin is called in a model."""
    kind: type[BaseMixin]
    read: Callable[[Model, Mapping[str, Any], SafetensorsSource, str], Mapping[str, BaseMixin]]
    """Model, configuration, tensors and where they are, to the mixin for each part."""
    write: Callable[[Model, Mapping[str, Any]], tuple[dict[str, Any], dict[str, Tensor]]]
    """Model and the mixin of each part, to configuration and tensors."""


METHODS: Mapping[str, Method] = {
    "LORA": Method("lora", LoRAMixin, read_lora, write_lora),
    "IA3": Method("ia3", IA3Mixin, read_ia3, write_ia3),
    "VERA": Method("vera", VeRAMixin, read_vera, write_vera),
    "BEFT": Method("bitfit", BitFitMixin, read_bias, write_bias),
    "PREFIX_TUNING": Method("prefix-tuning", PrefixTuningMixin, read_prefix, write_prefix),
    "PROMPT_TUNING": Method("prompt-tuning", PromptTuningMixin, read_prompt, write_prompt),
    "P_TUNING": Method("prompt-tuning", PTuningMixin, read_prompt, write_prompt),
}
"""By `peft_type`. Of P-tuning PEFT keeps what the encoder made, which is read as a plain prompt."""


def load_peft(model: Model, folder: Path, *, name: str | None = None) -> None:
    """Add an adapter of PEFT as the mixin of its method, under its own name or another.

    Raises:
        CheckpointError: No such adapter, a method that is not ours, or a tensor that has no place or is missing;
            nothing was added.
        ConfigError: A field of its configuration is not what it must be.
    """
    source = _open(folder)
    where = str(folder / CONFIG_FILE)
    values = read_json_object(folder / CONFIG_FILE)
    method = METHODS.get(str(values.get("peft_type")))
    if method is None:
        raise CheckpointError(f"{where}: peft_type={values.get('peft_type')!r} is not supported; {_known()} are.")
    whole, source = read_whole(model, values, source, where)
    mixins = method.read(model, values, source, where)
    model.add_mixin(method.name if name is None else name, mixins if model.parts else mixins[""])
    put_whole(model, whole)


def content_for_peft(
    model: Model, name: str, modules_to_save: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What PEFT's two files say of a mixin, and of what trained beside it.

    Raises:
        CheckpointError: PEFT would compute something else.
    """
    mixins = {key: part.get_mixin(name) for key, part in plain_models(model).items() if name in part.mixins}
    peft_type, method = next((key, each) for key, each in METHODS.items() if isinstance(_first(mixins), each.kind))
    _check_places(mixins, model)
    values, tensors = method.write(model, mixins)
    own = {"peft_type": peft_type, "task_type": None, "base_model_name_or_path": None, "inference_mode": True}
    for prefix in modules_to_save:
        modules, whole = whole_modules(model, f"{prefix}.")
        values = {**values, "modules_to_save": [*values.get("modules_to_save", ()), *modules]}
        tensors = {**tensors, **{f"{BASE}{theirs}": tensor for theirs, tensor in whole.items()}}
    return {**own, **values}, tensors


def write_for_peft(values: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write both files to a new folder.

    Raises:
        CheckpointError: It cannot be written.
    """
    with write_folder(folder) as target:
        (target / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (written,) = save_safetensors(target, tensors, max_shard_bytes=1 << 62)
        os.rename(target / written, target / WEIGHTS_FILE)


def _known() -> str:
    return ", ".join(map(repr, sorted(METHODS)))


def _open(folder: Path) -> SafetensorsSource:
    if not folder.is_dir() or not (folder / CONFIG_FILE).is_file():
        holds = describe_folder(folder) if folder.is_dir() else f"{folder} is a file"
        named = sorted(str(file.parent) for file in folder.glob(f"*/{CONFIG_FILE}"))
        cure = f" An adapter that has a name of its own lies in {named[0]}." if named else ""
        raise CheckpointError(
            f"{folder} is no adapter of PEFT: it needs {CONFIG_FILE} and {WEIGHTS_FILE}; {holds}.{cure}"
        )
    if not (folder / WEIGHTS_FILE).is_file() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder / 'adapter_model.bin'} is a pickle, and adapters are read from safetensors only: let PEFT load "
            "it and save it again with save_pretrained(dir, safe_serialization=True)."
        )
    return SafetensorsSource(folder / WEIGHTS_FILE)


def names_of(model: Model, name: str | None = None) -> list[str]:
    """The mixins whose method PEFT has, or the one of this name if it is one of them."""
    kinds = tuple(method.kind for method in METHODS.values())
    found = {
        key for part in plain_models(model).values() for key in part.mixins if isinstance(part.get_mixin(key), kinds)
    }
    return sorted(found if name is None else found & {name})


def name_for_peft(model: Model, name: str | None) -> str:
    """This name, or that of the only mixin whose method PEFT has.

    Raises:
        CheckpointError: There is none, or there are several.
    """
    names = names_of(model)
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        problem = f"several mixins that PEFT has: say name={names[0]!r} or another" if names else "no mixin of these"
        if name is not None:
            problem = f"no mixin '{name}' that PEFT has.{nearest(name, names)} There are: {names}"
        known = ", ".join(dict.fromkeys(method.kind.__name__ for method in METHODS.values()))
        raise CheckpointError(f'the model has {problem}; for PEFT are written: {known}; any other by layout="mixins".')
    return name


def _first(mixins: Mapping[str, BaseMixin]) -> BaseMixin:
    return next(iter(mixins.values()))


def _check_places(mixins: Mapping[str, BaseMixin], model: Model) -> None:
    """Refuse what PEFT would have no module for; it must not be lost in silence."""
    modules = peft_modules(model)
    known = {(place.part, place.projection.address) for module in modules.values() for place in module.places}
    targeted = {key: mixin for key, mixin in mixins.items() if isinstance(mixin, TargetedMixin)}
    for key, mixin in targeted.items():
        for projection in projections_of(plain_models(model)[key]):
            if mixin.change_at(projection) is not None and (key, projection.address) not in known:
                raise CheckpointError(
                    f"'{projection.module}' has no module in this family's Hugging Face model, so PEFT cannot "
                    "represent its change."
                )
