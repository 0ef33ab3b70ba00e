"""Samplers of Gaussian diffusion and the spacing of their steps."""

from mdm_jax.gaussian.samplers.methods import (
    ddim,
    ddpm_ancestral,
    dpm_solver_pp_2m,
    edm_heun,
    euler_flow,
    heun_flow,
)
from mdm_jax.gaussian.samplers.sampler import (
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
    SearchResult,
    align_steps,
    curve_cost,
    exhaustive_search,
    klub,
    loss_curve,
    normal_cost,
    pair_cost,
    pattern_search,
    unmasking_cost,
)
