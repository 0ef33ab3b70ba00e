"""Scores of answers from explicitly masked views: traces, orders, and the surrogates of papers.

A surrogate chooses which tokens the network does not see and how much each log-probability counts,
as a deterministic function of a draw (:class:`Views`): ``value = sum_w sum_i weight log p(y_i |
tokens not hidden)``. All read the masked process; others have :mod:`mdm_jax.alignment.bounds`.
Tokens after the end of an answer are hidden in every view (``rollout.hide_tail``).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.masked import count_at_rate, noise_ranks
from mdm_jax.draws import Draw
from mdm_jax.likelihood.estimators import logsnr_of_count
from mdm_jax.models.cross_entropy import token_nats
from mdm_jax.objectives.objective import call_model
from mdm_jax.types import Array, Batch, ModelFn


class Views(NamedTuple):
    """W masked inputs of each of V draws of B rows, and the weights of their log-probabilities.

    Attributes:
        hidden: [W, V, B, L] bool, tokens that the network gets as the mask token.
        weight: [W, V, B, L] factor on log p of each token; 0: not scored.
    """

    hidden: Array
    weight: Array


Surrogate = Callable[[Draw, Batch], Views]
"""``surrogate(draw, batch) -> Views`` from ``draw.u`` [V, B, 1] and ``draw.noise`` [V, B, L]."""


def token_scores(model_fn: ModelFn, batch: Batch, views: Views, mask_id: int) -> Array:
    """log p of every scored token, nats [W, V, B, L], 0 elsewhere; [M, ...] of M ``networks``.

    One forward pass of W V B rows; the level is that of the number of hidden eligible tokens.
    """
    shape = views.hidden.shape
    hidden, where = (a.reshape(-1, *shape[2:]) for a in (views.hidden, views.weight != 0))
    tokens, eligible = jnp.asarray(batch.tokens)[None], jnp.asarray(batch.eligible)[None]
    masked = jnp.maximum(jnp.sum(hidden & eligible, axis=-1, keepdims=True), 1)
    logsnr = logsnr_of_count(masked, jnp.sum(eligible, axis=-1, keepdims=True))

    def loss(outputs: Array, targets: Array, where: Array) -> Array:
        return token_nats(outputs, targets, where, mask_id)

    inputs = jnp.where(hidden, mask_id, tokens)
    nats = call_model(model_fn, inputs, logsnr, batch.documents, loss, (tokens, where))
    return -nats.reshape(*nats.shape[:-3], *shape)


def weighted_tokens(scores: Array, views: Views) -> Array:
    """Each token's share of the surrogate, [..., V, B, L], for ratios token by token."""
    return jnp.sum(jnp.broadcast_to(views.weight, scores.shape) * scores, axis=-4)


def surrogate_values(
    model_fn: ModelFn, batch: Batch, draw: Draw, surrogate: Surrogate, mask_id: int
) -> Array:
    """The surrogate of log p(answer | prompt), nats [V, B], or [M, V, B] of M ``networks``."""
    views = surrogate(draw, batch)
    return jnp.sum(weighted_tokens(token_scores(model_fn, batch, views, mask_id), views), axis=-1)


def fixed_counts(draw: Draw, batch: Batch) -> Views:
    """``(n/k) sum_M log p`` with k uniform on 1..n of n eligible tokens: the bound of fixed counts.

    ELBO: exact. Policy gradient: biased. Passes: 1. The same as the bound of ``fixed_count``, with
    the tokens kept apart, for :func:`eubo`.
    """
    eligible = jnp.asarray(batch.eligible)[None]
    count = jnp.sum(eligible, axis=-1, keepdims=True)
    masked = count_at_rate(draw.u, count)
    hidden = eligible & (noise_ranks(draw.noise, eligible) < masked)
    return _one_view(hidden, count / masked)


def complementary(draw: Draw, batch: Batch) -> Views:
    """A mask and its complement: ``1/2 [(n+1)/k sum_M + (n+1)/(n-k) sum_rest]``, k uniform on 0..n.

    ELBO: exact; its weights do not add up to a constant (k = 0 and n), which MIRROR's do. Policy
    gradient: biased. Passes: 2. Source: ESPO (arXiv 2512.03759); its code stratifies the levels
    over rows with rounded offsets, which alone would be biased: the complement visits the rest.
    """
    eligible = jnp.asarray(batch.eligible)[None]
    count = jnp.sum(eligible, axis=-1, keepdims=True)
    masked = jnp.minimum(jnp.floor(draw.u * (count + 1)).astype(jnp.int32), count)
    first = eligible & (noise_ranks(draw.noise, eligible) < masked)
    hidden = jnp.stack([first, eligible & ~first])
    sizes = jnp.stack([masked, count - masked])
    weight = jnp.where(sizes > 0, (count + 1)[None] / (2 * jnp.maximum(sizes, 1)), 0.0)
    return Views(hidden, jnp.where(hidden, weight, 0.0))


