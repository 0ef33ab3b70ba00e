"""Densities over the quantile ``u`` that warps sample from; moments per level.
u lies in (0, 1), near 1 = clean (masking rate ``1 - u`` if that is uniform). With f the integrand
(raw loss times the objective's weight, averaged over views at one level), v its variance over
masks, g its mean and c the variance over rows of its mean, levels from p have the second moment
``int E[f^2] / p``, least for p ~ sqrt(E f^2), ``E f^2 = v + g^2 + c``; for gradients ``E ||G||^2``.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Real, Whole, checked, is_concrete
from mdm_jax.draws import GRID_BITS, Draw, LossStats
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.types import Array, ArrayLike
from mdm_jax.variance.transform import LevelProfile

_SIZE = 2**GRID_BITS
NARROWEST = 2.0 ** -(GRID_BITS - 1)
"""Least width of a cell: four float32 numbers next to 1."""


@runtime_checkable
class QuantileDensity(Protocol):
    """A probability density on the unit interval. Methods are elementwise and jit-able."""

    @property
    def support(self) -> tuple[float, float]:
        """(low, high), the interval of positive density; (0, 1) by default."""
        return 0.0, 1.0

    def log_pdf(self, u: ArrayLike) -> Array:
        """Log density at ``u``, nats; -inf outside the support."""

    def cdf(self, u: ArrayLike) -> Array:
        """Probability of a smaller quantile."""

    def icdf(self, u: ArrayLike) -> Array:
        """The inverse of ``cdf``, within the support and strictly inside (0, 1)."""


@pytree_dataclass
class PiecewiseDensity(QuantileDensity):
    """Uniform within each of J cells between ``edges`` [J + 1] that cover (0, 1).
    ``points`` [J + 1] int32 counts the grid points below each edge and defines the density, so
    sampling and weights agree to the last bit, weights average to 1 exactly, and no cell is empty.
    """

    edges: Array
    points: Array

    @property
    def masses(self) -> Array:
        """[J] probability of each cell."""
        return jnp.diff(self.points) / _SIZE

    def cell(self, u: ArrayLike) -> Array:
        """Index of the cell [edges[j], edges[j + 1]) of each quantile, int32."""
        return find_cell(self.edges, jnp.asarray(u, self.edges.dtype))

    def log_pdf(self, u: ArrayLike) -> Array:
        return jnp.log(self.masses / jnp.diff(self.edges))[self.cell(u)]

    def cdf(self, u: ArrayLike) -> Array:
        u = jnp.asarray(u, self.edges.dtype)
        cell = self.cell(u)
        left, right = self.edges[cell], self.edges[cell + 1]
        return self.points[cell] / _SIZE + self.masses[cell] * ((u - left) / (right - left))

    def icdf(self, u: ArrayLike) -> Array:
        point = jnp.asarray(u, self.edges.dtype) * _SIZE  # exact: a power of two
        cell = find_cell(self.points, jnp.floor(point).astype(self.points.dtype))
        start, count = self.points[cell], self.points[cell + 1] - self.points[cell]
        left, right = self.edges[cell], self.edges[cell + 1]
        inside = left + (point - start) / count * (right - left)
        # Strictly below the right edge, where the next cell and its density begin.
        return open_interval(jnp.clip(inside, left, jnp.nextafter(right, left)))


def piecewise_density(
    edges: ArrayLike, masses: ArrayLike, floor: ArrayLike = 0.0
) -> PiecewiseDensity:
    """Density with mass ``(1 - floor) masses_j / sum + floor width_j`` in cell j.
    Masses are rounded to whole grid points, 2**-23, upwards where a cell would fall below ``floor
    width_j``: no weight exceeds ``1 / floor``, however narrow the cells. ``edges``: [J + 1]
    quantiles, rounded to the grid; ``masses``: [J] up to a common factor, highest masking rates
    first; ``floor``: share of uniform levels. If masses are traced, only their shape is checked.
    ValueError if shapes do not fit, edges do not run from 0 to 1 in steps of 2**-22 or more, or a
    mass is not finite, negative, or zero without a floor.
    """
    edges = check_edges(edges)
    cells = edges.size - 1
    if not isinstance(masses, jax.Array):
        masses = np.asarray(masses, np.float64)
    if masses.shape != (cells,):
        raise ValueError(
            f"piecewise_density: {edges.size} edges need {cells} masses, got shape {masses.shape}"
        )
    if is_concrete(masses, floor):
        values = np.asarray(masses)
        if not np.all(np.isfinite(values) & (values >= 0) & (values + floor > 0)):
            raise ValueError(
                "piecewise_density: masses must be positive and finite, since a cell without mass "
                f"would be lost; got {values}. clipped() leaves out a range on purpose"
            )
    shares = jnp.asarray(masses / masses.max(), jnp.float32)
    widths = np.diff(edges.astype(np.float64) * _SIZE).astype(np.float32)  # whole numbers
    points = _grid_points(shares, jnp.asarray(widths), jnp.asarray(floor, jnp.float32))
    return PiecewiseDensity(jnp.asarray(edges), points)


Floor = Annotated[float, Real("(0, 1]", "of draws", "at uniform levels, so that none is lost")]
LogBins = Annotated[int, Whole("[2, 1e5]", "bins", "of equal width in the log of the rate")]
SmallestRate = Annotated[float, Real("(0, 1)", "masking rate", "below which rates are uniform")]
WarmupSteps = Annotated[int, Whole("[0, 2e9]", "steps", "of uniform levels")]


@checked
def log_spaced_edges(num_bins: LogBins = 32, smallest_rate: SmallestRate = 1e-3) -> np.ndarray:
    """[J + 1] float32 edges from 0 to 1, even in log(1 - u); one bin below ``smallest_rate``.
    ValueError if an argument is out of range or a cell would be narrower than 2**-22.
    """
    rates = np.geomspace(1.0, smallest_rate, num_bins)
    return check_edges(np.concatenate([1.0 - rates, [1.0]]))


def check_edges(edges: ArrayLike) -> np.ndarray:
    """``edges`` as float32 on the grid, multiples of 2**-23.
    ValueError unless they run from 0 to 1 in steps of 2**-22 or more.
    """
    edges = np.asarray(edges, np.float32)
    if edges.ndim != 1 or edges.size < 2 or edges[0] != 0 or edges[-1] != 1:
        raise ValueError(
            "edges must run over the quantile from 0 to 1, both included, so that no level is "
            f"lost; got {edges}"
        )
    edges = np.round(edges.astype(np.float64) * _SIZE).astype(np.float32) / np.float32(_SIZE)
    wide = np.diff(edges) >= NARROWEST
    if not np.all(wide):
        at = int(np.argmin(wide))
        raise ValueError(
            f"edges must increase by at least {NARROWEST:.2g}, but edges {at} and {at + 1} are "
            f"{edges[at]} and {edges[at + 1]}; take fewer bins or a larger smallest rate"
        )
    return edges


def equal_edges(num_bins: int) -> np.ndarray:
    """[J + 1] edges of bins equally wide in the quantile."""
    return check_edges(np.linspace(0.0, 1.0, num_bins + 1))


def bin_of(edges: np.ndarray, u: Array) -> Array:
    """Index of the bin that holds each quantile, int32."""
    return jnp.searchsorted(jnp.asarray(edges[1:-1]), u, side="right")


def find_cell(edges: Array, values: Array) -> Array:
    """Index of the cell [edges[j], edges[j + 1]) of each value; the outermost ones beyond them."""
    cell = jnp.searchsorted(edges, values, side="right") - 1
    return jnp.clip(cell, 0, edges.size - 2)


def warp(draw: Draw, density: QuantileDensity) -> Draw:
    """``draw`` with quantiles from ``density``, and ``-log density`` added to ``log_weight``."""
    u = density.icdf(draw.u)
    return draw._replace(u=u, log_weight=draw.log_weight - density.log_pdf(u))


def density_profile(density: QuantileDensity, u: ArrayLike) -> LevelProfile:
    """Level profile of :func:`warp`: weight ``1 / density`` on the support, no draws outside."""
    log_density = density.log_pdf(u)
    return LevelProfile(log_density, jnp.where(jnp.isfinite(log_density), -log_density, 0.0))


def open_interval(u: Array) -> Array:
    """``u`` clipped to the outermost grid points, as rounding can reach 0 or 1."""
    tiny = 2.0 ** -(GRID_BITS + 1)
    return jnp.clip(u, tiny, 1.0 - tiny)


@jax.jit
def _grid_points(shares: Array, widths: Array, floor: Array) -> Array:
    """Cumulative masses in whole grid points [J + 1]: of each cell ``floor * width``, at least 1.
    ``shares`` [J] up to a factor, ``widths`` [J] in grid points.
    """
    followed = jnp.cumsum(shares)
    uniform = jnp.cumsum(widths)  # exact: whole numbers below 2**24
    total = (1.0 - floor) * (followed / followed[-1]) * _SIZE + floor * uniform
    points = jnp.round(total).astype(jnp.int32)
    # Both bounds rise by at least the least number of a cell, so their minimum does.
    least = jnp.cumsum(jnp.maximum(jnp.ceil(floor * widths), 1.0).astype(jnp.int32))
    lower = least + jax.lax.cummax(jnp.maximum(points - least, 0))
    points = jnp.minimum(lower, _SIZE - least[-1] + least)
    return jnp.concatenate([jnp.zeros(1, points.dtype), points])


class LevelLosses(NamedTuple):
    """Losses averaged over a row's views at a level, and 1 / views, [V, B, S]; 0 if ineligible."""

    value: Array
    count: Array

    def mean(self, values: Array) -> Array:
        """Mean of ``values`` [V, B, S] over the estimates of the batch; 0 without any."""
        total = jnp.sum(self.count)
        return jnp.sum(self.count * values) / jnp.where(total > 0, total, 1.0)


