"""Gaussian diffusion on MNIST, prepared beforehand by TFDS in array_record format.

python -m experiments.launch --config=experiments/configs/mnist_gaussian.py --workdir=runs/mnist
(--config.data.data_dir=DIR where the prepared data lie elsewhere than in TFDS's own directory)
"""

from mdm_jax.gaussian.recipes import RECIPES
from mdm_jax.launch.configs import digits_gaussian


def get_config(variant: str = "vdm"):
    """MNIST; ``variant`` is a recipe's name or "smoke"."""
    if variant != "smoke" and variant not in RECIPES:
        raise ValueError(
            f"mnist_gaussian has the variants smoke, {', '.join(sorted(RECIPES))}; not {variant!r}"
        )
    config = digits_gaussian.get_config(variant)
    config.data.update(source="tfds", name="mnist", kind="image")
    config.data.splits = ("train[:55000]", "train[55000:]", "test")
    config.model.patch_size = 4
    if variant != "smoke":
        config.model.update(width=192, depth=6, num_heads=6)
        config.train.update(steps=20_000, evaluate_every=2000, checkpoint_every=2000)
    return config
