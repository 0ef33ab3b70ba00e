"""Objectives of the training step for preference pairs and rewarded answers.

They consume a draw as every objective does, so the step, its chains, microbatches, adapters and
checkpoints apply unchanged; what is summed over rows is a loss of pairs or of answers instead of
their bounds (``Objective.summed``). The network is one of ``bounds.networks``.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.alignment import policy, preference, surrogates
from mdm_jax.alignment.bounds import replicate_means
from mdm_jax.alignment.methods import METHODS, PER_ANSWER, Constant, in_unit, per_token
from mdm_jax.alignment.preference import Estimate
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.objectives.objective import LossSums, Objective, weighted_losses
from mdm_jax.types import Array, Batch, ModelFn, worst_bias


class Answers(NamedTuple):
    """Written and rewarded answers: a ``Batch`` and what its loss is made of.

    Attributes:
        advantage: [B] factor of each answer's score.
        weight: [B] 1 for answers that count, 0 for those without a reward.
        steps: [B, L] int32, the step in which a token was written, -1 for given ones.
        old: the old policy's values where several updates are made of the same answers: [B, V] of
            answers or [B, V, L] of tokens; None: the policy is that which wrote them.
    """

    tokens: Array
    eligible: Array
    documents: Array
    units: Array
    advantage: Array
    weight: Array
    steps: Array
    old: Array | None = None


PairLoss = Callable[[Array, Array], Array]
"""``loss(scores [M, R, 2, B], tokens [2, B]) -> [B]``: bounds in nats of M networks for R draws of
the chosen and the rejected answer of B pairs."""


def pair_loss(
    name: str, beta: Constant, *, gap: float = 0.5, estimate: Estimate = preference.crossfitted
) -> PairLoss:
    """The loss "dpo", "ipo", "simpo" or "kto" of scores; the first two networks are policy and
    reference, the reference being unread by "simpo". Units as of each loss.
    """
    in_unit(beta, METHODS[name].unit, f"beta of {name}")  # before the first step

    def loss(scores: Array, tokens: Array) -> Array:
        if name == "simpo":
            chosen, rejected = jnp.moveaxis(_per_token(scores[0], tokens), 1, 0)
            return preference.simpo(chosen, rejected, beta, gap, estimate)
        if name == "kto":
            ratio = scores[0] - scores[1]  # [R, 2, B]
            good = jnp.arange(2)[:, None] == jnp.zeros(ratio.shape[1:], int)
            flat = ratio.reshape(len(ratio), -1)
            each = preference.kto(flat, good.ravel(), beta, estimate=estimate)
            return jnp.mean(each.reshape(2, -1), axis=0)
        return getattr(preference, name)(pair_margins(name, scores, tokens), beta, estimate)

    return loss


def pair_margins(name: str, scores: Array, tokens: Array) -> Array:
    """By how much the chosen answer is preferred, [R, B], from the arguments of a
    :data:`PairLoss`: gain over the reference, nats; of "simpo" the bound per token."""
    each = _per_token(scores[0], tokens) if name == "simpo" else scores[0] - scores[1]
    return each[:, 0] - each[:, 1]


def _per_token(scores: Array, tokens: Array) -> Array:
    return scores / jnp.maximum(tokens, 1)[None].astype(scores.dtype)


def of_pairs(rows: Batch) -> Batch:
    """Rows [B, 2 L] of a chosen and a rejected answer as rows [2 B, L], the chosen ones first."""
    first = Batch(*rows[:4])
    halved = jax.tree.map(lambda a: _halves(jnp.asarray(a)), first._replace(units=None))
    shown = (halved.documents > 0).astype(jnp.int32)
    return halved._replace(documents=shown, units=jnp.tile(jnp.asarray(rows.units), 2))


def pair_objective(inner: Objective, loss: PairLoss, replicates: int) -> Objective:
    """The mean ``loss`` of pairs, in rows [B, 2 L] of a chosen and a rejected answer (``pairs``).

    A row's two answers have noise levels of their own, as two blocks have, so that one draw of the
    chain serves both, and policy and reference share it. ``replicates``: R of the chain's draw.
    ValueError for a process without noise, and from ``spec`` for an odd number of positions.
    """
    if inner.corruption.event_shape(2) != (2,):
        raise ValueError(
            f"preference pairs need noise for each token, and {inner.name} has none of that shape; "
            "take process=masked or block"
        )

    def spec(batch_size: int, length: int) -> DrawSpec:
        if length % 2:
            raise ValueError(
                f"rows of pairs have two answers of one length, got {length} positions"
            )
        levels = inner.spec(2 * batch_size, length // 2).num_levels
        return DrawSpec(batch_size, 2 * levels, (length,), separate_levels=True)

    def summed(model_fn: ModelFn, batch: Batch, draw: Draw) -> tuple[LossSums, LossStats]:
        rows, own = of_pairs(batch), Draw(*(_halves(a, axis=1) for a in draw))
        stats = inner.loss(model_fn, rows, own)
        scores = -jnp.sum(weighted_losses(own, stats), axis=-1)  # [M, V, 2 B]
        scores = replicate_means(scores, replicates)
        tokens = jnp.sum(rows.eligible, axis=-1).reshape(2, -1)
        whole = jnp.all(tokens > 0, axis=0)
        losses = loss(scores.reshape(*scores.shape[:2], 2, -1), tokens)
        policy_stats = jax.tree.map(lambda a: _joined(a[0] if a.ndim > 3 else a), stats)
        sums = LossSums(
            loss=jnp.sum(jnp.where(whole, losses, 0.0)),
            eligible=jnp.sum(whole).astype(losses.dtype),
            cross_entropy=jnp.sum(policy_stats.raw),
            targets=jnp.sum(policy_stats.targets).astype(jnp.float32),
        )
        return sums, policy_stats

    return inner._replace(
        name=f"pairs over {inner.name}",
        spec=spec,
        loss=lambda *arguments: summed(*arguments)[1],
        bias="biased",
        summed=summed,
        log_level_weight=None,
    )


def margin_of(name: str) -> PairLoss:
    """The :func:`pair_margins`, averaged over replicates, in place of a loss: whose variance is
    that of the score."""
    return lambda scores, tokens: jnp.mean(pair_margins(name, scores, tokens), axis=0)


def bound_margin_of(network: int) -> PairLoss:
    """The difference of a network's bounds of the two answers: with masks of its own for each
    network the variances of these would add up to the margin's."""
    return lambda scores, _: jnp.mean(scores[network, :, 0] - scores[network, :, 1], axis=0)


