"""Random keys as a function of (seed, step, name), never part of a state.

So a resumed run draws what the uninterrupted one would have drawn, and switching one random part on
or off leaves the others' numbers unchanged.
"""

import zlib

import jax

from mdm_jax.types import Array, ArrayLike


def step_key(seed: ArrayLike, step: ArrayLike) -> Array:
    """Typed key of one training step.

    Args:
        seed: non-negative integer below 2**32; traced, as uint32, it gives the same key.
        step: scalar integer, may be traced.

    Raises:
        ValueError: if the seed is out of range.
    """
    if not isinstance(seed, jax.core.Tracer) and not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    return jax.random.fold_in(jax.random.key(seed), step)


def stream(key: Array, name: str) -> Array:
    """Key of the named stream below ``key``.

    Names are hashed with CRC-32, which is the same in every process; Python's ``hash`` is salted.
    """
    return jax.random.fold_in(key, zlib.crc32(name.encode("utf-8")))