def integrand(draw: Draw, stats: LossStats) -> LevelLosses:
    """f, whose mean over uniform quantiles is the loss, per eligible element."""
    return _per_level(draw, stats.raw * stats.weight, stats.eligible)


def target_loss(draw: Draw, stats: LossStats) -> LevelLosses:
    """The raw loss per target element, without any weight."""
    return _per_level(draw, stats.raw, stats.targets)


def _per_level(draw: Draw, total: Array, elements: Array) -> LevelLosses:
    empty = elements == 0
    value = jnp.where(empty, 0.0, total / jnp.where(empty, 1, elements))
    # Views of a row at the same level are one estimate: average them before squaring.
    same = (draw.u[:, None] == draw.u[None]).astype(value.dtype)
    views = jnp.maximum(jnp.sum(same * jnp.where(empty, 0.0, 1.0)[None], axis=1), 1.0)
    joined = jnp.sum(same * value[None], axis=1) / views
    return LevelLosses(jnp.where(empty, 0.0, joined), jnp.where(empty, 0.0, 1.0 / views))


class LevelMoments(NamedTuple):
    """Moments of the integrand f in each of J bins of the level, over rows and masks, [J] each.
    ``second``: E f^2 = v + g^2 + c, for gradients the mean squared norm. ``mean``: g, for gradients
    the norm of the mean. ``data``: c; measuring it takes several masks per row, otherwise None.
    """

    second: Array
    mean: Array
    data: Array | None = None


