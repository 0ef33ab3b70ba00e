"""Plots: functions that take axes draw on them and return them; the others return a new figure."""

from mdm_jax.plots.noise_levels import (
    LEVELS,
    compare_recipes,
    effective_weights,
    grid_panels,
    law_densities,
    noise_curves,
    recipe_densities,
    schedule_curves,
    trajectories,
    tried_settings,
    weighting_panels,
)
from mdm_jax.plots.run import (
    Result,
    bits_error,
    critical_batch,
    level_curve,
    noise_shares,
    outcome_curve,
    speed,
    training_curve,
    weights,
)
from mdm_jax.plots.samples import (
    PANELS,
    picture,
    picture_grid,
    picture_paths,
    quality_by_steps,
    quality_curve,
)
from mdm_jax.plots.style import (
    PALETTE,
    bar,
    dress,
    gif,
    line,
    new_figure,
    save,
    svg,
    write,
    write_film,
)
from mdm_jax.plots.variance import (
    RATE,
    component_bars,
    efficiency_bars,
    fitted_curve,
    level_densities,
    level_loss,
    level_moments,
)
