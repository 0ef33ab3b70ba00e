"""The logSNR coordinates of masking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import schedules

pytestmark = pytest.mark.keyless


def test_coordinates_against_float64():
    logsnr = np.linspace(-80, 80, 641).astype(np.float32)
    exact = logsnr.astype(np.float64)
    log_survival = -np.logaddexp(0, -exact)
    log_rate = -np.logaddexp(0, exact)
    close = {"rtol": 2e-6}
    np.testing.assert_allclose(schedules.masking_rate(logsnr), np.exp(log_rate), **close)
    np.testing.assert_allclose(
        schedules.survival_probability(logsnr), np.exp(log_survival), **close
    )
    np.testing.assert_allclose(schedules.log_masking_rate(logsnr), log_rate, **close)
    np.testing.assert_allclose(schedules.log_survival_probability(logsnr), log_survival, **close)


@pytest.mark.parametrize(
    "function",
    [
        schedules.masking_rate,
        schedules.survival_probability,
        schedules.log_masking_rate,
        schedules.log_survival_probability,
    ],
)
def test_coordinate_gradients(function):
    logsnr = jnp.linspace(-80, 80, 161).reshape(7, 23)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(function(x))))(logsnr)
    assert function(logsnr).shape == (7, 23)
    assert np.all(np.isfinite(slope))
    log_slopes = {
        schedules.log_masking_rate: lambda x: -jax.nn.sigmoid(x),
        schedules.log_survival_probability: lambda x: jax.nn.sigmoid(-x),
    }
    if function in log_slopes:
        np.testing.assert_allclose(slope, log_slopes[function](logsnr), rtol=2e-6)


def test_coordinates_invert():
    logsnr = np.linspace(-80, 80, 161).astype(np.float32)
    noisy, clean = logsnr[logsnr <= 0], logsnr[logsnr >= 0]
    back = schedules.logsnr_from_survival_probability(schedules.survival_probability(noisy))
    np.testing.assert_allclose(back, noisy, rtol=2e-6)
    back = schedules.logsnr_from_masking_rate(schedules.masking_rate(clean))
    np.testing.assert_allclose(back, clean, rtol=2e-6)
    back = schedules.logsnr_from_log_survival_probability(schedules.log_survival_probability(noisy))
    np.testing.assert_allclose(back, noisy, rtol=2e-6)
    back = schedules.logsnr_from_log_masking_rate(schedules.log_masking_rate(clean))
    np.testing.assert_allclose(back, clean, rtol=2e-6)
    ends = jnp.array([0.0, 1.0])
    np.testing.assert_array_equal(schedules.logsnr_from_masking_rate(ends), [np.inf, -np.inf])
    np.testing.assert_array_equal(
        schedules.logsnr_from_survival_probability(ends), [-np.inf, np.inf]
    )


def test_levels_agree_in_every_coordinate():
    by_logsnr = schedules.level_from_logsnr(jnp.linspace(-5, 5, 11))
    by_rate = schedules.level_from_masking_rate(by_logsnr.rate)
    for a, b in zip(by_logsnr, by_rate):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert schedules.level_from_logsnr(0).rate == 0.5