def coupled(draw: Draw, batch: Batch, low: float = 0.2, high: float = 0.8) -> Views:
    """DiffuCoder's triple: everything masked, a mask at the rate r, and its complement.

    ``1/2 [log p given nothing + (1/r) log p in the view that masks the token, or 1/(1-r) in the
    other]``, r uniform on (low, high). ELBO: biased, total weight 1.5 instead of 1, a third of it
    on the full mask. Policy gradient: biased. Passes: 3. Source: arXiv 2506.20639. The released
    code has one rate per micro-batch and leaves the tokens after the end visible.
    """
    return _coupled(draw, batch, low, high, lambda rate: 1 / rate)


def coupled_unweighted(draw: Draw, batch: Batch, low: float = 0.2, high: float = 0.8) -> Views:
    """:func:`coupled` without the weights 1/r, of total weight 1. ELBO: biased."""
    return _coupled(draw, batch, low, high, jnp.ones_like)


def _coupled(draw: Draw, batch: Batch, low: float, high: float, weight: Callable) -> Views:
    eligible = jnp.asarray(batch.eligible)[None]
    rate = low + (high - low) * draw.u
    first = eligible & (draw.noise < rate)
    every = jnp.broadcast_to(eligible, first.shape)
    hidden = jnp.stack([every, first, eligible & ~first])
    factors = jnp.stack([jnp.ones_like(rate), weight(rate), weight(1 - rate)]) / 2
    return Views(hidden, jnp.where(hidden, factors, 0.0))


def mean_over_masked(draw: Draw, batch: Batch, low: float = 0.0, high: float = 1.0) -> Views:
    """n times the mean of log p over the masked tokens, at a rate uniform on (low, high).

    For (0, 1) the expectation is the bound times n/(n+1): "proportional"; truncated ranges are
    biased. Policy gradient: biased. Passes: 1. Source: UniGRPO (arXiv 2505.15809).
    """
    eligible = jnp.asarray(batch.eligible)[None]
    hidden = eligible & (draw.noise < low + (high - low) * draw.u)
    masked = jnp.maximum(jnp.sum(hidden, axis=-1, keepdims=True), 1)
    return _one_view(hidden, jnp.sum(eligible, axis=-1, keepdims=True) / masked)


def one_step(draw: Draw, batch: Batch, hide_prompt: float = 0.15) -> Views:
    """All of the answer masked at once: the log-probability of the one-step parallel sampler.

    Prompt tokens are hidden with probability ``hide_prompt``, by the draw's noise. ELBO: biased,
    above log p or below the bound. Policy gradient: biased. Passes: 1. Source: diffu-GRPO (d1,
    arXiv 2504.12216), also wd1 (arXiv 2507.08838), whose code draws the hidden prompt tokens from
    a seed by micro-batch, so that fewer masks are used than inner steps are made.
    """
    eligible = jnp.asarray(batch.eligible)[None]
    prompt = ~eligible & (jnp.asarray(batch.documents)[None] > 0)
    hidden = eligible | (prompt & (draw.noise < hide_prompt))
    return Views(
        hidden[None], jnp.broadcast_to(eligible.astype(draw.noise.dtype), hidden[None].shape)
    )


def quadrature(draw: Draw, batch: Batch, nodes: int = 2) -> Views:
    """Gauss-Legendre over the masking rate: ``sum_j (w_j / r_j) sum_M log p``, one mask per rate.

    View v of the draw serves node ``v % nodes``; the level is not read. ELBO: exact where ``2 nodes
    >= n``, else biased with either sign. Policy gradient: biased. Passes: ``nodes``. Source: GDPO
    (arXiv 2510.08554, whose code was not found). For short answers two draws of
    :func:`fixed_counts` have less variance. ValueError unless ``nodes`` divides the views.
    """
    views, rows, length = draw.noise.shape
    if nodes < 1 or views % nodes:
        raise ValueError(f"quadrature needs {nodes} views for its nodes, or multiples; got {views}")
    points, weights = np.polynomial.legendre.leggauss(nodes)
    rate = jnp.asarray((1 + points) / 2, draw.noise.dtype).reshape(-1, 1, 1, 1)
    weight = jnp.asarray(weights / 2, draw.noise.dtype).reshape(-1, 1, 1, 1)
    noise = draw.noise.reshape(-1, nodes, rows, length).swapaxes(0, 1)
    hidden = jnp.asarray(batch.eligible)[None, None] & (noise < rate)
    return Views(hidden, jnp.where(hidden, weight / rate, 0.0))


