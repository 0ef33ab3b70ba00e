"""Ring-buffer KV cache for finished tokens."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from mdm_jax.types import Array


class KeyValues(NamedTuple):
    """Keys (rotated to their position) and values, [N, Q, H, D] or [depth, N, Q, H, D]."""

    keys: Array
    values: Array


class KeyValueCache(NamedTuple):
    """A ring buffer of the last M tokens: position p is in slot p mod M.

    ``key_values`` [depth, N, M, H, D] hold keys rotated to absolute positions, ``documents`` [N, M]
    int32 those of each token, ``written`` [] the number of tokens so far.
    """

    key_values: KeyValues
    documents: Array
    written: Array

    @property
    def capacity(self) -> int:
        return self.documents.shape[-1]


def new_cache(config: Any, num_rows: int, capacity: int) -> KeyValueCache:
    """An empty cache of N rows and M slots for a ``TransformerConfig``."""
    if num_rows < 1 or capacity < 1:
        raise ValueError(f"a cache needs at least one row and slot, got {num_rows} and {capacity}")
    shape = (config.depth, num_rows, capacity, config.kv_heads, config.head_size)
    keys, values = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    documents = jnp.zeros((num_rows, capacity), jnp.int32)
    return KeyValueCache(KeyValues(keys, values), documents, jnp.zeros((), jnp.int32))


def cached_positions(cache: KeyValueCache) -> Array:
    """[M] int32 position in the row of each slot's token; negative for an empty slot."""
    last = cache.written - 1
    return last - (last - jnp.arange(cache.capacity)) % cache.capacity


def append(cache: KeyValueCache, new: KeyValues, documents: Array) -> KeyValueCache:
    """Write the next tokens of every row, keys rotated; in a full ring they replace the oldest."""
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
    """The cache of rows [N'] in that order; a row may occur several times."""
    key_values = KeyValues(*(leaf[:, rows] for leaf in cache.key_values))
    return KeyValueCache(key_values, cache.documents[rows], cache.written)
