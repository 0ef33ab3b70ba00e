"""Keys and values kept for later passes: a ring buffer of finished tokens, and whole rows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.types import Array


class KeyValues(NamedTuple):
    """Keys (rotated to their position) and values, [N, Q, H, D] or [depth, N, Q, H, D]."""

    keys: Array
    values: Array

    def joined(self, new: "KeyValues") -> "KeyValues":
        """These, then the new tokens' [N, Q, H, D]."""
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), self, new)


class RowKeyValues(NamedTuple):
    """Keys and values of whole rows, of which a pass computes some anew: [..., N, L, H, D].

    ``source`` [..., N, L] int32 is the number of each position among the new tokens, negative for
    those that stay.
    """

    keys: Array
    values: Array
    source: Array

    def joined(self, new: KeyValues) -> KeyValues:
        """The rows [N, L, H, D] with the new ones of [N, Q, H, D] in their places."""
        return KeyValues(*(renew(old, x, self.source) for old, x in zip(self[:2], new)))


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


def renew(rows: Array, new: Array, source: Array) -> Array:
    """Rows [N, L, ...] with ``new[n, source[n, l]]`` of [N, Q, ...] where the source is >= 0."""
    # A gather: CPUs run it in parallel, and a scatter index by index.
    taken = jax.vmap(lambda values, index: values[index])(new, jnp.maximum(source, 0))
    kept = (source < 0).reshape(*source.shape, *(1,) * (rows.ndim - 2))
    return jnp.where(kept, rows, taken.astype(rows.dtype))


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
