"""Masked diffusion on the text that CPython carries, in minutes on two CPU cores.

python -m experiments.launch --config=experiments/configs/quickstart.py --workdir=runs/quickstart

``--config=...quickstart.py:smoke`` shrinks it to seconds, for tests.
"""

from experiments.configs import base


def get_config(variant: str = ""):
    """The quickstart; ``variant`` is "" or "smoke"."""
    config = base.get_config()
    if variant == "smoke":
        config.data.update(length=32, train_stride=16)
        config.model.update(width=16, depth=1, num_heads=2)
        config.train.update(
            steps=12, batch_size=8, evaluate_every=4, checkpoint_every=4, log_every=2
        )
        config.optimizer.warmup_steps = 2
        config.evaluate.update(
            batch_size=8, passes=2, replicates=2, max_rows=8, final_passes=2, final_replicates=2
        )
        config.sample.update(num_samples=2, gap=8)
        config.measure.update(rows=4, levels_per_row=2, grid_rows=2, grid_levels=6, grid_masks=2)
        config.measure.update(groups=3, redraws=4, data_batches=1, warm_up=2, chunk=8)
    elif variant:
        raise ValueError(f"quickstart has the variant 'smoke', not {variant!r}")
    return config
