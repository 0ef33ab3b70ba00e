"""Random keys as a function of (seed, step, name), so that resumed runs draw the same numbers."""

import functools
import hashlib
import zlib
from collections.abc import Sequence

import jax
import numpy as np

from mdm_jax.types import Array, ArrayLike


def step_key(seed: ArrayLike, step: ArrayLike) -> Array:
    """Typed key of a training step; ValueError for a known seed outside [0, 2**32)."""
    if not isinstance(seed, jax.core.Tracer) and not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    return jax.random.fold_in(jax.random.key(seed), step)


def stream(key: Array, name: str) -> Array:
    """Key of the named stream below ``key``: CRC-32 of the name, the same in every process."""
    return jax.random.fold_in(key, _number(name))


def streams(key: Array, names: Sequence[str]) -> Array:
    """Keys [N] of :func:`stream`, in one operation, which compiles sooner than many."""
    numbers = np.array([_number(name) for name in names], np.uint32)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)


def _number(name: str) -> int:
    return zlib.crc32(name.encode("utf-8"))


def content_words(seed: int, number: int, ids: np.ndarray) -> np.ndarray:
    """[2] uint32 from the SHA-256 of numbers and token ids: a key's data."""
    digest = hashlib.sha256(f"{seed} {number} ".encode() + np.asarray(ids, "<i4").tobytes())
    return np.frombuffer(digest.digest()[:8], "<u4").astype(np.uint32)
