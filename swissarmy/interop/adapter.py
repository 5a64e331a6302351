"""Adapters apart from the model that they were trained on: as PEFT writes them, or as a folder of our mixins.

PEFT's layout is what others read; a folder of mixins (`mixins/mixins.json` and their tensors, as beside a checkpoint)
holds any mixin, and is what a run over reduced weights leaves in `final/`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from swissarmy.backbone.model import Model, every_mixin, iterate_models
from swissarmy.core.errors import CheckpointError, ConfigError, HookConflictError, nearest
from swissarmy.core.mixin import BaseMixin
from swissarmy.interop import mixin_folder, peft
from swissarmy.interop.hub import resolve
from swissarmy.interop.mixin_folder import StoredMixins, add_mixins, added_mixins, added_tensors, write_mixins
from swissarmy.interop.safe_write import write_folder

_LOG = logging.getLogger(__name__)
Layout = Literal["peft", "mixins"]
_PATTERNS = ("config.json", peft.CONFIG_FILE, peft.WEIGHTS_FILE, f"{mixin_folder.FOLDER}/*")


def load_adapter(
    model: Model, path: str | Path, *, name: str | None = None, mixins: Mapping[str, BaseMixin] | None = None
) -> Model:
    """Add an adapter that PEFT, `save_adapter` or a run wrote.

    Args:
        model: A model of the family that the adapter was trained on; its weights may be reduced.
        path: The adapter's folder, or its name on the hub.
        name: The mixin's name (what names begin with, where there are several); other adapters under other names add
            to it. When `None`, the one that it was saved with; PEFT keeps none: `lora`, `ia3`, `vera`, `bitfit`,
            `prefix-tuning` or `prompt-tuning`.
        mixins: Mixins of your own classes that a folder of mixins has, by name, to be filled from it.

    Returns:
        The model.

    Raises:
        CheckpointError: No such adapter, a method that is not ours, or a tensor that has no place or is missing;
            nothing was added.
        ConfigError: A field of its configuration is not what it must be.
        HookConflictError: The name is taken.
    """
    folder = resolve(path, _PATTERNS)
    if (folder / "config.json").is_file() and not (folder / peft.CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} is a whole model, of which more than mixins may have been trained: load it with sat.load."
        )
    if (folder / mixin_folder.FOLDER / mixin_folder.NAMES_FILE).is_file():
        stored = StoredMixins.open(folder)
        _add(model, stored if name is None else stored.renamed(name), mixins or {})
    elif mixins:
        raise CheckpointError(f"{folder} holds no mixins of your own, which would lie in {mixin_folder.FOLDER}/.")
    else:
        peft.load_peft(model, folder, name=name)
    return model


def save_adapter(
    model: Model,
    folder: str | Path,
    *,
    name: str | None = None,
    layout: Layout | None = None,
    modules_to_save: Sequence[str] = (),
) -> None:
    """Write a mixin of a model, without the model, to a new folder.

    Args:
        model: Any for a folder of mixins; of a family for PEFT, so that PEFT's names are known.
        folder: Where to.
        name: The mixin; may be left out where there is only one.
        layout: `"peft"`, or `"mixins"` for what only this library reads; when `None`, PEFT's where it has the method
            and would compute the same, else ours, and the log says why.
        modules_to_save: Parts of the model that trained beside it and go along, by the beginnings of their parameters'
            names (`"mixins.head"`); for PEFT only.

    Raises:
        CheckpointError: There is no such mixin, PEFT cannot represent it, or the folder cannot be written.
        ConfigError: No such layout, or one that holds no modules.
    """
    if layout is not None and layout not in get_args(Layout):
        raise ConfigError(
            f"layout={layout!r} is not known.{nearest(layout, get_args(Layout))} There are: peft, mixins."
        )
    if layout == "peft" or (layout is None and peft.names_of(model, name)):
        name = peft.name_for_peft(model, name)
        try:
            content = peft.content_for_peft(model, name, modules_to_save)
        except CheckpointError as error:
            if layout == "peft" or modules_to_save:
                raise CheckpointError(f'{error} With layout="mixins" it is kept for this library.') from None
            _LOG.warning("%s is written for this library alone: %s", folder, error)
        else:
            peft.write_for_peft(*content, folder)
            return
    if modules_to_save:
        raise ConfigError("modules_to_save goes with PEFT's layout alone; save_pretrained writes all that trained.")
    chosen = _chosen(model, name)
    with write_folder(folder) as target:
        write_mixins(model, model.source, target, only=chosen)


def _add(model: Model, stored: StoredMixins, mixins: Mapping[str, BaseMixin]) -> None:
    """Add what is stored, all or nothing."""
    before = {name for name, _ in every_mixin(model)}
    for taken in before & stored.records.keys():
        name = taken.rpartition("mixins.")[2]
        raise HookConflictError(f"{stored.folder}: there is a mixin '{name}' already; give the adapter another name.")
    try:
        add_mixins(model, mixins, stored, without=added_tensors(model, ()).keys())
    except Exception:
        for prefix, plain in iterate_models(model):
            for name in [name for name in plain.mixins if f"{prefix}mixins.{name}" not in before]:
                plain.del_mixin(name)
        raise


def _chosen(model: Model, name: str | None) -> list[str]:
    """The full names of a mixin, in each part that has it."""
    full_names = list(added_mixins(model, model.source))
    names = sorted({full_name.rpartition("mixins.")[2] for full_name in full_names})
    if name is None and len(names) == 1:
        (name,) = names
    if name not in names:
        problem = f"several mixins: say name={names[0]!r} or another of {names}" if names else "no mixin that was added"
        if name is not None:
            problem = f"no mixin '{name}' that was added.{nearest(name, names)} There are: {names}"
        raise CheckpointError(f"the model has {problem}.")
    return [full_name for full_name in full_names if full_name.rpartition("mixins.")[2] == name]
