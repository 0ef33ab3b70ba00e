"""Zebra puzzles with 3 to 6 houses and attributes, generated: 1,500,000 with one solution each.

mdm train --config=experiments/configs/benchmarks/zebra.py --workdir=runs/zebra

6 blocks of width 512, 300,000 steps of 128 rows. Puzzles are made when first read; all cores make
them ahead, and a run reads them, by:
python -m experiments.prepare generate --config=experiments/configs/benchmarks/zebra.py \\
    --to=data/zebra.jsonl
mdm train --config=experiments/configs/benchmarks/zebra.py:file --workdir=runs/zebra_file
"""

from experiments.published import settings


def get_config(variant: str = ""):
    """``variant`` is "", "file" or "smoke"."""
    config = settings.puzzles("zebra", steps=300_000, batch_size=128, peak=1e-3)
    config.data.task.zebra.update(houses=(3, 6), attributes=(3, 6))
    config.data.task.train_rows = 1_500_000
    config.model.update(width=512, depth=6, num_heads=8)
    if variant == "file":
        return settings.from_file(config, "data/zebra.jsonl")
    return settings.chosen(config, "benchmarks/zebra", variant, "file")
