"""Held-out figures of preference pairs: accuracy, margin and loss, with their errors."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mdm_jax.alignment import preference
from mdm_jax.alignment.methods import Constant
from mdm_jax.alignment.training import pair_loss, pair_margins
from mdm_jax.estimates import finite_or_none, standard_error_of_mean
from mdm_jax.types import Array


class Figure(NamedTuple):
    """A mean over pairs. ``standard_error``: over pairs, mask noise included, what other pairs
    might change; ``monte_carlo_error``: that of the masks alone, NaN for one replicate."""

    value: float
    standard_error: float
    monte_carlo_error: float


class PreferenceFigures(NamedTuple):
    """What policy and reference make of pairs that they were not trained on.

    Attributes:
        accuracy: share of pairs whose chosen answer gains more over the reference (simpo: has the
            higher bound per token); equal ones count half. Mask noise pulls it towards 1/2.
        margin: by how much, nats per answer (simpo: per token).
        loss: of the method, from the mean over all replicates, which mask noise biases upwards.
        losses: [B] of each pair.
    """

    accuracy: Figure
    margin: Figure
    loss: Figure
    losses: np.ndarray

    def to_dict(self) -> dict[str, float | None]:
        """JSON values, None where there is no error."""
        record = {}
        for name in ("accuracy", "margin", "loss"):
            for part, value in getattr(self, name)._asdict().items():
                suffix = "" if part == "value" else f"_{part}"
                record[f"preference_{name}{suffix}"] = finite_or_none(value)
        return record


def preference_figures(
    scores: Array, tokens: Array, method: str, beta: Constant, gap: float = 0.5
) -> PreferenceFigures:
    """Figures of B pairs from bounds of R independent replicates under M networks.

    Monte Carlo errors of margin and loss are of the jackknife over the replicates of each pair (of
    R - 1 of them at a time); pairs have masks of their own, so their variances add up. That of an
    accuracy is NaN: a step function, for which the jackknife is wrong.

    Args:
        scores, tokens: [M, R, 2, B] nats and [2, B], as of ``training.PairLoss``.
        method, beta, gap: as of ``training.pair_loss``.
    """
    loss = pair_loss(method, beta, gap=gap, estimate=preference.plain)

    def evaluate(scores: Array) -> np.ndarray:
        """[3, B] of each pair: accuracy, margin, loss."""
        margin = jnp.mean(pair_margins(method, scores, tokens), axis=0)
        right = jnp.where(margin == 0, 0.5, margin > 0)
        return np.asarray(jnp.stack([right, margin, loss(scores, tokens)]), np.float64)

    scores = jnp.asarray(scores)
    whole, replicates = evaluate(scores), scores.shape[1]
    noise = np.full(3, math.nan)
    if replicates > 1:
        without = np.stack([evaluate(jnp.delete(scores, r, axis=1)) for r in range(replicates)])
        variances = (replicates - 1) * without.var(axis=0)
        noise[1:] = (np.sqrt(variances.sum(-1)) / whole.shape[-1])[1:]
    made = [
        Figure(float(each.mean()), standard_error_of_mean(each), float(error))
        for each, error in zip(whole, noise)
    ]
    return PreferenceFigures(*made, whole[2])
