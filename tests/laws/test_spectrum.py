"""Spectra of pictures whose spectrum is known, and the weighting that is made of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from mdm_jax.gaussian import weightings
from mdm_jax.gaussian.spectrum import radial_spectrum

pytestmark = pytest.mark.keyless

SIDE, POWER, EXPONENT, COUNT = 32, 3.0, 2.0, 400
LEVELS = np.linspace(-12, 14, 521)


@pytest.fixture(scope="module")
def pictures():
    """[400, 32, 32] normal fields of power 3 f^-2, f the nearest whole frequency; not centred."""
    rows = np.fft.fftfreq(SIDE) * SIDE
    frequency = np.maximum(1, np.rint(np.hypot(rows[:, None], rows)))
    white = np.random.default_rng(0).normal(size=(COUNT, SIDE, SIDE))
    amplitude = np.sqrt(POWER * frequency**-EXPONENT)
    return np.fft.ifft2(np.fft.fft2(white, norm="ortho") * amplitude, norm="ortho").real + 0.7


def test_a_power_law_is_measured(pictures):
    """Rings have 8 modes or more, half of them free; 4 standard errors at each frequency."""
    frequencies, power = radial_spectrum(pictures)
    np.testing.assert_array_equal(frequencies, np.arange(1, 17))
    rows = np.fft.fftfreq(SIDE) * SIDE
    rings = np.rint(np.hypot(rows[:, None], rows))
    modes = np.array([np.sum(rings == f) for f in frequencies])
    error = np.sqrt(2 / (modes * COUNT))  # the power of k free real numbers: sqrt(2 / k)
    assert error.max() < 0.026
    np.testing.assert_array_less(np.abs(power / (POWER * frequencies**-EXPONENT) - 1), 4 * error)


def test_white_noise_has_its_variance():
    noise = np.random.default_rng(1).normal(0, 0.5, (300, 8, 12))
    frequencies, power = radial_spectrum(noise)
    assert frequencies.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(power, 0.25, rtol=4 * np.sqrt(2 / (300 * 7)))


def test_the_weighting_of_a_power_law_is_flat_between_its_ends():
    """Octaves alike: levels are even in log f, and the mean of bumps has a closed form."""
    # As many frequencies in each octave, so that each counts alike; middles of equal parts.
    frequencies = 16 ** ((np.arange(200) + 0.5) / 200)
    own = weightings.spectrum((frequencies, POWER * frequencies**-EXPONENT), falloff=0.0)
    low, high = -np.log(POWER), -np.log(POWER) + EXPONENT * np.log(16)
    exact = (expit(LEVELS - low) - expit(LEVELS - high)) / (high - low)
    np.testing.assert_allclose(np.exp(own.log_weight(LEVELS)), exact, rtol=1e-3)


def test_the_weighting_of_measured_pictures(pictures):
    """Whole frequencies with shares 1/f against the closed form of known power."""
    own = weightings.spectrum(radial_spectrum(pictures))
    frequencies = np.arange(1, 17)
    shares = (1 / frequencies) / np.sum(1 / frequencies)
    above = LEVELS[:, None] + np.log(POWER * frequencies**-EXPONENT)
    exact = np.sum(shares * expit(above) * expit(-above), axis=-1)
    weight = np.exp(np.asarray(own.log_weight(LEVELS)))
    np.testing.assert_allclose(weight, exact, rtol=0.05)  # levels are known within 0.03
    assert np.trapezoid(weight, LEVELS) == pytest.approx(1, abs=2e-4)


def test_frequencies_that_no_picture_has():
    with pytest.raises(ValueError, match="power above 0"):
        weightings.spectrum((np.arange(1, 3), np.array([1.0, 0.0])))
    with pytest.raises(ValueError, match="two pictures"):
        radial_spectrum(np.zeros((1, 8, 8)))


def test_far_levels_are_finite():
    own = weightings.spectrum((np.arange(1, 3), np.array([1.0, 0.1])))
    assert np.all(np.isfinite(own.log_weight(jnp.float32([-200, 200]))))
