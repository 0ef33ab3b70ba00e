"""Laws over the logSNR: one zoo, and what every law in it must satisfy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import test_schedules_gaussian
from variants import slow_except

from mdm_jax import draws, schedules
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.schedules import masked
from mdm_jax.schedules.laws import PiecewiseConstant

SCHEDULES = {
    "linear": masked.linear,
    "loglinear": masked.loglinear,
    "clipped": lambda: masked.clipped(0.3, 0.8),
    "cosine_md4": masked.cosine_md4,
    "cosine_mdlm": masked.cosine_mdlm,
    "cosine_squared": masked.cosine_squared,
    "power": lambda: masked.power(2.0),
    "power_steep": lambda: masked.power(8.0),
    "sqrt": masked.sqrt,
    "log": masked.log,
    "geometric": lambda: masked.geometric(1e-3, 20.0),
    "linear_sigma": lambda: masked.linear_sigma(1e-3, 7.0),
    "linear_sigma_from_zero": lambda: masked.linear_sigma(0.0, 7.0),
    "log_uniform": lambda: masked.log_uniform(1e-3, 1.0),
    "uniform_logsnr": lambda: masked.uniform_logsnr(-5.0, 5.0),
}
MASSES = np.array([0.02, 0.05, 0.1, 0.22, 0.61])

# Factories, so that a law is built in the precision of the test. Every property runs over all.
ZOO = {
    "logistic": schedules.logistic,
    "logistic_shifted": lambda: schedules.logistic(-1.5, 0.7),
    "uniform": lambda: schedules.uniform(-6.0, 4.0),
    "truncated_logistic": lambda: gaussian_schedules.truncated(schedules.logistic(), -8.0, 6.9),
    "truncated_one_side": lambda: gaussian_schedules.truncated(schedules.logistic(), high=6.9),
    "truncated_tail": lambda: gaussian_schedules.truncated(schedules.logistic(), 10.0, 14.0),
    "truncated_twice": lambda: gaussian_schedules.truncated(
        gaussian_schedules.truncated(schedules.logistic(), -8.0, 6.0), -3.0, 9.0
    ),
    "truncated_schedule": lambda: gaussian_schedules.truncated(
        schedules.law_of(masked.cosine_mdlm()), -15.0, 15.0
    ),
    "truncated_piecewise": lambda: gaussian_schedules.truncated(
        schedules.piecewise(MASSES, (-5.0, 5.0)), -4.0, 4.5
    ),
    "piecewise": lambda: schedules.piecewise(MASSES, (-5.0, 5.0)),
    "piecewise_edges": lambda: schedules.piecewise([1.0, 0.0, 3.0, 1e-6], [-7.0, -2, 0, 0.5, 9]),
    "tabulated": lambda: schedules.tabulated(lambda t: np.sin(np.pi / 2 * t) ** 2),
    "tabulated_bounded": lambda: schedules.tabulated(lambda t: 0.1 + 0.7 * t**1.5),
    **{
        f"schedule_{name}": lambda make=make: schedules.law_of(make())
        for name, make in SCHEDULES.items()
    },
}
# The others share their code with one that is kept.
SIBLINGS = {
    *("logistic_shifted", "schedule_linear", "schedule_linear_sigma_from_zero", "schedule_sqrt"),
    *("schedule_loglinear", "schedule_power_steep", "tabulated_bounded", "truncated_one_side"),
    *("piecewise_edges", "truncated_logistic"),
}
every_law = pytest.mark.parametrize("name", slow_except(set(ZOO) - SIBLINGS, sorted(ZOO)))
# One of each kind; in float64 it is every law.
FEW = {"logistic", "uniform", "piecewise", "tabulated", "truncated_twice", "schedule_clipped"}
few_laws = pytest.mark.parametrize("name", slow_except(FEW, sorted(ZOO)))
EXTREMES = np.array([2.0**-24, 3 * 2.0**-24, 1 - 3 * 2.0**-24, 1 - 2.0**-24])
QUANTILES = np.concatenate([EXTREMES[:2], np.linspace(0.001, 0.999, 207), EXTREMES[2:]])
RANDOM = np.random.default_rng(7).integers(2**23, size=20_000)  # points of the draw grid


def test_every_public_law_and_schedule_is_in_the_zoo():
    classes, pending = set(), [schedules.TwoSidedLaw]
    while pending:
        found = [c for c in pending.pop().__subclasses__() if c.__module__.startswith("mdm_jax")]
        classes.update(found)
        pending.extend(found)
    tested = [*ZOO.values(), *test_schedules_gaussian.ZOO.values()]
    assert {type(make()) for make in tested} == classes - {gaussian_schedules.CurveLaw}
    assert set(masked.MASKED_SCHEDULES) <= set(SCHEDULES)
    assert all(isinstance(law_in(name, 32), schedules.Law) for name in ZOO)


class Measured(NamedTuple):
    """What a law says at :data:`QUANTILES`."""

    u: np.ndarray
    level: np.ndarray
    below: np.ndarray
    above: np.ndarray
    log_pdf: np.ndarray
    slope: np.ndarray  # of icdf
    tilt: np.ndarray  # slope of log_pdf
    outside_cdf: np.ndarray  # at four levels outside of the support
    outside_log_pdf: np.ndarray
    outside_tilt: np.ndarray


@functools.cache
def law_in(name, bits):
    with jax.enable_x64(bits == 64):
        return ZOO[name]()


def differentiate_forward(function, x):
    return jax.jvp(function, (x,), (jnp.ones_like(x),))


def differentiate_backward(function, x):
    """The stricter of the two: reverse mode multiplies what a where() discards by 0."""
    value, pull_back = jax.vjp(function, x)
    return value, *pull_back(jnp.ones_like(x))


def measure(law, u, outside, differentiate):
    level, slope = differentiate(law.icdf, u)
    log_pdf, tilt = differentiate(law.log_pdf, jnp.concatenate([level, outside]))
    below, above = law.tails(jnp.concatenate([level, outside]))
    n = len(u)
    inside = (u, level, below[:n], above[:n], log_pdf[:n], slope, tilt[:n])
    return Measured(*inside, below[n:], log_pdf[n:], tilt[n:])


# One compilation for all laws of a type, whose parameters are traced.
compiled_measure = jax.jit(measure, static_argnames="differentiate")
compiled_log_pdf = jax.jit(lambda law, logsnr: law.log_pdf(logsnr))


@functools.cache
def measured(name, bits):
    """In float64, or compiled in float32 and at the draws of :data:`RANDOM` as well."""
    law = law_in(name, bits)
    with jax.enable_x64(bits == 64):
        low, high = map(float, law.support)
        outside = np.array([-np.inf, np.inf, low - 0.01, high + 0.01])
        if bits == 64:
            results = measure(law, jnp.asarray(QUANTILES), outside, differentiate_forward)
        else:
            u = np.concatenate([QUANTILES.astype(np.float32), draws.from_grid(RANDOM)])
            outside = outside.astype(np.float32)
            results = compiled_measure(law, u, outside, differentiate=differentiate_backward)
        return jax.tree.map(np.asarray, results)


@every_law
def test_inverse_in_float64(name):
    at = measured(name, 64)
    assert at.level.dtype == np.float64
    np.testing.assert_allclose(at.below, QUANTILES, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(at.above, 1 - QUANTILES, rtol=1e-9, atol=1e-14)


@few_laws
def test_inverse_in_float32(name):
    at = measured(name, 32)
    assert all(value.dtype == np.float32 for value in at)
    # The density turns the last digit of a level of order 10 into an error of the quantile,
    # and there are four units of rounding on the side where the probability is near 1.
    slack = 4e-7 * np.exp(at.log_pdf) * np.maximum(1, np.abs(at.level))
    slack += 1e-5 * np.minimum(at.u, 1 - at.u)
    assert np.all(np.abs(at.below - at.u) <= slack + 2.4e-7 * (at.u > 0.5))
    assert np.all(np.abs(at.above - (1 - at.u)) <= slack + 2.4e-7 * (at.u < 0.5))


@every_law
def test_float32_levels_agree_with_float64(name):
    """Most of all at the clean end, where 1 - m has long rounded to 1."""
    single, double = measured(name, 32), measured(name, 64)
    single = Measured(*(value[: len(QUANTILES)] for value in single))
    # The last cell of this one, of mass 2.5e-7, is four units of rounding wide.
    select = single.u <= (0.9995 if name == "piecewise_edges" else 1.0)
    # The quantiles themselves are rounded too, which the slope turns into a change of level.
    slack = 3e-6 * np.maximum(1, np.abs(double.level))
    slack += 2 * double.slope * np.abs(single.u - QUANTILES)
    assert np.all((np.abs(single.level - double.level) <= slack)[select])


@every_law
def test_derivative_of_icdf_is_one_over_density(name):
    at = measured(name, 64)
    np.testing.assert_allclose(at.slope * np.exp(at.log_pdf), 1, rtol=1e-7)
    at = measured(name, 32)
    np.testing.assert_allclose(at.slope * np.exp(at.log_pdf), 1, rtol=1e-4)


@few_laws
def test_draws_are_finite_in_float32(name):
    """Values and gradients up to the last points of the draw grid, interpreted and compiled.

    An infinite weight from one unlucky rounding would poison a run.
    """
    law, compiled = law_in(name, 32), measured(name, 32)
    for value in compiled[:7]:
        assert np.all(np.isfinite(value))
    level = law.icdf(compiled.u)
    np.testing.assert_allclose(level, compiled.level, rtol=1e-5, atol=1e-5)
    # A level drawn by compiled code has a density under interpreted code, and the other way round.
    for levels in (level, compiled.level):
        assert np.all(np.isfinite(law.log_pdf(levels)))
    assert np.all(np.isfinite(compiled_log_pdf(law, level)))
    low, high = law.support
    assert low - 1e-5 * max(1, abs(low)) <= np.min(level)
    assert high + 1e-5 * max(1, abs(high)) >= np.max(level)
    assert np.all(np.diff(np.asarray(level)[np.argsort(compiled.u)]) >= 0)


@every_law
def test_mass_is_one(name):
    """By Gauss-Legendre quadrature between the breaks; its partial sums are the cdf."""
    with jax.enable_x64(True):
        law = law_in(name, 64)
        low, high = (float(np.clip(end, -400, 400)) for end in law.support)
        base = law.base if isinstance(getattr(law, "base", None), PiecewiseConstant) else law
        breaks = np.asarray(getattr(base, "edges", []))
        nodes = np.unique(np.concatenate([np.linspace(-400, 400, 2001), [low, high], breaks]))
        nodes = nodes[(nodes >= low) & (nodes <= high)]
        nodes = np.append(nodes, np.full(4000 - len(nodes), high))  # one shape for all laws
        points, weights = np.polynomial.legendre.leggauss(8)
        middle, half = (nodes[1:] + nodes[:-1]) / 2, np.diff(nodes) / 2
        density = np.exp(law.log_pdf(middle[:, None] + half[:, None] * points))
        partial = np.cumsum(density @ weights * half)
        np.testing.assert_allclose(partial[-1], 1, rtol=1e-9)
        np.testing.assert_allclose(partial, law.cdf(nodes[1:]), rtol=1e-8, atol=1e-10)


@every_law
def test_outside_the_support(name):
    for at in (measured(name, 32), measured(name, 64)):
        np.testing.assert_array_equal(at.outside_log_pdf, -np.inf)
        np.testing.assert_allclose(at.outside_cdf, [0, 1, 0, 1], atol=1e-7)
        if name not in ("logistic", "logistic_shifted"):  # no end, hence no where()
            np.testing.assert_array_equal(at.outside_tilt, 0)


@pytest.mark.parametrize(
    "name",
    ["logistic", "piecewise", "tabulated", "truncated_schedule", "schedule_geometric"],
)
def test_jit_vmap_and_shapes(name):
    def everything(law, u):
        level = law.icdf(u)
        return level, law.log_pdf(level), law.cdf(level)

    law, at = law_in(name, 32), measured(name, 32)
    u = jnp.asarray(at.u[:210]).reshape(2, 3, 35)
    results = jax.jit(jax.vmap(everything, in_axes=(None, 0)))(law, u)
    for got, want in zip(results, (at.level, at.log_pdf, at.below)):
        assert got.shape == u.shape
        np.testing.assert_allclose(got.ravel(), want[:210], rtol=1e-4, atol=1e-5)
    assert all(out.shape == () for out in jax.eval_shape(everything, law, 0.5))
    assert jax.tree.structure(jax.tree.map(jnp.asarray, law)) == jax.tree.structure(law)


LOGISTIC = scipy.stats.logistic
INDEPENDENT_CDF = {
    "logistic": LOGISTIC.cdf,
    "logistic_shifted": lambda x: LOGISTIC.cdf(x, -1.5, 0.7),
    "uniform": scipy.stats.uniform(-6, 10).cdf,
    "truncated_tail": lambda x: (
        (LOGISTIC.sf(10.0) - LOGISTIC.sf(x)) / (LOGISTIC.sf(10.0) - LOGISTIC.sf(14.0))
    ),
    "schedule_cosine_md4": lambda x: 1 - 2 / np.pi * np.arcsin(LOGISTIC.sf(x)),
    "schedule_cosine_squared": lambda x: 2 / np.pi * np.arctan(np.exp(x / 2)),
    "piecewise": lambda x: np.interp(x, np.linspace(-5, 5, 6), np.append(0, np.cumsum(MASSES))),
}


@pytest.mark.parametrize("name", sorted(INDEPENDENT_CDF))
def test_kolmogorov_smirnov(name):
    """20000 draws with a fixed seed; a right law fails for one seed in 1000."""
    level = measured(name, 32).level[len(QUANTILES) :].astype(np.float64)
    assert scipy.stats.kstest(level, INDEPENDENT_CDF[name]).pvalue > 1e-3
    assert scipy.stats.kstest(level + 0.2, INDEPENDENT_CDF[name]).pvalue < 1e-6


# Identities between laws


def assert_same_law(one, other, rtol=1e-10):
    level = one.icdf(QUANTILES)
    np.testing.assert_allclose(other.icdf(QUANTILES), level, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(other.log_pdf(level), one.log_pdf(level), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(other.cdf(level), one.cdf(level), rtol=rtol, atol=rtol)


@pytest.mark.slow
def test_identities():
    with jax.enable_x64(True):
        of, logit = schedules.law_of, schedules.logsnr_from_masking_rate
        logistic = schedules.logistic()
        assert_same_law(of(masked.linear()), logistic)
        assert_same_law(of(masked.power(1.0)), logistic)
        assert_same_law(
            of(masked.clipped(0.3, 0.8)),
            gaussian_schedules.truncated(logistic, logit(0.8), logit(0.3)),
        )
        assert_same_law(of(masked.uniform_logsnr(-5.0, 5.0)), schedules.uniform(-5.0, 5.0))
        assert_same_law(of(masked.sqrt()), of(masked.power(0.5)))
        assert_same_law(schedules.piecewise([1.0] * 7, (-6.0, 4.0)), schedules.uniform(-6.0, 4.0))
        assert_same_law(gaussian_schedules.truncated(logistic), logistic)
        assert_same_law(
            gaussian_schedules.truncated(schedules.uniform(-9.0, 9.0), -6.0, 4.0),
            schedules.uniform(-6.0, 4.0),
        )
        assert_same_law(
            ZOO["truncated_twice"](), gaussian_schedules.truncated(schedules.logistic(), -3.0, 6.0)
        )
        level = np.linspace(-30, 30, 61)
        np.testing.assert_allclose(
            np.exp(of(masked.cosine_squared()).log_pdf(level)),
            1 / (2 * np.pi * np.cosh(level / 2)),
            rtol=1e-12,
        )


def test_uniform_rate_is_the_logistic_law():
    """Quantile and masking rate add to 1: near 1 is clean."""
    u = np.linspace(0.001, 0.999, 99).astype(np.float32)
    np.testing.assert_allclose(
        schedules.masking_rate(schedules.logistic().icdf(u)), 1 - u, rtol=1e-5
    )


def test_truncation_states_its_lost_mass():
    logit = schedules.logsnr_from_masking_rate
    law = gaussian_schedules.truncated(schedules.logistic(), logit(0.9), logit(1e-3))
    np.testing.assert_allclose(law.lost_mass, (0.1, 1e-3), rtol=1e-5)
    np.testing.assert_allclose(law.support, (logit(0.9), logit(1e-3)))


def test_truncated_tail_keeps_its_precision():
    """All of the mass lies where cdf rounds to 1; differences of it keep 3 digits."""
    law = gaussian_schedules.truncated(schedules.logistic(), 10.0, 14.0)
    below, above = 1 / (1 + np.exp(10.0)), 1 / (1 + np.exp(14.0))
    survival = 0.5 * (below + above)
    np.testing.assert_allclose(law.icdf(0.5), -np.log(survival / (1 - survival)), rtol=1e-6)


def types_within(value):
    """Types of a law, and of the law or schedule that it wraps."""
    inner = getattr(value, "base", getattr(value, "schedule", None))
    return [type(value)] + ([] if inner is None else types_within(inner))


def test_jit_tells_every_type_apart():
    """Structures of different types differ, or jit runs the code of one on another by chance."""
    laws = [law_in(name, 32) for name in sorted(ZOO)]
    values = laws + [make() for make in SCHEDULES.values()]
    for i, one in enumerate(values):
        for other in values[:i]:
            if types_within(one) != types_within(other):
                assert jax.tree.structure(one) != jax.tree.structure(other), (one, other)
    paths = jax.tree_util.tree_leaves_with_path(schedules.logistic())
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [".loc", ".scale"]
