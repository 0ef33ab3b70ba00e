"""A monotone network as a quantile function, and the density that it is of.

A learned monotone map of the level.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.types import Array, ArrayLike, PyTree
from mdm_jax.variance.densities import density_profile, open_interval
from mdm_jax.variance.moments import accept, all_finite, integrand, total_count
from mdm_jax.variance.ppots import check_decay
from mdm_jax.variance.transform import LevelProfile, Phase, VarianceTransform

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


class LearnedQuantile(NamedTuple):
    """A density and what its next step is made from.

    Attributes:
        net: the density in use.
        optimizer: Adam's moments.
        square: [] decayed mean of the squared, weighted integrand.
        weight: [] total weight of that mean, from 0 towards 1.
        steps: number of batches learnt from.
        rejected: number of batches that were not finite and changed nothing else.
    """

    net: MonotoneNet
    optimizer: PyTree
    square: Array
    weight: Array
    steps: Array
    rejected: Array


def learned_quantile(
    resolution: int = 32, learning_rate: float = 1e-2, decay: float = 0.99
) -> VarianceTransform:
    """Levels through a learned quantile function ``u' = Q(u)``, paid for by ``Q'(u)``.

    Q is a monotone network with fixed ends, Q(0) = 0 and Q(1) = 1, so the density 1 / Q' covers all
    levels and the objective cannot move. It starts at the identity. Each step descends the second
    moment M = E[(f / q)^2] of the weighted integrand; since its mean does not depend on q, that is
    its variance. The gradient needs no derivative of the loss in the level,

        grad M = -E[ (f / q)^2 grad log q(u') ] ,

    and is divided by a running mean of the square, which makes it free of the loss's unit. The
    minimum is ``q`` proportional to sqrt(E f^2).

    The integrand includes whatever else the chain put into the log weight. Q has no floor: weights
    are bounded by the steepest slope that was learnt. Where the integrand has a tail, as under
    Bernoulli masks, the gradient has a heavier one; the bins of :func:`~mdm_jax.variance.ppots` are
    safer there.

    Keeps: E[weight f(u)] = int f at every step. Couples: nothing within a step; steps through the
    state. Costs: one view, and a network of one hidden layer per level.
    Removes: as much as sqrt(E f^2) varies with the level. Bias: exact.
    Reference: Kingma et al. 2021 (VDM), appendix I.2, with the score function in place of the
    derivative of the loss. Their network has kernels of absolute value; these are positive by a
    softplus and an exponential.

    Args:
        resolution: hidden units per unit of the level; there are 32 more.
        learning_rate: of Adam.
        decay: of the running mean, in [0, 1).

    Raises:
        ValueError: if a setting is out of range.
    """
    if not learning_rate > 0:
        raise ValueError(f"learned_quantile needs learning_rate > 0, got {learning_rate}")
    check_decay("learned_quantile", decay)
    monotone_net(resolution)  # raises where there is none
    optimizer = optax.adam(learning_rate)

    def init(_spec: DrawSpec) -> LearnedQuantile:
        net = monotone_net(resolution)
        return LearnedQuantile(
            net=net,
            optimizer=optimizer.init(net),
            square=jnp.zeros((), jnp.float32),
            weight=jnp.zeros((), jnp.float32),
            steps=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
        )

    def draw(_key: Array, state: LearnedQuantile, current: Draw, _spec: DrawSpec) -> Draw:
        log_weight = current.log_weight + state.net.log_slope(current.u)
        return current._replace(u=state.net.icdf(current.u), log_weight=log_weight)

    def update(state: LearnedQuantile, current: Draw, stats: LossStats) -> LearnedQuantile:
        value, count = losses = integrand(current, stats)
        squares = jnp.square(value * jnp.exp(current.log_weight))
        share = count / total_count(losses)
        mean = jnp.sum(share * squares)
        # The past's mean: one of this batch would tie numerator and denominator.
        past = jnp.where(state.weight > 0, state.square / jnp.maximum(state.weight, 1e-30), mean)
        relative = squares / jnp.where(past > 0, past, 1.0)
        # The score has mean zero, so taking 1 away changes the noise and not the mean.
        gradient = second_moment_gradient(
            lambda net: net.log_pdf(current.u), state.net, relative - 1.0, share
        )
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.net)
        learnt = LearnedQuantile(
            net=optax.apply_updates(state.net, updates),
            optimizer=opt_state,
            square=decay * state.square + (1 - decay) * mean,
            weight=decay * state.weight + (1 - decay),
            steps=state.steps + 1,
            rejected=state.rejected,
        )
        return accept(all_finite(learnt) & jnp.any(count > 0), learnt, state)

    def profile(state: LearnedQuantile, u: Array) -> LevelProfile:
        return density_profile(state.net, u)

    return VarianceTransform("learned_quantile", Phase.WARP, init, draw, update, profile=profile)


def second_moment_gradient(
    log_density: Callable[[PyTree], Array], parameters: PyTree, squares: Array, share: Array
) -> PyTree:
    """Gradient of ``E[(f / q)^2]`` in the parameters of q, by the score function.

    Args:
        log_density: from parameters to log q at the levels drawn, which stay where they are.
        parameters: those that the levels were drawn with.
        squares: squared weighted integrand at these levels, of the shape of the log density.
        share: weight of each level in the mean, summing to 1.
    """

    def surrogate(parameters: PyTree) -> Array:
        return -jnp.sum(share * squares * log_density(parameters))

    return jax.grad(surrogate)(parameters)
