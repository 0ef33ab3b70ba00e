"""An objective with another weighting of its levels.

Self-conditioning: a network that is sometimes shown its own earlier estimate.

Reference: Chen et al. 2022 (Analog Bits), section 3; used by DiffusionGemma on uniform tokens.
"""

from collections.abc import Callable

import jax.numpy as jnp

from mdm_jax.corruption.token_estimate import token_estimate
from mdm_jax.draws import GRID_BITS, Draw, LossStats
from mdm_jax.gaussian import weightings
from mdm_jax.models.cross_entropy import as_logits
from mdm_jax.objectives.objective import Objective, flatten_views
from mdm_jax.schedules.laws import logistic
from mdm_jax.types import Array, ArrayLike, Batch, ModelFn

LogFactor = Callable[[Array], Array]
"""From the logSNR to the log of a factor on the weight, elementwise."""


def reweighted(objective: Objective, log_factor: LogFactor, name: str) -> Objective:
    """``objective`` with its weight multiplied by ``exp(log_factor(logsnr))``.

    With W the effective weight of the objective over the logSNR, the new one is W times the factor.
    The raw loss, the law and the noise stay as they were, so weightings of Gaussian diffusion can
    be put on masked diffusion: there ``exp(logsnr)`` is the odds of a token being visible, and the
    factor falls on the bound's integrand. The expectation is no bound any more: "biased".

    The factor of any weighting of :mod:`~mdm_jax.schedules.weightings` that holds no law will do,
    such as ``weightings.sigmoid(2.0).log_weight``.

    Args:
        objective: any.
        log_factor: a fixed function; :func:`~mdm_jax.variance.uncertainty_weighting` learns one.
        name: what the factor is called; it is appended to the objective's name.
    """

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        stats = objective.loss(model_fn, batch, draw)
        factor = jnp.exp(log_factor(objective.law.icdf(draw.u)))
        return stats._replace(weight=stats.weight * factor)

    return objective._replace(name=f"{objective.name}, {name}", loss=loss, bias="biased")


def min_snr_factor(gamma: ArrayLike = 5.0) -> LogFactor:
    """log of ``min(1, gamma exp(-lambda))`` (Hang et al. 2023): no more weight on clean levels.

    Raises:
        ValueError: unless gamma > 0.
    """
    return weightings.min_snr(logistic(), gamma).factors[0].log_weight


def p2_factor(k: ArrayLike = 1.0, gamma: ArrayLike = 1.0) -> LogFactor:
    """log of ``(k + exp(lambda))^-gamma`` (Choi et al. 2022).

    Raises:
        ValueError: unless k > 0 and gamma is finite.
    """
    return weightings.p2(logistic(), k, gamma).factors[0].log_weight


def self_conditioned(objective: Objective, num_tokens: int) -> Objective:
    """``objective`` for a network that takes an estimate of the clean tokens as a further input.

    For half of the (row, view)s, those of :func:`estimate_coin`, a first pass without an estimate
    gives probabilities, through which no gradient flows, and the loss is that of the second pass,
    which sees them. The others are trained without an estimate, as sampling starts. All rows take
    part in the first pass, so a step costs one more forward pass, without its backward one.

    The expectation is the mean of two losses: of the network alone, and of the network after its
    first pass (:func:`two_pass`). If the objective is a bound, both are.

    Args:
        objective: for tokens, such as ``masked_nelbo`` or ``uniform_nelbo``.
        num_tokens: number of real tokens; ids from there on have probability zero in the estimate.
            The mask token, the last id of this package's vocabularies, is such a one.

    The model function is ``model_fn(inputs, logsnr, documents, estimate=None)``, with the estimate
    [N, L, K] over as many ids as the network has logits.
    """

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        chosen = flatten_views(estimate_coin(draw.noise))
        return objective.loss(two_pass(model_fn, num_tokens, chosen), batch, draw)

    return objective._replace(name=f"{objective.name}, self-conditioned", loss=loss)


def two_pass(model_fn: ModelFn, num_tokens: int, chosen: Array | None = None) -> ModelFn:
    """The network after a first pass whose probabilities it sees in the second one.

    Another network with the usual signature; as such it can be trained or its likelihood evaluated.

    Args:
        model_fn: ``model_fn(inputs [N, L], logsnr, documents, estimate=None) -> [N, L, K]``.
        num_tokens: as for :func:`self_conditioned`.
        chosen: [N] bool, rows that see the first pass; the others see zeros. All if not given.
    """

    def second(inputs: Array, logsnr: Array, documents: Array | None = None) -> Array:
        estimate = token_estimate(as_logits(model_fn(inputs, logsnr, documents)), num_tokens)
        if chosen is not None:
            estimate = jnp.where(chosen[:, None, None], estimate, 0.0)
        return model_fn(inputs, logsnr, documents, estimate=estimate)

    return second


def estimate_coin(noise: Array) -> Array:
    """A fair coin per view and row, [V, B] bool, read off the draw's base noise [V, B, ...].

    It is the parity of the row's numbers on their grid (``draws.GRID_BITS``), all lowest bits
    added. A corruption looks at their size and order, about which the parity says nothing, so the
    coin is independent of what is done to the row. It is taken from the first view, which no
    replication touches, and turned over from one view to the next: the views of a row take turns,
    and an even number of them is half and half. Rows are as independent as their noise.
    """
    index = jnp.floor(noise[0] * 2**GRID_BITS).astype(jnp.int32)
    parity = jnp.sum((index & 1).reshape(index.shape[0], -1), axis=-1)
    turn = jnp.arange(noise.shape[0])[:, None]
    return (parity[None] + turn) % 2 == 1