Ratio = tuple[Constant, Constant]
"""Clips of a ratio, below and above."""

SEQUENCE_SURROGATES = {
    "espo": surrogates.complementary,
    "gdpo": surrogates.quadrature,
}
TOKEN_SURROGATES = {
    "coupled": (surrogates.coupled, policy.over_all_tokens),
    "d1": (surrogates.one_step, policy.over_all_tokens),
    "unigrpo": (surrogates.mean_over_masked, policy.over_own_tokens),
}
BY_INNER = ("elbo", "rejection")
"""Methods that score answers by the run's own objective, under its chain."""


def has_ratio(method: str) -> bool:
    """Whether a method's loss is of a clipped ratio to the old policy."""
    return method in SEQUENCE_SURROGATES or method in TOKEN_SURROGATES


def policy_objective(
    inner: Objective,
    method: str,
    *,
    clip: Ratio | None = None,
    kl: Constant | None = None,
    mask_id: int,
) -> Objective:
    """The loss of :class:`Answers` by a method of ``METHODS``, a mean over those that count.

    ``clip``: of the methods with a ratio. ``kl``: factor of ``policy.kl_k2`` to the reference (the
    second network), of scores in nats per answer; for methods that score bounds of answers.
    ValueError for one that this method does not read, and for a process without masks. Advantages
    make the difference between "elbo", "wd1" and "rejection": see ``rewards.coefficients``.
    """
    if method not in BY_INNER and inner.name != "masked_nelbo":
        raise ValueError(
            f"alignment.method={method!r} masks views of its own, for process=masked; this run has "
            f"{inner.name}: take one of {', '.join(BY_INNER)}"
        )
    if has_ratio(method) != (clip is not None):
        needs = "needs" if has_ratio(method) else "has no"
        raise ValueError(f"alignment.method={method!r} {needs} clips")
    bounded = ("elbo", "rejection", "spg", *SEQUENCE_SURROGATES)
    if kl is not None and method not in bounded:
        raise ValueError(
            f"alignment.kl is of bounds of answers, the methods {', '.join(bounded)}; "
            f"{method!r} scores something else: leave it at 0"
        )
    by_inner = method in BY_INNER

    def spec(batch_size: int, length: int) -> DrawSpec:
        return inner.spec(batch_size, length) if by_inner else DrawSpec(batch_size, 1, (length,))

    def summed(model_fn: ModelFn, batch: Answers, draw: Draw) -> tuple[LossSums, LossStats]:
        rows = Batch(*batch[:4])
        count = jnp.sum(jnp.asarray(batch.eligible), axis=-1)
        if by_inner:
            stats = inner.loss(model_fn, rows, draw)
            scores = _networks(-jnp.sum(weighted_losses(draw, stats), axis=-1), 2)
            stats = jax.tree.map(lambda a: a[0] if a.ndim > 3 else a, stats)
            losses, sizes = policy.policy_gradient(jnp.mean(scores[0], 0), batch.advantage), 1.0
        else:
            scores, losses, sizes = _of_views(method, model_fn, batch, rows, draw, clip, mask_id)
            stats = _plain_stats(scores[0], count)
        if kl is not None:
            distance = policy.kl_k2(*(jnp.mean(each, axis=0, keepdims=True) for each in scores[:2]))
            losses = losses + in_unit(kl, PER_ANSWER, "alignment.kl") * distance
        counted = batch.weight * (count > 0)
        sums = LossSums(
            loss=jnp.sum(jnp.where(counted > 0, losses, 0.0)),
            eligible=jnp.sum(counted * sizes),
            cross_entropy=jnp.sum(stats.raw),
            targets=jnp.sum(stats.targets).astype(jnp.float32),
        )
        return sums, stats

    label = METHODS[method].policy_gradient
    return inner._replace(
        name=f"{method} over {inner.name}",
        spec=spec,
        loss=lambda *arguments: summed(*arguments)[1],
        bias=worst_bias(inner.bias, "exact" if label == "exact" else "biased"),
        summed=summed,
        log_level_weight=None,
    )


