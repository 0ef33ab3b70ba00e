"""The bound of uniform-token diffusion, in continuous time."""

import jax
import jax.numpy as jnp

from mdm_jax.corruption.process import spread_levels, sum_levels
from mdm_jax.corruption.uniform import uniform_tokens
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.models.cross_entropy import Readout, position_losses
from mdm_jax.objectives.objective import (
    UNIFORM_RATE,
    Objective,
    bias_of_law,
    bias_of_levels,
    call_model,
)
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array, Batch, ModelFn, worst_bias

LOGSNR_LIMIT = 25.0
"""Levels are clipped here; the bound's part beyond is of the order exp(-25)."""


def uniform_nelbo(num_tokens: int, law: Law | None = None, num_levels: int = 1) -> Objective:
    """Negative evidence lower bound of a uniform-token diffusion model, nats.

    With f the sum of :func:`bound_rate` over the eligible tokens, replaced or not,

        NELBO = int_0^1 E[f | m] dm = E_{lambda ~ law} [ logistic(lambda) / law(lambda) f ] ,

    where m is the replacement rate; prior and reconstruction terms vanish. The law changes the
    estimate's variance, not its mean, if it covers the real line.

    For small m a replaced token costs about 1/m, and more by a logarithm where the network finds it
    plausible: the variance is infinite under the default law (large on the grid of quantiles), and
    finite under laws with more levels there, ``schedules.law_of(schedules.masked.power(3.0))``.

    Stats have shape [V, B, S]; prompt and padding carry neither loss nor gradient. The network is
    that of :func:`bound_rate`: one that predicts P(x_i | z) goes through
    ``corruption.leave_one_out``.

    Args:
        num_tokens: K of ``corruption.uniform_tokens``. Eligible tokens must lie in {0..K - 1};
            logits from K on are ignored.
        law, num_levels: as of :func:`~mdm_jax.objectives.masked_nelbo`.

    Raises:
        ValueError: for fewer than two tokens, or if ``num_levels`` is not positive; from ``spec``,
            if it does not divide L; from ``loss``, for a network of fewer logits than tokens.

    References: Schiff et al. 2024 (UDLM), the continuous-time bound; Sahoo et al. 2025 (Duo).
    """
    corruption = uniform_tokens(num_tokens)
    law = UNIFORM_RATE if law is None else law
    bias = worst_bias(bias_of_law(law), bias_of_levels("uniform_nelbo", num_levels))

    def rate_and_gradient(logits: Array, *known: Array) -> tuple[Array, Array]:
        def rate(logits: Array) -> Array:
            return bound_rate(logits[..., :num_tokens], *known)

        rates, pullback = jax.vjp(rate, logits)
        return rates, pullback(jnp.ones_like(rates))[0]

    def token_loss(outputs: Array | Readout, where: Array, *known: Array) -> Array:
        is_readout = isinstance(outputs, Readout)
        num_logits = outputs.num_tokens if is_readout else outputs.shape[-1]
        if num_logits < num_tokens:
            raise ValueError(
                f"a bound over {num_tokens} tokens needs as many logits, got {num_logits}"
            )
        if is_readout:
            return position_losses(rate_and_gradient, outputs, where, *known)
        return jnp.where(where, bound_rate(outputs[..., :num_tokens], *known), 0.0)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        levels = draw.u.shape[-1]
        tokens, eligible = jnp.asarray(batch.tokens)[None], jnp.asarray(batch.eligible)[None]
        logsnr = law.icdf(draw.u)
        corrupted = corruption.corrupt(tokens, logsnr, draw.noise, eligible)
        where = corrupted.target_mask
        # Elsewhere an id may be a special one, for which there is no logit.
        noisy, clean = (jnp.where(where, ids, 0) for ids in (corrupted.inputs, tokens))
        known = (where, noisy, clean, spread_levels(logsnr, tokens.shape[-1]))
        nats = call_model(model_fn, corrupted.inputs, logsnr, batch.documents, token_loss, known)
        count = sum_levels(eligible.astype(jnp.float32), levels)
        return LossStats(
            raw=sum_levels(nats, levels),
            weight=jnp.exp(UNIFORM_RATE.log_pdf(logsnr) - law.log_pdf(logsnr)),
            scored=jnp.broadcast_to(count, draw.u.shape),
            targets=sum_levels(where.astype(jnp.int32), levels),
        )

    def spec(batch_size: int, length: int) -> DrawSpec:
        spread_levels(jnp.zeros((num_levels,)), length)  # raises where S does not divide L
        return DrawSpec(batch_size, num_levels, corruption.event_shape(length))

    return Objective("uniform_nelbo", law, corruption, spec, loss, bias)


def bound_rate(logits: Array, inputs: Array, tokens: Array, logsnr: Array) -> Array:
    """Cost of each token per unit of the replacement rate m, nats [..., L]; never negative.

    From a noisy token z the reversed forward process jumps to y != z at a rate proportional to
    ``r(y) = q(y | x) / q(z | x)``, the model's at ``r_c(y)``, with the network's probabilities c in
    place of the clean token x. The Kullback-Leibler divergence of their paths grows, per unit of m,
    by

        1 / (K (1 - m))  sum_{y != z} [ r_c(y) - r(y) + r(y) log(r(y) / r_c(y)) ] .

    With ``e = K (1 - m) / m = K exp(lambda)`` these ratios are
    ``(1 + e [y = x]) / (1 + e [z = x])`` and ``(1 + e c_y) / (1 + e c_z)``. Each bracket is taken
    as ``r (expm1(d) - d)`` with ``d = log(r_c / r)``, which cancels nothing at either end of m. For
    a model whose c is ``P(x_i | z without z_i)`` the bound is -log p(x).

    Args:
        logits: [..., L, K] of c, any float dtype; computed in float32 or wider.
        inputs, tokens: [..., L] noisy and clean tokens in {0..K - 1}.
        logsnr: [..., L] finite levels.

    References: Campbell et al. 2022 (bound on rates); Schiff et al. 2024 (UDLM), whose integrand
    this is after substituting the schedule.
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
