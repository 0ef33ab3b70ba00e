"""What every law over the logSNR satisfies, in both precisions, down to quantiles of 2^-24."""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from law_zoo import GAUSSIAN, LAWS, MASKED, MASSES, SIBLINGS, SIZE, every_law, law_in, laws

from mdm_jax import draws, schedules
from mdm_jax.gaussian import schedules as gaussian
from mdm_jax.schedules import masked

pytestmark = pytest.mark.keyless

EXTREMES = np.array([2.0**-24, 3 * 2.0**-24, 1 - 3 * 2.0**-24, 1 - 2.0**-24])
QUANTILES = np.concatenate([EXTREMES[:2], np.linspace(0.001, 0.999, SIZE - 8), EXTREMES[2:]])
RANDOM = np.random.default_rng(7).integers(2**23, size=20_000)  # points of the draw grid


def test_every_public_law_is_in_the_zoo():
    classes, pending = set(), [schedules.TwoSidedLaw]
    while pending:
        known = [c for c in pending.pop().__subclasses__() if c.__module__.startswith("mdm_jax")]
        classes.update(known)
        pending.extend(known)
    built = [law_in(name, 32) for name in LAWS]
    concrete = {c for c in classes if not inspect.isabstract(c) and not c.__name__.startswith("_")}
    assert {type(law) for law in built} == concrete
    assert all(isinstance(law, schedules.Law) for law in built)
    assert set(masked.MASKED_SCHEDULES) == set(MASKED)
    assert all(getattr(masked, name) is f for name, f in masked.MASKED_SCHEDULES.items())
    assert set(gaussian.GAUSSIAN_SCHEDULES) == set(GAUSSIAN)
    tables = gaussian.GAUSSIAN_SCHEDULES | gaussian.MODIFIERS
    assert all(getattr(gaussian, name) is factory for name, factory in tables.items())


def test_a_law_keeps_its_parameters_in_full():
    """Built without x64 it is the law built with it, and can be evaluated in float64."""
    for name in LAWS:
        pairs = zip(jax.tree.leaves(law_in(name, 32)), jax.tree.leaves(law_in(name, 64)))
        for plain, exact in pairs:
            assert np.asarray(plain).dtype == np.float64, name
            np.testing.assert_array_equal(plain, exact, err_msg=name)


class Measured(NamedTuple):
    """A law at :data:`QUANTILES`, and at four levels outside the support."""

    u: np.ndarray
    level: np.ndarray
    below: np.ndarray
    above: np.ndarray
    log_pdf: np.ndarray
    outside_below: np.ndarray
    outside_log_pdf: np.ndarray
    icdf_gradient: np.ndarray
    log_pdf_gradient: np.ndarray
    outside_gradient: np.ndarray


def with_gradient(function, x):
    """In reverse mode, the stricter one: it multiplies what a where() discards by zero."""
    value, pull_back = jax.vjp(function, x)
    return value, *pull_back(jnp.ones_like(x))


def measure(law, u, outside, evaluate=with_gradient):
    n = u.size - outside.size
    level, icdf_gradient = evaluate(law.icdf, u)
    levels = jnp.concatenate([level[:n], outside])
    log_pdf, gradient = evaluate(law.log_pdf, levels)
    below, above = law.tails(levels)
    inside = (u[:n], level[:n], below[:n], above[:n], log_pdf[:n])
    gradients = () if gradient is None else (icdf_gradient[:n], gradient[:n], gradient[n:])
    return Measured(*inside, below[n:], log_pdf[n:], *(gradients or (None,) * 3))


def outside_of(law, dtype):
    low, high = map(float, law.support)
    return jnp.asarray([-np.inf, np.inf, low - 0.01, high + 0.01], dtype)


@functools.cache
def measured(name, bits, gradients=False):
    """Interpreted: operations are shared by all laws, compiled laws are not."""
    law, dtype = law_in(name, bits), np.float64 if bits == 64 else np.float32
    evaluate = with_gradient if gradients else lambda function, x: (function(x), None)
    with jax.enable_x64(bits == 64):
        u = jnp.asarray(np.append(QUANTILES, [0.5] * 4), dtype)
        return jax.tree.map(np.asarray, measure(law, u, outside_of(law, dtype), evaluate))


# Whose gradients the default suite tests in float32; the others are slow tests.
DIFFERENTIATED = set(LAWS) - SIBLINGS - set(GAUSSIAN) - {"beta_time", "two_rates", "zero_terminal"}
DIFFERENTIATED |= {"cosine_power", "ddpm_linear", "sd3_mode"}


