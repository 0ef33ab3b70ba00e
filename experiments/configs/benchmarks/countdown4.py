"""Countdown with four numbers up to 99, generated: steps with + - * that reach a target.

mdm train --config=experiments/configs/benchmarks/countdown4.py --workdir=runs/countdown4

500,000 problems, 12 blocks of width 768, 50,000 steps of 512 rows. The answer's length is not given
away: every EOS after it counts.
"""

from experiments.published import settings


def get_config(variant: str = ""):
    """``variant`` is "" or "smoke"."""
    config = settings.puzzles("countdown", steps=50_000, batch_size=512, peak=3e-4)
    config.data.task.countdown.update(numbers=4, largest=99)
    config.data.task.update(train_rows=500_000, answer_padding="eos_scored")
    config.model.update(width=768, depth=12, num_heads=12)
    return settings.chosen(config, "benchmarks/countdown4", variant)
