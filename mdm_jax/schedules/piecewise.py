"""Piecewise-constant density over the logSNR: exact density and exact inverse from one table."""

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.laws import Tails, TwoSidedLaw, confine
from mdm_jax.schedules.parameters import is_concrete
from mdm_jax.typing import Array, ArrayLike


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