def answer_scores(inner: Objective, method: str, *, mask_id: int) -> Objective:
    """The score of each answer by a method of ``METHODS``, nats, in place of its loss: whose
    variance is that of the score. ``inner`` and ``mask_id`` as of :func:`policy_objective`.

    Answers that a method gives no weight, as "rejection" does to wrong ones, have a score too.
    """
    clip = (per_token(1.0), per_token(1.0)) if has_ratio(method) else None
    whole = policy_objective(inner, method, clip=clip, mask_id=mask_id)

    def summed(model_fn: ModelFn, batch: Answers, draw: Draw) -> tuple[LossSums, LossStats]:
        rows, count = Batch(*batch[:4]), jnp.sum(jnp.asarray(batch.eligible), axis=-1)
        if method in BY_INNER:
            stats = inner.loss(model_fn, rows, draw)
            values = _networks(-jnp.sum(weighted_losses(draw, stats), axis=-1), 2)[0]
        else:
            views = surrogate_of(method, batch)(draw, rows)
            scores = _networks(surrogates.token_scores(model_fn, rows, views, mask_id), 4)[0]
            values = jnp.sum(surrogates.weighted_tokens(scores, views), axis=-1)
        stats, counted = _plain_stats(values, count), (count > 0).astype(values.dtype)
        sums = LossSums(
            loss=jnp.sum(counted * jnp.mean(values, axis=0)),
            eligible=jnp.sum(counted),
            cross_entropy=jnp.sum(stats.raw),
            targets=jnp.sum(stats.targets).astype(jnp.float32),
        )
        return sums, stats

    return whole._replace(name=f"scores of {whole.name}", summed=summed)


