"""The bound of uniform-token diffusion, in continuous time."""

import jax
import jax.numpy as jnp

from mdm_jax import schedules
from mdm_jax.corruption.process import spread_levels, sum_levels
from mdm_jax.corruption.uniform import uniform_tokens
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.models.cross_entropy import PositionLoss, Readout, position_losses
from mdm_jax.objectives.objective import Objective, bias_of_levels, score_tokens
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array, Batch, ModelFn, worst_bias

_UNIFORM_RATE = schedules.logistic()

LOGSNR_LIMIT = 25.0
"""Levels beyond are scored as at this one; all they hold of the bound is of the order exp(-25)."""


def uniform_nelbo(num_tokens: int, law: Law | None = None, num_levels: int = 1) -> Objective:
    """Negative evidence lower bound of a uniform-token diffusion model, nats.

    With f the sum of :func:`bound_rate` over the eligible tokens, replaced or not,

        NELBO = int_0^1 E[f | m] dm = E_{lambda ~ law} [ logistic(lambda) / law(lambda) f ] ,

    where m is the replacement rate. This is the whole bound: prior and reconstruction terms vanish
    at m = 1 and m = 0. The law changes the variance of the estimate, never its mean, as long as it
    covers the real line; a law of bounded support leaves the bound's part outside out, and the
    objective is then labelled "truncated".

    For small m a replaced token costs about 1/m, and more by a logarithm where the network finds it
    plausible. So the variance is infinite under the default law, as with Bernoulli masks (on the
    grid of quantiles: large). It is finite under laws with more levels there, such as
    ``schedules.law_of(schedules.masked.power(3.0))``.

    Per-example stats have shape [V, B, S]. Rows without eligible elements contribute zero; prompt
    and padding positions carry neither loss nor gradient. The network is that of
    :func:`bound_rate`: one that predicts P(x_i | z) goes through ``corruption.leave_one_out``.

    Args:
        num_tokens: K of ``corruption.uniform_tokens``. Eligible tokens must lie in {0..K - 1}; the
            network's logits from K on are ignored.
        law: law over logSNR, standard logistic (uniform replacement rate) if not given.
        num_levels: S, independent noise levels per row, for contiguous segments of equal length.
            1 is the bound; with more a segment's context is drawn at the levels of the other
            segments, the expectation bounds nothing and the objective is labelled "biased"
            (:func:`~mdm_jax.objectives.block_nelbo` has a level per block and a bound).

    Raises:
        ValueError: for fewer than two tokens, or if ``num_levels`` is not positive; from ``spec``,
            if it does not divide L; from ``loss``, for a network of fewer logits than tokens.

    References: Schiff et al. 2024 (UDLM), the continuous-time bound; Sahoo et al. 2025 (Duo).
    """
    corruption = uniform_tokens(num_tokens)
    chosen = _UNIFORM_RATE if law is None else law
    of_levels = bias_of_levels("uniform_nelbo", num_levels)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        levels = draw.u.shape[-1]
        tokens, eligible = jnp.asarray(batch.tokens)[None], jnp.asarray(batch.eligible)[None]
        logsnr = chosen.icdf(draw.u)
        corrupted = corruption.corrupt(tokens, logsnr, draw.noise, eligible)
        # Where nothing is scored an id may be a special one, for which there is no logit.
        noisy, clean = (
            jnp.where(corrupted.target_mask, ids, 0) for ids in (corrupted.inputs, tokens)
        )
        each_logsnr = spread_levels(logsnr, tokens.shape[-1])
        nats = score_tokens(
            *(model_fn, corrupted.inputs, logsnr, batch.documents, score),
            *(noisy, clean, each_logsnr, corrupted.target_mask),
        )
        scored = sum_levels(eligible.astype(jnp.float32), levels)
        return LossStats(
            raw=sum_levels(nats, levels),
            weight=jnp.exp(_UNIFORM_RATE.log_pdf(logsnr) - chosen.log_pdf(logsnr)),
            scored=jnp.broadcast_to(scored, draw.u.shape),
            targets=sum_levels(corrupted.target_mask.astype(jnp.int32), levels),
        )

    def score(
        outputs: Array | Readout, noisy: Array, clean: Array, each_logsnr: Array, where: Array
    ) -> Array:
        known, held_back = (noisy, clean, each_logsnr), isinstance(outputs, Readout)
        found = outputs.num_tokens if held_back else outputs.shape[-1]
        if found < num_tokens:
            raise ValueError(f"a bound over {num_tokens} tokens needs as many logits, got {found}")
        if held_back:
            return position_losses(_bound_rate(num_tokens), outputs, where, *known)
        return jnp.where(where, bound_rate(outputs[..., :num_tokens], *known), 0.0)

    def spec(batch_size: int, length: int) -> DrawSpec:
        spread_levels(jnp.zeros((num_levels,)), length)  # raises where S does not divide L
        return DrawSpec(batch_size, num_levels, corruption.event_shape(length))

    low, high = chosen.support
    whole = bool(low == -jnp.inf and high == jnp.inf)
    bias = worst_bias("exact" if whole else "truncated", of_levels)
    return Objective("uniform_nelbo", chosen, corruption, spec, loss, bias)


