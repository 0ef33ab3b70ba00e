"""Levels from a part of the interval only."""

import jax.numpy as jnp

from mdm_jax.draws import GRID_BITS
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.typing import Array, ArrayLike
from mdm_jax.variance.importance import importance
from mdm_jax.variance.quantile_density import open_interval
from mdm_jax.variance.transform import VarianceTransform


def clipped(low: float, high: float) -> VarianceTransform:
    """Draws masking rates m = 1 - u in [low, high] only, with the weight ``high - low``.

    Keeps: ``int_low^high g(m) dm``, the bound's part in the range. Couples: nothing.
    Costs: one view. Removes: what the rates outside contribute, to the variance *and* to the bound:
    ``int_0^low g + int_high^1 g`` is missing, and no weight can bring it back.
    Bias: truncated. Report no likelihood from it. :func:`clipped_mixture` is the exact variant.
    Reference: Arriola et al. 2025 (BD3-LM), clipped schedules. Their code leaves out the factor
    ``high - low`` and thereby trains on the average over the range instead of the integral.

    Args:
        low: smallest masking rate.
        high: largest masking rate.

    Raises:
        ValueError: unless 0 <= low < high <= 1.
    """
    check_range("clipped", low, high)
    return importance(ClippedDensity(low, high))._replace(name="clipped")


def check_range(name: str, low: float, high: float) -> None:
    """Raises ValueError unless 0 <= low < high <= 1."""
    if not 0 <= low < high <= 1:
        raise ValueError(f"{name} needs masking rates 0 <= low < high <= 1, got {low} and {high}")


@pytree_dataclass
class ClippedDensity:
    """Uniform for masking rates 1 - u in [low, high], zero elsewhere; both may be traced."""

    low: ArrayLike
    high: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        """Quantiles between which all mass lies."""
        return 1.0 - self.high, 1.0 - self.low

    def log_pdf(self, u: ArrayLike) -> Array:
        """Log density, nats; -inf outside the support, whose ends allow for rounding."""
        u = jnp.asarray(u)
        below, above = self.support
        slack = 2.0**-GRID_BITS
        inside = (u >= below - slack) & (u <= above + slack)
        return jnp.where(inside, -jnp.log(self.high - self.low), -jnp.inf)

    def cdf(self, u: ArrayLike) -> Array:
        """Probability of a smaller quantile."""
        below, above = self.support
        return jnp.clip((jnp.asarray(u) - below) / (above - below), 0.0, 1.0)

    def icdf(self, u: ArrayLike) -> Array:
        """The quantile with the given probability below it."""
        below, above = self.support
        inside = below + (above - below) * jnp.asarray(u)
        return open_interval(jnp.clip(inside, below, above))
