"""The text that CPython carries, as in the quickstart.

mdm train --config=experiments/configs/study/text.py --workdir=runs/text
"""

from experiments.study import settings
from mdm_jax.launch import config as launch_config


def get_config(variant: str = ""):
    """The quickstart's network and data; ``variant`` is "" or "smoke"."""
    config = launch_config.get_config()
    if variant == "smoke":
        config.data.update(length=32, train_stride=16)
        config.sample.gap = 8
    return settings.chosen(config, "study/text", variant)
