"""Masked diffusion on 8 x 8 digits of 17 intensities (scikit-learn), with pictures of the samples.

pip install -e '.[digits]'
python -m experiments.launch --config=experiments/configs/digits_masked.py --workdir=runs/digits
"""

from mdm_jax.launch import config as launch_config


def get_config(variant: str = ""):
    """The digits; ``variant`` is "" or "smoke"."""
    config = launch_config.get_config()
    config.data.source = "digits"
    config.model.update(width=96, depth=3, num_heads=4)
    config.train.update(steps=600, batch_size=64)
    config.sample.update(num_samples=25, gap=0)
    if variant == "smoke":
        launch_config.shrink(config)
    elif variant:
        raise ValueError(f"digits_masked has the variant 'smoke', not {variant!r}")
    return config
