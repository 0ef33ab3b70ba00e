"""Keys and values of tokens that will not change any more, so that nobody computes them twice."""

from typing import NamedTuple

import jax.numpy as jnp

from mdm_jax.models.masks import cached
from mdm_jax.models.transformer import KeyValues, Transformer, TransformerConfig
from mdm_jax.types import Array, PyTree


class KeyValueCache(NamedTuple):
    """What later tokens may look at: a ring that holds the last M tokens written.

    The token at position p of the row lies in slot p mod M, so the one that leaves the window is
    overwritten by the one that enters. Keys are already rotated to their absolute position.

    Attributes:
        key_values: keys and values [depth, N, M, H, D].
        documents: [N, M] int32 document of each token.
        written: [] int32, tokens written since the beginning.
    """

    key_values: KeyValues
    documents: Array
    written: Array

    @property
    def capacity(self) -> int:
        """M."""
        return self.documents.shape[-1]


def new_cache(config: TransformerConfig, num_rows: int, capacity: int) -> KeyValueCache:
    """An empty cache.

    Args:
        config: of the network.
        num_rows: N.
        capacity: M, how many tokens a later one may look back at.

    Raises:
        ValueError: unless both numbers are positive.
    """
    if num_rows < 1 or capacity < 1:
        raise ValueError(f"a cache needs at least one row and slot, got {num_rows} and {capacity}")
    shape = (config.depth, num_rows, capacity, config.num_heads, config.width // config.num_heads)
    keys, values = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    documents = jnp.zeros((num_rows, capacity), jnp.int32)
    return KeyValueCache(KeyValues(keys, values), documents, jnp.zeros((), jnp.int32))


def cached_positions(cache: KeyValueCache) -> Array:
    """[M] int32, position in the row of the token in each slot; negative where none is."""
    last = cache.written - 1
    return last - (last - jnp.arange(cache.capacity)) % cache.capacity


def append(cache: KeyValueCache, new: KeyValues, documents: Array) -> KeyValueCache:
    """Writes the tokens that come next in every row; the oldest make way once the ring is full.

    Args:
        cache: of what stands before.
        new: keys and values [depth, N, Q, H, D], rotated to the positions from ``cache.written``.
        documents: [N, Q] int32.
    """
    count = documents.shape[-1]
    kept = min(count, cache.capacity)
    slots = (cache.written + count - kept + jnp.arange(kept)) % cache.capacity

    def write(old: Array, values: Array) -> Array:
        latest = values[:, :, count - kept :].astype(old.dtype)
        return old.at[:, :, slots].set(latest, unique_indices=True)

    return KeyValueCache(
        KeyValues(*map(write, cache.key_values, new)),
        cache.documents.at[:, slots].set(documents[:, count - kept :], unique_indices=True),
        cache.written + count,
    )


def take_rows(cache: KeyValueCache, rows: Array) -> KeyValueCache:
    """The cache of rows [N'] of its own, in that order; a row may occur several times."""
    key_values = KeyValues(*(leaf[:, rows] for leaf in cache.key_values))
    return KeyValueCache(key_values, cache.documents[rows], cache.written)


def attend_with_cache(
    model: Transformer,
    params: PyTree,
    cache: KeyValueCache,
    tokens: Array,
    logsnr: Array | None,
    documents: Array,
    block_size: int,
    window: int | None,
    estimate: Array | None = None,
) -> tuple[Array, KeyValues]:
    """Runs the tokens that come next, block-causally, over the cache and themselves.

    Args:
        model: the network.
        params: its parameters.
        cache: of what stands before; it must reach back as far as the window does.
        tokens: [N, Q] int32.
        logsnr: [N, S] noise levels, or None.
        documents: [N, Q] int32 document numbers, 0 for padding.
        block_size: L'.
        window: blocks to look at, the own one included; None for all.
        estimate: [N, Q, K] for a network with self_conditioning, or None.

    Returns:
        Logits [N, Q, K] and the keys and values of the tokens, to be appended once they are final.
    """
    positions = cache.written + jnp.arange(tokens.shape[-1])
    keys = jnp.concatenate([cached_positions(cache), positions])
    key_documents = jnp.concatenate([cache.documents, documents], axis=-1)
    mask = cached(positions, keys, documents, key_documents, block_size, window)
    options = {"cached": cache.key_values, "estimate": estimate, "method": "attend"}
    return model.apply(params, tokens, logsnr, positions, mask, **options)
