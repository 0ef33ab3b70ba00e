"""Bell-shaped laws of the masking rate: logit-normal and Beta, by centre and width.

Objectives under them are "truncated": float32 quantiles draw no rates near 0 and 1 (logit-normal of
centre 0.6 and width 0.8: none outside 0.021 to 0.990), and the weights of those drawn have a large
variance. Without the weight, ``weighting.name="law"`` in configs, levels count by the law's
density: another objective, of little variance. Reference: arXiv 2605.13026 (bell-shaped rates; its
own density is not known here).
"""

import operator
from typing import Annotated

import jax.numpy as jnp
from jax.scipy.special import betaln, ndtr, ndtri

from mdm_jax.checks import Real, as_parameter, checked, log_positive, parameters
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import MaskingLevel, masking_rate
from mdm_jax.schedules.laws import Instant
from mdm_jax.schedules.schedule import MaskedSchedule
from mdm_jax.schedules.times import beta_instant, beta_time
from mdm_jax.types import Array, ArrayLike


@pytree_dataclass
class LogitNormal(MaskedSchedule):
    """The logit of the rate is normal, of mean ``loc`` and standard deviation ``scale``."""

    loc: ArrayLike
    scale: ArrayLike
    drawn_to_the_ends = False

    def rate_formula(self, at: Instant) -> Array:
        return masking_rate(self.logsnr_formula(at))

    def logsnr_formula(self, at: Instant) -> Array:
        early = at.t < 0.5  # each half from its own small probability
        z = ndtri(jnp.where(early, at.t, at.rest))
        return -self.loc - self.scale * jnp.where(early, z, -z)

    def time_formula(self, level: MaskingLevel) -> Instant:
        z = self._standardised(level)
        return Instant(ndtr(z), ndtr(-z))

    def log_rate_density(self, level: MaskingLevel) -> Array:
        normaliser = jnp.log(self.scale) + 0.5 * jnp.log(2 * jnp.pi)
        log_normal = -0.5 * jnp.square(self._standardised(level))
        return (
            log_normal - normaliser.astype(log_normal.dtype) - level.log_rate - level.log_survival
        )

    def _standardised(self, level: MaskingLevel) -> Array:
        return (-level.logsnr - self.loc) / self.scale


@pytree_dataclass
class Beta(MaskedSchedule):
    """The rate has a Beta law, of density m^(alpha - 1) (1 - m)^(beta - 1) / B(alpha, beta)."""

    alpha: ArrayLike
    beta: ArrayLike
    drawn_to_the_ends = False

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf  # known without the inverse, which takes long to compile

    def rate_formula(self, at: Instant) -> Array:
        return masking_rate(self.logsnr_formula(at))

    def logsnr_formula(self, at: Instant) -> Array:
        rate, survival = beta_instant(self.alpha, self.beta, at)
        inside = jnp.log(survival) - jnp.log(rate)
        return jnp.where(at.t <= 0, jnp.inf, jnp.where(at.rest <= 0, -jnp.inf, inside))

    def time_formula(self, level: MaskingLevel) -> Instant:
        return beta_time(self.alpha, self.beta, Instant(level.rate, level.survival))

    def log_rate_density(self, level: MaskingLevel) -> Array:
        log_power = (self.alpha - 1) * level.log_rate + (self.beta - 1) * level.log_survival
        return log_power - betaln(self.alpha, self.beta)


Center = Annotated[ArrayLike, Real("(0, 1)", "masking rate", "centre of the bell")]


@checked
def logit_normal(
    center: Center = 0.5,
    width: Annotated[ArrayLike, Real("(0, 100]", "logits", "standard deviation")] = 1.0,
) -> LogitNormal:
    """logit(m) normal around that of the median rate ``center``. Weight 1 / (m density(m))."""
    center, width = as_parameter(center, "center"), as_parameter(width, "width")
    odds = (log_positive("logit_normal", "rate", rate) for rate in (center, 1 - center))
    return LogitNormal(operator.sub(*odds), width)


@checked
def beta(
    center: Center = 0.5,
    width: Annotated[ArrayLike, Real("(0, 0.5)", "masking rate", "standard deviation")] = 0.2,
) -> Beta:
    """Beta law of the rate, by mean and standard deviation, width^2 < center (1 - center)."""
    rule = "width**2 < center * (1 - center)"
    center, width = parameters(
        "beta", rule, lambda c, w: w**2 < c * (1 - c), center=center, width=width
    )
    total = center * (1 - center) / width**2 - 1
    return Beta(center * total, (1 - center) * total)
