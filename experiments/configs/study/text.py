"""The text that CPython carries, as in the quickstart.

mdm train --config=experiments/configs/study/text.py --workdir=runs/text
"""

from experiments.configs.study import settings
from mdm_jax.launch import config as launch_config


def get_config(variant: str = ""):
    """Characters; ``variant`` is "", "subwords" (a vocabulary of 1,024) or "smoke"."""
    config = launch_config.get_config()
    if variant == "subwords":
        config.data.update(tokenizer="bpe", bpe_vocab_size=1024)
        return settings.chosen(config, "study/text", "")
    if variant == "smoke":
        config.data.update(length=32, train_stride=16)
        config.sample.gap = 8
    return settings.chosen(config, "study/text", variant, "subwords")
