"""Laws over the logSNR: what a training noise level is drawn from.

A law turns a quantile ``u`` in the open interval (0, 1) into a noise level by ``icdf`` and knows
the density it drew from. ``u`` rises with the logSNR: near 0 is noisy, near 1 clean.

In float32 the quantiles next to 1 are spaced by 6e-8, those next to 0 much finer, so a law that
worked with ``u`` alone would be precise at one end only. Every law here is built on pairs of tail
probabilities instead (:class:`Tails`), from which ``cdf`` and ``icdf`` follow.

Laws are frozen pytrees: parameters may be traced, differentiated and mapped over. The lower-case
factories check the parameters, the classes themselves do not. A law of one's own subclasses
:class:`TwoSidedLaw`; anything with the four members of :class:`Law` can be used for training.

Piecewise-constant density over the logSNR: exact density and exact inverse from one table.
"""

import abc
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import as_parameter, check_finite, check_interval, is_concrete
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.types import Array, ArrayLike


@runtime_checkable
class Law(Protocol):
    """A probability law over the logSNR. Methods are elementwise and jit-able."""

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        """(low, high) logSNR between which all mass lies; either may be infinite."""

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        """Log density with respect to the logSNR, nats; -inf outside the support."""

    def cdf(self, logsnr: ArrayLike) -> Array:
        """Probability of a smaller (noisier) logSNR."""

    def icdf(self, u: ArrayLike) -> Array:
        """logSNR of the quantile ``u`` in the open interval (0, 1)."""


class Tails(NamedTuple):
    """Probabilities on the two sides of a level; they sum to 1 and each is exact to rounding.

    Attributes:
        below: probability of a smaller (noisier) logSNR.
        above: probability of a larger (cleaner) logSNR.
    """

    below: Array
    above: Array


class TwoSidedLaw(abc.ABC):
    """Base of the laws here: ``cdf`` and ``icdf`` from tail probabilities.

    A subclass defines ``support``, ``log_pdf``, ``tails`` and ``quantile``.
    """

    @property
    @abc.abstractmethod
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        """(low, high) logSNR between which all mass lies; either may be infinite."""

    @abc.abstractmethod
    def log_pdf(self, logsnr: ArrayLike) -> Array:
        """Log density with respect to the logSNR, nats; -inf outside the support.

        The test for being outside allows for a few units of rounding, so a level that ``icdf``
        returned is always inside.
        """

    @abc.abstractmethod
    def tails(self, logsnr: ArrayLike) -> Tails:
        """Probabilities below and above a level."""

    @abc.abstractmethod
    def quantile(self, below: Array, above: Array) -> Array:
        """The level with these tail probabilities, ``below + above = 1``."""

    def cdf(self, logsnr: ArrayLike) -> Array:
        """Probability of a smaller (noisier) logSNR."""
        return self.tails(logsnr).below

    def icdf(self, u: ArrayLike) -> Array:
        """logSNR of the quantile ``u`` in the open interval (0, 1); finite, as is its gradient."""
        u = as_float(u)
        return self.quantile(u, 1 - u)


@pytree_dataclass
class Logistic(TwoSidedLaw):
    """Logistic law; with location 0 and scale 1 the masking rate is uniform on (0, 1).

    Its density ``sigmoid(z) sigmoid(-z) / scale``, z = (logsnr - loc) / scale, has tails
    ``exp(-|z|)``.
    """

    loc: ArrayLike
    scale: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        z = (as_float(logsnr) - self.loc) / self.scale
        return jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z) - jnp.log(self.scale)

    def tails(self, logsnr: ArrayLike) -> Tails:
        z = (as_float(logsnr) - self.loc) / self.scale
        return Tails(jax.nn.sigmoid(z), jax.nn.sigmoid(-z))

    def quantile(self, below: Array, above: Array) -> Array:
        return self.loc + self.scale * (jnp.log(below) - jnp.log(above))


@pytree_dataclass
class Uniform(TwoSidedLaw):
    """Uniform law on [low, high]. Masking rates outside the two ends are never drawn."""

    low: ArrayLike
    high: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return self.low, self.high

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        logsnr = as_float(logsnr)
        return jnp.where(inside(logsnr, self.support), -jnp.log(self.high - self.low), -jnp.inf)

    def tails(self, logsnr: ArrayLike) -> Tails:
        logsnr = jnp.clip(as_float(logsnr), self.low, self.high)
        width = self.high - self.low
        return Tails((logsnr - self.low) / width, (self.high - logsnr) / width)

    def quantile(self, below: Array, above: Array) -> Array:
        return confine(self.low * above + self.high * below, self.support)


