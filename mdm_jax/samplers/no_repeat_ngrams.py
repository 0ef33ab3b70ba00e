"""Generation without repeated n-grams, in any order of places."""

from typing import Any

import jax
import jax.numpy as jnp

from mdm_jax.samplers.sampler import Denoise, StepContext
from mdm_jax.samplers.wrappers import DenoiseWrapper
from mdm_jax.typing import Array

_LOWEST = jnp.finfo(jnp.float32).min  # of the mask token, which is no way out either


def no_repeat_ngrams(n: int) -> DenoiseWrapper:
    """Rules out tokens that complete an n-gram which the row shows elsewhere; see ``wrapped``.

    A token at a masked place may complete an n-gram with visible ones to its left, its right or
    both; it is ruled out if another n visible tokens in a row, given or generated, then read the
    same. Where that would leave no token, all stay as they are. Samplers that fill one place at a
    time therefore never repeat an n-gram except in that case; tokens revealed in the same step do
    not see each other and may. In ``sample_blocks`` the row is what is written so far, up to the
    end of the block: tokens given in later blocks may repeat what was generated before them.

    Costs ``n^2 L^2`` comparisons per row and pass, ``n^2 (L' + n) L`` in blocks of L'.

    Args:
        n: length of the n-grams. 1 never uses a token twice.

    Raises:
        ValueError: unless n >= 1.
    """
    if n < 1:
        raise ValueError(f"no_repeat_ngrams needs n >= 1, got {n}")

    def wrapper(context: StepContext, denoise: Denoise) -> Denoise:
        def constrained(
            tokens: Array, logsnr: Array, rows: Array | None = None, **further: Any
        ) -> Array:
            logits = denoise(tokens, logsnr, rows, **further)
            before = context.before
            before = before if before is None or rows is None else before[rows]
            repeats = completes_repeat(tokens, n, context.mask_id, logits.shape[-1], before)
            left = jnp.any(~repeats & (logits > _LOWEST), axis=-1, keepdims=True)
            return jnp.where(repeats & left, -jnp.inf, logits)

        return constrained

    return wrapper


def completes_repeat(
    tokens: Array, n: int, mask_id: int, vocab_size: int, before: Array | None = None
) -> Array:
    """[B, L, K] bool: whether a token at a masked place would complete an n-gram seen elsewhere.

    Args:
        tokens: [B, L] int32.
        n: length of the n-grams.
        mask_id: the mask token.
        vocab_size: K.
        before: [B, P] int32, what stands before the tokens, with the mask token where nothing does;
            its masked places are not looked at.
    """
    past = 0 if before is None else before.shape[-1]
    rows = tokens if before is None else jnp.concatenate([before, tokens], axis=-1)
    if rows.shape[-1] < n:
        return jnp.zeros((*tokens.shape, vocab_size), bool)
    start = jnp.arange(rows.shape[-1] - n + 1)  # of every n-gram
    own = start[max(past - n + 1, 0) :]  # of those that reach the tokens
    shift = start[None, :] - own[:, None]

    def one_row(row: Array) -> Array:
        grams = row[start[:, None] + jnp.arange(n)[None]]  # [W, n], one per start
        seen = grams != mask_id
        mine, mine_seen = grams[own], seen[own]
        found = jnp.zeros((tokens.shape[-1], vocab_size), bool)
        for hole in range(n):
            # [own, W]: the n-gram of each start, with its hole filled, against all the others.
            place = own + hole - past
            same = (~mine_seen[:, hole] & (place >= 0))[:, None] & seen[:, hole][None]
            filler = grams[:, hole]
            for k in range(n):
                if k != hole:
                    plain = (mine[:, k][:, None] == grams[:, k][None]) & seen[:, k][None]
                    # The other n-gram covers the hole, too, and reads the filler there.
                    shared = mine[:, k][:, None] == filler[None]
                    same &= jnp.where(shift == hole - k, shared, plain) & mine_seen[:, k][:, None]
            where = jnp.broadcast_to(jnp.maximum(place, 0)[:, None], same.shape)
            found = found.at[where, jnp.broadcast_to(filler[None], same.shape)].max(same)
        return found

    return jax.vmap(one_row)(rows)
