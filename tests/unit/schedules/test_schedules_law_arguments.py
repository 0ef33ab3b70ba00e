"""What the law factories refuse, and what they leave alone because it is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import schedules
from mdm_jax.gaussian import schedules as gaussian_schedules


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
        gaussian_schedules.truncated(Foreign(), -1.0, 1.0)
    with pytest.raises(TypeError, match="tabulated"):
        schedules.law_of(lambda t: t)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.logistic(scale=0.0), "scale > 0"),
        (lambda: schedules.logistic(float("nan")), "finite loc"),
        (lambda: schedules.uniform(1.0, 1.0), "low < high"),
        (lambda: schedules.uniform(-jnp.inf, 1.0), "finite low"),
        (lambda: gaussian_schedules.truncated(schedules.logistic(), 3.0, 2.0), "low < high"),
        (lambda: gaussian_schedules.truncated(schedules.logistic(), float("nan"), 2.0), "nan"),
        (lambda: gaussian_schedules.truncated(schedules.uniform(-1.0, 1.0), 2.0, 3.0), "no mass"),
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
        jax.jit(lambda u: gaussian_schedules.truncated(schedules.uniform(0.0, 1.0), 2.0).icdf(u))(
            0.5
        )


def test_traced_parameters():
    @jax.jit
    def level(loc, low, high):
        return gaussian_schedules.truncated(schedules.logistic(loc), low, high).icdf(0.5)

    np.testing.assert_allclose(level(0.0, -2.0, 2.0), 0, atol=1e-6)
    slope = jax.grad(level, argnums=1)(0.0, -2.0, 2.0)
    assert 0 < slope < 1
    moved = jax.grad(lambda end: schedules.piecewise([1.0, 1.0], [-1.0, 0.0, end]).icdf(0.75))(1.0)
    np.testing.assert_allclose(moved, 0.5, rtol=1e-6)