def logistic(loc: ArrayLike = 0.0, scale: ArrayLike = 1.0) -> Logistic:
    """Logistic law; the default is a uniform masking rate, the law of the linear schedule.

    Args:
        loc: median, logSNR.
        scale: positive; 1 keeps the tails of a uniform rate.

    Raises:
        ValueError: if ``loc`` is not finite or ``scale`` is not positive and finite.
    """
    loc, scale = as_parameter(loc, "loc"), as_parameter(scale, "scale")
    check_finite("logistic", loc=loc, scale=scale)
    if is_concrete(scale) and not scale > 0:
        raise ValueError(f"logistic needs scale > 0, got {scale}")
    return Logistic(loc, scale)


def uniform(low: ArrayLike, high: ArrayLike) -> Uniform:
    """Uniform law on the logSNR interval [low, high].

    Raises:
        ValueError: unless low < high, both finite.
    """
    low, high = as_parameter(low, "low"), as_parameter(high, "high")
    check_finite("uniform", low=low, high=high)
    check_interval("uniform", low, high)
    return Uniform(low, high)


def inside(logsnr: Array, support: tuple[ArrayLike, ArrayLike]) -> Array:
    """Whether finite levels lie in the support, both ends widened by 8 units of rounding.

    Without the allowance a level drawn next to the end could test as outside, have density zero
    and thereby infinite weight, because compiled and interpreted code round differently.
    """
    low, high = (jnp.asarray(end, logsnr.dtype) for end in support)
    slack = 8 * jnp.finfo(logsnr.dtype).eps
    above_low = logsnr >= low - slack * jnp.maximum(1, jnp.abs(low))
    below_high = logsnr <= high + slack * jnp.maximum(1, jnp.abs(high))
    return above_low & below_high & jnp.isfinite(logsnr)


def confine(logsnr: Array, support: tuple[ArrayLike, ArrayLike]) -> Array:
    """Levels clipped into the support; the gradient is that of the unclipped level.

    For levels that leave the support by rounding only, where the clip's own gradient of zero would
    be wrong.
    """
    return _confine(logsnr, *(jnp.asarray(end, logsnr.dtype) for end in support))


@jax.custom_jvp
def _confine(logsnr: Array, low: Array, high: Array) -> Array:
    return jnp.clip(logsnr, low, high)


@_confine.defjvp
def _confine_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return _confine(*primals), tangents[0]


@pytree_dataclass
class PiecewiseConstant(TwoSidedLaw):
    """Uniform within each of J cells of the logSNR.

    The density is computed from the differences of the very table that is inverted, so sampling and
    weighting agree to the last bit, whatever rounding did to the masses. A cell without mass is
    never drawn and has log density -inf.

    Attributes:
        edges: [J + 1] strictly increasing logSNR, finite.
        cumulative: [J + 1] probability below each edge, from 0 to 1.
    """

    edges: Array
    cumulative: Array

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        """The outermost edges, also where the outer cells hold no mass."""
        return self.edges[0], self.edges[-1]

    @property
    def masses(self) -> Array:
        """[J] probability of each cell."""
        return jnp.diff(self.cumulative)

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        logsnr = as_float(logsnr)
        cell = _find(self.edges, logsnr)
        density = (self.masses / jnp.diff(self.edges))[cell]
        # Both edges belong to the law: exact ones, since every level drawn lies between them.
        positive = (density > 0) & (logsnr >= self.edges[0]) & (logsnr <= self.edges[-1])
        log_density = jnp.log(jnp.where(positive, density, 1.0))
        return jnp.where(positive, log_density, -jnp.inf).astype(logsnr.dtype)

    def tails(self, logsnr: ArrayLike) -> Tails:
        logsnr = jnp.clip(as_float(logsnr), self.edges[0], self.edges[-1])
        cell = _find(self.edges, logsnr)
        left, right = self.edges[cell], self.edges[cell + 1]
        mass = self.masses[cell]
        return Tails(
            self.cumulative[cell] + mass * ((logsnr - left) / (right - left)),
            (1 - self.cumulative[cell + 1]) + mass * ((right - logsnr) / (right - left)),
        )

    def quantile(self, below: Array, above: Array) -> Array:
        # Rounded to 1, ``below`` would land in the last cell even if that is empty.
        cell = _find(self.cumulative, jnp.minimum(below, 1 - jnp.finfo(below.dtype).epsneg))
        mass = self.masses[cell]
        from_left = (below - self.cumulative[cell]) / mass
        from_right = (above - (1 - self.cumulative[cell + 1])) / mass
        fraction = jnp.where(below < 0.5, from_left, 1 - from_right)
        left, right = self.edges[cell], self.edges[cell + 1]
        # Strictly below the right edge, where the next cell and its density begin.
        last = jnp.nextafter(*jax.lax.stop_gradient((right, left)))
        return confine(left + fraction * (right - left), (left, last))


