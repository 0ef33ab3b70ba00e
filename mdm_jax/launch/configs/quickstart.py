"""Masked diffusion on the text that CPython carries, in minutes on two CPU cores.

python -m experiments.launch --config=experiments/configs/quickstart.py --workdir=runs/quickstart

``--config=...quickstart.py:smoke`` shrinks it to seconds, for tests.
"""

from mdm_jax.launch import config as launch_config


def get_config(variant: str = ""):
    """The quickstart; ``variant`` is "" or "smoke"."""
    config = launch_config.get_config()
    if variant == "smoke":
        launch_config.shrink(config)
        config.data.update(length=32, train_stride=16)
        config.train.update(steps=12, evaluate_every=4, checkpoint_every=4)
        config.sample.update(num_samples=2, gap=8)
    elif variant:
        raise ValueError(f"quickstart has the variant 'smoke', not {variant!r}")
    return config
