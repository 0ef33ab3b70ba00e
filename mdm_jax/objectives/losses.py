"""Training losses by process: masked, partition, block and uniform bounds, next token."""

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.masked import rounded_count
from mdm_jax.corruption.process import Corrupted, Corruption, spread_levels, sum_levels
from mdm_jax.corruption.uniform import uniform_tokens
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.models.cross_entropy import Readout, position_losses, token_nats
from mdm_jax.objectives.objective import (
    UNIFORM_RATE,
    Objective,
    bias_of_law,
    bias_of_levels,
    call_model,
    rate_importance,
    repeat_views,
)
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array, Batch, ModelFn, worst_bias


def masked_nelbo(corruption: Corruption, law: Law | None = None, num_levels: int = 1) -> Objective:
    """Negative evidence lower bound of a masked diffusion model, nats.

    With S the sum of the cross-entropies of the masked tokens and g(m) = E[S / m],

        NELBO = int g(m) dm = E_{lambda ~ law} [ logistic(lambda) / law(lambda) * w S ],

    where w is the corruption's weight (1/m, n/k, ...; a weight per element goes into S). A law that
    covers the real line changes the variance only. Stats have shape [V, B, S]; prompt and padding
    carry neither loss nor gradient.

    Args:
        corruption: a masked process such as ``corruption.fixed_count(mask_id)``; its bias label
            carries over.
        law: over logSNR; standard logistic (uniform rate) by default; "truncated" if of bounded
            support.
        num_levels: S, independent noise levels per row, for contiguous segments of equal length.
            More than 1 bounds nothing ("biased"); use :func:`block_nelbo`.

    Raises ValueError if the process has no mask token or weights for other rates than the law's, or
    ``num_levels`` is not positive; from ``spec``, if it does not divide L. References: Shi et al.
    2024 (MD4), Sahoo et al. 2024 (MDLM), after substituting the schedule.
    """
    if corruption.mask_id is None:
        raise ValueError(f"masked_nelbo needs a process with a mask token, not {corruption.name!r}")
    law = UNIFORM_RATE if law is None else law
    log_level_weight = rate_importance(law)
    _check_rates(corruption, law)
    bias = worst_bias(bias_of_law(law), corruption.bias, bias_of_levels("masked_nelbo", num_levels))

    def token_loss(outputs: Array | Readout, targets: Array, where: Array) -> Array:
        return token_nats(outputs, targets, where, corruption.mask_id)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        levels = draw.u.shape[-1]
        tokens, eligible = jnp.asarray(batch.tokens)[None], jnp.asarray(batch.eligible)[None]
        logsnr = law.icdf(draw.u)
        corrupted = corruption.corrupt(tokens, logsnr, draw.noise, eligible)
        known = (tokens, corrupted.target_mask)
        nats = call_model(model_fn, corrupted.inputs, logsnr, batch.documents, token_loss, known)
        # At the logits: (1 - p)^2 <= |p - one_hot|^2 <= 2 (1 - p)^2, p the right token's
        # probability.
        squares = jnp.square(jnp.expm1(-jax.lax.stop_gradient(nats)))
        if corrupted.element_log_weight is not None:
            factor = jnp.exp(corrupted.element_log_weight)
            factor = jnp.broadcast_to(jnp.where(corrupted.target_mask, factor, 0.0), nats.shape)
            nats, squares = nats * factor, squares * jnp.square(factor)
        log_weight = corrupted.log_weight + log_level_weight(logsnr)
        count = sum_levels(eligible.astype(jnp.float32), levels)
        return LossStats(
            raw=sum_levels(nats, levels),
            weight=jnp.exp(log_weight),
            eligible=jnp.broadcast_to(count, draw.u.shape),
            targets=sum_levels(corrupted.target_mask.astype(jnp.int32), levels),
            gradient_norms=sum_levels(squares, levels),
        )

    def spec(batch_size: int, length: int) -> DrawSpec:
        spread_levels(jnp.zeros((num_levels,)), length)  # raises where S does not divide L
        return DrawSpec(batch_size, num_levels, corruption.event_shape(length))

    return Objective(
        "masked_nelbo", law, corruption, spec, loss, bias, log_level_weight=log_level_weight
    )