def bound_rate(logits: Array, inputs: Array, tokens: Array, logsnr: Array) -> Array:
    """Cost of each token per unit of the replacement rate m, nats [..., L]; never negative.

    Seen from a noisy token z, the forward process jumped there from y != z at a rate proportional
    to ``r(y) = q(y | x) / q(z | x)``; the reverse process of the model has ``r_c(y)``, with the
    network's probabilities c in place of the clean token x. The Kullback-Leibler divergence between
    their paths accumulates, per unit of m, at

        1 / (K (1 - m))  sum_{y != z} [ r_c(y) - r(y) + r(y) log(r(y) / r_c(y)) ] .

    With ``e = K (1 - m) / m = K exp(lambda)`` these ratios are
    ``(1 + e [y = x]) / (1 + e [z = x])`` and ``(1 + e c_y) / (1 + e c_z)``. Each bracket is taken
    as ``r (expm1(d) - d)`` with ``d = log(r_c / r)``, which cancels nothing at either end of m.

    The model whose c is ``P(x_i | z without z_i)`` has the exact reverse process: for it the bound
    is -log p(x).

    Args:
        logits: [..., L, K] of c, any float dtype; computed in float32 or wider.
        inputs: [..., L] noisy tokens in {0..K - 1}.
        tokens: [..., L] clean tokens in {0..K - 1}.
        logsnr: [..., L] finite levels.

    References: Campbell et al. 2022 for the bound on rates; Schiff et al. 2024 (UDLM), whose
    integrand over time this is after substituting the schedule away.
    """
    num_tokens = logits.shape[-1]
    probs = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    inputs, tokens = (ids[..., None] for ids in jnp.broadcast_arrays(inputs, tokens))
    odds = num_tokens * jnp.exp(jnp.clip(logsnr, -LOGSNR_LIMIT, LOGSNR_LIMIT))[..., None]

    own = jnp.take_along_axis(probs, inputs, axis=-1)
    model = jnp.log1p(odds * probs) - jnp.log1p(odds * own)
    token = jax.lax.broadcasted_iota(jnp.int32, probs.shape, probs.ndim - 1)
    sharp = jnp.log1p(odds)
    truth = jnp.where(token == tokens, sharp, 0.0) - jnp.where(inputs == tokens, sharp, 0.0)
    excess = model - truth
    terms = jnp.where(token == inputs, 0.0, jnp.exp(truth) * (jnp.expm1(excess) - excess))
    return jnp.sum(terms, axis=-1) * (1 / odds + 1 / num_tokens)[..., 0]


def _bound_rate(num_tokens: int) -> PositionLoss:
    def rate(logits: Array, *known: Array) -> Array:
        return bound_rate(logits[..., :num_tokens], *known)

    def slope(logits: Array, _memory: tuple, *known: Array) -> Array:
        return jax.grad(lambda logits: jnp.sum(rate(logits, *known)))(logits)

    return PositionLoss(lambda logits, *known: (rate(logits, *known), ()), slope)
