"""Gaussian diffusion on 8 x 8 digits of 17 intensities (scikit-learn), by any recipe.

pip install -e '.[digits]'
python -m experiments.launch --config=experiments/configs/digits_gaussian.py:vdm --workdir=runs/vdm

The recipes (ddpm, iddpm, vdm, v_prediction, edm, edm2, flow, sd3) differ in law, weighting and
output alone. ``python -m experiments.recipes`` runs them side by side.
"""

from mdm_jax.gaussian.recipes import RECIPES
from mdm_jax.launch import config as launch_config


def get_config(variant: str = "vdm"):
    """The digits; ``variant`` is a recipe's name or "smoke"."""
    config = launch_config.get_config()
    config.process = "gaussian"
    config.data.source = "digits"
    config.model.update(width=96, depth=3, num_heads=4, patch_size=2, condition_on_logsnr=True)
    # Grey values are 0.125 apart, seven standard deviations of the noise at logSNR 8.
    config.gaussian.update(low=-8.0, high=8.0, sigma_data=0.8)
    config.gaussian.vdm.update(low=-8.0, high=8.0)
    config.gaussian.edm.sigma_data = config.gaussian.edm2.sigma_data = 0.8
    config.variance.order = ("stratified",)
    config.train.update(steps=1500, batch_size=64, evaluate_every=500, checkpoint_every=500)
    # No clipping: the recipes' gradients differ in scale, and the optimiser does not mind.
    config.optimizer.update(peak=1e-2, clip_norm=0.0, ema_decay=0.995)
    config.evaluate.update(batch_size=64, passes=8, replicates=2, final_passes=32)
    config.sample.update(
        num_samples=25, gap=0, sampler="dpm_solver_pp_2m", num_steps=32, grid="cosine"
    )
    if variant == "smoke":
        launch_config.shrink(config)
    elif variant in RECIPES:
        config.gaussian.recipe = variant
    else:
        raise ValueError(
            f"digits_gaussian has the variants smoke, {', '.join(sorted(RECIPES))}; not {variant!r}"
        )
    return config
