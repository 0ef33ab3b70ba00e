"""Losses of rewarded answers: policy gradients, clipped ratios, SPG, wd1, rejection; divergences.

Scores are log-probabilities of answers or surrogates of them (``bounds``, ``surrogates``), [B] in
nats, or of tokens [B, L]; advantages are of ``advantages``. Every loss is one of each answer, to be
summed over the global batch and divided once. With a surrogate even the expected gradient depends
on the baseline (``advantages.centred``); only a trace makes it the policy gradient.
"""

import jax
import jax.numpy as jnp

from mdm_jax.alignment.methods import PER_TOKEN, Constant, in_unit
from mdm_jax.alignment.preference import crossfitted, plain
from mdm_jax.types import Array


def policy_gradient(scores: Array, advantages: Array) -> Array:
    """``-A score`` [B]: REINFORCE on the policy that wrote the answers.

    Policy gradient: exact for ``surrogates.trace``, biased for bounds (toy: cosine 0.96) and all
    other surrogates. Passes: those of the score. Source: Williams 1992; JustGRPO (arXiv 2601.15165)
    in its left-to-right order, whose ratio is identically 1.
    """
    return -jax.lax.stop_gradient(advantages) * scores


def clipped(ratio: Array, advantages: Array, low: float, high: float) -> Array:
    """``min(r A, clip(r, 1 - low, 1 + high) A)``, whose gradient at equality is that of ``r A``.

    At r = 1, where every first inner step stands, ``minimum`` would halve it.
    """
    limit = jnp.clip(ratio, 1 - low, 1 + high)
    active = jnp.where(advantages >= 0, ratio <= 1 + high, ratio >= 1 - low)
    return jnp.where(active, ratio * advantages, jax.lax.stop_gradient(limit) * advantages)


def sequence_grpo(
    new: Array, old: Array, advantages: Array, count: Array, low: Constant, high: Constant
) -> Array:
    """``-min(r A, clip(r) A)`` [B] with ``r = exp((new - old) / tokens)`` of each answer.

    Clips are of the ratio per token. Policy gradient: biased, ratios of bounds are no ratios of
    probabilities; shared draws make r exactly 1 at the old policy. Passes: one score of policy and
    of old policy. Source: ESPO (arXiv 2512.03759), GSPO; GDPO (arXiv 2510.08554) by
    ``surrogates.quadrature``. ESPO's code divides by the canvas, whatever is scored.
    """
    ends = [in_unit(end, PER_TOKEN, "clip of sequence_grpo") for end in (low, high)]
    ratio = jnp.exp((new - jax.lax.stop_gradient(old)) / jnp.maximum(count, 1))
    return -clipped(ratio, advantages, *ends)


def token_grpo(
    new: Array, old: Array, advantages: Array, scored: Array, low: Constant, high: Constant
) -> Array:
    """``-min(r A, clip(r) A)`` of each token [B, L], with ``r = exp(new - old)``; 0 if not scored.

    Policy gradient: biased. Passes: one score of policy and of old policy. Source: diffu-GRPO (d1,
    ``surrogates.one_step``), coupled-GRPO (DiffuCoder, ``coupled``, whose weights add up to 1.5, so
    that r is a ratio to that power), UniGRPO (``mean_over_masked``). The sum over tokens is divided
    by one of the normalisers below.
    """
    ends = [in_unit(end, PER_TOKEN, "clip of token_grpo") for end in (low, high)]
    ratio = jnp.exp(jnp.where(scored, new - jax.lax.stop_gradient(old), 0.0))
    return jnp.where(scored, -clipped(ratio, advantages[..., None], *ends), 0.0)


def over_all_tokens(losses: Array, scored: Array) -> tuple[Array, Array]:
    """Numerators and denominators [B] of a mean over all tokens: long answers weigh more (d1)."""
    return jnp.sum(losses, axis=-1), jnp.sum(scored, axis=-1).astype(losses.dtype)


def over_own_tokens(losses: Array, scored: Array) -> tuple[Array, Array]:
    """... of a mean over each answer's tokens, then over answers (UniGRPO, TraceRL)."""
    total, count = over_all_tokens(losses, scored)
    return total / jnp.maximum(count, 1), jnp.ones_like(count)


