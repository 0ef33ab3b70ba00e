"""Countdown with four numbers up to 20: several answers, of different lengths, are correct.

mdm train --config=experiments/configs/study/countdown4.py --workdir=runs/countdown4
"""

from experiments.configs.study import settings


def get_config(variant: str = ""):
    """``variant`` is "" or "smoke"."""
    config = settings.reasoning("countdown", batch_size=16, steps=1200)
    config.model.update(width=128, depth=4)
    config.data.task.train_rows = 100_000
    config.data.task.countdown.numbers = 4
    config.data.task.answer_padding = "eos_scored"  # answers have several lengths
    return settings.chosen(config, "study/countdown4", variant)