def eubo(scores: Array, views: Views, count: Array, power: float = 1.5) -> Array:
    """SPG's evidence "upper bound" of the answers, nats [..., B], from m draws of one view each.

    Per token ``(1/b) log mean_m [weight p^b]``, b = ``power`` >= 1, over the draws; the mean over
    tokens that some draw masks, times ``count`` [B], the eligible ones. Without the paper's
    constant, as in its code, it is not always above log p; for m = 1 its gradient is the bound's
    (take two draws or more). Policy gradient: biased. Source: SPG (arXiv 2510.09541), whose code
    computes a block mask and does not apply it.

    Args:
        scores, views: of :func:`token_scores` and :func:`fixed_counts`, [..., 1, m, B, L].
    """
    scores = scores[..., 0, :, :, :]
    weight = jnp.broadcast_to(views.weight[0], scores.shape)
    used = weight > 0
    terms = jnp.where(used, jnp.log(jnp.where(used, weight, 1.0)) + power * scores, -jnp.inf)
    seen = jnp.any(used, axis=-3, keepdims=True)
    terms = jnp.where(seen, terms, 0.0)  # no gradient of a log of zero
    bound = (jax.nn.logsumexp(terms, axis=-3) - jnp.log(scores.shape[-3])) / power
    seen = seen[..., 0, :, :]
    share = jnp.broadcast_to(count, bound.shape[:-1]) / jnp.maximum(jnp.sum(seen, axis=-1), 1)
    return share * jnp.sum(jnp.where(seen, bound, 0.0), axis=-1)


def trace(steps: Array) -> Surrogate:
    """log p of answer *and* recorded order, all steps: the policy gradient's only exact score.

    ``steps`` [B, L] int32: the step in which the sampler wrote a token, -1 for given ones. Step s
    sees what was written before and scores what was written then; each is a pass. Policy gradient:
    exact for samplers whose order does not depend on the network (:data:`FREE_ORDERS`), with the
    sampler's temperature (``bounds.at_temperature``) and the whole canvas scored; else biased. The
    draw is not read. Passes: the most steps that L tokens can take, L. Source: AGRPO (arXiv
    2510.04019), which divides by each answer's own number of steps.
    """

    def surrogate(draw: Draw, batch: Batch) -> Views:
        del draw
        every = jnp.arange(steps.shape[-1])[:, None, None, None]
        return _at_steps(steps, every, batch, jnp.ones(every.shape))

    return surrogate


def sampled_trace(steps: Array) -> Surrogate:
    """:func:`trace` by one step of each answer, drawn by ``u``, times their number: still exact.

    Passes: 1 for each view. ``steps`` are numbered 0 to S - 1 without gaps (``rollout`` sees to
    it); S is each row's own.
    """

    def surrogate(draw: Draw, batch: Batch) -> Views:
        number = jnp.max(steps, axis=-1)[None, :, None] + 1
        chosen = jnp.minimum(jnp.floor(draw.u * number).astype(jnp.int32), number - 1)
        return _at_steps(steps, chosen[None], batch, number[None])

    return surrogate


FREE_ORDERS = ("ancestral", "cached_ancestral", "first_hitting", "random_remasking")
"""Samplers whose order of writing does not depend on the network's outputs, so that a trace gives
the exact policy gradient of what they write; those by confidence, margin or entropy choose by an
argmax of them. ``random_remasking`` in blocks of one token writes from left to right, as JustGRPO
(arXiv 2601.15165) does."""


def left_to_right(batch: Batch) -> Array:
    """Steps [B, L] of writing the eligible tokens from left to right, one at a time."""
    eligible = jnp.asarray(batch.eligible)
    return jnp.where(eligible, jnp.cumsum(eligible, axis=-1) - 1, -1)


def iw_orders(values: Array) -> Array:
    """log of the mean over Q orders of exp(log p of answer and order), [Q, B] -> [B].

    Between the bound (Q = 1) and log p (Q to infinity) on average. Passes: Q n.
    """
    return jax.nn.logsumexp(values, axis=0) - jnp.log(values.shape[0])


def _one_view(hidden: Array, weight: Array) -> Views:
    return Views(hidden[None], jnp.where(hidden, weight, 0.0)[None])


def _at_steps(steps: Array, chosen: Array, batch: Batch, weight: Array) -> Views:
    """Views at the ``chosen`` steps [W, V, B or 1, 1]."""
    steps, eligible = jnp.asarray(steps)[None, None], jnp.asarray(batch.eligible)[None, None]
    scored = eligible & (steps == chosen)
    return Views(eligible & (steps >= chosen), jnp.where(scored, weight, 0.0))
