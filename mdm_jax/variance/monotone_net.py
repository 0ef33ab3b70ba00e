"""A monotone network as a quantile function, and the density that it is of."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.typing import Array, ArrayLike
from mdm_jax.variance.quantile_density import open_interval

_MARGIN = 16
_HALVINGS = 30


@pytree_dataclass
class MonotoneNet:
    """``Q(u) = g(u) / g(1)`` on [0, 1], with positive kernels and one hidden layer of K units:

        g(u) = r u + sum_k h_k [sigmoid(a_k (u - c_k)) - sigmoid(-a_k c_k)] ,

    ``r`` and ``h`` through a softplus, ``a`` through an exponential. It is the quantile function of
    the density ``q(Q(u)) = 1 / Q'(u)``, which is positive on all of (0, 1). Every attribute may be
    trained without a constraint.

    Attributes:
        line: [] softplus inverse of r.
        height: [K] softplus inverse of h.
        log_steepness: [K] log of a.
        centre: [K] c.
    """

    line: Array
    height: Array
    log_steepness: Array
    centre: Array

    @property
    def support(self) -> tuple[float, float]:
        """The whole interval."""
        return 0.0, 1.0

    def icdf(self, u: ArrayLike) -> Array:
        """Q, strictly inside (0, 1)."""
        return open_interval(self._value(jnp.asarray(u)))

    def log_slope(self, u: ArrayLike) -> Array:
        """log Q'(u) = -log q(Q(u)), nats."""
        u = jnp.asarray(u)
        line, height, steepness, centre = self._kernels(u.ndim)
        place = steepness * (u[..., None] - centre)
        units = height * steepness * jax.nn.sigmoid(place) * jax.nn.sigmoid(-place)
        return jnp.log(line + jnp.sum(units, axis=-1)) - jnp.log(self._rise(jnp.ones(())))

    def cdf(self, u: ArrayLike) -> Array:
        """Probability of a smaller quantile: the inverse of Q, to rounding."""
        u = jnp.asarray(u)

        def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bracket
            middle = 0.5 * (low + high)
            below = self._value(middle) < u
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        start = jnp.zeros_like(u), jnp.ones_like(u)
        low, high = jax.lax.fori_loop(0, _HALVINGS, halve, start)
        return 0.5 * (low + high)

    def log_pdf(self, u: ArrayLike) -> Array:
        """Log density at ``u``, nats, differentiable in the network at fixed ``u``."""
        u = jnp.asarray(u)
        start = jax.lax.stop_gradient(self.cdf(u))
        # One Newton step from the root stays there and has the derivative of the inverse.
        slope = jax.lax.stop_gradient(jnp.exp(self.log_slope(start)))
        return -self.log_slope(start - (self._value(start) - u) / slope)

    def _value(self, u: Array) -> Array:
        return self._rise(u) / self._rise(jnp.ones(()))

    def _rise(self, u: Array) -> Array:
        """g(u)."""
        line, height, steepness, centre = self._kernels(u.ndim)
        reached = jax.nn.sigmoid(steepness * (u[..., None] - centre))
        units = height * (reached - jax.nn.sigmoid(-steepness * centre))
        return line * u + jnp.sum(units, axis=-1)

    def _kernels(self, rank: int) -> tuple[Array, Array, Array, Array]:
        """r [], then h, a and c [1, ..., K], to go with levels of the given rank."""
        line, height = jax.nn.softplus(self.line), jax.nn.softplus(self.height)
        units = (height, jnp.exp(self.log_steepness), self.centre)
        return line, *(a.reshape((1,) * rank + (-1,)) for a in units)


def monotone_net(resolution: int = 32) -> MonotoneNet:
    """The identity, as a network that can become any increasing map.

    Sigmoids of width 1 / resolution at that spacing add up to a straight line, to 1e-7 of it, where
    16 more continue the row on either side.

    Args:
        resolution: units per unit length, at least 1; K = resolution + 32.

    Raises:
        ValueError: unless ``resolution`` is positive.
    """
    if resolution < 1:
        raise ValueError(f"monotone_net needs resolution >= 1, got {resolution}")
    units = resolution + 2 * _MARGIN
    centre = (np.arange(units) - _MARGIN + 0.5) / resolution
    return MonotoneNet(
        line=jnp.asarray(math.log(math.expm1(0.1 * resolution)), jnp.float32),
        height=jnp.full(units, math.log(math.expm1(1.0)), jnp.float32),
        log_steepness=jnp.full(units, math.log(resolution), jnp.float32),
        centre=jnp.asarray(centre, jnp.float32),
    )
