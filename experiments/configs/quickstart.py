"""Masked diffusion on the text that CPython carries, in minutes on two CPU cores.

python -m experiments.launch --config=experiments/configs/quickstart.py --workdir=runs/quickstart

``--config=...quickstart.py:smoke`` shrinks it to seconds, for tests.
"""

from experiments.configs import base


def get_config(variant: str = ""):
    """The quickstart; ``variant`` is "" or "smoke"."""
    config = base.get_config()
    if variant == "smoke":
        base.shrink(config)
        config.data.update(length=32, train_stride=16)
        config.train.update(steps=12, evaluate_every=4, checkpoint_every=4)
        config.sample.update(num_samples=2, gap=8)
    elif variant:
        raise ValueError(f"quickstart has the variant 'smoke', not {variant!r}")
    return config
