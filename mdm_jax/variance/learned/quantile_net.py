"""A learned quantile function: a monotone network that levels pass through."""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax.checks import Decay, LearningRate, Whole, checked
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.types import Array, ArrayLike, PyTree
from mdm_jax.variance.densities import QuantileDensity, integrand, open_interval
from mdm_jax.variance.transform import VarianceTransform
from mdm_jax.variance.warps import all_finite, counters, learned_warp

_MARGIN = 16
_HALVINGS = 30


@pytree_dataclass
class MonotoneNet(QuantileDensity):
    """``Q(u) = g(u) / g(1)`` on [0, 1], with positive kernels and one hidden layer of K units:

        g(u) = r u + sum_k h_k [sigmoid(a_k (u - c_k)) - sigmoid(-a_k c_k)] .

    The quantile function of the density ``q(Q(u)) = 1 / Q'(u)``, positive on all of (0, 1).
    ``line`` [] and ``height`` [K] are softplus inverses of r and h, ``log_steepness`` [K] is log a.
    """

    line: Array
    height: Array
    log_steepness: Array
    centre: Array

    def icdf(self, u: ArrayLike) -> Array:
        return open_interval(self._value(jnp.asarray(u)))

    def log_slope(self, u: ArrayLike) -> Array:
        """log Q'(u) = -log q(Q(u)), nats."""
        u = jnp.asarray(u)
        line, height, steepness, centre = self._kernels(u.ndim)
        z = steepness * (u[..., None] - centre)
        units = height * steepness * jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)
        return jnp.log(line + jnp.sum(units, axis=-1)) - jnp.log(self._rise(jnp.ones(())))

    def cdf(self, u: ArrayLike) -> Array:
        """Inverse of Q, to rounding, by bisection."""
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


Resolution = Annotated[int, Whole("[1, 1e5]", "units", "sigmoids of the learned quantile")]


@checked
def monotone_net(resolution: Resolution = 32) -> MonotoneNet:
    """The identity map as a :class:`MonotoneNet` of K = resolution + 32 units, within 1e-7.
    Sigmoids of width and spacing 1 / resolution, 16 more on either side; ValueError if it is < 1.
    """
    units = resolution + 2 * _MARGIN
    centre = (np.arange(units) - _MARGIN + 0.5) / resolution
    return MonotoneNet(
        line=jnp.asarray(math.log(math.expm1(0.1 * resolution)), jnp.float32),
        height=jnp.full(units, math.log(math.expm1(1.0)), jnp.float32),
        log_steepness=jnp.full(units, math.log(resolution), jnp.float32),
        centre=jnp.asarray(centre, jnp.float32),
    )


class LearnedQuantile(NamedTuple):
    """Density, Adam's moments and gradient normaliser; counters as in PpotsState.
    ``square`` is the decayed mean of the squared, weighted integrand, ``weight`` its total weight.
    """

    net: MonotoneNet
    optimizer: PyTree
    square: Array
    weight: Array
    steps: Array
    rejected: Array


@checked
def learned_quantile(
    resolution: Resolution = 32, learning_rate: LearningRate = 1e-2, decay: Decay = 0.99
) -> VarianceTransform:
    """Learned quantile function of the level: ``u' = Q(u)``, with the weight ``Q'(u)``.

    Q is a monotone network that starts at the identity. Adam descends the second moment
    ``M = E[(f / q)^2]`` of the weighted integrand by the score function,

        grad M = -E[ (f / q)^2 grad log q(u') ] ,

    over a running mean of the square (``decay``); the minimum is ``q`` proportional to
    sqrt(E f^2). Q has no floor; for heavy tails prefer :func:`~mdm_jax.variance.ppots`.
    Keeps: E[weight f(u)] = int f at every step. Couples: steps, through the state. Costs: one view,
    a network of one hidden layer (``resolution`` units per unit of u) per level. Removes: as much
    as sqrt(E f^2) varies with the level. Bias: exact. Reference: Kingma et al. 2021 (VDM), appendix
    I.2, but by the score function, and with softplus and exponential kernels.
    """
    optimizer = optax.adam(learning_rate)

    def init(_spec: DrawSpec) -> LearnedQuantile:
        net = monotone_net(resolution)
        square, weight = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
        return LearnedQuantile(net, optimizer.init(net), square, weight, **counters())

    def draw(_key: Array, state: LearnedQuantile, current: Draw, _spec: DrawSpec) -> Draw:
        # The density at Q(u) without inverting Q.
        log_weight = current.log_weight + state.net.log_slope(current.u)
        return current._replace(u=state.net.icdf(current.u), log_weight=log_weight)

    def learn(
        state: LearnedQuantile, current: Draw, stats: LossStats
    ) -> tuple[dict[str, PyTree], Array]:
        losses = integrand(current, stats)
        squares = jnp.square(losses.value * jnp.exp(current.log_weight))
        mean = losses.mean(squares)
        # The past's mean: one of this batch would tie numerator and denominator.
        past = jnp.where(state.weight > 0, state.square / jnp.maximum(state.weight, 1e-30), mean)
        # Losses whose squares underflow teach nothing.
        relative = jnp.where(past > 0, squares / jnp.where(past > 0, past, 1.0), 1.0)
        # The score has mean zero, so taking 1 away changes the noise and not the mean.
        gradient = second_moment_gradient(
            lambda net: net.log_pdf(current.u), state.net, relative - 1.0, losses.mean
        )
        step, opt_state = optimizer.update(gradient, state.optimizer, state.net)
        changes = {
            "net": optax.apply_updates(state.net, step),
            "optimizer": opt_state,
            "square": decay * state.square + (1 - decay) * mean,
            "weight": decay * state.weight + (1 - decay),
        }
        return changes, all_finite(changes)

    warp = learned_warp("learned_quantile", init, lambda state: state.net, learn)
    return warp._replace(draw=draw)


def second_moment_gradient(
    log_density: Callable[[PyTree], Array],
    parameters: PyTree,
    squares: Array,
    mean: Callable[[Array], Array],
) -> PyTree:
    """Score-function gradient of ``E[(f / q)^2]`` in the parameters of q, given log q as drawn.
    ``squares`` is the squared weighted integrand there; ``mean`` averages over these levels.
    """
    return jax.grad(lambda parameters: -mean(squares * log_density(parameters)))(parameters)
