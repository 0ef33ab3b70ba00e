"""Plots; each function draws on axes and returns them."""

from mdm_jax.plots.quality import quality_by_steps, quality_curve