def partition_nelbo(mask_id: int, law: Law | None = None) -> Objective:
    """Negative evidence lower bound of a partition model, nats: both groups from one pass.

    At the rate m a group M of ``k = round(n m)`` of n tokens is drawn; M is predicted from the
    others, and they from M. With S the sum of the cross-entropies of a group,

        E[a_k S(M) + a_{n-k} S(rest)] = sum_k E[S | k masked] / k = NELBO ,

    a_j = n / (2 j), a_n = 1. Every token is predicted once, so constant token losses have no noise.
    Stats have shape [V, B, 1], all eligible tokens being targets. The network is
    ``model_fn(inputs [N, 2L], logsnr, documents) -> logits [N, L, K]`` of rows with M masked and
    rows with the rest masked side by side, such as ``models.pair_apply(model)``, whose
    ``prompt_length`` must cover the tokens that are not eligible (prompts): they are visible in
    both. Law as of :func:`masked_nelbo`. ValueError for a negative ``mask_id``. References:
    ``corruption.rounded_count``; Deschenaux et al. 2025 (PGM).
    """
    process, law = rounded_count(mask_id), UNIFORM_RATE if law is None else law
    log_level_weight = rate_importance(law)

    def token_loss(outputs: Array | Readout, targets: Array, where: Array) -> Array:
        return token_nats(outputs, targets, where, mask_id)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        tokens, eligible = jnp.asarray(batch.tokens)[None], jnp.asarray(batch.eligible)[None]
        logsnr = law.icdf(draw.u)
        corrupted = process.corrupt(tokens, logsnr, draw.noise, eligible)
        group = corrupted.target_mask
        count = jnp.broadcast_to(jnp.sum(eligible, -1, keepdims=True), draw.u.shape)
        size = jnp.sum(group, -1, keepdims=True)
        size = jnp.where(group, size, count - size)  # of the token's own group
        factor = jnp.where(size == count, 1.0, count / (2 * jnp.maximum(size, 1)))
        rest = jnp.where(eligible & ~group, mask_id, tokens)
        both = jnp.concatenate([corrupted.inputs, rest], axis=-1)
        known = (tokens, eligible)
        nats = call_model(model_fn, both, logsnr, batch.documents, token_loss, known)
        squares = jnp.square(factor * jnp.expm1(-jax.lax.stop_gradient(nats)))
        return LossStats(
            raw=jnp.sum(factor * nats, axis=-1, keepdims=True),
            weight=jnp.exp(log_level_weight(logsnr)),
            eligible=count.astype(jnp.float32),
            targets=count.astype(jnp.int32),
            gradient_norms=jnp.sum(jnp.where(eligible, squares, 0.0), axis=-1, keepdims=True),
        )

    def spec(batch_size: int, length: int) -> DrawSpec:
        return DrawSpec(batch_size, 1, process.event_shape(length))

    return Objective(
        "partition_nelbo",
        law,
        process,
        spec,
        loss,
        bias_of_law(law),
        log_level_weight=log_level_weight,
    )


def _check_rates(corruption: Corruption, law: Law) -> None:
    if corruption.rates is None:
        return
    highest, lowest = (float(jax.nn.sigmoid(-jnp.asarray(end))) for end in law.support)
    if not np.allclose([lowest, highest], corruption.rates, rtol=1e-5, atol=1e-7):
        low, high = corruption.rates
        raise ValueError(
            f"the weights of {corruption.name} are made for masking rates from {low:g} to {high:g} "
            f"and the law covers {lowest:g} to {highest:g}; take a law of the same rates, "
            f"schedules.masked.clipped({low:g}, {high:g}), which configs call law.name='clipped', "
            "or a process for any rates"
        )


