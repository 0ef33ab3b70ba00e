"""Laws over the logSNR: identities between them, truncation, and what the factories refuse.

What every law must satisfy is in tests/laws/test_schedules_zoo.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from law_zoo import LAWS

from mdm_jax import schedules
from mdm_jax.gaussian.schedules import truncated
from mdm_jax.schedules import masked

pytestmark = pytest.mark.keyless

QUANTILES = np.concatenate([[2.0**-24], np.linspace(0.001, 0.999, 58), [1 - 2.0**-24]])


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
            truncated(logistic, logit(0.8), logit(0.3)),
        )
        assert_same_law(of(masked.uniform_logsnr(-5.0, 5.0)), schedules.uniform(-5.0, 5.0))
        assert_same_law(of(masked.sqrt()), of(masked.power(0.5)))
        assert_same_law(schedules.piecewise([1.0] * 7, (-6.0, 4.0)), schedules.uniform(-6.0, 4.0))
        assert_same_law(truncated(logistic), logistic)
        assert_same_law(
            truncated(schedules.uniform(-9.0, 9.0), -6.0, 4.0),
            schedules.uniform(-6.0, 4.0),
        )
        assert_same_law(LAWS["truncated_twice"](), truncated(schedules.logistic(), -3.0, 6.0))
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
    law = truncated(schedules.logistic(), logit(0.9), logit(1e-3))
    np.testing.assert_allclose(law.lost_mass, (0.1, 1e-3), rtol=1e-5)
    np.testing.assert_allclose(law.support, (logit(0.9), logit(1e-3)))


def test_truncated_tail_keeps_its_precision():
    """All of the mass lies where cdf rounds to 1; differences of it keep 3 digits."""
    law = truncated(schedules.logistic(), 10.0, 14.0)
    below, above = 1 / (1 + np.exp(10.0)), 1 / (1 + np.exp(14.0))
    survival = 0.5 * (below + above)
    np.testing.assert_allclose(law.icdf(0.5), -np.log(survival / (1 - survival)), rtol=1e-6)


class Foreign:
    """A law with the four members of the protocol and no more."""

    support = (-1.0, 1.0)

    def log_pdf(self, logsnr):
        return 0 * logsnr

    def cdf(self, logsnr):
        return logsnr

    def icdf(self, u):
        return u


def test_foreign_laws():
    assert isinstance(Foreign(), schedules.Law)
    with pytest.raises(TypeError, match="TwoSidedLaw"):
        truncated(Foreign(), -1.0, 1.0)
    with pytest.raises(TypeError, match="tabulated"):
        schedules.law_of(lambda t: t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.logistic(scale=0.0), "scale > 0"),
        (lambda: schedules.logistic(float("nan")), "finite loc"),
        (lambda: schedules.uniform(1.0, 1.0), "low < high"),
        (lambda: schedules.uniform(-jnp.inf, 1.0), "finite low"),
        (lambda: truncated(schedules.logistic(), 3.0, 2.0), "low < high"),
        (lambda: truncated(schedules.logistic(), float("nan"), 2.0), "nan"),
        (lambda: truncated(schedules.uniform(-1.0, 1.0), 2.0, 3.0), "no mass"),
        (lambda: schedules.piecewise([1.0, -1.0], (-1.0, 1.0)), "non-negative"),
        (lambda: schedules.piecewise([0.0, 0.0], (-1.0, 1.0)), "not all 0"),
        (lambda: schedules.piecewise([1.0, np.inf], (-1.0, 1.0)), "finite"),
        (lambda: schedules.piecewise([1.0, 1.0, 1.0], [-1.0, 0.0, 1.0]), "4 edges"),
        (lambda: schedules.piecewise([1.0, 1.0], [-1.0, -1.0, 1.0]), "edges 0 and 1"),
        (lambda: schedules.piecewise([1.0, 1.0], [-np.inf, 0.0, 1.0]), "finite"),
        (lambda: schedules.piecewise([[1.0]], (-1.0, 1.0)), "masses"),
        (lambda: schedules.tabulated(lambda t: t, num_cells=4), "num_cells"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_known_arguments_are_checked_while_tracing():
    one = jnp.float32(1.0)
    with pytest.raises(ValueError, match="edges 0 and 1"):
        jax.jit(lambda m: schedules.piecewise(m, [1.0, 0.0, 2.0]).icdf(0.5))(jnp.ones(2))
    with pytest.raises(ValueError, match="low < high"):
        jax.jit(lambda u: schedules.uniform(one, 0.0).icdf(u))(0.5)
    with pytest.raises(ValueError, match="no mass"):
        jax.jit(lambda u: truncated(schedules.uniform(0.0, 1.0), 2.0).icdf(u))(0.5)


def test_traced_parameters():
    @jax.jit
    def level(loc, low, high):
        return truncated(schedules.logistic(loc), low, high).icdf(0.5)

    np.testing.assert_allclose(level(0.0, -2.0, 2.0), 0, atol=1e-6)
    slope = jax.grad(level, argnums=1)(0.0, -2.0, 2.0)
    assert 0 < slope < 1
    moved = jax.grad(lambda end: schedules.piecewise([1.0, 1.0], [-1.0, 0.0, end]).icdf(0.75))(1.0)
    np.testing.assert_allclose(moved, 0.5, rtol=1e-6)
