"""Countdown with four numbers up to 99, generated: steps with + - * / to a target of 10 to 100.

mdm train --config=experiments/configs/benchmarks/countdown4.py --workdir=runs/countdown4

500,000 problems, 12 blocks of width 768, 50,000 steps of 512 rows. The answer's length is not given
away: every EOS after it counts. Made ahead by all cores, as for zebra.py, a run reads them from
data/countdown.jsonl in the variant "file".
"""

from experiments.published import settings


def get_config(variant: str = ""):
    """``variant`` is "", "file" or "smoke"."""
    config = settings.puzzles("countdown_division", steps=50_000, batch_size=512, peak=3e-4)
    config.data.task.countdown_division.update(numbers=4, largest=99)
    config.data.task.update(train_rows=500_000, answer_padding="eos_scored")
    config.model.update(width=768, depth=12, num_heads=12)
    if variant == "file":
        return settings.from_file(config, "data/countdown.jsonl")
    return settings.chosen(config, "benchmarks/countdown4", variant, "file")
