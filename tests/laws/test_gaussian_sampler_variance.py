"""Variance of Gaussian samples on normal data, by the linear recursion of the steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gaussian_runs import (
    SAMPLERS,
    X0,
    context,
    cosine,
    draw_from,
    edm,
    edm_grid,
    oracle,
    uniform_logsnr,
    uniform_softplus,
)

from mdm_jax.gaussian import paths
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian.samplers.sampler import step_noise


@functools.cache
def step_gains(sampler, std, num_steps):
    """``gains(level, next_level) -> A, B``: a step takes x to A x + B noise on normal data."""
    path = paths.ve()
    model = oracle({1.0: "standard", 0.5: "narrow"}[std], path)
    denoise = gaussian_samplers.bind_denoiser(model, X0, path)

    def gains(level, next_level):
        def now():  # the same keys each time
            return context(path, level, next_level, num_steps=num_steps)

        def step(x):
            state = gaussian_samplers.GaussianState(jnp.full((1, 1), x), jnp.zeros((1, 1)))
            return sampler.step(now(), denoise, state).x[0, 0]

        noise = step_noise(now(), jnp.zeros((1, 1)))[0, 0]
        return step(1.0) - step(0.0), step(0.0) / noise

    return tiny.jit(gains)


def variance_out(sampler, grid, std, num_steps=None):
    """Variance of x / alpha after the last step, started from the exact law."""
    variance = std**2 + np.exp(-grid[0])
    for level, next_level in zip(grid[:-1], grid[1:]):
        gain, noise = map(float, step_gains(sampler, std, num_steps)(level, next_level))
        variance = gain**2 * variance + noise**2
    return variance


ANCESTRAL = {  # (std, N): variance out for uniform logSNR, cosine, EDM, softplus
    (1.0, 5): (0.2845130074, 0.5055149242, 0.2843876932, 0.2022320704),
    (1.0, 10): (0.4991897544, 0.6845801355, 0.4720684463, 0.4496644887),
    (1.0, 20): (0.6886499374, 0.8149523187, 0.6621692134, 0.6706555458),
    (1.0, 50): (0.8561148500, 0.9162931960, 0.8396655901, 0.8524792682),
    (0.5, 5): (0.0786850910, 0.1088386227, 0.0597653114, 0.0666890390),
    (0.5, 20): (0.1723958209, 0.1882860679, 0.1595795987, 0.1798434319),
}
ANCESTRAL_SAMPLER = gaussian_samplers.ddpm_ancestral()


@pytest.mark.parametrize("std, n", ANCESTRAL)
def test_variance_of_ancestral_samples(std, n):
    grids = [uniform_logsnr(n), cosine(n), edm(n), uniform_softplus(n, std)]
    with jax.enable_x64():
        for grid, expected in zip(grids, ANCESTRAL[std, n]):
            found = variance_out(ANCESTRAL_SAMPLER, grid, std)
            np.testing.assert_allclose(found, expected, atol=2e-10)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "settings, n, variance",
    [
        slow({"second_order": False}, 18, 0.178962586642),
        slow({"churn": 40.0, "second_order": False}, 18, 0.150770843925),
        ({}, 18, 0.278398632092),
        slow({"churn": 4.0}, 18, 0.298780274086),
        ({"churn": 40.0}, 18, 0.316095314990),
        slow({"churn": 4.0, "churn_min": 100.0}, 18, 0.278398632092),
        slow({}, 36, 0.256144271642),
        slow({}, 72, 0.251437480044),
    ],
)
def test_edm_sampler_on_narrow_data(settings, n, variance):
    with jax.enable_x64():
        sampler = SAMPLERS["edm"] if not settings else gaussian_samplers.edm_heun(**settings)
        steps = n if settings else None  # without churn nothing depends on it
        found = variance_out(sampler, edm_grid(n), 0.5, steps)
        np.testing.assert_allclose(found, variance, atol=1e-11)


def test_the_sampled_variance_is_that_of_the_recursion():
    path, grid = paths.vp(), uniform_logsnr(10)
    start = np.sqrt(1 + np.exp(8.0)) * np.random.default_rng(0).normal(size=(64, 1024))
    model = oracle("standard", path)
    out = draw_from(start, model, gaussian_samplers.ddpm_ancestral(), grid, path)
    expected = ANCESTRAL[1.0, 10][0]
    error = expected * np.sqrt(2 / out.size)
    assert abs(np.mean(out.astype(np.float64) ** 2) - expected) < 5 * error
