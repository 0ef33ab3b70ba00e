"""Logit filters (temperature, top-k, top-p) and a categorical draw that keeps the tail.

A filter maps logits [..., K] to logits with -inf for excluded tokens. It acts on the network's
distribution with the mask token excluded, before positions are selected.
"""

import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Real, Whole, checked, is_concrete
from mdm_jax.types import Array

LogitFilter = Callable[[Array], Array]
"""``filter(logits [..., K]) -> logits [..., K]``."""

_ONE_STAGE = 64
"""Largest vocabulary that is drawn from with one random number per token."""


@checked
def temperature(
    value: Annotated[float, Real("[0, 1e6]", "", "divisor of logits; 0: the most likely token")],
) -> LogitFilter:
    """Divides logits by ``value`` >= 0; 0 keeps the most likely token, of the lowest id on ties."""
    if value == 0:
        return _keep_most_likely
    return lambda logits: logits / value


@checked
def top_k(
    count: Annotated[int, Whole("[1, 2e9]", "tokens", "likely ones kept")],
) -> LogitFilter:
    """Keeps the ``count`` >= 1 most likely tokens (lower ids on ties), or all if fewer."""

    def keep_top(logits: Array) -> Array:
        if count >= logits.shape[-1]:
            return logits
        threshold = jax.lax.top_k(logits, count)[0][..., -1:]
        above, tied = logits > threshold, logits == threshold
        room = count - jnp.sum(above, axis=-1, keepdims=True)
        return _keep(above | (tied & (jnp.cumsum(tied, axis=-1) <= room)), logits)

    return keep_top


@checked
def top_p(
    mass: Annotated[float, Real("(0, 1]", "probability", "least mass of the tokens kept; 1: all")],
) -> LogitFilter:
    """Nucleus (Holtzman et al. 2020): the fewest most likely tokens of mass >= ``mass`` in (0, 1].

    The token that crosses ``mass`` is kept: of (.5, .3, .2) and mass .6 two tokens stay.
    """

    def keep_nucleus(logits: Array) -> Array:
        if mass == 1:
            return logits
        order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
        probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
        first = jnp.zeros_like(probs[..., :1])
        before = jnp.concatenate([first, jnp.cumsum(probs, axis=-1)[..., :-1]], axis=-1)
        rank = jnp.argsort(order, axis=-1)
        return _keep(jnp.take_along_axis(before < mass, rank, axis=-1), logits)

    return keep_nucleus


def compose(*filters: LogitFilter) -> LogitFilter:
    """Filters applied in reading order; without any, the identity."""

    def apply(logits: Array) -> Array:
        for each in filters:
            logits = each(logits)
        return logits

    return apply


def check_random(name: str, token_filter: LogitFilter, vocab_size: int, instead: str) -> None:
    """ValueError for a filter that leaves one of ``vocab_size`` >= 2 near-equal logits."""
    with jax.ensure_compile_time_eval():
        filtered = token_filter(jnp.linspace(0.0, -1e-3, vocab_size))
        left = jnp.sum(filtered > jnp.finfo(jnp.float32).min)
        alone = is_concrete(left) and int(left) < 2
    if alone:
        raise ValueError(
            f"{name} draws from a distribution, but its filter (temperature 0, or top_k of 1) "
            f"leaves a single token; raise the temperature, or use {instead}"
        )


NOT_FINITE = -1
"""In place of a token where a logit is NaN, or all are -inf."""


def check_finite(tokens: np.ndarray, name: str) -> None:
    """Raise ValueError, with the ``name`` of the row or request, where :data:`NOT_FINITE` is."""
    if np.any(tokens == NOT_FINITE):
        raise not_finite(name)


def not_finite(name: str) -> ValueError:
    """The error of a row or request."""
    return ValueError(
        f"{name}: the model's logits are not finite; compute in float32, or take an earlier "
        "checkpoint"
    )


def draw_tokens(keys: Array, logits: Array) -> Array:
    """One token per position from ``softmax(logits [B, ..., K])``, int32 [B, ...]; ``keys`` [B].

    :data:`NOT_FINITE` where there is no distribution.
    """
    flat = logits.reshape(logits.shape[0], -1, logits.shape[-1])
    positions = jnp.broadcast_to(jnp.arange(flat.shape[1])[None], flat.shape[:2])
    return draw_tokens_at(keys, flat, positions).reshape(logits.shape[:-1])


def draw_filtered(
    keys: Array, logits: Array, token_filter: LogitFilter, positions: Array | None = None
) -> Array:
    """:func:`draw_tokens` of filtered logits, at some ``positions`` if given (draw_tokens_at).

    With ``temperature(0)`` without random numbers.
    """
    if token_filter is _keep_most_likely:
        return most_likely(logits)
    if positions is None:
        return draw_tokens(keys, token_filter(logits))
    return draw_tokens_at(keys, token_filter(logits), positions)


def most_likely(logits: Array) -> Array:
    """``argmax`` over the last axis, int32; by two plain reductions, several times faster on CPUs.

    :data:`NOT_FINITE` where a logit is NaN, or all are -inf.
    """
    top = jnp.max(logits, axis=-1, keepdims=True)
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    first = jnp.min(jnp.where(logits == top, token, logits.shape[-1] - 1), axis=-1)
    return jnp.where(top[..., 0] > -jnp.inf, first, NOT_FINITE)


def draw_tokens_at(keys: Array, logits: Array, positions: Array) -> Array:
    """One token at each of some positions [B, C] from ``softmax(logits [B, C, K])``, int32 [B, C].

    Depends on the row's key, the position's number and its logits alone. Above 64 tokens a run of
    about sqrt(K) tokens is drawn by its total mass, then a token of it: the same law for 2 sqrt(K)
    random numbers. Gumbel noise of high range reaches tokens of probability 1e-14; the default
    float32 noise is cut off near 16 and never produces those below 1e-7.
    """
    choose = _draw_in_two_stages if logits.shape[-1] > _ONE_STAGE else _draw

    def row(key: Array, numbers: Array, values: Array) -> Array:
        own = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
        known = jnp.max(values, axis=-1) > -jnp.inf  # False for NaN
        return jnp.where(known, jax.vmap(choose)(own, values), NOT_FINITE)

    return jax.vmap(row)(keys, positions, logits)


def _draw(key: Array, logits: Array) -> Array:
    return jax.random.categorical(key, logits, axis=-1, mode="high").astype(jnp.int32)


def _draw_in_two_stages(key: Array, logits: Array) -> Array:
    size = math.isqrt(logits.shape[-1] - 1) + 1
    runs = jnp.pad(logits, (0, -logits.shape[-1] % size), constant_values=-jnp.inf)
    runs = runs.reshape(-1, size)
    masses = jnp.sum(jnp.exp(runs - jnp.max(logits)), axis=-1)
    first, second = jax.random.split(key)
    run = _draw(first, jnp.log(masses))
    return run * size + _draw(second, runs[run])


def _keep_most_likely(logits: Array) -> Array:
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return _keep(token == most_likely(logits)[..., None], logits)


def _keep(kept: Array, logits: Array) -> Array:
    return jnp.where(kept, logits, -jnp.inf)
