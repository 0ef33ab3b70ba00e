"""Uniform-token diffusion on the text that CPython carries.

python -m experiments.launch --config=experiments/configs/text_uniform.py --workdir=runs/uniform
"""

from mdm_jax.launch import config as launch_config


def get_config(variant: str = ""):
    """The quickstart's network, data and steps; ``variant`` is "" or "smoke"."""
    config = launch_config.get_config()
    config.process = "uniform"
    config.variance.order = ("stratified",)  # ppots_slopes reads losses of masked tokens
    # The network is not told which tokens are replaced, so it is told how many.
    config.model.condition_on_logsnr = True
    # A uniform rate would have infinite variance here too, see objectives.uniform_nelbo.
    config.law.name = "power"
    config.law.power.exponent = 3.0
    config.sample.update(sampler="uniform_ancestral", num_steps=128)
    if variant == "smoke":
        launch_config.shrink(config)
        config.data.update(length=32, train_stride=16)
        config.sample.update(num_samples=2, gap=8)
    elif variant:
        raise ValueError(f"text_uniform has the variant 'smoke', not {variant!r}")
    return config
