"""Samplers of Gaussian diffusion and the spacing of their steps."""

from mdm_jax.gaussian.samplers.methods import (
    ddim,
    ddpm_ancestral,
    dpm_solver_pp_2m,
    dpm_solver_pp_2s,
    dpm_solver_pp_3m,
    edm_heun,
    euler_flow,
    heun_flow,
    indi,
)
from mdm_jax.gaussian.samplers.sampler import (
    Denoise,
    GaussianContext,
    GaussianSampler,
    GaussianState,
    bind_denoiser,
    guided,
    initial_std,
    make_gaussian_generator,
    sample_gaussian,
    sample_gaussian_with_trace,
    shown,
)
from mdm_jax.gaussian.samplers.step_search import (
    AlignedSteps,
    Metric,
    SearchResult,
    align_steps,
    curve_cost,
    exhaustive_search,
    klub,
    loss_curve,
    normal_cost,
    pair_cost,
    pattern_search,
    refined_grid,
    unmasking_cost,
)
