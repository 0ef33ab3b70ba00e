"""Gaussian corruption, its noise, and the preconditioned network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mdm_jax import gaussian
from mdm_jax.corruption.process import spread_levels
from mdm_jax.draws import from_grid
from mdm_jax.gaussian import parameterisations, paths
from mdm_jax.gaussian.objective import normal_noise
from mdm_jax.testing import toys

every_path = pytest.mark.parametrize("path_name", sorted(paths.PATHS))


@every_path
def test_noisy_example_by_hand(path_name):
    path = paths.by_name(path_name)
    process = gaussian.gaussian(path)
    assert process.name == f"gaussian_{path_name}" and process.mask_id is None
    assert process.event_shape(6) == (6,)
    rng = np.random.default_rng(3)
    x, noise = rng.normal(size=(2, 6)), rng.uniform(0.05, 0.95, (2, 6))
    eligible = np.array([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
    logsnr = np.array([[-3.0, 2.0], [0.5, 7.0]])
    ids = np.array([[0, 1, 1, 0, 1, 0]] * 2)
    for level_ids, each in (
        (None, np.repeat(logsnr, 3, axis=1)),
        (ids, np.take_along_axis(logsnr, ids, axis=1)),
    ):
        got = process.corrupt(
            jnp.asarray(x),
            jnp.asarray(logsnr),
            jnp.asarray(noise),
            jnp.asarray(eligible),
            None if level_ids is None else jnp.asarray(level_ids),
        )
        noisy = path.alpha(each) * x + path.sigma(each) * scipy.stats.norm.ppf(noise)
        np.testing.assert_allclose(got.inputs, np.where(eligible, noisy, x), rtol=2e-5, atol=1e-5)
        np.testing.assert_array_equal(got.target_mask, eligible)
        np.testing.assert_array_equal(got.log_weight, np.zeros((2, 2)))


def test_reflected_noise_is_minus_the_noise():
    inner = np.random.default_rng(0).integers(2**23, size=50_000)
    v = from_grid(np.append(inner, [0, 2**23 - 1]))
    eps, reflected = jax.jit(lambda v: (normal_noise(v), normal_noise(1 - v)))(v)
    np.testing.assert_array_equal(reflected, -eps)
    np.testing.assert_allclose(eps[-2:], [-5.2947, 5.2947], rtol=1e-4)
    np.testing.assert_allclose(eps, scipy.stats.norm.ppf(np.float64(v)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path_name", ["ve", "flow"])
def test_preconditioned_network_sees_unit_variance(path_name):
    """N(0, 0.5^2) data: the scale times the spread is 1, and F = 0 is the ideal denoiser."""
    with jax.enable_x64():
        path, data = paths.by_name(path_name), toys.normal(0.0, 0.5)
        logsnr = jnp.asarray([[-9.0, 0.3], [2.0, 9.0]])
        wrapped = gaussian.precondition(lambda x, *_: x, path, 0.5)
        scale = wrapped(jnp.ones((2, 4)), logsnr)
        level = spread_levels(logsnr, 4)
        spread = np.sqrt(path.alpha(level) ** 2 * 0.25 + path.sigma(level) ** 2)
        np.testing.assert_allclose(scale * spread, 1.0, rtol=1e-12)
        # The ideal F of this data is zero whatever the input, so D = c_skip x / alpha.
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4))) * spread
        z, zero = x / path.alpha(level), jnp.zeros((2, 4))
        clean = parameterisations.edm(0.5).to_x0(path, level, zero, x)
        np.testing.assert_allclose(clean, data.denoise(z, level), rtol=1e-10)
        with pytest.raises(ValueError, match="precondition needs sigma_data > 0"):
            gaussian.precondition(lambda *_: x, path, -1.0)
