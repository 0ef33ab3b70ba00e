"""The autoregressive baseline on the text that CPython carries.

python -m experiments.launch --config=experiments/configs/text_ar.py --workdir=runs/text_ar
"""

from mdm_jax.launch import config as launch_config


def get_config(variant: str = ""):
    """The quickstart's network, data and steps; ``variant`` is "" or "smoke"."""
    config = launch_config.get_config()
    config.process = "autoregressive"
    config.variance.order = ()
    config.train.monitors = ()
    config.sample.gap = 0
    if variant == "smoke":
        launch_config.shrink(config)
        config.data.update(length=32, train_stride=16)
        config.sample.num_samples = 2
    elif variant:
        raise ValueError(f"text_ar has the variant 'smoke', not {variant!r}")
    return config
