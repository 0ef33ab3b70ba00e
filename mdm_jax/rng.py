"""Random keys as a function of (seed, step, name), so that resumed runs draw the same numbers."""

import zlib

import jax

from mdm_jax.types import Array, ArrayLike


def step_key(seed: ArrayLike, step: ArrayLike) -> Array:
    """Typed key of a training step; ValueError for a known seed outside [0, 2**32)."""
    if not isinstance(seed, jax.core.Tracer) and not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    return jax.random.fold_in(jax.random.key(seed), step)


def stream(key: Array, name: str) -> Array:
    """Key of the named stream below ``key``: CRC-32 of the name, the same in every process."""
    return jax.random.fold_in(key, zlib.crc32(name.encode("utf-8")))
