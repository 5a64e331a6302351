"""How long samples are, and how large pictures, where the config leaves it to the model."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from swissarmy.backbone.model import BaseModel, Model, iterate_models
from swissarmy.core.config import report
from swissarmy.core.errors import ConfigError
from swissarmy.core.mixin import BaseMixin
from swissarmy.data.config import DataConfig
from swissarmy.mixins.learned_positions import LearnedPositionsMixin
from swissarmy.mixins.patch_embedding import InterpolatedPositionsMixin, PatchEmbeddingMixin

ConfigT = TypeVar("ConfigT", bound=DataConfig)
MixinT = TypeVar("MixinT", bound=BaseMixin)


def sized_for(config: ConfigT, model: Model) -> ConfigT:
    """A config whose samples the model can take: no longer than its positions, and pictures of its size.

    Raises:
        ConfigError: The config asks for others.
    """
    parts = [plain for _, plain in iterate_models(model)]
    patches = _mixin(parts[0], PatchEmbeddingMixin)
    return _tokens(config, parts) if patches is None else _pictures(config, parts[0], patches)


def _tokens(config: ConfigT, parts: Sequence[BaseModel]) -> ConfigT:
    """Positions of another kind than a table go on beyond what the model was made for, where that is asked for."""
    if config.sequence_length is None:
        longest = min(part.config.max_sequence_length - part.positions_before for part in parts)
        if longest < 1:
            raise ConfigError(
                "the model's prompts take all its positions, and leave none to samples: make them shorter."
            )
        return config.replace(sequence_length=longest)
    tables = ((part, table) for part in parts if (table := _mixin(part, LearnedPositionsMixin)) is not None)
    longest = min((table.longest - part.positions_before for part, table in tables), default=config.sequence_length)
    if config.sequence_length > longest:
        raise ConfigError(
            f"sequence_length={config.sequence_length}, and the model has {longest} positions: give {longest}."
        )
    return config


def _pictures(config: ConfigT, model: BaseModel, patches: PatchEmbeddingMixin) -> ConfigT:
    size, positions = config.image_size, _mixin(model, InterpolatedPositionsMixin)
    if size is None and positions is not None:
        size = tuple(cells * pixels for cells, pixels in zip(positions.grid, patches.patch_size, strict=True))
    half = (0.5,) * patches.channels
    sized = config.replace(image_size=size, image_mean=config.image_mean or half, image_std=config.image_std or half)
    report("the data:", _picture_problems(sized, patches))
    return sized


def _picture_problems(config: DataConfig, patches: PatchEmbeddingMixin) -> Iterator[str]:
    if config.image_size is not None:
        for name, size, patch in zip(("height", "width"), config.image_size, patches.patch_size, strict=True):
            if size % patch:
                yield f"image_size={config.image_size}: the {name} is not divisible by the model's patches of {patch}"
    for name, scale in (("image_mean", config.image_mean), ("image_std", config.image_std)):
        if scale is not None and len(scale) != patches.channels:
            yield f"{name}={scale}: the model has {patches.channels} channels"


def _mixin(model: BaseModel, kind: type[MixinT]) -> MixinT | None:
    """The first mixin of this class."""
    return next((mixin for mixin in model.mixins.values() if isinstance(mixin, kind)), None)