def block_nelbo(corruption: Corruption, block_size: int, law: Law | None = None) -> Objective:
    """Negative evidence lower bound of a block diffusion model, nats (Arriola et al. 2025, BD3-LM).

    With S_b the sum of the cross-entropies of the masked tokens of block b, given the rest of the
    block and the *clean* blocks before it,

        NELBO = sum_b int_0^1 (1/m) E[S_b | m] dm ,

    estimated with an independent level per block, in one pass over the noised and the clean row
    side by side. One block: :func:`masked_nelbo`; blocks of one token: the autoregressive
    log-likelihood, without noise under fixed counts. Stats have shape [V, B, L / L']; a block
    counts as a row of its eligible tokens. The network is ``model_fn(inputs [N, 2L], logsnr [N, S],
    documents [N, L]) -> logits [N, L, K]``, such as ``models.block_apply(model, block_size)``.
    Other arguments and errors as of :func:`masked_nelbo`.

    Raises ValueError if L' = ``block_size`` is below 1; from ``spec`` and ``loss``, if it does not
    divide L or the draw has another number of levels.
    """
    if block_size < 1:
        raise ValueError(f"block_nelbo needs a block_size of at least 1, got {block_size}")
    segments = masked_nelbo(corruption, law)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        levels, blocks = draw.u.shape[-1], num_blocks(batch.tokens.shape[-1])
        if levels != blocks:
            raise ValueError(
                f"{blocks} blocks of {block_size} tokens need a noise level each; the draw has "
                f"{levels}: make it with this objective's spec"
            )

        def with_clean_row(inputs: Array, logsnr: Array, documents: Array) -> Array:
            clean = repeat_views(jnp.asarray(batch.tokens), draw.u.shape[0])
            return model_fn(jnp.concatenate([inputs, clean], axis=-1), logsnr, documents)

        return segments.loss(with_clean_row, batch, draw)

    def spec(batch_size: int, length: int) -> DrawSpec:
        shape = corruption.event_shape(length)
        return DrawSpec(batch_size, num_blocks(length), shape, separate_levels=True)

    def num_blocks(length: int) -> int:
        if length % block_size:
            raise ValueError(
                f"blocks of {block_size} tokens do not divide a row of {length} evenly; choose a "
                "divisor of the length"
            )
        return length // block_size

    return segments._replace(name="block_nelbo", spec=spec, loss=loss)


LOGSNR_LIMIT = 25.0
"""Levels are clipped here; the bound's part beyond is of the order exp(-25)."""


def uniform_nelbo(num_tokens: int, law: Law | None = None, num_levels: int = 1) -> Objective:
    """Negative evidence lower bound of a uniform-token diffusion model, nats.

    With f the sum of :func:`bound_rate` over the eligible tokens, replaced or not, and replacement
    rate m,

        NELBO = int_0^1 E[f | m] dm = E_{lambda ~ law} [ logistic(lambda) / law(lambda) f ] .

    For small m a replaced token costs about 1/m, and more by a logarithm where the network finds it
    plausible: the variance is infinite under the default law (large on the grid of quantiles),
    finite under ``schedules.law_of(schedules.masked.power(3.0))``. Stats, law and num_levels as of
    :func:`masked_nelbo`. The network is that of :func:`bound_rate`; one of P(x_i | z) goes through
    ``corruption.leave_one_out``. Eligible tokens must lie in {0..K - 1}, K = ``num_tokens``; logits
    from K on are ignored.

    Raises ValueError for fewer than two tokens or ``num_levels`` not positive; from ``spec``, if it
    does not divide L; from ``loss``, for a network of fewer logits than tokens. References: Schiff
    et al. 2024 (UDLM), the continuous-time bound; Sahoo et al. 2025 (Duo).
    """
    corruption = uniform_tokens(num_tokens)
    law = UNIFORM_RATE if law is None else law
    log_level_weight = rate_importance(law)
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
            weight=jnp.exp(log_level_weight(logsnr)),
            eligible=jnp.broadcast_to(count, draw.u.shape),
            targets=sum_levels(where.astype(jnp.int32), levels),
        )

    def spec(batch_size: int, length: int) -> DrawSpec:
        spread_levels(jnp.zeros((num_levels,)), length)  # raises where S does not divide L
        return DrawSpec(batch_size, num_levels, corruption.event_shape(length))

    return Objective(
        "uniform_nelbo", law, corruption, spec, loss, bias, log_level_weight=log_level_weight
    )


