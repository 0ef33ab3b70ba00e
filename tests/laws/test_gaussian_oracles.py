"""Ideal denoisers of Gaussian mixtures, against section 8 of the specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mdm_jax.testing import toys

G1 = toys.narrow_normal()
M1, M2 = toys.symmetric_pair(), toys.skewed_pair()

MOMENTS = {  # mmse and fourth moment at these levels
    "G1": (
        G1,
        [0.249979035344, 0.248860490282, 0.241818360909, 0.2]
        + [0.087803588929, 0.017065385160, 0.000335013090],
        [1.8746855433e-01, 1.8579463087e-01, 1.7542835902e-01, 1.2e-01]
        + [2.3128410686e-02, 8.7368211201e-04, 3.3670131225e-07],
    ),
    "M1": (
        M1,
        [0.999664649851, 0.982011087085, 0.880126885141, 0.467864038352]
        + [0.070773672401, 0.014949980105, 0.000334049449],
        [1.3015725989e00, 1.3133738419e00, 1.3154220218e00, 7.6380409541e-01]
        + [3.1311837242e-02, 6.7853616947e-04, 3.3476774667e-07],
    ),
    "M2": (
        M2,
        [0.534903994919, 0.529795430540, 0.498286708925, 0.335152017345]
        + [0.075102134083, 0.014498890039, 0.000333733785],
        [5.8215275791e-01, 5.7638397870e-01, 5.4248174727e-01, 3.5442788076e-01]
        + [3.2404607243e-02, 6.5287604115e-04, 3.3413706293e-07],
    ),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_of_the_ideal_denoiser(name):
    mixture, mmse, fourth = MOMENTS[name]
    with jax.enable_x64():
        levels = np.array([-8.0, -4, -2, 0, 2, 4, 8])
        found = _moments(mixture, levels)
        np.testing.assert_allclose(found[0], mmse, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found[1], fourth, rtol=1e-9, atol=1e-17)


@jax.jit
def _moments(mixture, levels):
    return mixture.mmse(levels), mixture.fourth_moment(levels)


@pytest.mark.parametrize(
    "mixture, denoised, entropy, log_density",
    [
        (G1, 0.340460967519, 0.725791352645, (-3.605791352645, -0.245791352645, -0.945791352645)),
        (M1, 0.621437359554, 0.838239397968, (-0.349324119561, -4.015359413123, -0.362079221357)),
        (M2, 0.430877067738, 0.640005315611, (-0.736616940874, -0.609310373417, -1.169319116023)),
    ],
)
def test_densities_and_denoisers(mixture, denoised, entropy, log_density):
    with jax.enable_x64():
        got = [np.asarray(value) for value in _known_values(mixture)]
        np.testing.assert_allclose(got[0], denoised, atol=1e-12)
        np.testing.assert_allclose(got[1], entropy, atol=1e-12)
        np.testing.assert_allclose(got[2], log_density, atol=1e-12)
        # Tweedie: the noise is the score of the noisy density, and the variance its slope.
        noise, score, variance_, slope = got[3:]
        np.testing.assert_allclose(noise, -np.exp(-1.7 / 2) * score, rtol=1e-12)
        np.testing.assert_allclose(variance_, np.exp(-1.7) * slope, rtol=1e-12)


@jax.jit
def _known_values(mixture):
    z, level = 0.35, 1.7
    return (
        mixture.denoise(0.4, 1.0),
        mixture.entropy(),
        mixture.log_density(jnp.asarray([-1.0, 0.2, 0.9])),
        mixture.predict_noise(z, level),
        jax.grad(mixture.noisy_log_density)(z, level),
        mixture.posterior_variance(z, level),
        jax.grad(mixture.denoise)(z, level),
    )


@jax.jit
def _predict_noise(mixture, z, levels):
    return mixture.predict_noise(z, levels)


def test_ideal_noise_is_precise_in_float32_at_both_ends():
    levels, z = np.array([-20.0, 20.0]), np.array([3e4, 0.9])
    with jax.enable_x64():
        expected = _predict_noise(M1, z, levels)
    got = _predict_noise(M1, np.float32(z), np.float32(levels))
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_samples_follow_the_mixture():
    """Kolmogorov-Smirnov of 20000 draws; 1.95 is the 0.1 % point."""
    x = np.sort(M2.sample(jax.random.key(1), (20_000,)))
    cdf = 0.3 * scipy.stats.norm.cdf(x, -1, 0.25) + 0.7 * scipy.stats.norm.cdf(x, 0.5, 0.25)
    gap = np.max(np.abs(cdf - (np.arange(len(x)) + 0.5) / len(x)))
    assert gap * len(x) ** 0.5 < 1.95
    with pytest.raises(ValueError, match="std > 0"):
        toys.normal(0.0, 0.0)


@pytest.mark.parametrize(
    "mixture, diffusion, nelbo",
    [
        (G1, 4.306937936097, 0.725793395839),
        (M1, 4.419564428622, 0.838239397969),
        (M2, 4.221405356853, 0.640005372469),
    ],
)
def test_bound_falls_into_its_terms(mixture, diffusion, nelbo):
    """Reconstruction, diffusion and prior between logSNR -10 and 10, nats (section 8.3)."""
    with jax.enable_x64():
        nodes, weights = np.polynomial.legendre.leggauss(80)
        eps_mse, *entropies = _bound_parts(mixture, jnp.asarray(10 * nodes))
        term = 5 * np.sum(weights * eps_mse)
        np.testing.assert_allclose(term, diffusion, rtol=1e-11)
        noise_entropy = 0.5 * np.log(2 * np.pi * np.e) - 5.0
        reconstruction = entropies[0] + noise_entropy - entropies[1]
        power = np.sum(mixture.weights * (mixture.means**2 + mixture.std**2))
        keep, lose = jax.nn.sigmoid(-10.0), jax.nn.sigmoid(10.0)
        prior = 0.5 * (lose + keep * power - 1 - np.log(lose))
        np.testing.assert_allclose(reconstruction + term + prior, nelbo, atol=1e-11)


@jax.jit
def _bound_parts(mixture, levels):
    return mixture.eps_mse(levels), mixture.entropy(), mixture.entropy(10.0)