def piecewise(masses: ArrayLike, edges: ArrayLike) -> PiecewiseConstant:
    """Law with the given mass in each cell of the logSNR, uniform within a cell.

    Masses may be traced (an adaptive histogram inside a jitted step); then only shapes are checked.
    A density that follows the 1/m growth of masked losses needs cells of about equal width in the
    logSNR, which is what two edges give; equal widths in the masking rate waste most of the gain.

    Args:
        masses: [J] non-negative, not all zero; normalised here.
        edges: [J + 1] strictly increasing logSNR, or the two outer ends of J equal cells.

    Raises:
        ValueError: if shapes do not fit, edges are not finite and increasing (as float32 too), or
            masses are negative, not finite or all zero.
    """
    masses, edges = _as_table(masses), _as_table(edges)
    cells = masses.size
    if masses.ndim != 1 or edges.ndim != 1 or cells < 1:
        raise ValueError(
            "piecewise needs masses [J] and edges [J + 1], "
            f"got shapes {masses.shape} and {edges.shape}"
        )
    if edges.size not in (2, cells + 1):
        raise ValueError(
            f"piecewise: {cells} masses need {cells + 1} edges, or 2 for equal cells, "
            f"got {edges.size}"
        )
    return PiecewiseConstant(_edges(edges, cells), _cumulative(masses))


def _as_table(values: ArrayLike) -> Array | np.ndarray:
    """Known numbers as NumPy float64: exact, never compiled, and checked even while tracing."""
    if is_concrete(*jax.tree.leaves(values)):
        return np.asarray(values, np.float64)
    return as_float(values)


def _edges(edges: Array | np.ndarray, cells: int) -> Array:
    xp = np if is_concrete(edges) else jnp
    if edges.size != cells + 1:
        edges = xp.linspace(edges[0], edges[1], cells + 1)
    if is_concrete(edges):
        _check_edges(edges.astype(jnp.result_type(float)))
    return jnp.asarray(edges)


def _cumulative(masses: Array | np.ndarray) -> Array:
    xp = np if is_concrete(masses) else jnp
    if is_concrete(masses):
        _check_masses(masses)
    total = xp.cumsum(masses)
    table = xp.concatenate([xp.zeros(1), total[:-1] / total[-1], xp.ones(1)])
    # A parallel sum may step back by one rounding where a cell is empty.
    return jax.lax.cummax(table) if xp is jnp else jnp.asarray(table)


def _check_masses(known: np.ndarray) -> None:
    if not (np.all(np.isfinite(known)) and np.all(known >= 0) and np.any(known > 0)):
        raise ValueError(f"piecewise: masses must be finite, non-negative, not all 0, got {known}")


def _check_edges(known: np.ndarray) -> None:
    if not np.all(np.isfinite(known)):
        raise ValueError(f"piecewise: edges must be finite, got {known}; truncate an open end")
    if not np.all(np.diff(known) > 0):
        at = int(np.argmin(np.diff(known) > 0))
        raise ValueError(
            f"piecewise: edges must increase strictly in {known.dtype}, "
            f"but edges {at} and {at + 1} are {known[at]} and {known[at + 1]}"
        )


def _find(table: Array, values: Array) -> Array:
    """Index of the cell [table[j], table[j + 1]) that holds each value, the last one closed."""
    cell = jnp.searchsorted(table, values, side="right") - 1
    return jnp.clip(cell, 0, table.size - 2)