def policy_values(
    method: str, model_fn: ModelFn, batch: Answers, draw: Draw, mask_id: int
) -> Array:
    """What a ratio is of: [B, V] of answers or [B, V, L] of tokens, for ``Answers.old``."""
    surrogate = SEQUENCE_SURROGATES.get(method) or TOKEN_SURROGATES[method][0]
    rows = Batch(*batch[:4])
    views = surrogate(draw, rows)
    scores = _networks(surrogates.token_scores(model_fn, rows, views, mask_id), 4)[0]
    values = surrogates.weighted_tokens(scores, views)
    return jnp.swapaxes(values if method in TOKEN_SURROGATES else jnp.sum(values, -1), 0, 1)


def surrogate_of(method: str, batch: Answers) -> surrogates.Surrogate:
    """What a method that masks views of its own scores."""
    return {
        "trace": surrogates.sampled_trace(batch.steps),
        "wd1": surrogates.one_step,
        "spg": surrogates.fixed_counts,
        **SEQUENCE_SURROGATES,
        **{name: own for name, (own, _) in TOKEN_SURROGATES.items()},
    }[method]


def _of_views(
    method: str,
    model_fn: ModelFn,
    batch: Answers,
    rows: Batch,
    draw: Draw,
    clip: Ratio | None,
    mask_id: int,
) -> tuple[Array, Array, Array | float]:
    """Scores [M, V, B] of a surrogate, losses [B], and what a batch's mean divides by [B]."""
    views = surrogate_of(method, batch)(draw, rows)
    scores = _networks(surrogates.token_scores(model_fn, rows, views, mask_id), 4)
    tokens = surrogates.weighted_tokens(scores, views)
    values = jnp.sum(tokens, axis=-1)
    old = None if batch.old is None else jnp.swapaxes(batch.old, 0, 1)
    count = jnp.sum(jnp.asarray(rows.eligible), axis=-1)
    if method in SEQUENCE_SURROGATES:
        new = jnp.mean(values[0], axis=0)
        before = jax.lax.stop_gradient(new) if old is None else jnp.mean(old, axis=0)
        return values, policy.sequence_grpo(new, before, batch.advantage, count, *clip), 1.0
    if method in TOKEN_SURROGATES:
        new, scored = jnp.mean(tokens[0], axis=0), jnp.asarray(rows.eligible)
        before = jax.lax.stop_gradient(new) if old is None else jnp.mean(old, axis=0)
        losses = policy.token_grpo(new, before, batch.advantage, scored, *clip)
        return values, *TOKEN_SURROGATES[method][1](losses, scored)
    mean = jnp.mean(values[0], axis=0)
    if method == "spg":
        upper = surrogates.eubo(scores[0], views, count)
        return values, policy.spg(mean, upper, batch.advantage), 1.0
    return values, policy.policy_gradient(mean, batch.advantage), 1.0


def _plain_stats(values: Array, count: Array) -> LossStats:
    """Statistics [V, B, 1] of surrogates, for chains and monitors that show the loss."""
    raw = -values[..., None]
    size = jnp.broadcast_to(count[None, :, None], raw.shape)
    return LossStats(raw, jnp.ones_like(raw), size.astype(raw.dtype), size, jnp.square(raw))


def _networks(values: Array, rank: int) -> Array:
    """Values [M, ...] of M networks; of a single one without the axis, M = 1."""
    return values if values.ndim > rank else values[None]


def _halves(values: Array, axis: int = 0) -> Array:
    """[..., B, 2 N, ...] at ``axis`` -> [..., 2 B, N, ...], first halves first."""
    rows, length = values.shape[axis : axis + 2]
    shape = (*values.shape[:axis], rows, 2, length // 2, *values.shape[axis + 2 :])
    swapped = jnp.swapaxes(values.reshape(shape), axis, axis + 1)
    return swapped.reshape(*values.shape[:axis], 2 * rows, *swapped.shape[axis + 2 :])


def _joined(values: Array) -> Array:
    """[V, 2 B, S] -> [V, B, 2 S], the inverse of :func:`_halves`."""
    views, rows, levels = values.shape
    swapped = jnp.swapaxes(values.reshape(views, 2, rows // 2, levels), 1, 2)
    return swapped.reshape(views, rows // 2, 2 * levels)
