"""Which places of a row see which, by their index alone: the static part of an attention rule.

A pattern is hashable and compares by its numbers; jit sees it as part of the structure of a rule.
``sees(queries, keys)`` takes integer arrays of numpy or of JAX that broadcast against each other.
"""

import dataclasses

import jax
import numpy as np

from mdm_jax.typing import Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Everything:
    """Every query sees every key.

    Attributes:
        shape: numbers of queries and keys.
    """

    shape: tuple[int, int]

    def sees(self, queries: Array, keys: Array) -> np.ndarray:
        """True everywhere."""
        return np.ones(np.broadcast_shapes(queries.shape, keys.shape), bool)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockCausal:
    """A place sees its own block and the blocks before it.

    Attributes:
        length: L.
        block_size: L'.
        window: number of blocks to look at, the own one included; None for all.
    """

    length: int
    block_size: int
    window: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys, [L, L]."""
        return self.length, self.length

    def sees(self, queries: Array, keys: Array) -> Array:
        """Bool, whether a query sees a key."""
        distance = queries // self.block_size - keys // self.block_size
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockTraining:
    """Noised blocks see themselves and earlier clean ones, clean blocks the clean ones up to them.

    Attributes:
        length: L; the first L of 2L places are the noised row, the other L the clean one.
        block_size: L'.
        window: number of blocks to look at, the own one included; None for all.
    """

    length: int
    block_size: int
    window: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys, [2L, 2L]."""
        return 2 * self.length, 2 * self.length

    def sees(self, queries: Array, keys: Array) -> Array:
        """Bool, whether a query sees a key."""
        from_clean, to_clean = queries >= self.length, keys >= self.length
        row, size = self.length, self.block_size
        distance = queries % row // size - keys % row // size
        near = distance < (row if self.window is None else self.window)
        itself = ~from_clean & ~to_clean & (distance == 0)
        earlier = ~from_clean & to_clean & (distance > 0) & near
        history = from_clean & to_clean & (distance >= 0) & near
        return itself | earlier | history


Pattern = Everything | BlockCausal | BlockTraining


def check_blocks(length: int, block_size: int, window: int | None = None) -> int:
    """The number of blocks in a row.

    Raises:
        ValueError: if the block size does not divide the length or the window is below 1.
    """
    if block_size < 1 or length < 1 or length % block_size:
        raise ValueError(
            f"blocks of {block_size} tokens do not divide a row of {length} evenly; choose a "
            "divisor of the length, or pad the row to a multiple of the block size"
        )
    if window is not None and window < 1:
        raise ValueError(f"a window must hold at least 1 block (its own), got {window}")
    return length // block_size
