"""Plots; functions that take axes draw on them and return them, the others make a new figure."""

from mdm_jax.plots.gaussian import compare_recipes, effective_weights, recipe_densities
from mdm_jax.plots.quality import quality_by_steps, quality_curve
from mdm_jax.plots.runs import (
    law_densities,
    level_curve,
    new_figure,
    noise_curves,
    picture,
    picture_grid,
    save,
    schedule_curves,
    training_curve,
    trajectories,
)
from mdm_jax.plots.variance import (
    component_bars,
    efficiency_bars,
    level_densities,
    level_loss,
    level_moments,
)
