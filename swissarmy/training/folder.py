"""A run's folder: opened before anything else, because a run that cannot write should not begin."""

import dataclasses
from pathlib import Path
from typing import Any, Final

import yaml

from swissarmy.core.errors import ConfigError
from swissarmy.core.files import replace_file
from swissarmy.training.callbacks.metrics_file import METRICS
from swissarmy.training.config import TrainConfig

CONFIG: Final = "config.yaml"
FINAL: Final = "final"
CHECKPOINTS: Final = "checkpoints"
OF_A_RUN: Final = (CONFIG, FINAL, CHECKPOINTS, METRICS)
"""What only a run leaves in a folder."""


def open_folder(config: TrainConfig) -> Path:
    """Make the run's folder, or find the one to resume in.

    Raises:
        ConfigError: It cannot be written, or holds a run already and is not to be resumed.
    """
    check_folder(config)
    folder = Path(config.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replace_file(folder / ".writable") as file:
            file.write(b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"output={folder} cannot be written: {error.strerror or error}.") from error
    return folder


def check_folder(config: TrainConfig) -> None:
    """Look at the folder before anything is loaded.

    Raises:
        ConfigError: It holds a run already, which is not to be resumed.
    """
    folder = Path(config.output)
    if config.resume == "never" and any((folder / name).exists() for name in OF_A_RUN):
        raise ConfigError(f"output={folder} holds a run: resume it (--resume auto), or name another folder.")


def write_config(config: TrainConfig, folder: Path) -> None:
    """Write the resolved config, which is itself a config file."""
    values = {name: _plain(value) for name, value in config.to_save().items()}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with replace_file(folder / CONFIG) as file:
        file.write(text.encode())


def _plain(value: Any) -> Any:
    """A value as YAML writes it."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else value
