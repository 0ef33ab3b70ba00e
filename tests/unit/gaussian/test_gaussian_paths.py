"""Paths of Gaussian diffusion and the noise coordinates of other code bases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax.gaussian import paths

every_path = pytest.mark.parametrize("name", sorted(paths.PATHS))
LEVELS = np.array([-20.0, -12.0, -4.0, -0.3, 0.0, 1.3, 5.0, 12.0, 18.0, 20.0])


@functools.cache
def measured(name, bits):
    """log alpha, log sigma, both slopes, amplitudes, and slopes by differentiation."""
    with jax.enable_x64(bits == 64):
        path, levels = paths.by_name(name), jnp.asarray(LEVELS)
        ones = jnp.ones_like(levels)
        return [
            np.asarray(value)
            for value in (
                path.log_alpha(levels),
                path.log_sigma(levels),
                path.log_alpha_slope(levels),
                path.log_sigma_slope(levels),
                path.alpha(levels),
                path.sigma(levels),
                jax.jvp(path.log_alpha, (levels,), (ones,))[1],
                jax.jvp(path.log_sigma, (levels,), (ones,))[1],
            )
        ]


@every_path
def test_amplitudes_have_the_logsnr_and_slopes_are_derivatives(name):
    log_alpha, log_sigma, slope, noise_slope, alpha, sigma, by_jvp, noise_by_jvp = measured(
        name, 64
    )
    np.testing.assert_allclose(2 * (log_alpha - log_sigma), LEVELS, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(slope - noise_slope, 0.5, rtol=1e-14)
    np.testing.assert_allclose(slope, by_jvp, rtol=1e-12)
    np.testing.assert_allclose(noise_slope, noise_by_jvp, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(np.log(alpha), log_alpha, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(np.log(sigma), log_sigma, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "name, rule",
    [
        ("vp", lambda alpha, sigma: alpha**2 + sigma**2),
        ("ve", lambda alpha, sigma: alpha + 0 * sigma),
        ("flow", lambda alpha, sigma: alpha + sigma),
        ("song_subvp", lambda alpha, sigma: alpha**2 + sigma),
    ],
)
def test_each_path_keeps_its_sum(name, rule):
    alpha, sigma = measured(name, 64)[4:6]
    np.testing.assert_allclose(rule(alpha, sigma), 1.0, rtol=1e-12)


def test_closed_forms_of_the_sub_vp_path():
    s = np.exp(-LEVELS / 2)
    alpha, slope = measured("song_subvp", 64)[4], measured("song_subvp", 64)[2]
    np.testing.assert_allclose(alpha, 2 / (s + np.sqrt(s**2 + 4)), rtol=1e-12)
    np.testing.assert_allclose(slope, 0.5 / np.sqrt(1 + 4 * np.exp(LEVELS)), rtol=1e-12)


@every_path
def test_float32_keeps_six_digits_between_minus_20_and_20(name):
    for index in (4, 5):
        single, double = measured(name, 32)[index], measured(name, 64)[index]
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, double, rtol=1e-6)
    for index, atol in ((2, 0.0), (3, 0.0), (6, 1e-7), (7, 1e-7)):
        np.testing.assert_allclose(
            measured(name, 32)[index], measured(name, 64)[index], rtol=2e-6, atol=atol
        )


@every_path
def test_a_path_is_a_static_pytree(name):
    path = paths.by_name(name)
    alpha = jax.jit(lambda path, x: path.alpha(x))
    assert jax.tree.leaves(path) == [] and path.name == name
    np.testing.assert_allclose(alpha(path, 1.3), path.alpha(1.3), rtol=1e-6)
    np.testing.assert_allclose(
        alpha(paths.ve(), 1.3), 1.0
    )  # not the code compiled for another path


def test_an_unknown_path_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match="unknown path 'subvp'; did you mean .*song_subvp"):
        paths.by_name("subvp")


def test_scales_of_other_code_bases():
    with jax.enable_x64():
        level = 1.3
        assert paths.vdm_gamma(level) == -1.3
        assert paths.half_logsnr(level) == 0.65
        np.testing.assert_allclose(paths.sigma_from_logsnr(level), np.exp(-0.65))
        # Table 2.2 of the specification.
        np.testing.assert_allclose(paths.logsnr_from_sigma(0.01), 9.2103403720, atol=1e-9)
        np.testing.assert_allclose(paths.logsnr_from_cosine_time(0.25), 1.7627471740, atol=1e-9)
        np.testing.assert_allclose(paths.logsnr_from_flow_time(0.1), 4.3944491547, atol=1e-9)


@pytest.mark.parametrize(
    "there, back",
    [
        (paths.sigma_from_logsnr, paths.logsnr_from_sigma),
        (paths.half_logsnr, paths.logsnr_from_half),
        (paths.vdm_gamma, paths.logsnr_from_vdm_gamma),
        (paths.flow_time, paths.logsnr_from_flow_time),
        (paths.cosine_time, paths.logsnr_from_cosine_time),
    ],
)
def test_scales_round_trip(there, back):
    with jax.enable_x64():
        np.testing.assert_allclose(back(there(LEVELS)), LEVELS, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "time, logsnr",
    [
        (paths.flow_time, paths.logsnr_from_flow_time),
        (paths.cosine_time, paths.logsnr_from_cosine_time),
    ],
)
def test_times_given_with_their_rest_are_precise_at_the_noisy_end(time, logsnr):
    levels = np.float32([-20.0, -12.0, 3.0, 20.0])
    rest = time(-levels)  # both laws are symmetric, so this is 1 - time
    np.testing.assert_allclose(logsnr(time(levels), rest), levels, rtol=2e-6)


def test_paths_and_times_agree():
    with jax.enable_x64():
        np.testing.assert_allclose(paths.flow().sigma(LEVELS), paths.flow_time(LEVELS), rtol=1e-12)
        np.testing.assert_allclose(
            paths.vp().sigma(LEVELS),
            np.sin(np.pi / 2 * paths.cosine_time(LEVELS)),
            rtol=1e-12,
        )
