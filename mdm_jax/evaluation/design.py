"""Which tokens the likelihood estimator masks: an even spread of counts along one permutation.

Of a row with n eligible tokens, view j of F masks

    k_j = 1 + (k_0 - 1 + floor(j n / F)) mod n

with k_0 uniform on {1..n}. In integer arithmetic every k_j is exactly uniform (a lattice formed in
floating point and rounded half to even is not), and the F counts lie evenly over the noise levels.
The masked tokens are those whose rank in a random permutation, rotated by floor(j n / F), is below
k_j: a uniform subset of that size.
"""

import jax
import jax.numpy as jnp

from mdm_jax.corruption import noise_ranks
from mdm_jax.draws import open_uniform
from mdm_jax.streams import stream
from mdm_jax.typing import Array


def row_keys(key: Array, first_row: Array | int, num_rows: int, replicate: Array | int) -> Array:
    """[B] typed keys: functions of the key, the row's number in the stream and the replicate."""
    rows = first_row + jnp.arange(num_rows)
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), replicate))(rows)


def pass_masks(keys: Array, eligible: Array, view: Array | int, passes: int) -> tuple[Array, Array]:
    """What view j of one replicate masks: (mask [B, L] bool, count k_j [B] int32).

    Args:
        keys: [B] typed keys, the same for every view of a replicate.
        eligible: [B, L] bool; a row without eligible elements masks nothing.
        view: j in {0..passes-1}, may be traced.
        passes: F.
    """
    lap = view_lap(jnp.sum(eligible, axis=-1), view, passes)
    first_count, ranks = draw_design(keys, eligible, lap)
    return view_mask(first_count, ranks, eligible, view, passes)


def draw_design(keys: Array, eligible: Array, lap: Array) -> tuple[Array, Array]:
    """Randomness of one replicate: ``k_0`` [B] uniform on {1..n} and ranks [B, L] of a permutation.

    Args:
        keys: [B] typed keys, the same for every view of a replicate.
        eligible: [B, L] bool.
        lap: [B] number of the permutation; see :func:`view_lap`.
    """
    num_eligible = jnp.maximum(jnp.sum(eligible, axis=-1), 1)

    def draw(key: Array, n: Array, which: Array) -> tuple[Array, Array]:
        order = jax.random.fold_in(stream(key, "order"), which)
        count = jax.random.randint(stream(key, "count"), (), 1, n + 1)
        return count, open_uniform(order, eligible.shape[-1:])

    first_count, noise = jax.vmap(draw)(keys, num_eligible, lap)
    return first_count, noise_ranks(noise, eligible)


def view_mask(
    first_count: Array, ranks: Array, eligible: Array, view: Array | int, passes: int
) -> tuple[Array, Array]:
    """What view j masks: (mask [B, L] bool, count k_j [B] int32).

    Args:
        first_count: [B] k_0 in {1..n}.
        ranks: [B, L] rank of each eligible element in the row's permutation.
        eligible: [B, L] bool; a row without eligible elements masks nothing.
        view: j in {0..passes-1}, may be traced.
        passes: F.
    """
    num_eligible = jnp.maximum(jnp.sum(eligible, axis=-1), 1)
    offset = view * num_eligible // passes
    count = 1 + (first_count - 1 + offset) % num_eligible
    rank = (ranks - offset[:, None]) % num_eligible[:, None]
    return eligible & (rank < count[:, None]), count


def view_lap(num_eligible: Array, view: Array | int, passes: int) -> Array:
    """[B] number of earlier views with the same count as view j; zero wherever F <= n.

    With more passes than tokens several views share a count. Each takes a permutation of its own:
    with the same one they would be the same forward pass.
    """
    num_eligible = jnp.maximum(num_eligible, 1)
    offset = view * num_eligible // passes
    first_view = (offset * passes + num_eligible - 1) // num_eligible
    return view - first_view


def logsnr_of_count(count: Array, num_eligible: Array) -> Array:
    """logSNR of the masking rate (k - 1/2) / n, float32.

    Training with fixed counts masks k tokens at the rates from (k - 1) / n to k / n; this is the
    level in their middle, finite at both ends.
    """
    kept = jnp.maximum(num_eligible, 1) - count
    return (jnp.log(kept + 0.5) - jnp.log(count - 0.5)).astype(jnp.float32)