def over_canvas(losses: Array, scored: Array) -> tuple[Array, Array]:
    """... of sums over the same number of positions for every answer (ESPO, JustGRPO)."""
    total = jnp.sum(losses, axis=-1) / losses.shape[-1]
    return total, jnp.ones(scored.shape[:-1], losses.dtype)


def spg(lower: Array, upper: Array, advantages: Array, mix: float = 0.5) -> Array:
    """``-A s`` [B] with s the lower bound for A > 0, else ``mix`` upper + (1 - mix) lower.

    Policy gradient: biased; on the toy the upper bound lowers the cosine. Passes: the draws of
    ``surrogates.eubo``, two or more. Source: SPG (arXiv 2510.09541), whose code makes inner steps
    on old answers without a ratio.
    """
    return policy_gradient(
        jnp.where(advantages > 0, lower, mix * upper + (1 - mix) * lower), advantages
    )


def weighted_likelihood(scores: Array, rewards: Array, weight: Array) -> Array:
    """wd1: ``(w- - w+) score`` [P, G], with softmax weights of the rewards and of their negatives.

    In each group; equal rewards give zero, and 0/1 rewards the direction of the policy gradient of
    the same surrogate, up to a factor. ELBO and policy gradient: biased (``surrogates.one_step``).
    Passes: 1, no ratio and no reference. Source: wd1 (arXiv 2507.08838), whose code takes the
    softmax over the micro-batch. ``weight`` as of ``advantages``.
    """
    used = weight > 0
    log_weight = jnp.log(jnp.where(used, weight, 1.0))
    up, down = (
        jax.nn.softmax(jnp.where(used, log_weight + r, jnp.finfo(log_weight.dtype).min), axis=-1)
        for r in (rewards, -rewards)
    )
    return jnp.where(used, (down - up) * scores, 0.0)


def rejection(scores: Array, kept: Array) -> Array:
    """``-score`` [B] of the answers that are kept: fine-tuning on one's own right answers (RAFT).

    Divide by the number kept. ELBO: exact, under any training chain. Policy gradient: biased by the
    surrogate's drift, parallel for an exact likelihood. Passes: 1. Source: arXiv 2304.06767.
    ``kept`` [B] bool such as reward == 1, or :func:`best_of_group`.
    """
    return jnp.where(kept, -scores, 0.0)


def best_of_group(rewards: Array, weight: Array) -> Array:
    """The first of the best answers of each group, [P, G] bool; none of a group without rewards."""
    score = jnp.where(weight > 0, rewards, -jnp.inf)
    best = jax.nn.one_hot(jnp.argmax(score, axis=-1), rewards.shape[-1], dtype=bool)
    return best & (weight > 0)


def kl_k1(new: Array, reference: Array) -> Array:
    """``D = new - reference``: its own gradient is 0 for exact scores, and drift for bounds."""
    return new - jax.lax.stop_gradient(reference)


def kl_k1_score(new: Array, reference: Array) -> Array:
    """``D`` with the score term ``D grad new``: KL(policy | reference) for exact scores.

    For bounds it carries their drift (toy: cosine 0.53). Source: a branch of ESPO's code.
    """
    difference = kl_k1(new, reference)
    return difference + jax.lax.stop_gradient(difference) * (new - jax.lax.stop_gradient(new))


def kl_k2(new: Array, reference: Array) -> Array:
    """``mean(D)^2 / 2`` of estimates [R, B]: the gradient of KL(policy | reference); of bounds too,
    nearly (toy: cosine 0.95), plus half the mask variance of D. Source: ESPO's code.
    """
    return plain(lambda d: jnp.square(d) / 2, kl_k1(new, reference))


def kl_k2_crossfitted(new: Array, reference: Array) -> Array:
    """:func:`kl_k2` from R >= 2 independent estimates [R, B], without the mask variance."""
    return crossfitted(lambda d: jnp.square(d) / 2, kl_k1(new, reference))


def kl_k3(new: Array, reference: Array) -> Array:
    """``exp(-D) - 1 + D``, never negative; its gradient is that of KL(reference | policy), with
    heavy tails under mask noise. Source: d1, DiffuCoder (of tokens).
    """
    difference = kl_k1(new, reference)
    return jnp.expm1(-difference) + difference
