"""Derivations over named definitions, close to GSM8K in form: not learned in ten CPU minutes.

mdm train --config=experiments/configs/study/chain.py --workdir=runs/chain
"""

from experiments.configs.study import settings


def get_config(variant: str = ""):
    """Two steps and one distractor modulo 10; ``variant`` is "" or "smoke"."""
    config = settings.reasoning("chain", batch_size=64, steps=5000)
    config.model.depth = 4
    config.data.task.update(train_rows=100_000)
    config.data.task.chain.update(steps=2, distractors=1, modulus=10)
    return settings.chosen(config, "study/chain", variant)
