"""Laws over the logSNR: distributions of the training noise level.

``icdf`` maps a quantile u in (0, 1), near 0 noisy and near 1 clean, to a level of known density.
Near 1 float32 quantiles are spaced by 6e-8, so laws use the probabilities on both sides of a level
(:class:`Tails`). Laws are frozen pytrees: parameters may be traced, differentiated and mapped over.
Known ones are Python floats or NumPy float64, so that a law computes in the precision of its use.
The lower-case factories check parameters, the classes do not.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import is_concrete, parameters
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import MaskingLevel, as_float, level_from_logsnr
from mdm_jax.types import Array, ArrayLike


@runtime_checkable
class Law(Protocol):
    """A probability law over the logSNR, sufficient for training. Methods are elementwise."""

    @property
    @abc.abstractmethod
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        """(low, high) logSNR between which all mass lies; either may be infinite."""

    @abc.abstractmethod
    def log_pdf(self, logsnr: ArrayLike) -> Array:
        """Log density with respect to the logSNR, nats; -inf outside the support."""

    @abc.abstractmethod
    def cdf(self, logsnr: ArrayLike) -> Array:
        """Probability of a smaller (noisier) logSNR."""

    @abc.abstractmethod
    def icdf(self, u: ArrayLike) -> Array:
        """logSNR of the quantile ``u`` in the open interval (0, 1)."""


class Tails(NamedTuple):
    """Probabilities of a noisier and of a cleaner level, each exact to rounding."""

    below: Array
    above: Array


class Instant(NamedTuple):
    """A time in [0, 1], 0 clean, and 1 - t, each exact to rounding."""

    t: Array
    rest: Array


class TwoSidedLaw(Law):
    """Base of laws with ``support``, ``log_pdf``, ``tails``, ``quantile``; see :func:`inside`."""

    @abc.abstractmethod
    def tails(self, logsnr: ArrayLike) -> Tails:
        """Probabilities below and above a level."""

    @abc.abstractmethod
    def quantile(self, below: Array, above: Array) -> Array:
        """The level with these tail probabilities, ``below + above = 1``."""

    def cdf(self, logsnr: ArrayLike) -> Array:
        return self.tails(logsnr).below

    def icdf(self, u: ArrayLike) -> Array:
        u = as_float(u)
        return self.quantile(u, 1 - u)


class CurveLaw(TwoSidedLaw):
    """Base of laws given by a falling curve logsnr(t), t ~ U(0, 1), written as three formulas.

    Times come with 1 - t, levels in all coordinates and within ``support``, for exact arithmetic.
    """

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        logsnr = as_float(logsnr)
        within, middle = inside(logsnr, self.support), jnp.clip(0.0, *self.support)
        safe = jnp.where(within, jnp.clip(logsnr, *self.support), middle).astype(logsnr.dtype)
        log_density = self.log_pdf_formula(level_from_logsnr(safe)).astype(logsnr.dtype)
        return jnp.where(within, log_density, -jnp.inf)

    def tails(self, logsnr: ArrayLike) -> Tails:
        level = level_from_logsnr(jnp.clip(as_float(logsnr), *self.support))
        time, rest = self.time_formula(level)
        return Tails(below=jnp.clip(rest, 0, 1), above=jnp.clip(time, 0, 1))

    def quantile(self, below: Array, above: Array) -> Array:
        return confine(self.logsnr_formula(Instant(t=above, rest=below)), self.support)

    @abc.abstractmethod
    def logsnr_formula(self, at: Instant) -> Array:
        """The level at a time."""

    @abc.abstractmethod
    def time_formula(self, level: MaskingLevel) -> Instant:
        """The time of a level."""

    @abc.abstractmethod
    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        """-log |dlogsnr/dt| at a level."""


@pytree_dataclass
class Logistic(TwoSidedLaw):
    """Density ``sigmoid(z) sigmoid(-z) / scale``, z = (logsnr - loc) / scale."""

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
    """Logistic law, by default a uniform masking rate; ValueError unless scale > 0, both finite."""
    (loc,) = parameters("logistic", "", lambda _: True, loc=loc)
    (scale,) = parameters("logistic", "scale > 0", lambda s: s > 0, scale=scale)
    return Logistic(loc, scale)


def uniform(low: ArrayLike, high: ArrayLike) -> Uniform:
    """Uniform law on the logSNR interval [low, high]; ValueError unless low < high, both finite."""
    return Uniform(*parameters("uniform", "low < high", lambda a, b: a < b, low=low, high=high))


def inside(logsnr: Array, support: tuple[ArrayLike, ArrayLike]) -> Array:
    """Whether finite levels lie in the support, widened by 8 ulp as compiled code rounds apart."""
    low, high = (jnp.asarray(end, logsnr.dtype) for end in support)
    slack = 8 * jnp.finfo(logsnr.dtype).eps
    above_low = logsnr >= low - slack * jnp.maximum(1, jnp.abs(low))
    below_high = logsnr <= high + slack * jnp.maximum(1, jnp.abs(high))
    return above_low & below_high & jnp.isfinite(logsnr)


def confine(logsnr: Array, support: tuple[ArrayLike, ArrayLike]) -> Array:
    """Levels clipped into the support against rounding; gradient of the unclipped."""
    return _confine(logsnr, *(jnp.asarray(end, logsnr.dtype) for end in support))


@jax.custom_jvp
def _confine(logsnr: Array, low: Array, high: Array) -> Array:
    return jnp.clip(logsnr, low, high)


@_confine.defjvp
def _confine_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return _confine(*primals), tangents[0]


@pytree_dataclass
class PiecewiseConstant(TwoSidedLaw):
    """Uniform within each of J cells of the logSNR; a cell without mass is never drawn.

    ``edges`` [J + 1] are finite, strictly increasing logSNR, ``cumulative`` [J + 1] the probability
    below each, from 0 to 1. Sampling and density read one table, so they agree to the last bit.
    """

    edges: Array
    cumulative: Array

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return self.edges[0], self.edges[-1]

    @property
    def masses(self) -> Array:
        """[J] probability of each cell."""
        return jnp.diff(self.cumulative)

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        logsnr = as_float(logsnr)
        density = (self.masses / jnp.diff(self.edges))[_cell(self.edges, logsnr)]
        # Both edges belong to the law: exact ones, since every level drawn lies between them.
        positive = (density > 0) & (logsnr >= self.edges[0]) & (logsnr <= self.edges[-1])
        log_density = jnp.log(jnp.where(positive, density, 1.0))
        return jnp.where(positive, log_density, -jnp.inf).astype(logsnr.dtype)

    def tails(self, logsnr: ArrayLike) -> Tails:
        logsnr = jnp.clip(as_float(logsnr), *self.support)
        edges, cumulative = jnp.asarray(self.edges), jnp.asarray(self.cumulative)
        cell = _cell(edges, logsnr)
        left, right, mass = edges[cell], edges[cell + 1], self.masses[cell]
        return Tails(
            cumulative[cell] + mass * ((logsnr - left) / (right - left)),
            (1 - cumulative[cell + 1]) + mass * ((right - logsnr) / (right - left)),
        )

    def quantile(self, below: Array, above: Array) -> Array:
        # Rounded to 1, ``below`` would land in the last cell even if that is empty.
        edges, cumulative = jnp.asarray(self.edges), jnp.asarray(self.cumulative)
        cell = _cell(cumulative, jnp.minimum(below, 1 - jnp.finfo(below.dtype).epsneg))
        left, right, mass = edges[cell], edges[cell + 1], self.masses[cell]
        from_left = (below - cumulative[cell]) / mass
        from_right = (above - (1 - cumulative[cell + 1])) / mass
        fraction = jnp.where(below < 0.5, from_left, 1 - from_right)
        # Strictly below the right edge, where the next cell and its density begin.
        last = jnp.nextafter(*jax.lax.stop_gradient((right, left)))
        return confine(left + fraction * (right - left), (left, last))


def piecewise(masses: ArrayLike, edges: ArrayLike) -> PiecewiseConstant:
    """Law with the given mass in each cell of the logSNR, uniform within a cell.

    ValueError if shapes do not fit or values are not as follows (traced masses are not checked).

    Args:
        masses: [J] finite, non-negative, not all zero; normalised here.
        edges: [J + 1] finite, strictly increasing (as float32 too) logSNR, or the ends of J equal
            cells. For masked losses, which grow like 1/m, choose cells of about equal width.
    """
    masses, edges = _as_table(masses), _as_table(edges)
    if masses.ndim != 1 or edges.ndim != 1 or masses.size < 1:
        raise ValueError(
            "piecewise needs masses [J] and edges [J + 1], "
            f"got shapes {masses.shape} and {edges.shape}"
        )
    if edges.size not in (2, masses.size + 1):
        raise ValueError(
            f"piecewise: {masses.size} masses need {masses.size + 1} edges, or 2 for equal cells, "
            f"got {edges.size}"
        )
    if edges.size != masses.size + 1:
        xp = np if is_concrete(edges) else jnp
        edges = xp.linspace(edges[0], edges[1], masses.size + 1)
    if is_concrete(edges):
        _check_edges(edges.astype(jnp.result_type(float)))
    return PiecewiseConstant(edges, _cumulative(masses))


def _as_table(values: ArrayLike) -> Array | np.ndarray:
    """Known numbers as NumPy float64: exact, and checked even while tracing."""
    known = is_concrete(*jax.tree.leaves(values))
    return np.asarray(values, np.float64) if known else as_float(values)


def _cumulative(masses: Array | np.ndarray) -> Array:
    xp = np if is_concrete(masses) else jnp
    if xp is np and not (np.all(np.isfinite(masses) & (masses >= 0)) and np.any(masses > 0)):
        raise ValueError(f"piecewise: masses must be finite, non-negative, not all 0, got {masses}")
    total = xp.cumsum(masses)
    table = xp.concatenate([xp.zeros(1), total[:-1] / total[-1], xp.ones(1)])
    # A parallel sum may step back by one rounding where a cell is empty.
    return jax.lax.cummax(table) if xp is jnp else table


def _check_edges(known: np.ndarray) -> None:
    if not np.all(np.isfinite(known)):
        raise ValueError(f"piecewise: edges must be finite, got {known}; truncate an open end")
    rising = np.diff(known) > 0
    if not np.all(rising):
        at = int(np.argmin(rising))
        raise ValueError(
            f"piecewise: edges must increase strictly in {known.dtype}, "
            f"but edges {at} and {at + 1} are {known[at]} and {known[at + 1]}"
        )


def _cell(table: Array, values: Array) -> Array:
    """Index of the cell [table[j], table[j + 1]) that holds each value, the last one closed."""
    return jnp.clip(jnp.searchsorted(table, values, side="right") - 1, 0, table.size - 2)


_RESOLUTION = 2.0**-24
_CELLS_PER_OCTAVE = 16
_TAIL_OCTAVES = range(24, 5, -1)
_LONGEST_FLAT = 2.0**-8
_ROUNDING = 1e-6


def tabulated(
    masking_rate: Callable[[np.ndarray], ArrayLike], num_cells: int = 1024
) -> PiecewiseConstant:
    """Law of the logSNR of an arbitrary schedule m(t), t ~ U(0, 1).

    Samples m in float64 at times refined by octaves towards both ends, down to 2**-24, and is
    uniform in the logSNR in between: an exact law that follows m(t) to a few parts in
    ``num_cells`` >= 16 (cells of the middle part). Where m reaches 0 or 1 the last octave is
    repeated: the support is finite. ``masking_rate`` is elementwise, 0 is clean in time and rate.
    ValueError if m changes shape, leaves [0, 1], falls, stands still for more than 2**-8 of the
    time (an atom has no density), or varies too little.
    """
    if num_cells < 16:
        raise ValueError(f"tabulated needs num_cells >= 16, got {num_cells}")
    quantile = _quantile_table(num_cells)
    times = 1 - quantile[::-1]
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        rate = _check_rate(times, np.asarray(masking_rate(times)))[::-1]
    with np.errstate(divide="ignore"):
        logsnr = np.log1p(-rate) - np.log(rate)
    quantile, logsnr = _close_ends(quantile, logsnr)
    kept = _distinct(logsnr)
    if len(kept) < 16:
        raise ValueError(
            f"tabulated: m(t) varies too little, from {rate[-1]} to {rate[0]}, for float32"
        )
    return PiecewiseConstant(logsnr[kept], quantile[kept])


def _quantile_table(num_cells: int) -> np.ndarray:
    """Increasing quantiles from 0 to 1 on multiples of 2**-24, which float32 holds exactly."""
    steps = 1 + np.arange(_CELLS_PER_OCTAVE) / _CELLS_PER_OCTAVE
    tail = np.concatenate([2.0**-octave * steps for octave in _TAIL_OCTAVES])
    middle = np.linspace(tail[-1], 1 - tail[-1], num_cells + 1)
    table = np.concatenate([[0.0, 1.0], tail, 1 - tail, middle])
    return np.unique(np.round(table / _RESOLUTION) * _RESOLUTION)


def _check_rate(times: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """The rates as float64, without steps back by rounding."""
    if rate.shape != times.shape:
        raise ValueError(
            f"tabulated: m(t) must work elementwise, got {rate.shape} from {times.shape}"
        )
    rate = rate.astype(np.float64)
    valid = (rate >= 0) & (rate <= 1)
    if not np.all(valid):
        at = int(np.argmin(valid))
        raise ValueError(f"tabulated: m(t) must stay in [0, 1], but m({times[at]}) = {rate[at]}")
    rising = np.maximum.accumulate(rate)
    falls = rising - rate > _ROUNDING
    if np.any(falls):
        at = int(np.argmax(falls))
        raise ValueError(
            f"tabulated: m(t) must not fall, but m({times[at - 1]}) = {rate[at - 1]} "
            f"and m({times[at]}) = {rate[at]}"
        )
    last = np.append(np.flatnonzero(np.diff(rising) > 0), len(rising) - 1)  # of each constant run
    first = np.append(0, last[:-1] + 1)
    flat = times[last] - times[first] > _LONGEST_FLAT
    if np.any(flat):
        start, stop = first[np.argmax(flat)], last[np.argmax(flat)]
        raise ValueError(
            f"tabulated: m(t) = {rising[start]} all the way from t = {times[start]} to "
            f"{times[stop]}, which has no density; rescale t to leave this part out"
        )
    return rising


def _close_ends(quantile: np.ndarray, logsnr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace infinite levels at the ends by one octave beyond the outermost finite one."""
    finite = np.isfinite(logsnr)
    inner, level = quantile[finite], logsnr[finite]
    if not finite[0]:
        octave = level[np.searchsorted(inner, 2 * inner[0])] - level[0]
        inner, level = np.append(0.0, inner), np.append(level[0] - octave, level)
    if not finite[-1]:
        octave = level[-1] - level[np.searchsorted(inner, 1 - 2 * (1 - inner[-1]))]
        inner, level = np.append(inner, 1.0), np.append(level, level[-1] + octave)
    return inner, level


def _distinct(logsnr: np.ndarray) -> list[int]:
    """Indices of edges that float32 tells apart: cells keep at least 64 units of rounding."""
    width = 64 * np.finfo(np.float32).eps * np.maximum(1, np.abs(logsnr))
    kept = [0]
    for index in range(1, len(logsnr)):
        if logsnr[index] - logsnr[kept[-1]] >= width[index]:
            kept.append(index)
    if len(kept) > 1:
        kept[-1] = len(logsnr) - 1
    return kept
