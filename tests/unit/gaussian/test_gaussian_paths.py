"""Paths of Gaussian diffusion and the noise coordinates of other code bases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.gaussian import paths

pytestmark = pytest.mark.keyless

every_path = pytest.mark.parametrize("name", sorted(paths.PATHS))
LEVELS = np.array([-20.0, -12.0, -4.0, -0.3, 0.0, 1.3, 5.0, 12.0, 18.0, 20.0])


@functools.cache
def measured(name, bits):
    """Amplitudes and their logarithms, and the derivatives of these, [6, levels]."""

    @jax.jit
    def measure(levels):
        path, ones = paths.by_name(name), jnp.ones_like(levels)
        log_alpha, alpha_slope = jax.jvp(path.log_alpha, (levels,), (ones,))
        log_sigma, sigma_slope = jax.jvp(path.log_sigma, (levels,), (ones,))
        return (
            jnp.stack([path.alpha(levels), path.sigma(levels), log_alpha, log_sigma]),
            jnp.stack([alpha_slope, sigma_slope]),
        )

    with jax.enable_x64(bits == 64):
        return jax.tree.map(np.asarray, measure(jnp.asarray(LEVELS)))


RULES = {
    "vp": lambda alpha, sigma: alpha**2 + sigma**2,
    "ve": lambda alpha, sigma: alpha + 0 * sigma,
    "flow": lambda alpha, sigma: alpha + sigma,
    "song_subvp": lambda alpha, sigma: alpha**2 + sigma,
}


@every_path
def test_amplitudes_have_the_logsnr_and_keep_their_sum(name):
    (alpha, sigma, log_alpha, log_sigma), (slope, noise_slope) = measured(name, 64)
    np.testing.assert_allclose(2 * (log_alpha - log_sigma), LEVELS, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(slope - noise_slope, 0.5, rtol=1e-12)
    np.testing.assert_allclose(np.log(alpha), log_alpha, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(np.log(sigma), log_sigma, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(RULES[name](alpha, sigma), 1.0, rtol=1e-12)


def test_closed_forms_of_the_sub_vp_path():
    s, (values, slopes) = np.exp(-LEVELS / 2), measured("song_subvp", 64)
    np.testing.assert_allclose(values[0], 2 / (s + np.sqrt(s**2 + 4)), rtol=1e-12)
    np.testing.assert_allclose(slopes[0], 0.5 / np.sqrt(1 + 4 * np.exp(LEVELS)), rtol=1e-12)


@every_path
def test_float32_keeps_six_digits_between_minus_20_and_20(name):
    single, double = measured(name, 32), measured(name, 64)
    assert single[0].dtype == np.float32
    np.testing.assert_allclose(single[0][:2], double[0][:2], rtol=1e-6)
    np.testing.assert_allclose(single[1], double[1], rtol=2e-6, atol=1e-7)


def test_a_path_is_a_static_pytree():
    alpha = jax.jit(lambda path, x: path.alpha(x))
    for name in paths.PATHS:  # no path runs the code compiled for another
        path = paths.by_name(name)
        assert jax.tree.leaves(path) == [] and path.name == name
        np.testing.assert_allclose(alpha(path, 1.3), path.alpha(1.3), rtol=1e-6)


def test_an_unknown_path_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match="unknown path 'subvp'; did you mean .*song_subvp"):
        paths.by_name("subvp")
