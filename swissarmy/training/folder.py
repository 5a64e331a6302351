"""A run's folder: opened before anything else, because a run that cannot write should not begin."""

import dataclasses
from pathlib import Path
from typing import Any, Final

from swissarmy.core.errors import ConfigError
from swissarmy.core.files import replace_file
from swissarmy.core.plain_yaml import write_yaml
from swissarmy.training.callbacks.metrics_file import METRICS
from swissarmy.training.checkpoint.checkpoints import FOLDER, steps_in
from swissarmy.training.config import TrainConfig

CONFIG: Final = "config.yaml"
FINAL: Final = "final"
OF_A_RUN: Final = (CONFIG, FINAL, FOLDER, METRICS)
"""What only a run leaves in a folder."""


def open_folder(config: TrainConfig) -> Path:
    """Make the run's folder, or find the one that is there.

    Raises:
        ConfigError: It cannot be written.
    """
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
    """Look at what is in the folder.

    Raises:
        ConfigError: A run which is not to be resumed, or which is over and kept nothing to go on from.
    """
    folder = Path(config.output)
    if (folder / FINAL).exists() and not steps_in(folder / FOLDER):
        raise ConfigError(
            f"output={folder} holds a run that is over, and no checkpoint to go on from (save_interval makes them): "
            f"name another folder. To train its model further, start from {folder / FINAL}."
        )
    if config.resume == "never" and any((folder / name).exists() for name in OF_A_RUN):
        raise ConfigError(f"output={folder} holds a run: resume it (--resume auto), or name another folder.")


def write_config(config: TrainConfig, folder: Path) -> None:
    """Write the resolved config, which is itself a config file."""
    values = {name: _plain(value) for name, value in config.to_save().items()}
    with replace_file(folder / CONFIG) as file:
        file.write(write_yaml(values).encode())


def forget_run(folder: Path) -> None:
    """Leave no sign of a run that ended before its first step was done: the next one finds the folder free."""
    for name in (CONFIG, METRICS):
        (folder / name).unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """A value as YAML writes it."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else value
