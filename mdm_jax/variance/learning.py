"""What adaptive transforms learn from a step, and when they refuse to."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.draws import Draw, LossStats
from mdm_jax.typing import Array, PyTree


class LevelLosses(NamedTuple):
    """Losses at the levels of a draw.

    Attributes:
        value: [V, B, S] of the row at this level, averaged over its views there; 0 where nothing
            is scored.
        count: [V, B, S] what the entry counts: 1 over the number of views of the row at this level,
            0 where nothing is scored.
    """

    value: Array
    count: Array


def integrand(draw: Draw, stats: LossStats) -> LevelLosses:
    """f, whose mean over uniform quantiles is the loss, per scored element.

    The raw loss times the objective's weight, without the importance weight.
    """
    return _per_level(draw, stats.raw * stats.weight, stats.scored)


def target_loss(draw: Draw, stats: LossStats) -> LevelLosses:
    """The raw loss per target element, without any weight."""
    return _per_level(draw, stats.raw, stats.targets)


def total_count(losses: LevelLosses) -> Array:
    """Number of estimates in the batch, at least 1."""
    total = jnp.sum(losses.count)
    return jnp.where(total > 0, total, 1.0)


def all_finite(tree: PyTree) -> Array:
    """Whether no leaf holds an infinity or NaN."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def accept(finite: Array, learnt: PyTree, old: PyTree) -> PyTree:
    """The state ``learnt``, or ``old`` with its counter ``rejected`` raised.

    Args:
        finite: whether what was learnt may be kept.
        learnt: NamedTuple.
        old: NamedTuple of the same kind.
    """
    refused = old._replace(rejected=old.rejected + 1)
    return jax.tree.map(lambda new, kept: jnp.where(finite, new, kept), learnt, refused)


def _per_level(draw: Draw, total: Array, elements: Array) -> LevelLosses:
    empty = elements == 0
    value = jnp.where(empty, 0.0, total / jnp.where(empty, 1, elements))
    # Views of a row at the same level are one estimate: average them before squaring.
    same = (draw.u[:, None] == draw.u[None]).astype(value.dtype)
    views = jnp.maximum(jnp.sum(same * jnp.where(empty, 0.0, 1.0)[None], axis=1), 1.0)
    joined = jnp.sum(same * value[None], axis=1) / views
    return LevelLosses(jnp.where(empty, 0.0, joined), jnp.where(empty, 0.0, 1.0 / views))