def in_float32(name):
    return measured(name, 32, name in DIFFERENTIATED)


@every_law
def test_inverse(name):
    at = measured(name, 64)
    assert at.level.dtype == np.float64
    np.testing.assert_allclose(at.below, QUANTILES, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(at.above, 1 - QUANTILES, rtol=1e-9, atol=1e-14)
    assert np.all(np.diff(at.level) > 0)
    # Next to its noisy end the zero-terminal law is one more rounding off at one point in 4000.
    points = slice(None, None, 64 if name == "zero_terminal" else 1)
    at = jax.tree.map(lambda values: values[points], in_float32(name))
    assert all(value.dtype == np.float32 for value in jax.tree.leaves(at))
    # The density turns the last digit of a level of order 10 into an error of the quantile,
    # and there are four units of rounding on the side where the probability is near 1.
    slack = 4e-7 * np.exp(at.log_pdf) * np.maximum(1, np.abs(at.level))
    slack += 1e-5 * np.minimum(at.u, 1 - at.u)
    assert np.all(np.abs(at.below - at.u) <= slack + 2.4e-7 * (at.u > 0.5))
    assert np.all(np.abs(at.above - (1 - at.u)) <= slack + 2.4e-7 * (at.u < 0.5))
    assert np.all(np.diff(at.level) >= 0)


@every_law
def test_float32_agrees_with_float64(name):
    """Most of all at the clean end, where 1 - m has long rounded to 1."""
    single, double = in_float32(name), measured(name, 64)
    # The last cell of this one, of mass 2.5e-7, is four units of rounding wide.
    select = single.u <= (0.9995 if name == "piecewise_edges" else 1.0)
    # The incomplete beta function of JAX is exact to 1e-6, and rises slowly where density is low.
    slack = (2e-5 if name == "beta_time" else 3e-6) * np.maximum(1, np.abs(double.level))
    # The quantiles themselves are rounded too, which the gradient turns into a change of level.
    slack += 2 * np.exp(-double.log_pdf) * np.abs(single.u - QUANTILES)
    assert np.all((np.abs(single.level - double.level) <= slack)[select])
    if name in GAUSSIAN:
        np.testing.assert_allclose(single.log_pdf, double.log_pdf, rtol=1e-5, atol=1e-4)


def assert_gradients(at, rtol):
    """The derivative of the quantile is one over the density, and all of them are finite."""
    finite = (at.level, at.log_pdf, at.icdf_gradient, at.log_pdf_gradient)
    assert all(np.all(np.isfinite(value)) for value in finite)
    np.testing.assert_allclose(at.icdf_gradient * np.exp(at.log_pdf), 1, rtol=rtol)


@laws(DIFFERENTIATED.__contains__)
def test_gradients(name):
    assert_gradients(measured(name, 32, True), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LAWS))
def test_gradients_in_float64(name):
    """By default the density is tested in float64 against the distribution function."""
    assert_gradients(measured(name, 64, True), rtol=1e-7)


@every_law
def test_outside_the_support(name):
    for at in (in_float32(name), measured(name, 64)):
        np.testing.assert_array_equal(at.outside_log_pdf, -np.inf)
        np.testing.assert_allclose(at.outside_below, [0, 1, 0, 1], atol=1e-7)
    if (
        in_float32(name).outside_gradient is not None
        and np.isfinite(law_in(name, 32).support).all()
    ):
        np.testing.assert_array_equal(in_float32(name).outside_gradient, 0)


def breaks(law):
    """Levels at which the density jumps."""
    inner = getattr(law, "base", law)
    if hasattr(inner, "edges"):
        return inner.edges
    if hasattr(law, "boundary"):
        early = law.boundary / (law.boundary + (1 - law.boundary) / law.ratio)
        return gaussian.logsnr_at(law, np.array([early]))
    table = getattr(law, "decay", getattr(law, "loss", None))
    if table is None:
        return []
    return gaussian.logsnr_at(law, np.arange(1, len(table)) / (len(table) - 1))


@every_law
def test_density_integrates_to_the_distribution_function(name):
    """By Gauss-Legendre quadrature between the breaks, whose partial sums are the cdf."""
    with jax.enable_x64(True):
        law = law_in(name, 64)
        low, high = (float(np.clip(end, -400, 400)) for end in law.support)
        nodes = np.unique([*np.linspace(-400, 400, 2001), low, high, *np.asarray(breaks(law))])
        nodes = nodes[(nodes >= low) & (nodes <= high)]
        nodes = np.append(nodes, np.full(SIZE + 1 - len(nodes), high))
        points, weights = np.polynomial.legendre.leggauss(8)
        middle, half = (nodes[1:] + nodes[:-1]) / 2, np.diff(nodes) / 2
        density = [np.exp(law.log_pdf(middle + half * point)) for point in points]
        partial = np.cumsum(np.transpose(density) @ weights * half)
        np.testing.assert_allclose(partial[-1], 1, rtol=1e-9)
        np.testing.assert_allclose(partial, law.cdf(nodes[1:]), rtol=1e-8, atol=1e-10)


