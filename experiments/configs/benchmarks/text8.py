"""text8: 100 million characters of Wikipedia, 27 letters; bits per character of the test part.

python -m experiments.prepare text8 --source=text8.zip --to=data/text8.txt
mdm train --config=experiments/configs/benchmarks/text8.py --workdir=runs/text8

Rows of 256 characters, a million steps of 512. The variant "local" is a CPU hour on any text in
the same 27 letters, which is not text8.
"""

from experiments.published import settings
from mdm_jax.launch import config as launch_config


def get_config(variant: str = ""):
    """``variant`` is "", "local" or "smoke"."""
    config = settings.text(steps=1_000_000, length=256)
    config.data.update(source="text", path="data/text8.txt")
    if variant == "local":
        return _local()
    if variant == "smoke":
        config.data.length = 32
    return settings.chosen(config, "benchmarks/text8", variant, "local")


def _local():
    config = launch_config.get_config()
    config.data.update(source="text", path="data/letters.txt", length=256)
    config.model.update(width=192, depth=6, num_heads=6)
    config.train.update(steps=1500, batch_size=16, evaluate_every=100, checkpoint_every=50)
    config.optimizer.update(peak=2e-2, warmup_steps=100, ema_decay=0.99)  # of the kept run
    config.evaluate.update(max_rows=64, passes=2)
    config.sample.gap = 0
    return config
