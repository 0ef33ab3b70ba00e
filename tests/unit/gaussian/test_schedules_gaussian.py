"""Gaussian schedules: every one in the registry, and what each must satisfy as a law."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from gaussian_values import LOGSNR, RATES, TIMES

from mdm_jax import schedules
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.gaussian.schedules import names
from mdm_jax.gaussian.schedules.curve_law import CurveLaw

# Registered schedules are tested by being registered; those without defaults need a line here.
PARAMETERS = {
    "cosine_interpolated": {"size": 512},
    "cosine_power": {"start": 0.2, "power": 2.0},
    "cosine_shifted": {"size": 128},
    "ddpm_discrete": {"num_steps": 7, "beta_start": 0.01, "beta_end": 0.5},
    "flow_shifted": {"ratio": 3.0},
    "iddpm_discrete": {"num_steps": 7},
    "lognormal": {"mean": 0.3, "std": 0.7},
    "wavegrad": {"num_steps": 6, "beta_start": 0.01, "beta_end": 0.5},
}
ZOO = {
    name: functools.partial(gaussian_schedules.by_name, name, **PARAMETERS.get(name, {}))
    for name in gaussian_schedules.GAUSSIAN_SCHEDULES
}
ZOO |= {
    "cosine_power_flat": lambda: gaussian_schedules.cosine_power(0.0, 0.5),
    "sd3_mode_negative": lambda: gaussian_schedules.sd3_mode(-1.0),
    "shifted": lambda: gaussian_schedules.shifted(gaussian_schedules.flow(), 1.0),
    "interpolated_truncated": lambda: gaussian_schedules.interpolated(
        gaussian_schedules.truncated(gaussian_schedules.cosine(), -15.0, 15.0), -1.4, -5.5
    ),
    "zero_terminal": lambda: gaussian_schedules.zero_terminal(gaussian_schedules.ddpm_linear()),
    "beta_time": lambda: gaussian_schedules.beta_time(gaussian_schedules.cosine(), 0.8, 1.0),
    "two_rates": lambda: gaussian_schedules.two_rates(gaussian_schedules.ddpm_linear(), 0.7),
}


def laws(select):
    """Parametrises over all laws; those not selected are slow tests."""
    marks = {name: () if select(name) else pytest.mark.slow for name in sorted(ZOO)}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


# One law of each class of curve; the others are the same curve with other numbers.
SIBLINGS = {
    *("cosine_iddpm", "cosine_power_flat", "edm2_lognormal", "edm_lognormal", "edm_sigma"),
    *("flow_shifted", "iddpm_discrete", "indi", "interpolated_truncated", "ou_time"),
    *("santos_lin_fisher", "sd3_cosmap", "sd3_logit_normal", "sd3_mode_negative"),
    *("variance_linear", "ve_geometric"),
}
# Inverting the incomplete beta function takes long to compile; it has a test against scipy.
every_law = laws(lambda name: name not in SIBLINGS | {"beta_time"})
EXTREMES = np.array([2.0**-24, 3 * 2.0**-24, 1 - 3 * 2.0**-24, 1 - 2.0**-24])
QUANTILES = np.concatenate([EXTREMES[:2], np.linspace(0.00137, 0.99862, 60), EXTREMES[2:]])


@functools.cache
def law_in(name, bits):
    with jax.enable_x64(bits == 64):
        return ZOO[name]()


STEP = 1e-4  # of a five-point difference
AROUND = QUANTILES[5:-5:3] + STEP * np.array([[-2], [-1], [1], [2]])


class Measured(NamedTuple):
    """What a law says at :data:`QUANTILES`, beyond its support, and at nodes of a quadrature."""

    level: np.ndarray
    log_pdf: np.ndarray
    below: np.ndarray
    above: np.ndarray
    around: np.ndarray  # levels at AROUND
    outside: np.ndarray  # log_pdf
    nodes_log_pdf: np.ndarray


@functools.cache
def measured(name, bits):
    """Interpreted, as compiling takes longer; in float64 at the nodes of the quadrature too."""
    law, n = law_in(name, bits), len(QUANTILES)
    with jax.enable_x64(bits == 64):
        low, high = map(float, law.support)
        dtype = np.float64 if bits == 64 else np.float32
        others = [-np.inf, np.inf, low - 0.01, high + 0.01]
        if bits == 64:
            others = np.append(others, quadrature(name)[1])
        level = law.icdf(jnp.asarray(np.append(QUANTILES, AROUND), dtype))
        levels = jnp.append(level[:n], jnp.asarray(others, dtype))
        log_pdf, (below, above) = law.log_pdf(levels), law.tails(levels)
        pieces = level[:n], log_pdf[:n], below[:n], above[:n], level[n:]
        return Measured(*map(np.asarray, (*pieces, log_pdf[n : n + 4], log_pdf[n + 4 :])))


@functools.cache
def quadrature(name):
    """Ends of cells between which the density is smooth, and Gauss-Legendre nodes in each."""
    with jax.enable_x64(True):
        law = law_in(name, 64)
        low, high = (float(np.clip(end, -200, 200)) for end in law.support)
        breaks = np.asarray(gaussian_schedules.logsnr_at(law, jumps(law)))
    ends = np.unique(np.concatenate([np.linspace(-200, 200, 801), [low, high], breaks]))
    ends = ends[(ends >= low) & (ends <= high)]
    ends = np.append(ends, np.full(820 - len(ends), high))  # one shape for all laws
    points, _ = np.polynomial.legendre.leggauss(8)
    middle, half = 0.5 * (ends[1:] + ends[:-1]), 0.5 * np.diff(ends)
    return ends, (middle[:, None] + half[:, None] * points).ravel()


def jumps(law):
    """Times at which the density jumps."""
    table = getattr(law, "decay", getattr(law, "loss", ()))
    if hasattr(law, "boundary"):
        return np.array([law.boundary / (law.boundary + (1 - law.boundary) / law.ratio)])
    return np.arange(1, len(table)) / (len(table) - 1)


def test_registry():
    """Names are those of the functions; every class of curve is built by something in the zoo."""
    assert all(getattr(names, n) is f for n, f in gaussian_schedules.GAUSSIAN_SCHEDULES.items())
    assert all(getattr(names, n) is f for n, f in gaussian_schedules.MODIFIERS.items())
    assert {type(law_in(name, 32)) for name in ZOO} >= set(CurveLaw.__subclasses__())
    assert all(isinstance(law_in(name, 32), schedules.TwoSidedLaw) for name in ZOO)


# Values


def table_law(name):
    if name == "ddpm_discrete":
        return gaussian_schedules.ddpm_discrete()
    if name == "edm_sigma_unit":
        return gaussian_schedules.edm_sigma(0.0, 1.0)
    if name == "cosine_truncated":
        return gaussian_schedules.truncated(gaussian_schedules.cosine(), -15.0, 15.0)
    return ZOO[name]()


@pytest.mark.parametrize("name", sorted(set(LOGSNR) - {"zero_terminal", "zero_terminal_table"}))
def test_levels_at_known_times(name):
    with jax.enable_x64(True):
        got = gaussian_schedules.logsnr_at(table_law(name), np.array(TIMES))
    np.testing.assert_allclose(got, LOGSNR[name], rtol=0, atol=1e-10)


def test_zero_terminal_levels():
    """The continuous one keeps the level of t = 1e-3; its own time begins there."""
    with jax.enable_x64(True):
        base = gaussian_schedules.ddpm_linear()
        late = gaussian_schedules.truncated(
            base, high=float(gaussian_schedules.logsnr_at(base, 1e-3))
        )
        time = (np.array(TIMES) - 1e-3) / (1 - 1e-3)
        got = gaussian_schedules.logsnr_at(gaussian_schedules.zero_terminal(late), time)
        np.testing.assert_allclose(got, LOGSNR["zero_terminal"], rtol=0, atol=1e-10)
        # with 1 at the clean end, alpha' = (alpha - alpha_T) / (1 - alpha_T)
        law, level = gaussian_schedules.zero_terminal(base), gaussian_schedules.logsnr_at(base, 0.5)
        alpha = np.sqrt(scipy.special.expit(np.array([level, base.support[0]])))
        square = ((alpha[0] - alpha[1]) / (1 - alpha[1])) ** 2
        got = gaussian_schedules.logsnr_at(law, 0.5)
        np.testing.assert_allclose(got, scipy.special.logit(square), rtol=1e-12)
    table = gaussian_schedules.zero_terminal_table(gaussian_schedules.ddpm_table())
    steps = np.round(1000 * np.array(TIMES)).astype(int) - 1
    np.testing.assert_allclose(table[steps], LOGSNR["zero_terminal_table"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(table[[0, 998]], [9.2102403670, -19.2850285528], atol=1e-10)
    assert table[-1] == -np.inf


@pytest.mark.parametrize("name", sorted(RATES))
def test_known_rates_and_densities(name):
    slope, *density = RATES[name]
    with jax.enable_x64(True):
        law = table_law(name)
        rate = gaussian_schedules.logsnr_rate(law, gaussian_schedules.logsnr_at(law, 0.25))
        np.testing.assert_allclose(-rate, slope, rtol=0, atol=1e-10)
        got = np.exp(law.log_pdf(np.array([-4.0, 0.0, 4.0])))
    np.testing.assert_allclose(got, density, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("law", "low", "high"),
    [
        (gaussian_schedules.ddpm_linear, -10.04995681, np.inf),
        (gaussian_schedules.cosine_offset, -np.inf, 8.7692947882),
        (gaussian_schedules.edm_rho, -8.7640532694, 12.4292161969),
        (ZOO["interpolated_truncated"], -20.5, 13.6),
        (
            lambda: gaussian_schedules.shifted(gaussian_schedules.uniform_logsnr(-1.0, 2.0), -3.0),
            -4.0,
            -1.0,
        ),
    ],
)
def test_supports(law, low, high):
    with jax.enable_x64(True):
        np.testing.assert_allclose(law().support, (low, high), rtol=0, atol=1e-8)


def test_tables():
    np.testing.assert_allclose(
        gaussian_schedules.ddpm_table()[[0, -1]], [9.2102403670, -10.1176731833], atol=1e-10
    )
    cosine = gaussian_schedules.iddpm_cosine_table()
    np.testing.assert_allclose(
        cosine[[0, 998, 999]], [10.0949888115, -12.9281244463, -19.8358821516], atol=1e-10
    )
    # The clip is active in the last step only: the others are the continuous curve.
    with jax.enable_x64(True):
        exact = gaussian_schedules.logsnr_at(
            gaussian_schedules.cosine_iddpm(), np.arange(1, 1000) / 1000
        )
    np.testing.assert_allclose(cosine[:-1], exact, rtol=1e-9)
    np.testing.assert_allclose(
        gaussian_schedules.ddpm_table(3, 0.1, 0.3)[-1],
        scipy.special.logit(0.9 * 0.8 * 0.7),
        rtol=1e-12,
    )


@pytest.mark.slow
def test_a_table_is_met_at_its_steps():
    with jax.enable_x64(True):
        for law, table in (
            (gaussian_schedules.ddpm_discrete(), gaussian_schedules.ddpm_table()),
            (gaussian_schedules.iddpm_discrete(), gaussian_schedules.iddpm_cosine_table()),
            (gaussian_schedules.wavegrad(), gaussian_schedules.ddpm_table(1000, 1e-6, 0.01)),
        ):
            steps = np.arange(1, 1001)
            got = gaussian_schedules.logsnr_at(law, steps / 1000, (1000 - steps) / 1000)
            np.testing.assert_allclose(got, table, rtol=1e-9)


# Properties of every schedule


@every_law
def test_inverse_in_float64(name):
    at = measured(name, 64)
    assert at.level.dtype == np.float64
    np.testing.assert_allclose(at.below, QUANTILES, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(at.above, 1 - QUANTILES, rtol=1e-9, atol=1e-13)
    assert np.all(np.diff(at.level) > 0)


@every_law
def test_density_is_one_over_the_rate(name):
    """By finite differences, so that no derivative of JAX vouches for itself."""
    at = measured(name, 64)
    before, behind, ahead, beyond = at.around.reshape(AROUND.shape)
    slope = (8 * (ahead - behind) - (beyond - before)) / (12 * STEP)
    np.testing.assert_allclose(slope, np.exp(-at.log_pdf[5:-5:3]), rtol=1e-7)


@every_law
def test_mass_is_one(name):
    ends, _ = quadrature(name)
    _, weights = np.polynomial.legendre.leggauss(8)
    density = np.exp(measured(name, 64).nodes_log_pdf).reshape(-1, 8)
    mass = np.sum(density @ weights * 0.5 * np.diff(ends))
    np.testing.assert_allclose(mass, 1, rtol=5e-8)


@every_law
def test_float32_holds_both_ends(name):
    """Levels, tails and densities at quantiles down to 2^-24 and up to 1 - 2^-24."""
    single, double = measured(name, 32), measured(name, 64)
    assert all(value.dtype == np.float32 for value in single)
    assert all(np.all(np.isfinite(value)) for value in single[:5])
    u = QUANTILES.astype(np.float32)
    # The incomplete beta function of JAX is exact to 1e-6, and rises slowly where density is low.
    slack = (2e-5 if name.startswith("beta") else 3e-6) * np.maximum(1, np.abs(double.level))
    # The quantiles themselves are rounded too, which the slope turns into a change of level.
    slack += 2 * np.exp(-double.log_pdf) * np.abs(u - QUANTILES)
    assert np.all(np.abs(single.level - double.level) <= slack)
    np.testing.assert_allclose(single.log_pdf, double.log_pdf, rtol=1e-5, atol=1e-4)
    # The density turns the last digit of a level into an error of its quantile.
    slack = 4e-7 * np.exp(single.log_pdf) * np.maximum(1, np.abs(single.level))
    slack += 1e-5 * np.minimum(u, 1 - u)
    assert np.all(np.abs(single.below - u) <= slack + 2.4e-7 * (u > 0.5))
    assert np.all(np.abs(single.above - (1 - u)) <= slack + 2.4e-7 * (u < 0.5))
    assert np.all(np.diff(single.level) >= 0)


def test_noisy_end_in_time():
    """With 1 - t given, float32 keeps the level; from t alone it cannot."""
    law, rest = gaussian_schedules.cosine(), np.float32(2.0**-22)
    exact = 2 * np.log(np.tan(np.pi / 2 * 2.0**-22))
    np.testing.assert_allclose(gaussian_schedules.logsnr_at(law, 1 - rest, rest), exact, rtol=1e-6)
    rest = np.float32(0.3 * 2.0**-22)
    held = gaussian_schedules.logsnr_at(law, np.float32(1) - rest, rest)
    assert abs(held - gaussian_schedules.logsnr_at(law, np.float32(1) - rest)) > 0.1


def differentiate(law, u):
    level, pull_back = jax.vjp(law.icdf, u)
    log_pdf, tilt = jax.vjp(law.log_pdf, level)
    return level, *pull_back(jnp.ones_like(u)), log_pdf, *tilt(jnp.ones_like(u))


compiled = jax.jit(differentiate)


@laws(("cosine_power", "ddpm_linear", "sd3_mode").__contains__)
def test_compiled_gradients_in_float32(name):
    """In reverse mode, which multiplies what a where() discards by zero."""
    u = jnp.asarray(QUANTILES, jnp.float32)
    level, slope, log_pdf, tilt = compiled(law_in(name, 32), u)
    assert all(np.all(np.isfinite(value)) for value in (level, slope, log_pdf, tilt))
    np.testing.assert_allclose(slope * np.exp(log_pdf), 1, rtol=1e-4)
    np.testing.assert_allclose(level, measured(name, 32).level, rtol=2e-5, atol=2e-5)


@laws(("cosine", "uniform_logsnr").__contains__)
def test_truncation(name):
    """Between the 20 % and the 90 % quantile of any schedule."""
    with jax.enable_x64(True):
        law = law_in(name, 64)
        low, high = law.icdf(np.array([0.2, 0.9]))
        cut, u = gaussian_schedules.truncated(law, float(low), float(high)), QUANTILES[5:-5:8]
        level = cut.icdf(u)
        np.testing.assert_allclose(level, law.icdf(0.2 + 0.7 * u), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(cut.log_pdf(level), law.log_pdf(level) - np.log(0.7), atol=1e-9)
        np.testing.assert_allclose(cut.cdf(level), u, rtol=1e-9)
        ends = cut.log_pdf(np.array([low - 0.01, high + 0.01]))
        np.testing.assert_array_equal(ends, -np.inf)


@every_law
def test_outside_the_support(name):
    np.testing.assert_array_equal(measured(name, 64).outside, -np.inf)
    np.testing.assert_array_equal(measured(name, 32).outside, -np.inf)
