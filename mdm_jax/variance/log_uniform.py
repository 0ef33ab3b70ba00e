"""Masking rates uniform on a logarithmic scale."""

import jax.numpy as jnp

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.typing import Array, ArrayLike
from mdm_jax.variance.importance import importance
from mdm_jax.variance.quantile_density import open_interval
from mdm_jax.variance.transform import VarianceTransform


def log_uniform(smallest_rate: float = 1e-3) -> VarianceTransform:
    """Draws ``ln m`` uniformly for rates m = 1 - u above ``smallest_rate``, and m uniformly below.

    The density of the rate is ``1 / (T max(m, smallest_rate))`` with ``T = 1 - ln smallest_rate``,
    so together with a corruption's weight 1/m the masked cross-entropies have the constant weight T
    above ``smallest_rate``. MDLM stops there and leaves the lower rates out; here the flat foot
    takes the share 1/T of the draws and keeps the bound whole. The published form, truncated, is
    the law ``schedules.masked.log_uniform``.

    Keeps: E[weight f(u)] = int f. Couples: nothing. Costs: one view.
    Removes: the tail of Bernoulli's weight 1/m above ``smallest_rate``. Below it the density stays
    bounded, so down to m = 0 the second moment ``int dm / (m p)`` is infinite still: its divergent
    part is T smallest_rate times that of uniform rates. It draws small rates far more often than
    the optimum, which grows as 1/sqrt(m), and under fixed counts there is no tail to remove.
    Bias: exact.
    Reference: Sahoo et al. 2024 (MDLM), change of variables (its option for importance sampling).

    Args:
        smallest_rate: masking rate in (0, 1) below which the density is constant.

    Raises:
        ValueError: if ``smallest_rate`` is not in (0, 1).
    """
    return importance(log_uniform_density(smallest_rate))._replace(name="log_uniform")


def log_uniform_density(smallest_rate: float) -> "LogUniformDensity":
    """The density of :func:`log_uniform`; arguments and errors as there."""
    if not 0 < smallest_rate < 1:
        raise ValueError(f"log_uniform needs 0 < smallest_rate < 1, got {smallest_rate}")
    return LogUniformDensity(smallest_rate)


@pytree_dataclass
class LogUniformDensity:
    """Density ``1 / (T max(m, smallest_rate))`` of m = 1 - u, ``T = 1 - ln smallest_rate``."""

    smallest_rate: ArrayLike

    @property
    def support(self) -> tuple[float, float]:
        """The whole interval."""
        return 0.0, 1.0

    @property
    def total(self) -> Array:
        """T, the constant weight on masked cross-entropies above the smallest rate."""
        return 1.0 - jnp.log(self.smallest_rate)

    def log_pdf(self, u: ArrayLike) -> Array:
        """Log density, nats."""
        return -jnp.log(self.total * jnp.maximum(1.0 - jnp.asarray(u), self.smallest_rate))

    def cdf(self, u: ArrayLike) -> Array:
        """Probability of a smaller quantile."""
        ratio = (1.0 - jnp.asarray(u)) / self.smallest_rate
        foot, body = jnp.minimum(ratio, 1.0), jnp.log(jnp.maximum(ratio, 1.0))
        return 1.0 - (foot + body) / self.total

    def icdf(self, u: ArrayLike) -> Array:
        """The quantile with the given probability below it."""
        place = (1.0 - jnp.asarray(u)) * self.total
        growth = jnp.exp(jnp.maximum(place - 1.0, 0.0))
        rate = self.smallest_rate * jnp.minimum(place, 1.0) * growth
        return open_interval(1.0 - rate)
