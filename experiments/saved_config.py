"""The config of a run that exists, as a config file: ``experiments/saved_config.py:WORKDIR``."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from experiments.configs import base
from experiments.workdir import read_config


def get_config(workdir: str) -> ConfigDict:
    """Config of the run in ``workdir``; settings it did not know yet have their defaults."""
    config = base.get_config()
    _update(config, read_config(pathlib.Path(workdir)) or {})
    return config


def _update(config: ConfigDict, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        if isinstance(config.get(name), ConfigDict):
            _update(config[name], value)
        else:
            config[name] = tuple(value) if isinstance(value, list) else value
