"""Independent masks of the same row at the same level."""

import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec, open_uniform
from mdm_jax.streams import stream
from mdm_jax.typing import Array
from mdm_jax.variance.transform import Phase, VarianceTransform, replicate_views, stateless


def repeat(views: int = 2) -> VarianceTransform:
    """R views of every row at the same level, each with independent noise.

    Keeps: the law of each view. Couples: nothing; the views of a row share its level.
    Costs: R forward passes per row. Removes: pattern noise A by the factor R, which R times the
    rows would do too, along with B and C: it is the baseline that coupled views have to beat.
    Bias: exact.
    Reference: plain Monte Carlo. The public StableDLLM release does this under the name MIRROR.

    Args:
        views: R.

    Raises:
        ValueError: if ``views`` is not positive.
    """
    check_views("repeat", views)

    def draw(key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        noise = fresh_noise(stream(key, "noise"), current.noise, views)
        return replicate_views(current, list(jnp.split(noise, views)))

    return stateless("repeat", Phase.REPLICATE, draw, views=views)


def fresh_noise(key: Array, noise: Array, views: int) -> Array:
    """``noise`` [V, B, ...] followed by ``views - 1`` independent copies, [views V, B, ...].

    One stream per copy, so that a row's numbers do not depend on the batch size.
    """
    copies = (open_uniform(stream(key, f"view {i}"), noise.shape) for i in range(1, views))
    return jnp.concatenate([noise, *copies])


def check_views(name: str, views: int) -> None:
    """Raises ValueError unless ``views`` is positive."""
    if views < 1:
        raise ValueError(f"{name} needs at least 1 view, got {views}")
