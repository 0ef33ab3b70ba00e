"""Whether weights 1/m have infinite variance, which redraws of a batch hardly ever show."""

import jax
import jax.numpy as jnp

from mdm_jax.draws import GRID_BITS, DrawSpec
from mdm_jax.objectives import Objective
from mdm_jax.typing import PyTree
from mdm_jax.variance import VarianceTransform

_SLOWEST = 0.01  # power of m that still counts as a fall


def inverse_rates_diverge(
    objective: Objective, transform: VarianceTransform, state: PyTree, spec: DrawSpec
) -> bool:
    """Whether an estimate with losses S/m of the bound has infinite variance under a law and chain.

    Near m = 0 the second moment of S/m is of the order of 1/m. Where the law's density of the rate
    is p and the chain draws its quantiles from q(u) with the weight w(u), that of the estimate is

        int q w^2 / (m p) dm ,

    which is finite if law or chain stop above m = 0, or ``q w^2 / p`` falls like a power of m. The
    power is read off the two last quantiles of the float32 grid, within the last cell of every
    piecewise density. A warp without profile is taken for one of bounded density.

    Args:
        objective: whose effective weight is the bound's; one labelled "biased" has another, of
            which nothing is known here, and the answer is no.
        transform: any chain.
        state: its state, read only.
        spec: of a training batch, for the number of levels.
    """
    if objective.bias == "biased" or float(objective.law.support[1]) < jnp.inf:
        return False
    law, places = objective.law, jnp.asarray([3.0, 1.0])
    u = jnp.broadcast_to((1 - places * 2.0 ** -(GRID_BITS + 1))[:, None], (2, spec.num_levels))
    logsnr = law.icdf(u)
    log_rate, log_survival = jax.nn.log_sigmoid(-logsnr), jax.nn.log_sigmoid(logsnr)
    height = -(law.log_pdf(logsnr) - log_rate - log_survival)
    if transform.profile is not None:
        profile = transform.profile(state, u)
        height = height + profile.log_density + 2 * profile.log_weight
    power = jnp.diff(height, axis=0) / jnp.diff(log_rate, axis=0)
    return bool(jnp.any((height[1] > -jnp.inf) & (power[0] < _SLOWEST)))