def bound_rate(logits: Array, inputs: Array, tokens: Array, logsnr: Array) -> Array:
    """Cost of each token per unit of the replacement rate m, nats [..., L]; never negative.

    From a noisy token z the reversed forward process jumps to y != z at a rate proportional to
    ``r(y) = q(y | x) / q(z | x)``, the model at ``r_c(y)``, with probabilities c for the clean
    token x. The Kullback-Leibler divergence of their paths grows, per unit of m, by

        1 / (K (1 - m))  sum_{y != z} [ r_c(y) - r(y) + r(y) log(r(y) / r_c(y)) ] .

    With ``e = K (1 - m) / m = K exp(lambda)`` the ratios are ``(1 + e [y = x]) / (1 + e [z = x])``
    and ``(1 + e c_y) / (1 + e c_z)``; each bracket is ``r (expm1(d) - d)``, ``d = log(r_c / r)``,
    without cancellation at either end of m. For c = ``P(x_i | z without z_i)`` the bound is -log
    p(x).

    Takes logits [..., L, K] of c (computed in float32 or wider) and [..., L] noisy tokens, clean
    tokens in {0..K - 1} and finite levels. References: Campbell et al. 2022 (bound on rates);
    Schiff et al. 2024 (UDLM), their integrand.
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


def next_token(mask_id: int) -> Objective:
    """Negative log-likelihood of the eligible tokens, each given all tokens before it, nats.

    No noise: law and process exist for the train step, monitors and chains, and the quantile is not
    read. Exact warps only add noise and truncated ones scale the loss, so train with an empty
    chain. Stats have shape [V, B, 1]; prompt and padding carry no loss. The network is
    ``model_fn(tokens [N, L], logsnr, documents) -> logits [N, L, K]``, at position i a function of
    earlier tokens only, such as ``models.causal_apply(model, mask_id)``. ``mask_id`` >= 0
    (ValueError) is left out of the softmax, as in the bounds.
    """
    if mask_id < 0:
        raise ValueError(f"next_token: mask_id must be a token id, got {mask_id}")

    def token_loss(outputs: Array | Readout, targets: Array, where: Array) -> Array:
        return token_nats(outputs, targets, where, mask_id)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        shape = (draw.u.shape[0], *batch.tokens.shape)
        tokens = jnp.broadcast_to(jnp.asarray(batch.tokens)[None], shape)
        eligible, logsnr = jnp.asarray(batch.eligible), UNIFORM_RATE.icdf(draw.u)
        known = (tokens, eligible)
        nats = call_model(model_fn, tokens, logsnr, batch.documents, token_loss, known)
        count = jnp.broadcast_to(jnp.sum(eligible, axis=-1)[None, :, None], draw.u.shape)
        return LossStats(
            raw=jnp.sum(nats, axis=-1, keepdims=True),
            weight=jnp.ones(draw.u.shape, jnp.float32),
            eligible=count.astype(jnp.float32),
            targets=count.astype(jnp.int32),
        )

    def spec(batch_size: int, _length: int) -> DrawSpec:
        return DrawSpec(batch_size, 1, process.event_shape(1))

    process = Corruption("no_noise", _clean, lambda _: (1,), mask_id)
    return Objective("next_token", UNIFORM_RATE, process, spec, loss, "exact")


def _clean(
    x: Array, logsnr: Array, _noise: Array, eligible: Array, _level_ids: Array | None = None
) -> Corrupted:
    shape = jnp.broadcast_shapes(x.shape, eligible.shape, (*logsnr.shape[:-1], x.shape[-1]))
    inputs, targets = jnp.broadcast_to(x, shape), jnp.broadcast_to(eligible, shape)
    return Corrupted(inputs, targets, jnp.zeros_like(logsnr))