Target = Callable[[LevelMoments], Array]
"""From moments to the moment [J] whose root the density follows."""


def second_moment(moments: LevelMoments) -> Array:
    """``v + g^2 + c``: optimal for the total variance when levels are drawn independently."""
    return jnp.asarray(moments.second)


def level_variance(moments: LevelMoments) -> Array:
    """``v + c``, optimal only for stratified levels (which remove g^2 at leading order).
    Needs a uniform floor. Variation of g inside a bin counts as variance.
    """
    return jnp.maximum(jnp.asarray(moments.second) - jnp.square(moments.mean), 0.0)


def published_second_moment(moments: LevelMoments) -> Array:
    """``v + g^2``: target of the StableDLLM scripts, optimal if c is zero or proportional to it.
    ValueError if the moments hold no data variance.
    """
    if moments.data is None:
        raise ValueError(
            "published_second_moment needs the data variance c of each level; running moments "
            "from one mask per row cannot hold it: take moments that were measured with several "
            "masks per row, or another target"
        )
    return jnp.maximum(jnp.asarray(moments.second) - jnp.asarray(moments.data), 0.0)


def squared_mean(moments: LevelMoments) -> Array:
    """``g^2``: density proportional to the loss (Kingma and Gao); optimal if E f^2 ~ g^2."""
    return jnp.square(moments.mean)


def moment_density(edges: ArrayLike, moment: ArrayLike, floor: ArrayLike) -> PiecewiseDensity:
    """Density proportional to the root of ``moment`` in each bin, mixed with the uniform one.
    :func:`piecewise_density` with masses ``d_j sqrt(moment_j)`` in bins of width d_j; uniform if
    moments are all zero or not finite. ``moment`` [J] is not negative, ``floor`` in (0, 1]; both
    may be traced. ValueError unless ``edges`` [J + 1] fit in number and run from 0 to 1.
    """
    edges, moment = check_edges(edges), jnp.asarray(moment, jnp.float32)
    if moment.shape != (edges.size - 1,):  # one moment would be broadcast to all bins
        raise ValueError(
            f"{edges.size} edges make {edges.size - 1} bins and need a moment each, got moments of "
            f"shape {moment.shape}"
        )
    widths = jnp.diff(jnp.asarray(edges))
    root = jnp.sqrt(jnp.maximum(moment, 0.0))
    share = widths * (root / jnp.max(root))
    total = jnp.sum(share)
    usable = jnp.isfinite(total) & (total > 0)
    return piecewise_density(edges, jnp.where(usable, share, widths), floor)


def gradient_stats(stats: LossStats, norms: Array) -> LossStats:
    """Statistics whose integrand is the row's gradient norm, for ``update`` of ``variance.ppots``.
    ``norms`` [V, B, S] are those of the gradient of ``stats.raw * stats.weight``.
    """
    return stats._replace(raw=norms, weight=jnp.ones_like(norms))