compiled_measure = jax.jit(jax.vmap(measure, in_axes=(None, 0, None)))
compiled_log_pdf = jax.jit(lambda law, logsnr: law.log_pdf(logsnr))
FEW = {"logistic", "piecewise", "masked_clipped", "ddpm_linear"}


@laws({"piecewise", "masked_clipped", "sd3_mode"}.__contains__)
def test_compiled_draws_in_float32(name):
    """Values and gradients up to the last points of the draw grid, mapped and compiled.

    An infinite weight from one unlucky rounding would poison a run.
    """
    law = law_in(name, 32)
    rows = np.append(QUANTILES.astype(np.float32), draws.from_grid(RANDOM)).reshape(2, -1)
    rows = np.append(rows, np.full((2, 4), 0.5, np.float32), axis=1)
    compiled = jax.tree.map(np.asarray, compiled_measure(law, rows, outside_of(law, np.float32)))
    assert compiled.level.shape == compiled.above.shape == (2, rows.shape[1] - 4)
    assert_gradients(compiled, rtol=1e-4)
    assert np.all(np.isfinite(compiled.below)) and np.all(np.isfinite(compiled.above))
    # A level drawn by compiled code has a density under interpreted code, and the other way round.
    level = np.asarray(law.icdf(rows[:, :-4].ravel()))
    np.testing.assert_allclose(level, compiled.level.ravel(), rtol=2e-5, atol=2e-5)
    for levels in (level, compiled.level.ravel()):
        assert np.all(np.isfinite(law.log_pdf(levels)))
    assert np.all(np.isfinite(compiled_log_pdf(law, level)))
    low, high = law.support
    assert low - 1e-5 * max(1, abs(low)) <= np.min(level)
    assert high + 1e-5 * max(1, abs(high)) >= np.max(level)
    if name in FEW:  # the others are monotone to within a rounding
        assert np.all(np.diff(level[np.argsort(rows[:, :-4].ravel())]) >= 0)


LOGISTIC = scipy.stats.logistic
INDEPENDENT_CDF = {
    "logistic": LOGISTIC.cdf,
    "logistic_shifted": lambda x: LOGISTIC.cdf(x, -1.5, 0.7),
    "uniform": scipy.stats.uniform(-6, 10).cdf,
    "truncated_tail": lambda x: (
        (LOGISTIC.sf(10.0) - LOGISTIC.sf(x)) / (LOGISTIC.sf(10.0) - LOGISTIC.sf(14.0))
    ),
    "masked_cosine_md4": lambda x: 1 - 2 / np.pi * np.arcsin(LOGISTIC.sf(x)),
    "masked_cosine_squared": lambda x: 2 / np.pi * np.arctan(np.exp(x / 2)),
    "piecewise": lambda x: np.interp(x, np.linspace(-5, 5, 6), np.append(0, np.cumsum(MASSES))),
}


@pytest.mark.parametrize("name", sorted(INDEPENDENT_CDF))
def test_kolmogorov_smirnov(name):
    """20000 draws with a fixed seed; a right law fails for one seed in 1000."""
    level = np.asarray(law_in(name, 32).icdf(draws.from_grid(RANDOM)), np.float64)
    assert scipy.stats.kstest(level, INDEPENDENT_CDF[name]).pvalue > 1e-3
    assert scipy.stats.kstest(level + 0.2, INDEPENDENT_CDF[name]).pvalue < 1e-6


def types_within(value):
    """Types of a law, and of the law that it wraps."""
    inner = getattr(value, "base", None)
    return [type(value)] + ([] if inner is None else types_within(inner))


def test_jit_tells_every_type_apart():
    """Structures of different types differ, or jit runs the code of one on another by chance."""
    values = [law_in(name, 32) for name in sorted(LAWS)]
    structures = [jax.tree.structure(value) for value in values]
    for i, one in enumerate(values):
        for j, other in enumerate(values[:i]):
            if types_within(one) != types_within(other):
                assert structures[i] != structures[j], (one, other)
    paths = jax.tree_util.tree_leaves_with_path(schedules.logistic())
    assert [jax.tree_util.keystr(path) for path, _ in paths] == [".loc", ".scale"]
