"""A running baseline for the *reported* loss. It cannot change a gradient.

Subtracting from a loss something that does not depend on the parameters leaves its gradient as it
is, bit for bit, whatever it does to the curve of the loss; a baseline reduces the variance of
*score-function* terms, of which a masked bound with a fixed forward process has none. So this is a
control variate for the number that is logged:

    reported = sum_rows [ w (f - n b(u)) + n mean(b) ] ,

with w the importance weight, n the scored tokens, and b a running mean of the per-token integrand
in equal bins of the quantile u. Where w is one over the density that u is drawn from, ``w b(u)``
has the mean of b, and because b is of the past the expectation is that of the loss. That holds for
chains labelled "exact". Under one that leaves levels out, or pays another weight than that, the
correction has a mean of its own and the number is that of nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.draws import Draw, LossStats
from mdm_jax.typing import Array


class Baseline(NamedTuple):
    """Running mean of the per-token integrand in bins of the quantile.

    Attributes:
        mean: [bins] nats per token; 0 where nothing was seen yet.
        weight: [bins] total weight behind the mean, from 0 towards 1.
        rejected: [] int32 batches left out because a loss was not finite.
    """

    mean: Array
    weight: Array
    rejected: Array


def new_baseline(bins: int = 16) -> Baseline:
    """A baseline that has seen nothing and changes nothing.

    Raises:
        ValueError: unless bins >= 1.
    """
    if bins < 1:
        raise ValueError(f"a baseline needs at least 1 bin, got {bins}")
    mean, weight = (jnp.zeros((bins,), jnp.float32) for _ in range(2))  # both can be donated
    return Baseline(mean, weight, jnp.zeros((), jnp.int32))


def update_baseline(
    baseline: Baseline, draw: Draw, stats: LossStats, decay: float = 0.99
) -> Baseline:
    """The baseline after one more batch; rows that share a bin are averaged, not overwritten.

    Args:
        baseline: of the batches before.
        draw: of this batch.
        stats: of this batch; rows without scored tokens are left out.
        decay: of a bin's mean, whenever it is visited, in [0, 1).
    """
    member, loss, scored = _bins(baseline, draw, stats)
    finite = jnp.all(jnp.isfinite(jnp.where(scored, loss, 0.0)))
    loss = jnp.where(scored & finite, loss, 0.0)
    count = jnp.sum(member, axis=(0, 1, 2))
    seen = jnp.sum(loss[..., None] * member, axis=(0, 1, 2)) / jnp.maximum(count, 1.0)
    new = jnp.where((count > 0) & finite, 1 - decay, 0.0)
    weight = baseline.weight * (1 - new) + new
    gain = jnp.where(weight > 0, new / jnp.maximum(weight, 1e-30), 0.0)
    return Baseline(
        mean=baseline.mean + gain * (seen - baseline.mean),
        weight=weight,
        rejected=baseline.rejected + jnp.where(finite, 0, 1),
    )


def reported_loss(baseline: Baseline, draw: Draw, stats: LossStats) -> Array:
    """Sum over rows of the loss with its control variate, nats, averaged over views.

    Divide by the scored tokens as for ``sum_losses(draw, stats).loss``, whose expectation it has if
    the draw is of a chain whose bias is "exact". The baseline must not have seen this batch.
    """
    member, _, scored = _bins(baseline, draw, stats)
    level = jnp.dot(member, baseline.mean, precision=jax.lax.Precision.HIGHEST)
    weight = jnp.exp(draw.log_weight)
    correction = jnp.mean(baseline.mean) - weight * level
    control = jnp.where(scored, stats.scored * correction, 0.0)
    total = jnp.sum(weight * stats.weight * stats.raw) + jnp.sum(control)
    return total / draw.u.shape[0]


def _bins(baseline: Baseline, draw: Draw, stats: LossStats) -> tuple[Array, Array, Array]:
    bins = baseline.mean.shape[0]
    scored = stats.scored > 0
    index = jnp.clip((draw.u * bins).astype(jnp.int32), 0, bins - 1)
    member = jax.nn.one_hot(index, bins, dtype=jnp.float32) * scored[..., None]
    return member, stats.raw * stats.weight / jnp.maximum(stats.scored, 1), scored
