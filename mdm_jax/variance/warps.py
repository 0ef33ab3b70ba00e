"""Warps: importance sampling of the level, clipped ranges, log-uniform rates; learned warps' frame.
Quantiles are drawn from a density, with the importance weight in ``log_weight``.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Rate, Real, checked
from mdm_jax.draws import GRID_BITS, Draw, DrawSpec, LossStats
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.types import Array, ArrayLike, PyTree
from mdm_jax.variance.densities import (
    NARROWEST,
    QuantileDensity,
    SmallestRate,
    density_profile,
    open_interval,
    piecewise_density,
    warp,
)
from mdm_jax.variance.transform import (
    InitFn,
    LevelProfile,
    Phase,
    VarianceTransform,
    stateless,
)


def importance(density: QuantileDensity) -> VarianceTransform:
    """Importance sampling of levels: quantiles from ``density``, with its inverse as weight.
    Strata become strata of equal probability.
    Keeps: E[weight f(u)] = int f. Couples: nothing. Costs: one view. Removes: variance of level and
    pattern for densities like the root of ``densities.second_moment``; poor ones add variance.
    Bias: exact if the density covers (0, 1), else truncated. Reference: Kahn and Marshall 1953.
    """
    low, high = density.support
    return stateless(
        "importance",
        Phase.WARP,
        lambda _key, current, _spec: warp(current, density),
        bias="exact" if low <= 0 and high >= 1 else "truncated",
        profile=lambda u: density_profile(density, u),
    )


def unweighted(density: QuantileDensity) -> VarianceTransform:
    """:func:`importance` without its weight: quantiles from ``density``, and nothing paid for it.
    Keeps: ``int p(u) f(u) du`` for the density p. Couples: nothing. Costs: one view. Removes:
    nothing of the bound's variance. Bias: biased.
    """

    def draw(_key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        return current._replace(u=density.icdf(current.u))

    def profile(u: Array) -> LevelProfile:
        return LevelProfile(density.log_pdf(u), jnp.zeros_like(u))

    return stateless("unweighted", Phase.WARP, draw, bias="biased", profile=profile)


@checked
def clipped(low: Rate, high: Rate) -> VarianceTransform:
    """Clipped masking rates: m = 1 - u uniform in [low, high], with the weight ``high - low``.
    Keeps: ``int_low^high g(m) dm``, the bound's part in the range. Couples: nothing. Costs: one
    view. Removes: what rates outside add to variance *and* bound. Bias: truncated, so report no
    likelihood from it; :func:`clipped_mixture` is exact. Reference: Arriola et al. 2025 (BD3-LM),
    whose code omits the weight. Raises: ValueError unless ``0 <= low < high <= 1``.
    """
    _check_range("clipped", low, high)
    return importance(ClippedDensity(low, high))._replace(name="clipped")


@pytree_dataclass
class ClippedDensity(QuantileDensity):
    """Uniform for masking rates 1 - u in [low, high], zero elsewhere; both may be traced."""

    low: ArrayLike
    high: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return 1.0 - self.high, 1.0 - self.low

    def log_pdf(self, u: ArrayLike) -> Array:
        u = jnp.asarray(u)
        below, above = self.support
        slack = 2.0**-GRID_BITS
        inside = (u >= below - slack) & (u <= above + slack)
        return jnp.where(inside, -jnp.log(self.high - self.low), -jnp.inf)

    def cdf(self, u: ArrayLike) -> Array:
        below, above = self.support
        return jnp.clip((jnp.asarray(u) - below) / (above - below), 0.0, 1.0)

    def icdf(self, u: ArrayLike) -> Array:
        below, above = self.support
        inside = below + (above - below) * jnp.asarray(u)
        return open_interval(jnp.clip(inside, below, above))


class ClipRange(NamedTuple):
    """The range in use, [] float32 masking rates."""

    low: Array
    high: Array


@checked
def clipped_adaptive(low: Rate = 1e-3, high: Rate = 1.0) -> VarianceTransform:
    """:func:`clipped` with its range in the state, to be set by :func:`set_clip_range`.
    Starts at [low, high]; ``meter.make_clip_search`` finds a range. No recompilation; checkpointed.
    Keeps: ``int_low^high g(m) dm`` for the current range, which moves. Couples: nothing. Costs: one
    view. Removes: as :func:`clipped`. Bias: truncated. Reference: Arriola et al. 2025 (BD3-LM),
    data-driven clipping. Raises: as :func:`clipped`.
    """
    _check_range("clipped_adaptive", low, high)
    return learned_warp(
        "clipped_adaptive",
        lambda _spec: _clip_range(low, high),
        lambda state: ClippedDensity(*state),
        bias="truncated",
    )


def set_clip_range(state: PyTree, low: float, high: float) -> PyTree:
    """Sets the range in the state of :func:`clipped_adaptive` or of a chain with it.
    ValueError unless 0 <= low < high <= 1, or if the chain has no such member.
    """
    _check_range("set_clip_range", low, high)
    if isinstance(state, ClipRange):
        return _clip_range(low, high)
    if not isinstance(state, dict) or "clipped_adaptive" not in state:
        raise ValueError(
            f"set_clip_range needs the state of clipped_adaptive() or of a chain that holds it, "
            f"got {type(state).__name__}"
            + (f" with {', '.join(state)}" if isinstance(state, dict) else "")
        )
    return state | {"clipped_adaptive": _clip_range(low, high)}


_LEAST = 2 * NARROWEST  # wide enough even after both ends are rounded


@checked
def clipped_mixture(
    low: Rate,
    high: Rate,
    share: Annotated[
        float, Real("(0, 1]", "of draws", "from all rates; with none it would be clipped")
    ] = 0.1,
) -> VarianceTransform:
    """Mixture of a clipped range of masking rates and the full one: exact clipping.

    The density is ``(1 - share) U[low, high] + share U[0, 1]``. Rates within 2**-21 of 0 or 1 count
    as these (float32 resolution).
    Keeps: E[weight f(u)] = int f, the whole bound. Couples: nothing. Costs: one view. Removes: what
    a preference for the range can, with weights of ``1 / share`` outside. Bias: exact. Reference:
    defensive importance sampling (Hesterberg 1995). Raises: ValueError if narrower than 2**-21.
    """
    _check_range("clipped_mixture", low, high)
    low, high = (0.0 if low < _LEAST else low), (1.0 if high > 1.0 - _LEAST else high)
    if high - low < _LEAST:
        raise ValueError(
            f"clipped_mixture needs a range of masking rates at least {_LEAST:.2g} wide, got "
            f"{low} to {high}; widen it"
        )
    widths = np.array([1.0 - high, high - low, low])
    masses, kept = np.array([0.0, 1.0, 0.0]), widths > 0
    edges = np.concatenate([[0.0], np.cumsum(widths[kept])])
    edges[-1] = 1.0
    return importance(piecewise_density(edges, masses[kept], share))._replace(
        name="clipped_mixture"
    )


@checked
def log_uniform(smallest_rate: SmallestRate = 1e-3) -> VarianceTransform:
    """Log-uniform masking rates m = 1 - u above ``smallest_rate``, uniform ones below.

    The density of m is ``1 / (T max(m, smallest_rate))``, ``T = 1 - ln smallest_rate``;
    cross-entropies with weight 1/m then get the constant T above ``smallest_rate``.
    ``schedules.masked.log_uniform`` is the published form, truncated.
    Keeps: E[weight f(u)] = int f. Couples: nothing. Costs: one view. Removes: the tail of
    Bernoulli's weight 1/m above ``smallest_rate``; the second moment below stays infinite, T
    smallest_rate times that of uniform rates. Draws small rates more often than optimal; fixed
    counts have no tail. Bias: exact. Reference: Sahoo et al. 2024 (MDLM), change of variables (an
    option for importance sampling).
    """
    return importance(LogUniformDensity(smallest_rate))._replace(name="log_uniform")


@pytree_dataclass
class LogUniformDensity(QuantileDensity):
    """Density ``1 / (T max(m, smallest_rate))`` of m = 1 - u, ``T = 1 - ln smallest_rate``."""

    smallest_rate: ArrayLike

    @property
    def total(self) -> Array:
        """T, the constant weight on masked cross-entropies above the smallest rate."""
        return 1.0 - jnp.log(self.smallest_rate)

    def log_pdf(self, u: ArrayLike) -> Array:
        return -jnp.log(self.total * jnp.maximum(1.0 - jnp.asarray(u), self.smallest_rate))

    def cdf(self, u: ArrayLike) -> Array:
        ratio = (1.0 - jnp.asarray(u)) / self.smallest_rate
        foot, body = jnp.minimum(ratio, 1.0), jnp.log(jnp.maximum(ratio, 1.0))
        return 1.0 - (foot + body) / self.total

    def icdf(self, u: ArrayLike) -> Array:
        above = (1.0 - jnp.asarray(u)) * self.total
        growth = jnp.exp(jnp.maximum(above - 1.0, 0.0))
        rate = self.smallest_rate * jnp.minimum(above, 1.0) * growth
        return open_interval(1.0 - rate)


LearnFn = Callable[[Any, Draw, LossStats], tuple[dict[str, PyTree], Array]]
"""``learn(state, draw, stats) -> (changed fields, whether to keep them)``."""


def learned_warp(
    name: str,
    init: InitFn,
    density: Callable[[PyTree], QuantileDensity],
    learn: LearnFn | None = None,
    bias: str = "exact",
) -> VarianceTransform:
    """A warp with importance weights and its density in the state, fixed without ``learn``.
    ``density`` maps the state to the density of the quantile; for ``learn`` see :func:`updates`.
    """
    return VarianceTransform(
        name,
        Phase.WARP,
        init,
        lambda _key, state, current, _spec: warp(current, density(state)),
        (lambda state, _draw, _stats: state) if learn is None else updates(learn),
        bias=bias,
        profile=lambda state, u: density_profile(density(state), u),
    )


def updates(learn: LearnFn) -> Callable[[Any, Draw, LossStats], Any]:
    """Counting ``update`` from ``learn``; changes not to be kept only raise ``rejected``.
    A batch without losses other than zero teaches nothing, and only raises ``steps``: momentum, and
    steps that do not depend on the size of a gradient, would move a learner for ever.
    """

    def update(state: Any, current: Draw, stats: LossStats) -> Any:
        changes, keep = learn(state, current, stats)
        taught = jnp.any((stats.raw != 0) & (stats.eligible > 0))
        held = {name: getattr(state, name) for name in changes}
        changes = jax.tree.map(lambda new, old: jnp.where(taught, new, old), changes, held)
        learnt = state._replace(steps=state.steps + 1, **changes)
        refused = state._replace(rejected=state.rejected + 1)
        return jax.tree.map(lambda new, old: jnp.where(keep, new, old), learnt, refused)

    return update


def counters() -> dict[str, Array]:
    """Fresh ``steps`` and ``rejected``; two buffers, as a donated state may not hold one twice."""
    return {name: jnp.zeros((), jnp.int32) for name in ("steps", "rejected")}


def all_finite(tree: PyTree) -> Array:
    """Whether no leaf holds an infinity or NaN."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _check_range(name: str, low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"{name} needs masking rates 0 <= low < high <= 1, got {low} and {high}")


def _clip_range(low: float, high: float) -> ClipRange:
    return ClipRange(jnp.float32(low), jnp.float32(high))
